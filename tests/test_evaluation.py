"""The evaluation: measures against values worked out by hand, resuming, tables and pictures."""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import models
import numpy as np
import pytest
import torch

import hgc
from hgc.bench.pipelines import random_weights
from hgc.bench.runner import bench
from hgc.bench.table import Timing
from hgc.evaluation import candidates as all_candidates
from hgc.evaluation import measure, metrics, peers, record, subject, tables, timing
from hgc.evaluation.candidate import Candidate, equal_steps, own_schedulers, steps_of
from hgc.evaluation.metrics import Summary
from hgc.evaluation.models import sd15_macs
from hgc.evaluation.rows import FIGURES, Row
from hgc.evaluation.settings import COMPUTING, MEASURING, Settings, key
from hgc.planning.config import PRESETS, Calibration, Config, ConfigError, StepPlan
from hgc.report.macs import Macs

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
SETTINGS = Settings(scenes=3, steps=4, batch=2)
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


def test_loss_of_segmentation_is_of_the_summed_counts():
    right = metrics.class_counts(np.array([[[4, 0], [0, 4]], [[8, 0], [0, 0]]]))
    wrong = metrics.class_counts(np.array([[[4, 0], [4, 0]], [[8, 0], [0, 0]]]))
    scores = np.array([0.0, 0.0])  # not read
    loss, low, high = metrics.loss_interval(scores, scores, counts=wrong, reference_counts=right)
    # classes: 12 / 16 and 0 / 4, against 1 and 1
    assert loss == pytest.approx(1 - (0.75 + 0.0) / 2)
    assert low <= loss <= high
    assert metrics.fidelity_interval(scores, wrong)[0] == pytest.approx(0.375)


def test_psnr_and_ssim_by_hand():
    random = np.random.default_rng(4)
    reference = random.random((2, 16, 16, 3), dtype=np.float32)
    images = reference.copy()
    images[0] = np.clip(images[0] + np.float32(0.1), 0, 2)
    found = metrics.psnr(images, reference)
    # 10 log10(1 / 0.01), and equal pictures at the limit
    assert found[0] == pytest.approx(20.0, abs=1e-4) and found[1] == metrics.PSNR_LIMIT
    from skimage.metrics import structural_similarity

    for one, value in zip(images, metrics.ssim(images, reference), strict=True):
        true = reference[0] if one is not images[1] else reference[1]
        expected = structural_similarity(
            one.astype(np.float64), true.astype(np.float64), channel_axis=-1, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert value == pytest.approx(expected, abs=5e-3)
        break
    assert metrics.ssim(reference, reference) == pytest.approx(1.0)


def _noisy(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture equal to its reference, then ones ever farther from it."""
    random = np.random.default_rng(size)
    one = random.random((size, size + 3, 3), dtype=np.float32)
    noise = random.normal(size=one.shape).astype(np.float32)
    images = np.stack([np.clip(one + scale * noise, 0, 1) for scale in (0, 0.02, 0.1)])
    return images, np.stack([one] * len(images))


@pytest.mark.parametrize(("size", "degrees"), [(64, 8.375), (512, 67.0)])
def test_flip_is_that_of_its_authors_at_the_stated_pixels_a_degree(size, degrees):
    package = pytest.importorskip("flip_evaluator")
    images, reference = _noisy(size)
    maps, found = metrics.flip_maps(images, reference), metrics.flip(images, reference)
    assert maps.shape == images.shape[:3]
    for image, true, of_pixels, value in zip(images, reference, maps, found, strict=True):
        theirs, mean, used = package.evaluate(
            true, image, "LDR", applyMagma=False, parameters={"ppd": degrees}
        )
        np.testing.assert_array_equal(of_pixels, theirs[..., 0])
        # theirs is summed in float32
        assert value == pytest.approx(mean, rel=of_pixels.size * 2.0**-23)
        assert used["ppd"] == degrees
    assert found[0] == 0.0 < found[1] < found[2] < 1.0
    # at 512 pixels it is what FLIP takes when nothing is said
    default = package.evaluate(reference[1], images[1], "LDR", applyMagma=False)[2]["ppd"]
    assert round(default) == metrics.PIXELS_PER_DEGREE == metrics.pixels_per_degree(512, 768)
    assert metrics.pixels_per_degree(128, 64) == 8.375


def test_flip_refuses_what_would_end_the_process():
    images, reference = _noisy(8)
    for bad, message in (
        (images[..., :2], "shape"), (images[0], "shape"), (images[:, :0], "shape"),
        (images + 1.0, "numbers from 0 to 1"), (np.full_like(images, np.nan), "from 0 to 1"),
    ):  # fmt: skip
        like = reference if "shape" not in message else np.zeros_like(bad)
        for measured in (metrics.flip, metrics.jod):
            with pytest.raises(ValueError, match=message):
                measured(bad, like)
    with pytest.raises(ValueError, match="one shape"):
        metrics.flip(images, reference[:1])


def test_jod_is_that_of_cvvdp_at_the_same_pixels_a_degree():
    package = pytest.importorskip("pycvvdp", reason="the extra jod is not installed")
    images, reference = _noisy(64)
    found = metrics.jod(images, reference)
    assert found[0] == 10.0 > found[1] > found[2] > 0.0
    geometry = package.vvdp_display_geometry((67, 64), ppd=8.375)
    theirs = package.cvvdp("standard_4k", display_geometry=geometry, device=torch.device("cpu"))
    assert found[2] == float(theirs.predict(images[2], reference[2], dim_order="HWC")[0])


def test_pictures_of_one_condition_are_resampled_together():
    values = np.repeat(np.random.default_rng(5).random(30), 4)
    alone = metrics.interval(values[::4])
    assert metrics.interval(values, images=4) == pytest.approx(alone)
    # taken for independent they would claim twice the precision
    low, high = metrics.interval(values)
    assert (high - low) < 0.6 * (alone[1] - alone[0])


def test_ratio_of_distances_is_of_means_and_paired():
    ours, theirs = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])
    assert metrics.ratio_interval(ours, theirs) == pytest.approx((0.5, 0.5, 0.5))
    assert metrics.ratio_interval(ours, theirs[::-1])[0] == pytest.approx(0.5)


def test_frechet_of_two_normal_sets():
    """Sets with the same covariance and shifted means: the squared shift, and 0 to itself."""
    random = np.random.default_rng(6)
    features = random.normal(size=(200, 5))
    assert metrics.frechet(features, features) == pytest.approx(0.0, abs=1e-9)
    assert metrics.frechet(features + 2.0, features) == pytest.approx(5 * 4.0)
    # N(0, 1) against N(0, 4) in each of 5 dimensions: 1 + 4 - 2 * 2
    assert metrics.frechet(2 * features, features) == pytest.approx(
        (features.std(0, ddof=1) ** 2).sum() + (features.mean(0) ** 2).sum(), rel=1e-6
    )
    assert metrics.frechet(features[:1], features) is None


# Rows


def test_candidates_put_the_uncached_run_first_and_fewer_steps_after_their_equals(monkeypatch):
    # what it counts is tested below
    counted = {"turbo": 5, "paper": 8}
    monkeypatch.setattr(
        "hgc.evaluation.candidate.equal_steps", lambda config, steps, subject: counted[config.name]
    )
    rows = all_candidates(["exact", "turbo", "paper", "fewer-steps", "3-steps", "turbo"])
    assert [row.name for row in rows] == [
        "uncached", "exact", "turbo", "5 steps", "paper", "8 steps", "3 steps",
    ]  # fmt: skip
    assert [row.steps for row in rows] == [20, 20, 20, 5, 20, 8, 3]
    assert rows[3].equal_to == ("turbo",) and rows[3].label == "5 steps (vs turbo)"
    assert rows[1].config is Config.preset("exact") and rows[0].config is None
    rows = all_candidates(["turbo", "fewer-steps"], schedulers=(None, "dpm++2m"))
    assert [(r.name, r.scheduler) for r in rows[2:]] == [
        ("5 steps", None), ("5 steps@dpm++2m", "dpm++2m"),
    ]  # fmt: skip
    assert rows[2].equal_to == rows[3].equal_to == ("turbo",)


def test_schedulers_of_fewer_steps_leave_out_the_evaluations_own():
    assert own_schedulers(["unipc", "dpm++2m"], "unipc") == (None, "dpm++2m")
    assert own_schedulers(["unipc", "dpm++2m"], "ddim") == (None, "unipc", "dpm++2m")
    assert own_schedulers([], "unipc") == (None,)
    assert own_schedulers(["unipc-trailing"], "unipc") == (None, "unipc-trailing")
    with pytest.raises(ConfigError, match="no scheduler named 'lcm'"):
        own_schedulers(["lcm"], "unipc")


def test_fewer_steps_is_never_given_fewer_macs():
    turbo = Config.preset("turbo")
    count = equal_steps(turbo, turbo.num_evaluations)
    macs_here = subject.Testbed().macs
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
    keys = {50: [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46],
            20: [0, 1, 2, 3, 4, 6, 8, 11, 15], 2: [0, 1]}[steps]  # fmt: skip
    assert [i for i, s in enumerate(plans["spectrum"]) if s.is_key] == keys


@pytest.mark.parametrize(
    ("name", "steps"), [("spectrum", 20), ("spectrum-5", 20), ("spectrum", 50)]
)
def test_the_forecast_of_spectrum_is_its_ridge_regression(name, steps):
    """Fitted and evaluated with torch, on values instead of coefficients."""
    config = peers.peer(name, steps)
    values = torch.randn(steps, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.arange(steps, dtype=torch.float64)
    angles = torch.arccos(2 * times / steps - 1)
    basis = torch.stack([torch.cos(m * angles) for m in range(5)], 1)
    keys = [i for i, step in enumerate(config.steps) if step.is_key]
    for i, step in enumerate(config.steps):
        if step.is_key:
            continue
        past = [key for key in keys if key < i]
        # a ridge is as many more rows that ask for zero
        rows = torch.cat([basis[past], 0.1**0.5 * torch.eye(5, dtype=torch.float64)])
        wanted = torch.cat([values[past], torch.zeros(5, 7, dtype=torch.float64)])
        curve = basis[i] @ torch.linalg.lstsq(rows, wanted).solution
        last, before = past[-1], past[-2]
        line = values[last] + (i - last) / (last - before) * (values[last] - values[before])
        found = torch.tensor(step.forecast, dtype=torch.float64) @ values[past[::-1]]
        torch.testing.assert_close(found, (curve + line) / 2, atol=1e-5, rtol=0)


def test_spectrum_at_so_many_evaluations():
    for count in (5, 6, 7, 8):
        steps = peers.peer(f"spectrum-{count}", 20).steps
        keys = [i for i, step in enumerate(steps) if step.is_key]
        gaps = np.diff(keys)[1:]
        assert len(keys) == count and keys[:2] == [0, 1] and gaps[0] == 2
        assert list(gaps) == sorted(gaps)
    assert sum(step.is_key for step in peers.peer("spectrum-8", 50).steps) == 20
    with pytest.raises(ConfigError, match="no run of 20 steps that computes 19"):
        peers.peer("spectrum-19", 20)


def test_what_spectrum_forecasts_is_read_from_all_it_computed():
    pipe, config = models.sd15_pipeline(), peers.peer("spectrum", 8)
    outputs = []
    with hgc.install(pipe, config=config):
        hook = pipe.unet.register_forward_hook(lambda m, a, out: outputs.append(out[0].clone()))
        models.draw(pipe, steps=8)
        hook.remove()
    keys = [i for i, step in enumerate(config.steps) if step.is_key]
    assert keys == [0, 1, 2, 3, 4, 6]
    wanted = sum(c * outputs[k] for c, k in zip(config.steps[7].forecast, keys[::-1], strict=True))
    torch.testing.assert_close(outputs[7], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", range(1, 21))
def test_a_grid_is_so_many_of_the_steps(count):
    found = peers.grid(count, 20)
    assert len(set(found)) == count and sorted(found) == [*found]
    assert found[0] == 0 and (count == 1 or found[-1] >= 16)
    assert len(peers.grid(count, 50)) == len(set(peers.grid(count, 50))) == count
    assert peers.grid(7, 20) == (0, 2, 4, 8, 12, 16, 19)
    with pytest.raises(ConfigError, match="a grid of 20 steps has no 21 of them"):
        peers.grid(21, 20)


def test_rows_of_the_free_rivals():
    rows = all_candidates(["skip-x0", "6-steps@grid", "6-steps", "skip-x0-10", "6-steps@deis-grid"])
    assert [(r.name, r.group) for r in rows[1:]] == [
        ("skip-x0-8", ""), ("skip-x0-7", ""), ("skip-x0-6", ""), ("skip-x0-5", ""),
        ("skip-x0-4", ""), ("skip-x0-10", ""), ("6 steps@unipc-grid", "6 steps@grid"),
        ("6 steps@dpm++2m-grid", "6 steps@grid"), ("6 steps", "6 steps"),
        ("6 steps@deis-grid", ""),
    ]  # fmt: skip
    for row in rows[1:7]:
        steps = hgc.plan(row.config, row.steps)
        keys = int(row.name.rpartition("-")[2])
        assert sum(step.is_key for step in steps) == keys
        ours, theirs = sd15_macs(row.config, row.steps), sd15_macs(None, keys)
        # the condition is embedded once
        assert 0.98 * theirs.total < ours.total < theirs.total and row.steps == 20
        assert {step.damping for step in steps if not step.is_key} == {0.6}
    for name in ("ddim-grid", "grid-grid"):
        with pytest.raises(ConfigError, match=f"no scheduler named '{name}'"):
            all_candidates([f"6-steps@{name}"])


@pytest.mark.parametrize("name", ["unipc-grid", "dpm++2m-grid", "euler-grid"])
def test_steps_on_the_grid_are_at_timesteps_of_the_uncached_run(name):
    pipe = models.sd15_pipeline()
    own = pipe.scheduler.config
    pipe.scheduler = subject.make_scheduler(name.removesuffix("-grid"), own)
    whole = models.draw(pipe, steps=6)
    timesteps, sigmas = pipe.scheduler.timesteps, pipe.scheduler.sigmas
    pipe.scheduler = subject.make_scheduler(name, own, 6)
    assert torch.equal(models.draw(pipe, steps=6), whole)
    assert not torch.equal(models.draw(pipe, steps=4), whole)
    kept = [*peers.grid(4, 6)]
    assert torch.equal(pipe.scheduler.timesteps, timesteps[kept])
    assert torch.equal(pipe.scheduler.sigmas, sigmas[[*kept, 6]])
    with pytest.raises(ValueError, match="steps of the uncached run"):
        subject.make_scheduler(name, own)


def test_the_row_ays_is_at_the_timesteps_that_diffusers_ships():
    from diffusers.schedulers import AysSchedules

    own = testbed.load_pipeline("canny").scheduler.config
    row = all_candidates(["ays"])[1]
    assert (row.name, row.steps, row.config) == ("ays", 10, None)
    timesteps = AysSchedules["StableDiffusionTimesteps"]
    pipe = models.sd15_pipeline()
    pipe.scheduler = subject.make_scheduler("dpm++2m", own)
    asked = models.draw(pipe, steps=10, timesteps=timesteps)
    pipe.scheduler = subject.make_scheduler(row.scheduler, own, 20)
    assert torch.equal(models.draw(pipe, steps=row.steps), asked)
    assert pipe.scheduler.timesteps.tolist() == timesteps
    with pytest.raises(ConfigError, match="it has no '@'"):
        all_candidates(["ays@ddim"])
    with pytest.raises(ConfigError, match="no scheduler named 'dpm\\+\\+2m-ays'"):
        all_candidates(["6-steps@dpm++2m-ays"])


def test_the_row_ays_is_refused_where_the_training_is_another(monkeypatch):
    other = subject.Testbed()
    config = {**other.scheduler_config(), "beta_end": 0.02}
    monkeypatch.setattr(other, "scheduler_config", lambda: config)
    with pytest.raises(ConfigError, match=r"row 'ays': .* this one's scheduler has .*0\.02"):
        all_candidates(["ays"], subject=other)


def test_rivals_with_refined_coefficients_are_files_beside_the_model(tmp_path):
    other = subject.Testbed()
    assert other.plans == next(iter(testbed.plans().values())).parent
    other.plans = tmp_path
    with pytest.raises(ConfigError, match=r"refine_plans\.py --steps 20 makes it"):
        all_candidates(["fewer-steps-8-calibrated"], subject=other)
    for name in ("calibrated", "fewer-steps-calibrated"):
        for row, (rule, _) in peers.refined_rows(name, 20).items():
            rule.to_json(tmp_path / f"{row}.json")
    rows = all_candidates(["calibrated", "fewer-steps-6-calibrated"], subject=other)[1:]
    assert [(r.name, r.steps, r.scheduler) for r in rows] == [
        *((f"{name}-calibrated", 20, None) for name in ("paper", "balanced", "fast", "turbo")),
        ("fewer-steps-6-calibrated", 6, "dpm++2m-grid"),
    ]  # fmt: skip
    assert rows[-1].method == "fewer steps, calibrated"
    assert rows[1].config == PRESETS["balanced"].replace(name="balanced-calibrated")
    # for 50 steps there are other files
    ((row, (rule, scheduler)),) = peers.refined_rows("paper-calibrated", 50).items()
    assert (row, len(rule.key_steps), scheduler) == ("paper-calibrated-50", 18, None)
    ((_, (rule, _)),) = peers.refined_rows("fewer-steps-6-calibrated", 50).items()
    assert rule.num_evaluations == 15


def test_plans_of_another_model_are_beside_its_folder(tmp_path):
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(testbed.path() / "controlnet_canny", folder / "controlnet_canny")
    assert subject.Testbed(folder).plans == tmp_path / "other-plans"


@pytest.mark.parametrize("name", ["deepcache-2", "faster-diffusion", "t-gate", "skip-x0-3"])
def test_schedules_of_peers_run(name):
    pipe = models.sd15_pipeline()
    config = peers.peer(name, 4)
    with hgc.install(pipe, config=config) as installation:
        models.draw(pipe, steps=4)
        done = installation.report().rows
    for row, step in zip(done, hgc.plan(config, 4), strict=True):
        assert (row.depth, row.encoder) == (step.depth, step.encoder)
        assert (row.attention, row.guidance) == (step.attention, step.guidance)
        words = {"compute": "computed", "reuse": "reused", "off": "off"}
        assert row.control == (words[step.control],)


def test_of_runs_that_differ_in_the_scheduler_the_nearest_is_shown_and_is_the_rival():
    rows = [
        ROWS[0], dataclasses.replace(ROWS[2], name="plan"),
        Candidate("3 steps", None, 3, ("plan",), group="3 steps"),
        Candidate("3 steps@dpm++2m", None, 3, ("plan",), "dpm++2m", group="3 steps"),
        Candidate("3 steps@ddim", None, 3, scheduler="ddim"),
    ]  # fmt: skip
    found = measure.evaluate(["segmentation"], rows, dataclasses.replace(SETTINGS, scenes=2))
    near, far = sorted(found[2:4], key=lambda row: row["distance"].mean)
    assert near["distance"].mean < far["distance"].mean
    assert near.shown and not far.shown
    # one that was asked for by name competes with none
    assert found[4].shown and found[4].scheduler == "ddim"
    plan = found[1]
    assert plan.rival == near.name
    ratio, ours, theirs = plan["rival_ratio"], plan["distance"], near["distance"]
    assert ratio.mean == pytest.approx(ours.mean / theirs.mean)
    assert ratio.worst == pytest.approx(ours.worst / theirs.worst)
    assert ratio.low <= ratio.mean <= ratio.high
    assert found[0].rival is None and found[2].rival is None


def test_a_row_may_have_a_scheduler_of_its_own():
    rows = all_candidates(["turbo@deis", "turbo", "4-steps@dpm++2m-trailing", "t-gate@ddim"])
    assert [(r.name, r.scheduler) for r in rows] == [
        ("uncached", None), ("turbo@deis", "deis"), ("turbo", None), ("t-gate@ddim", "ddim"),
        ("4 steps@dpm++2m-trailing", "dpm++2m-trailing"),
    ]  # fmt: skip
    assert [r.method for r in rows] == [
        "fewer steps", "hgc, deis", "hgc", "T-GATE's schedule, ddim",
        "fewer steps, dpm++2m-trailing",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no scheduler named 'lcm'"):
        all_candidates(["turbo@lcm"])


def test_a_scheduler_of_another_class_keeps_the_noise_schedule():
    own = testbed.load_pipeline("canny").scheduler.config
    made = {n: subject.make_scheduler(n, own) for n in ("dpm++2m", "dpm++2m-trailing", "ddim")}
    for one in made.values():
        assert one.config.beta_end == own["beta_end"]
        assert one.config.prediction_type == own["prediction_type"]
    assert [made[n].config.timestep_spacing for n in made] == ["leading", "trailing", "leading"]
    # clipping belongs to pictures, not to latents
    assert made["ddim"].config.clip_sample is False


def test_rows_of_packages_that_do_not_run_say_why(monkeypatch):
    with pytest.raises(ConfigError, match="loaders for pipelines without a ControlNet only"):
        all_candidates(["tgate-pypi"])
    monkeypatch.setitem(sys.modules, "DeepCache", None)
    with pytest.raises(ConfigError, match=r"hybrid-grained-cache\[peers\]"):
        all_candidates(["deepcache-pypi-3"])
    with pytest.raises(ConfigError, match="no preset named 'deepcache-pypi-1'"):
        all_candidates(["deepcache-pypi-1"])


@pytest.mark.peers
def test_the_package_deepcache_makes_the_pictures_of_its_schedule():
    pytest.importorskip("DeepCache")
    rows = all_candidates(["deepcache-2", "deepcache-pypi-2", "fewer-steps"], 6)
    assert [row.name for row in rows] == [
        "uncached", "deepcache-2", "4 steps", "deepcache-pypi-2",
    ]  # fmt: skip
    kept = {}
    found = measure.evaluate(
        ["canny"], rows, Settings(scenes=2, steps=6, batch=2),
        on_images=lambda batch: kept.setdefault(batch.candidate.name, batch.images),
    )  # fmt: skip
    uncached, ours, _, theirs = found
    distance = theirs["distance"].mean
    assert distance == pytest.approx(ours["distance"].mean, rel=1e-3) and distance > 0
    np.testing.assert_allclose(kept["deepcache-pypi-2"], kept["deepcache-2"], atol=1e-3)
    # its short evaluation keeps more than ours, and it embeds the condition each time
    assert ours.macs.total < theirs.macs.total < uncached.macs.total
    assert ours.sd15_macs.paper < theirs.sd15_macs.paper < uncached.sd15_macs.paper
    assert theirs.held_bytes > ours.held_bytes
    assert theirs.method == "DeepCache (package)" and theirs.cached


def test_steps_of_a_plan_follow_the_uncached_run():
    rule = Config(num_evaluations=12, key_steps=(0, 3, 7, 11))
    assert steps_of(rule, 20) == 12
    assert steps_of(rule, 40) == 24
    assert steps_of(QUICK, 40) == 4
    known = Calibration("m", "UniPC", 12, 40, 0.5, 0.1, 0.1, 2, 0.1, 1)
    calibrated = rule.replace(calibration=known)
    assert steps_of(calibrated, 40) == 12 and steps_of(calibrated, 20) == 6


# Measuring


def test_exact_is_at_distance_zero_and_pictures_are_measured_against_the_uncached_ones():
    kept: dict[tuple[str, int], np.ndarray] = {}

    def keep(batch):
        kept[batch.candidate.name, batch.start] = batch.images

    rows = measure.evaluate(["canny"], ROWS, SETTINGS, on_images=keep)
    assert [row.name for row in rows] == ["uncached", "exact", "quick"]
    assert rows[0]["distance"] == rows[1]["distance"] == Summary(0.0, 0.0, 0.0, 0.0)
    assert rows[0]["loss"].mean == rows[1]["loss"].mean == 0.0
    images = {
        name: np.concatenate([kept[name, 0], kept[name, 2]]) for name in ("uncached", "quick")
    }
    distance = [
        np.linalg.norm(a - b) / np.linalg.norm(b)
        for a, b in zip(images["quick"], images["uncached"], strict=True)
    ]
    assert (
        rows[2]["distance"].mean == pytest.approx(np.mean(distance), rel=1e-5) and min(distance) > 0
    )
    assert rows[2]["distance"].worst == pytest.approx(max(distance), rel=1e-5)
    seen = metrics.flip(images["quick"], images["uncached"])
    if seen is not None:
        assert rows[0]["flip"] == rows[1]["flip"] == Summary(0.0, 0.0, 0.0, 0.0)
        assert rows[2]["flip"].mean == pytest.approx(seen.mean()) and seen.min() > 0
        assert rows[2]["flip"].worst == pytest.approx(seen.max())
    scenes = testbed.held_out(3)
    for row in (rows[0], rows[2]):
        fidelity = testbed.fidelity("canny", images[row.name], scenes)
        assert row["fidelity"].mean == pytest.approx(fidelity.mean())
    one = rows[0]["fidelity"].mean
    assert rows[2]["loss"].mean == pytest.approx((one - rows[2]["fidelity"].mean) / one)
    assert rows[2].held_bytes > 0 and rows[0].held_bytes == 0
    assert {row.full_macs for row in rows} == {rows[0].macs}
    flat = rows[2].flat()
    assert flat["share"] == rows[2].macs.total / rows[0].macs.total < 1
    assert flat["share_paper"] == rows[2].macs.paper / rows[0].macs.paper < 1


def test_segmentation_is_the_corpus_iou():
    kept = []
    rows = measure.evaluate(
        ["segmentation"], ROWS[:1], SETTINGS, on_images=lambda batch: kept.append(batch.images)
    )
    expected = testbed.mean_iou(np.concatenate(kept), testbed.held_out(3))
    assert rows[0]["fidelity"].mean == pytest.approx(expected)


def test_the_testbeds_judge_sees_what_the_prompt_names():
    """On the renders themselves: their own prompts, and those of other scenes."""
    shipped = subject.Testbed()
    inputs = shipped.inputs("canny", 40, 8)
    renders = np.stack([one.truth.image for one in inputs]).astype(np.float32) / 255
    own = shipped.judge("canny", renders, inputs)
    assert own.agreement.mean() > 0.95
    others = shipped.judge("canny", renders, [*inputs[1:], inputs[0]])
    assert others.agreement.mean() < 0.75
    # light, ground and one material, each asked for anew
    one = inputs[0]
    wrong = dataclasses.replace(
        one.truth, light="fog" if one.truth.light != "fog" else "day", solids=()
    )
    changed = dataclasses.replace(one, truth=wrong)
    assert shipped.judge("canny", renders[:1], [changed]).agreement[0] == 0.5
    truths = shipped.truths("canny", inputs)
    np.testing.assert_array_equal(own.features, truths)
    assert metrics.frechet(own.features, truths) == pytest.approx(0.0, abs=1e-6)


def test_without_their_packages_flip_is_left_out_and_jod_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    one = dataclasses.replace(SETTINGS, scenes=1)
    (row,) = measure.evaluate(["canny"], ROWS[:1], one)
    assert "flip" not in row.figures and "jod" not in row.figures
    with pytest.raises(ValueError, match=r"hybrid-grained-cache\[jod\]"):
        dataclasses.replace(SETTINGS, jod=True)


def test_a_timing_says_when_another_process_had_the_core():
    if not hasattr(os, "sched_setaffinity") or timing.timed(lambda: None)[1].waited is None:
        pytest.skip("this system does not say how long a thread waits for a core")
    allowed = os.sched_getaffinity(0)
    core = min(allowed)

    def work() -> str:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        return "done"

    os.sched_setaffinity(0, {core})
    try:
        # it inherits the core
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.2)
            value, found = timing.timed(work)
        finally:
            other.kill()
            other.wait()
    finally:
        os.sched_setaffinity(0, allowed)
    assert value == "done" and found.seconds >= 0.5
    assert timing.MOST_WAITED < found.waited <= 1.0


def test_an_idle_thread_that_waits_is_none_of_the_timing(tmp_path, monkeypatch):
    own = threading.get_native_id()
    worker, idle = own + 1, own + 2

    def write(milliseconds: dict[int, tuple[float, float]]) -> None:
        for thread, (ran, waited) in milliseconds.items():
            (tmp_path / str(thread)).mkdir(exist_ok=True)
            text = f"{ran * 1e6:.0f} {waited * 1e6:.0f} 7\n"
            (tmp_path / str(thread) / "schedstat").write_text(text)

    def after(milliseconds: dict[int, tuple[float, float]]) -> float | None:
        def call() -> None:
            time.sleep(0.1)
            write(milliseconds)

        write({own: (0, 0), worker: (0, 0), idle: (0, 0)})
        return timing.timed(call)[1].waited

    monkeypatch.setattr(timing, "_THREADS", tmp_path)
    assert after({own: (90, 1), worker: (90, 2), idle: (1, 60)}) < 0.03
    assert after({own: (90, 1), worker: (40, 50), idle: (1, 0)}) > 0.3
    assert after({own: (1, 50), worker: (90, 0), idle: (0, 0)}) > 0.3


def test_timings_in_which_another_process_had_the_cores_are_left_out(tmp_path):
    measure.evaluate(["canny"], ROWS[:2], SETTINGS, folder=tmp_path)
    lines = tmp_path / record.NAME
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [len(line["values"]["distance"]) for line in found] == [2, 2, 1, 1]

    def speedups(*waited: float | None) -> list[tuple[float | None, float | None]]:
        for line, share in zip(found, waited, strict=True):
            line |= {"seconds": 2.0 * len(line["values"]["distance"]), "reference_seconds": 6.0}
            line["waited"] = share
        lines.write_text("".join(json.dumps(line) + "\n" for line in found))
        rows = measure.evaluate(["canny"], ROWS[:2], SETTINGS, folder=tmp_path)
        return [(row.seconds, row.speedup) for row in rows]

    both, second, none = (2.0, 2.25), (2.0, 3.0), (None, None)
    assert speedups(0.0, None, 0.01, timing.MOST_WAITED) == [both, both]
    assert speedups(0.9, 0.0, 0.0, 0.0) == [second, both]
    assert speedups(0.0, 0.06, 0.0, 0.06) == [both, none]


class _Interrupted(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_without_repeating_or_losing(tmp_path, monkeypatch):
    made: list[tuple[str, int]] = []
    plain = measure._Studio.make

    def make(self, one, inputs):
        made.append((one.name, inputs[0].index))
        return plain(self, one, inputs)

    monkeypatch.setattr(measure._Studio, "make", make)
    # strips are kept as pictures are made, so that none is made again for them
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
    assert [(line["candidate"], line["first"]) for line in written] == [
        (row.name, first) for first in (0, 2) for row in ROWS
    ]

    made.clear()
    again = measure.evaluate(["canny"], ROWS, SETTINGS, folder=tmp_path / "parts")
    assert again == resumed
    assert made == []
    more = dataclasses.replace(SETTINGS, seed=1)
    measure.evaluate(["canny"], ROWS[:1], more, folder=tmp_path / "parts")
    assert made == [("uncached", 0), ("uncached", 2)]


def test_what_was_measured_with_other_settings_is_not_taken_over():
    environment = {"versions": "1", "model": "a"}
    own = key(environment, SETTINGS, "canny", ROWS[0])
    others = [
        key({**environment, "model": "b"}, SETTINGS, "canny", ROWS[0]),
        key(environment, dataclasses.replace(SETTINGS, seed=1), "canny", ROWS[0]),
        key(environment, dataclasses.replace(SETTINGS, batch=3), "canny", ROWS[0]),
        key(environment, SETTINGS, "depth", ROWS[0]),
        key(environment, SETTINGS, "canny", ROWS[1]),
        key(environment, SETTINGS, "canny", Candidate("uncached", None, 3)),
        key(environment, SETTINGS, "canny", Candidate("exact", QUICK.replace(name="exact"), 4)),
    ]
    assert len({own, *others}) == len(others) + 1
    assert key(environment, SETTINGS, "canny", ROWS[0]) == own


# What is compared stands in the key itself; the others make something of what was recorded.
_CHANGES_NO_NUMBER = {
    "__init__.py", "evaluation/__init__.py", "evaluation/candidate.py", "evaluation/record.py",
    "evaluation/rows.py", "report/macs.py", "warn.py",
}  # fmt: skip


def test_the_key_is_of_every_file_that_measuring_imports():
    package = Path(hgc.__file__).parent
    hashed = {
        path.relative_to(package).as_posix()
        for pattern in (*MEASURING, *COMPUTING)
        for path in package.glob(pattern)
    }
    for pattern in (*MEASURING, *COMPUTING):
        assert list(package.glob(pattern)), pattern
    found, left = set(), sorted(hashed)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        if name in _CHANGES_NO_NUMBER:
            continue
        for node in ast.walk(ast.parse((package / name).read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                top, *parts = module.split(".")
                path = package.joinpath(*parts)
                for file in (path / "__init__.py", path.with_suffix(".py")):
                    if top == "hgc" and file.is_file():
                        left.append(file.relative_to(package).as_posix())
    assert {"evaluation/measure.py", "evaluation/folder.py", "testbed/judges.py"} < hashed
    assert found == hashed | _CHANGES_NO_NUMBER


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
        Settings(scenes=0)


# Tables and pictures


_MEASURED = {
    "fidelity": Summary(0.75, 0.7, 0.8, 0.5), "loss": Summary(-0.012, -0.02, 0.003),
    "distance": Summary(0.03, 0.03, 0.03, 0.06), "psnr": Summary(40.0, 40.0, 40.0, 30.0),
    "ssim": Summary(0.95, 0.95, 0.95, 0.9), "flip": Summary(0.02, 0.02, 0.02, 0.05),
    "jod": Summary(9.75, 9.75, 9.75, 9.5), "perceived": Summary(0.1, 0.1, 0.1, 0.2),
    "agreement": Summary(0.9, 0.9, 0.9, 0.8), "rival_ratio": Summary(0.456, 0.4, 0.5, 0.6),
}  # fmt: skip
_NONE = Summary(0.0, 0.0, 0.0, 0.0)


def _row(figures=None, sd15=5, without=(), **changes) -> Row:
    """figures: others than `_MEASURED`; sd15: TMACs, in the paper's convention."""
    found = {k: v for k, v in {**_MEASURED, **(figures or {})}.items() if k not in without}
    values = {
        "condition": "canny", "name": "quick", "label": "quick", "method": "hgc", "steps": 4,
        "scheduler": "unipc", "cached": True, "shown": True, "scenes": 3, "images": 1,
        "macs": Macs(3 * 10**9, 2 * 10**9), "full_macs": Macs(6 * 10**9, 5 * 10**9),
        "sd15_macs": None if sd15 is None else Macs(int((sd15 + 1) * 1e12), int(sd15 * 1e12)),
        "seconds": 0.25, "speedup": 2.5, "measure": "edge F1", "figures": found,
        "frechet": 0.0123, "frechet_truth": 0.3, "rival": "3 steps", "held_bytes": 2048,
    }  # fmt: skip
    return Row(**(values | changes))


def test_tables_say_what_the_rows_say():
    same = {"distance": _NONE, "flip": _NONE}
    rows = [
        _row(same, without=("rival_ratio",), name="uncached", label="uncached", cached=False,
             held_bytes=0),
        _row(),
        _row(name="3 steps", label="3 steps (vs quick)", shown=False),
    ]  # fmt: skip
    text = tables.to_markdown(rows, "A heading.", "what the prompt names")
    assert "3 steps (vs" not in text and "Prompt: what the prompt names." in text
    line = next(line for line in text.splitlines() if line.startswith("| quick"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "quick", "4", "5.00 (6.00)", "40.0%", "2.50x", "0.7500 (0.5000)", "-1.20%",
        "-2.00 to 0.30", "0.0300 (0.0600)", "0.0200 (0.0500)", "9.75 (9.50)", "0.46 (0.40-0.50)",
        "0.60", "40.0 (30.0)", "0.9500", "0.0123", "0.900", "2",
    ]  # fmt: skip
    uncached = next(line for line in text.splitlines() if line.startswith("| uncached"))
    cells = [cell.strip() for cell in uncached.strip("|").split("|")]
    assert cells[6:13] == ["-", "-", "0", "0", "9.75 (9.50)", "-", "-"]
    # of a model that is no stand-in for SD1.5, without a judge
    other = tables.to_markdown([_row(sd15=None, without=("agreement",), frechet=None)])
    assert "Fréchet |" not in other and "| 2.00 (3.00) G |" in other and "SD1.5" not in other
    assert "canny (edge F1), 3 held-out scenes" in text and text.startswith("A heading.")
    read = list(csv.DictReader(io.StringIO(tables.to_csv(rows))))
    assert float(read[1]["distance_worst"]) == 0.06 and len(read) == 3
    data = json.loads(tables.to_json(rows, {"threads": 2}))
    assert data["about"] == {"threads": 2}
    flat = data["rows"][1]
    assert list(read[1]) == list(flat) and len(set(flat)) == len(flat)
    assert (flat["macs"], flat["sd15_macs_paper"], flat["share_paper"]) == (3e9, 5e12, 0.4)
    for name in FIGURES:
        assert flat[name] == _MEASURED[name].mean and flat[f"{name}_high"] == _MEASURED[name].high
    assert data["rows"][0]["rival_ratio"] is None


def test_what_tables_leave_out_is_said_once():
    whole = tables.to_markdown([_row(), _row(condition="depth")])
    for text in ("| FLIP (worst 5%) |", "| JOD (worst 5%) |", " JOD: ", "67 pixels a degree"):
        assert text in whole
    for text in ("left out: flip-evaluator", "No speedup"):
        assert text not in whole
    less = tables.to_markdown(
        [_row(without=("flip", "jod"), speedup=None, condition=name) for name in ("canny", "depth")]
    )
    for text in ("| FLIP", "| JOD", "JOD:", "FLIP: ", "| speedup"):
        assert text not in less
    for text in ("FLIP is left out: flip-evaluator", "No speedup: "):
        assert less.count(text) == 1
    # a cell of a column that other rows fill is empty
    some = tables.to_markdown([_row(), _row(name="busy", label="busy", speedup=None)])
    assert "| 40.0% |  | 0.7500" in some and "| 2.50x |" in some and "No speedup: " in some


@pytest.mark.parametrize("with_flip", [True, False], ids=["flip", "no-flip"])
def test_the_grid_shows_each_picture_enlarged_and_where_it_differs(with_flip, monkeypatch):
    pytest.importorskip("matplotlib")
    from hgc.evaluation.pictures import AMPLIFIED, FLIP_LIGHTEST, GridRow, difference, grid, visible

    random = np.random.default_rng(3)
    condition = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    uncached = random.random((4, 4, 3))
    other = np.clip(uncached + random.normal(scale=0.05, size=(4, 4, 3)), 0, 1)
    np.testing.assert_allclose(
        difference(uncached + 0.01, uncached), np.full((4, 4, 3), 0.01 * AMPLIFIED)
    )
    if with_flip:
        pytest.importorskip("flip_evaluator")
        from matplotlib import colormaps

        (found,) = metrics.flip_maps(other[None], uncached[None])
        expected = visible(other, uncached)
        assert found.min() < FLIP_LIGHTEST
        np.testing.assert_array_equal(
            expected, colormaps["magma"](np.clip(found / FLIP_LIGHTEST, 0, 1))[..., :3]
        )
    else:
        monkeypatch.setitem(sys.modules, "flip_evaluator", None)
        assert visible(other, uncached) is None
        expected = difference(other, uncached)
    picture = grid(
        [GridRow("a", condition, uncached, (other,)), GridRow("b", condition, other, (uncached,))],
        ["quick"],
        "a title that is longer than the picture is wide and so needs several lines",
    )
    pixels = np.asarray(picture)

    def has(image: np.ndarray) -> bool:
        large = np.repeat(np.repeat(image, 6, 0), 6, 1)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, large.shape)
        return bool((windows == large).all((-1, -2, -3)).any())

    for image in (condition, (uncached * 255 + 0.5).astype(np.uint8),
                  (expected * 255 + 0.5).astype(np.uint8)):  # fmt: skip
        assert has(image)


def test_the_plot_has_a_line_a_method_and_two_panels_a_condition(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    from PIL import Image

    from hgc.evaluation.pictures import pareto

    drawn = []
    plain = Axes.errorbar

    def errorbar(self, x, y, *arguments, **named):
        drawn.append((named["label"], list(x), list(y)))
        return plain(self, x, y, *arguments, **named)

    titles = []
    monkeypatch.setattr(Axes, "errorbar", errorbar)
    monkeypatch.setattr(Axes, "set_title", lambda self, label: titles.append(label))
    rows = [
        _row({"distance": _NONE}, name="uncached", method="fewer steps", cached=False),
        _row({"distance": Summary(0.01, 0.01, 0.01, 0.02)}, name="slow", sd15=8),
        _row(),
        _row(
            {"distance": Summary(0.04, 0.04, 0.04, 0.06), "loss": Summary(0.02, 0.01, 0.03)},
            name="5 steps", method="fewer steps", cached=False,
        ),
    ]  # fmt: skip
    pareto(rows, tmp_path / "pareto.png")
    assert drawn == [
        ("hgc", [5.0, 8.0], [0.03, 0.01]), ("hgc", [5.0, 8.0], [-1.2, -1.2]),
        ("fewer steps", [5.0], [0.04]), ("fewer steps", [5.0], [2.0]),
    ]  # fmt: skip
    assert titles == [f"{rows[0].condition}, {rows[0].scenes} scenes"]
    assert Image.open(tmp_path / "pareto.png").width > 300


def test_placing_labels_looks_at_what_is_in_the_panel_only(tmp_path, monkeypatch):
    """The line of no loss spans the panel, however far away a whole TMAC is."""
    pytest.importorskip("matplotlib")
    from hgc.evaluation import pictures

    drawn, seen = pictures._drawn_pixels, []

    def looked_at(axis):
        seen.append((axis.get_window_extent(), drawn(axis)))
        return seen[-1][1]

    monkeypatch.setattr(pictures, "_drawn_pixels", looked_at)
    pictures.pareto([_row(sd15=30e-6)], tmp_path / "pareto.png")
    assert len(seen) == 2
    for frame, pixels in seen:
        assert 0 < len(pixels) < 1000
        assert (pixels >= frame.min - 1).all() and (pixels <= frame.max + 1).all()


def test_labels_of_the_plot_cover_neither_each_other_nor_a_point(tmp_path, monkeypatch):
    """Twelve names on points that lie closer together than the names are long."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot
    from matplotlib.text import Annotation, Text

    from hgc.evaluation.pictures import pareto

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    random = np.random.default_rng(11)
    rows = [
        _row(
            {"distance": Summary(distance, distance, distance, 2 * distance)}, macs,
            name=f"a plan of number {i}", method=("hgc", "fewer steps")[i % 2],
        )
        for i, (macs, distance) in enumerate(random.uniform((4, 0.01), (7, 0.04), (12, 2)))
    ]  # fmt: skip
    pareto(rows, tmp_path / "pareto.png")
    (figure,) = drawn
    monkeypatch.undo()
    try:
        for axis in figure.axes:
            labels = [t for t in axis.texts if isinstance(t, Annotation)]
            assert {t.get_text() for t in labels} == {row.name for row in rows}
            boxes = [Text.get_window_extent(t) for t in labels]
            points = axis.transData.transform([t.xy for t in labels])
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:i])
                assert not any(box.contains(*point) for point in points)
                assert axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1)
                assert axis.bbox.containsy(box.y0) and axis.bbox.containsy(box.y1)
    finally:
        pyplot.close(figure)


# Benchmark


def test_random_weights_keep_a_pipeline_finite():
    with torch.device("meta"):
        unet = type(models.sd15_unet()).from_config(models.sd15_unet().config)
    unet = random_weights(unet, "cpu", torch.float32)
    out = unet(torch.randn(2, 4, 16, 16), 10, encoder_hidden_states=models.text(0, 2)).sample
    assert out.isfinite().all() and 1e-3 < out.std() < 1e3
    assert not any(p.requires_grad for p in unet.parameters())
    assert unet.conv_in.weight.std() == pytest.approx(1 / math.sqrt(36), rel=0.2)
    assert (unet.conv_norm_out.weight == 1).all() and (unet.conv_in.bias == 0).all()


def test_percentiles_of_a_timing():
    timing = Timing((3.0, 1.0, 2.0, 4.0, 5.0))
    assert timing.median == 3.0
    assert timing.percentile(0.2) == pytest.approx(1.8)
    assert timing.percentile(0.8) == pytest.approx(4.2)
    assert Timing((7.0,)).percentile(0.8) == 7.0


def test_bench_compares_each_plan_with_both_uncached_runs_and_leaves_nothing_behind():
    pipe = models.sd15_pipeline()
    before = dict(pipe.unet.__dict__)
    order = []
    found = bench(
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
        bench(pipe, [], height=32, width=32, repeats=0)

    def fail(label, done, total):
        if label.startswith("turbo"):
            raise _Interrupted

    with pytest.raises(_Interrupted):
        bench(
            pipe, [Config.preset("turbo")], height=32, width=32, steps=2, repeats=1,
            on_progress=fail,
        )  # fmt: skip
    assert not pipe.unet._forward_hooks and "forward" not in vars(pipe.unet)
