"""`hgc bench` beyond eager rows: modes, fewer steps, peers, files."""

from __future__ import annotations

import math
import sys
import types

import models
import pytest
import torch
from test_compile import small_pipeline

import hgc
from hgc import Config
from hgc.bench import runner as benchmarking
from hgc.planning.config import ConfigError

EXACT = Config.preset("exact")
SHALLOW = Config(name="shallow", num_evaluations=20, key_steps=(0, 10, 19), depth=1)


def bench(pipe, configs, **changes):
    return benchmarking.bench(
        pipe, configs, **{"height": 32, "width": 32, "steps": 2, "repeats": 1, **changes}
    )


def test_modes_are_compared_with_the_uncached_run_of_their_own_and_the_eager_one(tmp_path):
    pipe = small_pipeline()
    before = [dict(module.__dict__) for module in (pipe.unet, pipe.controlnet)]
    found = bench(
        pipe, [EXACT], modes=("compiled",), compile_options={"mode": None, "backend": "eager"}
    )
    rows = {(row.name, row.mode): row for row in found.rows}
    assert list(rows) == [("uncached", "eager"), ("uncached", "compiled"), ("exact", "compiled")]
    exact = rows["exact", "compiled"]
    assert exact.against.mode == "compiled" and exact.against_eager.mode == "eager"
    eager, own = rows["uncached", "eager"].loop.median, exact.loop.median
    assert exact.against_eager.loop == pytest.approx(eager / own)
    assert rows["uncached", "eager"].against is None
    assert exact.peak_bytes is None and exact.launches is None
    assert [dict(m.__dict__) for m in (pipe.unet, pipe.controlnet)] == before
    text = found.to_markdown()
    assert "| exact, 2 steps, compiled |" in text and "batch 1" in text
    found.save_chart(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"
    torch._dynamo.reset()


def test_fused_runs_are_compared_with_the_eager_uncached_one():
    pipe = small_pipeline()
    found = bench(pipe, [SHALLOW], modes=("eager", "fused"))
    rows = [(row.name, row.mode) for row in found.rows]
    assert rows == [("uncached", "eager"), ("shallow", "eager"), ("shallow", "fused")]
    assert found.rows[-1].against.mode == "eager"
    assert "| shallow, 2 steps, fused |" in found.to_markdown()


def test_configurations_share_what_was_compiled():
    """One set of networks a mode: what is of the same kind in two of them is compiled once."""
    pipe = small_pipeline()
    nets = [pipe.controlnet]
    runner = benchmarking._Runner(pipe, nets, {"mode": None, "backend": "eager"})
    found = []
    for config in (EXACT, SHALLOW, EXACT.replace(name="again")):
        variant = benchmarking._Variant(config.name, 4, "compiled", config)
        with runner.state(variant) as installed, torch._dynamo.config.patch(
            error_on_recompile=len(found) == 2
        ):  # fmt: skip
            models.draw(pipe, steps=4)
            found.append(
                (
                    installed._engine.functions.networks,
                    len(installed._engine.functions.networks.kinds),
                )
            )
    networks, counts = zip(*found, strict=True)
    assert networks[0] is networks[1] is networks[2]
    assert counts[0] < counts[1] == counts[2]
    torch._dynamo.reset()


def test_fewer_steps_cost_at_least_as_much_and_batches_are_counted():
    pipe = small_pipeline()
    found = bench(pipe, [SHALLOW], steps=6, fewer_steps=True, images=2)
    full = hgc.count_macs(pipe.unet, pipe.controlnet, "exact", num_evaluations=1, height=32,
                          width=32, images=2).full_evaluation.total  # fmt: skip
    shallow = found.rows[-1]
    count = math.ceil(shallow.macs / full)
    assert [(row.name, row.steps) for row in found.rows] == [
        ("uncached", 6), ("uncached", count), ("shallow", 6),
    ]  # fmt: skip
    assert 1 < count < 6 and found.rows[1].macs == count * full >= shallow.macs
    assert found.about["images"] == 2


def test_what_was_measured_is_handed_over_after_every_round():
    pipe, rounds = small_pipeline(), []

    def stop(found):
        rounds.append(found)
        if len(rounds) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(pipe, [EXACT], repeats=5, on_round=stop)
    assert [found.about["repeats"] for found in rounds] == [1, 2]
    assert [len(row.loop.samples) for row in rounds[1].rows] == [2, 2]
    assert rounds[1].rows[1].against.loop > 0
    assert "UniPCMultistepScheduler" in rounds[0].to_markdown()


def test_deepcache_is_a_row_where_it_is_installed(monkeypatch):
    calls = []

    class Helper:
        def __init__(self, pipe):
            calls.append("made")

        def set_params(self, **params):
            calls.append(params)

        def enable(self):
            calls.append("enabled")

        def disable(self):
            calls.append("disabled")

    monkeypatch.setitem(sys.modules, "DeepCache", types.SimpleNamespace(DeepCacheSDHelper=Helper))
    found = bench(models.sd15_pipeline(), [], peers=("deepcache-3",))
    row = found.rows[-1]
    assert row.name == "DeepCache, interval 3" and row.macs is None
    assert row.against.promised is None and row.against.arrived is None and row.against.loop > 0
    assert calls == ["made", {"cache_interval": 3, "cache_branch_id": 0}, "enabled", "disabled"]
    assert "DeepCache, interval 3, 2 steps" in found.to_markdown()


def test_wrong_arguments_are_named(monkeypatch):
    pipe = models.sd15_pipeline()
    monkeypatch.setitem(sys.modules, "DeepCache", None)
    for changes, error, message in (
        ({"modes": ("graphs",)}, ValueError, "CUDA graphs need a CUDA device; got 'cpu'"),
        ({"modes": ("captured",)}, ValueError, "CUDA graphs need a CUDA device; got 'cpu'"),
        (
            {"modes": ("fast",)},
            ValueError,
            "modes must be some of eager, fused, captured, fused-captured, compiled, graphs",
        ),
        ({"modes": ()}, ValueError, "modes must be"),
        (
            {"modes": ("fused",), "configs": [EXACT]},
            ValueError,
            "modes: exact is exact, and fused norms round otherwise",
        ),
        ({"images": 0}, ValueError, "images must be at least 1"),
        ({"peers": ("tgate",)}, ValueError, "peers must be some of deepcache-2"),
        ({"peers": ("deepcache-3",)}, ConfigError, r"hybrid-grained-cache\[peers\]"),
    ):
        with pytest.raises(error, match=message):
            bench(pipe, **{"configs": [], **changes})
