"""The evaluation: measures against values worked out by hand, resuming, tables and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math

import models
import numpy as np
import pytest
import torch

import hgc
from hgc import benchmarking
from hgc.config import Config, ConfigError, StepPlan
from hgc.evaluation import candidates as all_candidates
from hgc.evaluation import measure, metrics, peers, record, tables
from hgc.evaluation.candidate import Candidate, equal_steps, macs_here, steps_of
from hgc.evaluation.models import sd15_macs

for name in ("transformers", "PIL", "skimage", "torchmetrics"):
    pytest.importorskip(name)

from hgc import testbed  # noqa: E402

SHALLOW = StepPlan(control="reuse", depth=1, guidance="reuse")
QUICK = Config(name="quick", num_evaluations=4, steps=(StepPlan(), SHALLOW, SHALLOW, StepPlan()))
ROWS = [
    Candidate("uncached", None, 4),
    Candidate("exact", Config.preset("exact"), 4),
    Candidate("quick", QUICK, 4),
]
SETTINGS = measure.Settings(scenes=3, steps=4, batch=2)
_TIMES = {"seconds": 0.0, "speedup": 0.0}


def _untimed(rows):
    return [dataclasses.replace(row, **_TIMES) for row in rows]


# Measures


def test_relative_l2_is_the_norm_of_the_difference_over_that_of_the_reference():
    reference = np.zeros((3, 1, 2, 1), np.float32)
    reference[0, 0, :, 0] = (0.6, 0.8)
    images = reference.copy()
    images[0, 0, :, 0] = (0.6, 0.3)
    images[2] = 0.5
    distance = metrics.relative_l2(images, reference)
    assert distance[0] == pytest.approx(0.5)
    assert distance[1] == 0.0
    assert math.isinf(distance[2])


def test_relative_l2_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        metrics.relative_l2(np.zeros((1, 2, 2, 3)), np.zeros((1, 4, 4, 3)))


@pytest.mark.parametrize(
    ("count", "higher", "lower"), [(40, 38.5, 0.5), (20, 19.0, 0.0), (21, 19.5, 0.5), (3, 2.0, 0.0)]
)
def test_worst_share_is_the_mean_of_the_worst_twentieth(count, higher, lower):
    values = np.random.default_rng(0).permutation(count).astype(float)
    assert metrics.worst_share(values, higher_is_worse=True) == higher
    assert metrics.worst_share(values, higher_is_worse=False) == lower


def test_corpus_iou_by_hand_and_as_the_testbed_has_it():
    matrix = np.array([[3, 1, 0], [1, 3, 0], [0, 0, 0]])
    # 3 / (3 + 1 + 1) for both classes that occur
    assert metrics.corpus_iou(matrix) == pytest.approx(0.6)
    from hgc.testbed import judges

    random = np.random.default_rng(1).integers(0, 50, (4, 10, 10))
    random[2, 3] = 0
    for one, found in zip(random, metrics.corpus_iou(random), strict=True):
        assert found == pytest.approx(judges.corpus_iou(one))


def test_relative_loss_has_the_same_sense_for_errors_and_scores():
    assert metrics.relative_loss(0.72, 0.8) == pytest.approx(0.1)
    assert metrics.relative_loss(0.88, 0.8) == pytest.approx(-0.1)
    assert metrics.relative_loss(-0.11, -0.10) == pytest.approx(0.1)


def test_loss_interval_of_paired_scenes():
    reference = np.linspace(0.5, 0.9, 30)
    assert metrics.loss_interval(reference, reference) == (0.0, 0.0, 0.0)
    # every scene loses a tenth: pairing leaves nothing to chance
    assert metrics.loss_interval(0.9 * reference, reference) == pytest.approx((0.1, 0.1, 0.1))
    noisy = reference - np.random.default_rng(2).normal(0.02, 0.05, 30)
    loss, low, high = metrics.loss_interval(noisy, reference)
    assert low < loss < high
    assert loss == pytest.approx(1 - noisy.mean() / reference.mean())
    error = (noisy - reference).std(ddof=1) / math.sqrt(30) / reference.mean()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert metrics.loss_interval(noisy, reference) == (loss, low, high)


def test_loss_of_segmentation_is_of_the_summed_confusion():
    right = np.array([[[4, 0], [0, 4]], [[8, 0], [0, 0]]])
    wrong = np.array([[[4, 0], [4, 0]], [[8, 0], [0, 0]]])
    scores = np.array([0.0, 0.0])  # not read
    loss, low, high = metrics.loss_interval(
        scores, scores, confusion=wrong, reference_confusion=right
    )
    # classes: 12 / 16 and 0 / 4, against 1 and 1
    assert loss == pytest.approx(1 - (0.75 + 0.0) / 2)
    assert low <= loss <= high


# Rows


def test_candidates_put_the_uncached_run_first_and_fewer_steps_after_their_equals(monkeypatch):
    # what it counts is tested below
    counted = {8: 5, 20: 8}
    monkeypatch.setattr(
        "hgc.evaluation.candidate.equal_steps", lambda config, steps: counted[steps]
    )
    rows = all_candidates(["exact", "turbo", "paper", "fewer-steps", "3-steps", "turbo"])
    assert [row.name for row in rows] == [
        "uncached", "exact", "turbo", "5 steps", "paper", "8 steps", "3 steps",
    ]  # fmt: skip
    assert [row.steps for row in rows] == [20, 20, 8, 5, 20, 8, 3]
    assert rows[3].equal_to == ("turbo",) and rows[3].label == "5 steps (vs turbo)"
    assert rows[1].config is Config.preset("exact") and rows[0].config is None


def test_fewer_steps_is_never_given_fewer_macs():
    turbo = Config.preset("turbo")
    count = equal_steps(turbo, turbo.num_evaluations)
    for macs in (macs_here, sd15_macs):
        ours, theirs = macs(turbo, turbo.num_evaluations), macs(None, count)
        assert theirs.total >= ours.total and theirs.paper >= ours.paper
    short = [macs(None, count - 1) for macs in (macs_here, sd15_macs)]
    ours = [macs(turbo, turbo.num_evaluations) for macs in (macs_here, sd15_macs)]
    assert any(s.total < o.total or s.paper < o.paper for s, o in zip(short, ours, strict=True))


def test_candidates_from_files(tmp_path):
    path = tmp_path / "mine.json"
    QUICK.to_json(path)
    rows = all_candidates([str(path)], 20)
    assert rows[1].name == "mine" and rows[1].config == QUICK and rows[1].steps == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [("papre", "paper"), ("0-steps", "at least 1"), ("nowhere.json", "nowhere.json")],
)
def test_a_row_that_is_none_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        all_candidates([name])


@pytest.mark.parametrize("steps", [2, 20, 50])
def test_schedules_of_peers_are_plans_as_they_were_published(steps):
    """Arithmetic on what the authors run: see `hgc.evaluation.peers`."""
    rows = {c.name: c for c in all_candidates(["peers"], steps)}
    assert list(rows) == ["uncached", *peers.PEERS]
    plans = {n: hgc.plan(rows[n].config, rows[n].steps) for n in peers.PEERS}
    assert {rows[n].steps for n in peers.PEERS} == {steps}
    for interval in (2, 3, 5):
        found = plans[f"deepcache-{interval}"]
        assert [s.is_key for s in found] == [i % interval == 0 for i in range(steps)]
        assert all(s.control == "compute" and s.guidance == "both" for s in found)
    keys = {50: [0, 1, 2, 3, 5, 10, 15, 25, 35], 20: [0, 1, 2, 4, 6, 10, 14], 2: [0, 1]}[steps]
    assert [i for i, s in enumerate(plans["faster-diffusion"]) if s.is_key] == keys
    assert all(s.encoder == "reuse" for s in plans["faster-diffusion"] if not s.is_key)
    gate = {50: 20, 20: 8, 2: 1}[steps]
    assert [s.guidance for s in plans["t-gate"]] == ["both"] * gate + ["off"] * (steps - gate)
    assert all(s.attention == "reuse" and s.control == "compute" for s in plans["t-gate"][gate:])


@pytest.mark.parametrize("name", ["deepcache-2", "faster-diffusion", "t-gate"])
def test_schedules_of_peers_run(name):
    pipe = models.sd15_pipeline()
    config = peers.peer(name, 4)
    with hgc.install(pipe.unet, pipe.controlnet, config=config) as installation:
        models.draw(pipe, steps=4)
        done = installation.report().rows
    for row, step in zip(done, hgc.plan(config, 4), strict=True):
        assert (row.depth, row.encoder) == (step.depth, step.encoder)
        assert (row.attention, row.guidance) == (step.attention, step.guidance)
        assert row.control == ({"compute": "computed", "reuse": "reused"}[step.control],)


def test_steps_of_a_plan_follow_the_uncached_run():
    rule = Config(num_evaluations=12, key_steps=(0, 3, 7, 11))
    assert steps_of(rule, 20) == 12
    assert steps_of(rule, 40) == 24
    assert steps_of(QUICK, 40) == 4


# Measuring


def test_exact_is_at_distance_zero_and_pictures_are_measured_against_the_uncached_ones():
    kept: dict[tuple[str, int], np.ndarray] = {}

    def keep(batch):
        kept[batch.candidate.name, batch.start] = batch.images

    rows = measure.evaluate(["canny"], ROWS, SETTINGS, on_images=keep)
    assert [row.name for row in rows] == ["uncached", "exact", "quick"]
    assert rows[0].distance == rows[1].distance == rows[1].distance_worst == 0.0
    assert rows[0].loss == rows[1].loss == 0.0
    images = {
        name: np.concatenate([kept[name, 0], kept[name, 2]]) for name in ("uncached", "quick")
    }
    distance = [
        np.linalg.norm(a - b) / np.linalg.norm(b)
        for a, b in zip(images["quick"], images["uncached"], strict=True)
    ]
    assert rows[2].distance == pytest.approx(np.mean(distance), rel=1e-5) and min(distance) > 0
    assert rows[2].distance_worst == pytest.approx(max(distance), rel=1e-5)
    scenes = testbed.held_out(3)
    for row in (rows[0], rows[2]):
        fidelity = testbed.fidelity("canny", images[row.name], scenes)
        assert row.fidelity == pytest.approx(fidelity.mean())
    one = rows[0].fidelity
    assert rows[2].loss == pytest.approx((one - rows[2].fidelity) / one)
    assert rows[2].held_bytes > 0 and rows[0].held_bytes == 0
    assert rows[2].share == rows[2].macs / rows[0].macs < 1
    assert rows[2].share_paper == rows[2].macs_paper / rows[0].macs_paper < 1


def test_segmentation_is_the_corpus_iou():
    kept = []
    rows = measure.evaluate(
        ["segmentation"], ROWS[:1], SETTINGS, on_images=lambda batch: kept.append(batch.images)
    )
    expected = testbed.mean_iou(np.concatenate(kept), testbed.held_out(3))
    assert rows[0].fidelity == pytest.approx(expected)


class _Interrupted(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_without_repeating_or_losing(tmp_path, monkeypatch):
    made: list[tuple[str, int]] = []
    plain = measure._Studio.make

    def make(self, one, scenes):
        made.append((one.name, scenes[0].seed - testbed.held_out(1)[0].seed))
        return plain(self, one, scenes)

    monkeypatch.setattr(measure._Studio, "make", make)
    whole = measure.evaluate(["canny"], ROWS, SETTINGS, folder=tmp_path / "whole")
    everything = list(made)
    assert everything == [(row.name, start) for start in (0, 2) for row in ROWS]

    def stop(label, done, total):
        assert total == 6
        if done == 4:
            raise _Interrupted

    made.clear()
    with pytest.raises(_Interrupted):
        measure.evaluate(["canny"], ROWS, SETTINGS, folder=tmp_path / "parts", on_progress=stop)
    assert made == everything[:4]
    lines = tmp_path / "parts" / record.NAME
    with lines.open("a") as file:
        file.write('{"key": "cut short by the interr')

    made.clear()
    resumed = measure.evaluate(["canny"], ROWS, SETTINGS, folder=tmp_path / "parts")
    # the uncached pictures of the unfinished batch again: the other rows are measured against them
    assert made == [("uncached", 2), ("exact", 2), ("quick", 2)]
    assert _untimed(resumed) == _untimed(whole)
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(line["candidate"], line["batch"]) for line in written] == [
        (row.name, batch) for batch in (0, 1) for row in ROWS
    ]

    made.clear()
    assert measure.evaluate(["canny"], ROWS, SETTINGS, folder=tmp_path / "parts") == resumed
    assert made == []
    more = dataclasses.replace(SETTINGS, seed=1)
    measure.evaluate(["canny"], ROWS[:1], more, folder=tmp_path / "parts")
    assert made == [("uncached", 0), ("uncached", 2)]


def test_what_was_measured_with_other_settings_is_not_taken_over():
    environment = {"versions": "1", "model": "a"}
    key = measure._key(environment, SETTINGS, "canny", ROWS[0])
    others = [
        measure._key({**environment, "model": "b"}, SETTINGS, "canny", ROWS[0]),
        measure._key(environment, dataclasses.replace(SETTINGS, seed=1), "canny", ROWS[0]),
        measure._key(environment, dataclasses.replace(SETTINGS, batch=3), "canny", ROWS[0]),
        measure._key(environment, SETTINGS, "depth", ROWS[0]),
        measure._key(environment, SETTINGS, "canny", ROWS[1]),
        measure._key(environment, SETTINGS, "canny", Candidate("uncached", None, 3)),
        measure._key(
            environment, SETTINGS, "canny", Candidate("exact", QUICK.replace(name="exact"), 4)
        ),
    ]
    assert len({key, *others}) == len(others) + 1
    assert measure._key(environment, SETTINGS, "canny", ROWS[0]) == key


def test_a_record_that_is_something_else_is_refused(tmp_path):
    (tmp_path / record.NAME).write_text('{"what": 1}\n')
    with pytest.raises(ValueError, match="not a measurement"):
        record.Record(tmp_path)


def test_fingerprint_changes_with_a_byte(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1")
    before = record.fingerprint(tmp_path, "**/*")
    assert record.fingerprint(tmp_path, "**/*") == before
    (tmp_path / "a.bin").write_bytes(b"2")
    assert record.fingerprint(tmp_path, "**/*") != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": ["cany"]}, "cany"),
        ({"rows": ROWS[1:]}, "uncached"),
        ({"rows": [Candidate("uncached", None, 3)]}, "4 steps"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure.evaluate(**{"conditions": ["canny"], "settings": SETTINGS, **arguments})


def test_settings_are_checked():
    with pytest.raises(ValueError, match="scenes must be an integer of at least 1; got 0"):
        measure.Settings(scenes=0)


# Tables and pictures


def _row(**changes) -> measure.Row:
    values = {
        "condition": "canny", "name": "quick", "label": "quick", "steps": 4, "cached": True,
        "scenes": 3, "macs": 3 * 10**9, "macs_paper": 2 * 10**9, "share": 0.5, "share_paper": 0.4,
        "sd15_macs": 6 * 10**12, "sd15_macs_paper": 5 * 10**12, "seconds": 0.25, "speedup": 2.5,
        "measure": "edge F1", "fidelity": 0.75, "fidelity_worst": 0.5, "loss": -0.012,
        "loss_low": -0.02, "loss_high": 0.003, "distance": 0.03, "distance_worst": 0.06,
        "held_bytes": 2048, **changes,
    }  # fmt: skip
    return measure.Row(**values)


def test_tables_say_what_the_rows_say():
    rows = [_row(name="uncached", label="uncached", cached=False, held_bytes=0), _row()]
    text = tables.to_markdown(rows, "A heading.")
    line = next(line for line in text.splitlines() if line.startswith("| quick"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "quick", "4", "5.00 (6.00)", "2.00 (3.00)", "40.0% (50.0%)", "2.50x", "0.7500", "0.5000",
        "-1.20%", "-2.00% to 0.30%", "0.0300", "0.0600", "2",
    ]  # fmt: skip
    assert "canny (edge F1), 3 held-out scenes" in text and text.startswith("A heading.")
    read = list(csv.DictReader(io.StringIO(tables.to_csv(rows))))
    assert float(read[1]["distance_worst"]) == 0.06 and len(read) == 2
    data = json.loads(tables.to_json(rows, {"threads": 2}))
    assert data["about"] == {"threads": 2}
    assert measure.Row(**data["rows"][1]) == rows[1]


def test_the_grid_shows_each_picture_four_times_as_large_and_the_amplified_difference():
    from hgc.evaluation.pictures import AMPLIFIED, GridRow, difference, grid

    random = np.random.default_rng(3)
    condition = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    uncached, other = random.random((8, 8, 3)), random.random((8, 8, 3))
    np.testing.assert_allclose(
        difference(uncached + 0.01, uncached), np.full((8, 8, 3), 0.01 * AMPLIFIED)
    )
    picture = grid(
        [GridRow("a", condition, uncached, (other,)), GridRow("b", condition, other, (uncached,))],
        ["quick"],
        "a title that is longer than the picture is wide and so needs several lines",
    )
    pixels = np.asarray(picture)

    def has(image: np.ndarray) -> bool:
        large = np.repeat(np.repeat(image, 4, 0), 4, 1)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, large.shape)
        return bool((windows == large).all((-1, -2, -3)).any())

    for image in (condition, (uncached * 255 + 0.5).astype(np.uint8),
                  (difference(other, uncached) * 255 + 0.5).astype(np.uint8)):  # fmt: skip
        assert has(image)


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from hgc.evaluation.pictures import pareto

    rows = [
        _row(name="uncached", cached=False, distance=0.0, distance_worst=0.0),
        _row(),
        _row(name="5 steps", cached=False, distance=0.04, distance_worst=0.05),
    ]
    pareto(rows, tmp_path / "pareto.png")
    assert Image.open(tmp_path / "pareto.png").width > 300


# Benchmark


def test_random_weights_keep_a_pipeline_finite():
    with torch.device("meta"):
        unet = type(models.sd15_unet()).from_config(models.sd15_unet().config)
    unet = benchmarking.random_weights(unet, "cpu", torch.float32)
    out = unet(torch.randn(2, 4, 16, 16), 10, encoder_hidden_states=models.text(0, 2)).sample
    assert out.isfinite().all() and 1e-3 < out.std() < 1e3
    assert not any(p.requires_grad for p in unet.parameters())
    assert unet.conv_in.weight.std() == pytest.approx(1 / math.sqrt(36), rel=0.2)
    assert (unet.conv_norm_out.weight == 1).all() and (unet.conv_in.bias == 0).all()


def test_percentiles_of_a_timing():
    timing = benchmarking.Timing((3.0, 1.0, 2.0, 4.0, 5.0))
    assert timing.median == 3.0
    assert timing.percentile(0.2) == pytest.approx(1.8)
    assert timing.percentile(0.8) == pytest.approx(4.2)
    assert benchmarking.Timing((7.0,)).percentile(0.8) == 7.0


def test_bench_compares_each_plan_with_both_uncached_runs_and_leaves_nothing_behind():
    pipe = models.sd15_pipeline()
    before = dict(pipe.unet.__dict__)
    order = []
    found = benchmarking.bench(
        pipe, [QUICK], height=32, width=32, steps=6, repeats=3,
        on_progress=lambda label, done, total: order.append(label),
    )  # fmt: skip
    assert [(row.name, row.steps) for row in found.rows] == [
        ("uncached", 6), ("uncached", 4), ("quick", 4),
    ]  # fmt: skip
    runs = ["uncached, 6 steps", "uncached, 4 steps", "quick, 4 steps"]
    assert order == ["warming up", *runs, *runs[1:], runs[0], runs[2], *runs[:2], "done"]
    row = found.rows[2]
    full = hgc.count_macs(pipe.unet, pipe.controlnet, QUICK, height=32, width=32)
    assert row.macs == full.total and found.rows[1].macs == full.full.total
    assert row.against_equal.promised == full.full.total / full.total
    assert row.against.promised == pytest.approx(row.against_equal.promised * 6 / 4)
    for one in found.rows:
        assert len(one.loop.samples) == 3
        assert all(a < b for a, b in zip(one.loop.samples, one.whole.samples, strict=True))
    base = found.rows[0]
    ratios = sorted(b / a for a, b in zip(row.loop.samples, base.loop.samples, strict=True))
    assert row.against.loop == ratios[1]
    assert row.against.arrived == ratios[1] / row.against.promised
    assert row.held_bytes > 0 and base.held_bytes == 0
    assert dict(pipe.unet.__dict__) == before
    assert not pipe.unet._forward_hooks and not pipe.controlnet._forward_pre_hooks
    assert json.loads(found.to_json())["rows"][2]["against"]["promised"] == row.against.promised


def test_bench_uninstalls_when_a_run_fails():
    pipe = models.sd15_pipeline()
    with pytest.raises(ValueError, match="repeats"):
        benchmarking.bench(pipe, [], height=32, width=32, repeats=0)

    def fail(label, done, total):
        if label.startswith("turbo"):
            raise _Interrupted

    with pytest.raises(_Interrupted):
        benchmarking.bench(
            pipe, [Config.preset("turbo")], height=32, width=32, steps=2, repeats=1,
            on_progress=fail,
        )  # fmt: skip
    assert not pipe.unet._forward_hooks and "forward" not in vars(pipe.unet)
