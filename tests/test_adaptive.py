"""Key evaluations that a run places itself, by the error of the cache that it measures."""

from __future__ import annotations

import itertools
import json

import models
import pytest
import torch
from commands import refused, run
from diffusers import (
    DDIMScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
)

import hgc
from hgc import Config, ConfigError, StepPlan
from hgc.planning.config import Calibration
from hgc.planning.rule import bounds, longest_gap
from hgc.run.adaptive import AdaptiveSchedule
from hgc.run.cache import Cache
from hgc.run.evaluation import Evaluation

STEPS = 12
RULE = Config(
    name="rule",
    num_evaluations=STEPS,
    key_steps=(0, 2, 6, 10),
    depth=2,
    guidance="reuse",
    feature_damping=0.7,
    difference_damping=0.4,
)
# The errors of random weights are large: this makes distances of several lengths.
ADAPTIVE = RULE.replace(adaptive=0.2)


@pytest.fixture
def pipe():
    return models.sd15_pipeline(models.small_unet(), models.small_controlnet())


def draw(pipe, config=None, **changes):
    """Latents of one call, and the report."""
    with hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
        latents = models.draw(pipe, **{"steps": STEPS, **changes})
        return latents, installed.report()


def keys_of(report):
    return tuple(row.index for row in report.rows if row.depth == "full")


# -- configurations -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptive": -0.1}, r"Config.adaptive must lie in \[0.0, 1000.0\]; got -0.1"),
        ({"adaptive": True}, "Config.adaptive must be a finite number; got True"),
        ({"adaptive": float("nan")}, "Config.adaptive must be a finite number"),
        ({"adaptive": 0.1, "max_gap": 0}, "Config.max_gap must be an integer of at least 1; got 0"),
        ({"max_gap": 4}, "Config.max_gap bounds what Config.adaptive decides: set both"),
        ({"adaptive": 0.1, "key_steps": None}, "Config.adaptive needs Config.key_steps"),
        (
            {"adaptive": 0.1, "steps": (StepPlan(),) * STEPS},
            "Config.adaptive cannot be used where Config.steps is a plan that is fixed",
        ),
        (
            {
                "adaptive": 0.1,
                "calibration": Calibration("m", "s", 12, 20, 0.3, 0.1, 0.2, 6, 0.3, 8),
            },
            "where Config.calibration was measured on a plan that is fixed",
        ),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        RULE.replace(**changes)


def test_json_keeps_it():
    config = RULE.replace(adaptive=0.15, max_gap=5)
    assert json.loads(config.to_json())["adaptive"] == 0.15
    assert Config.from_json(config.to_json()) == config


def test_what_only_the_run_knows_is_not_planned_or_counted():
    for ask in (
        lambda: hgc.plan(ADAPTIVE, STEPS),
        lambda: hgc.count_macs(models.small_unet(), None, ADAPTIVE),
    ):
        with pytest.raises(ConfigError, match=r"Config.adaptive=0\.2 leaves the plan to each run"):
            ask()
    assert not ADAPTIVE.is_exact


def test_the_largest_distance_is_twice_the_rules():
    assert longest_gap(RULE.replace(adaptive=1.0), STEPS) == 8
    assert longest_gap(RULE.replace(adaptive=1.0, max_gap=3), STEPS) == 3
    every = RULE.replace(key_steps=tuple(range(STEPS)), adaptive=1.0)
    assert longest_gap(every, STEPS) == 2


def test_the_command_line_shows_the_rule_and_the_bounds(tmp_path):
    path = tmp_path / "adaptive.json"
    RULE.replace(name="mine", adaptive=0.1, max_gap=4).to_json(path)
    output = run("plan", "--model", "testbed", "-c", path)
    assert "mine (the rule without adaptive)" in output
    assert "each run places its key evaluations, at most 4 apart" in output
    least, most = bounds(Config.of(str(path)), STEPS)
    assert least.key_steps == (0, 4, 8) and most.key_steps == tuple(range(STEPS))
    said = refused("eval", "--rows", path, "--scenes", 1, "--out", tmp_path / "o")
    assert "Config.adaptive=0.1 leaves the plan to each run" in said


# -- what a run does ------------------------------------------------------------------------


def test_a_threshold_of_zero_is_exact(pipe):
    reference = models.draw(pipe, steps=STEPS)
    zero = RULE.replace(adaptive=0.0)
    assert zero.is_exact and hgc.plan(zero, STEPS) == [StepPlan()] * STEPS
    latents, report = draw(pipe, zero)
    assert torch.equal(latents, reference)
    assert keys_of(report) == tuple(range(STEPS))


def test_where_nothing_is_ever_too_far_distances_double(pipe):
    _, report = draw(pipe, RULE.replace(adaptive=1000.0, max_gap=5, num_evaluations=20), steps=20)
    # 0 and 2 are the rule's for 20 evaluations; then twice 2, and max_gap
    rule = hgc.plan(RULE.replace(num_evaluations=20), 20)
    assert [step.is_key for step in rule[:3]] == [True, False, True]
    assert keys_of(report) == (0, 2, 6, 11, 16)
    why = [report.rows[i].why for i in (0, 2, 6, 11, 16)]
    assert why[:2] == ["plan"] * 2 and why[3:] == ["max_gap"] * 2
    assert why[2].startswith("error ") and why[2].endswith(" over 2")
    assert report.rows[8].why.endswith(" over 4")


def test_decisions_are_one_step_late(pipe):
    """What key evaluation 2 shows says nothing of evaluation 3, which is planned while 2 may still
    be under way on the device."""
    _, report = draw(pipe, RULE.replace(adaptive=1e-6))
    assert keys_of(report) == (0, 2, *range(4, STEPS))
    assert report.rows[3].why == "plan"


def test_errors_are_read_after_their_event_and_two_evaluations_later(pipe, monkeypatch):
    """A device that copies at the last moment: when somebody waits for the copy."""
    expected, report = draw(pipe, ADAPTIVE)
    waits = []

    class Event:
        def __init__(self, copy, value, at):
            self.copy, self.value, self.at = copy, value, at

        def synchronize(self):
            self.copy.copy_(self.value)
            waits.append((self.at, evaluation[0]))

    def to_host(value):
        copy = torch.full_like(value, 1e9)
        return copy, Event(copy, value, evaluation[0])

    evaluation = [-1]
    hook = pipe.controlnet.register_forward_pre_hook(
        lambda *_: evaluation.__setitem__(0, evaluation[0] + 1)
    )
    monkeypatch.setattr("hgc.run.adaptive.to_host", to_host)
    try:
        latents, slow = draw(pipe, ADAPTIVE)
    finally:
        hook.remove()
    assert torch.equal(latents, expected) and keys_of(slow) == keys_of(report)
    assert waits == [(k, k + 2) for k in keys_of(report) if 0 < k < STEPS - 2]


VARIATIONS = {
    "plain": ({}, {}),
    "no guidance": ({}, {"guidance_scale": 1.0}),
    "guess_mode": ({}, {"guess_mode": True}),
    "two images": ({}, {"num_images_per_prompt": 2, "generator": None}),
    "control ends": ({}, {"control_guidance_end": 0.5}),
    "plain reuse": ({"feature_damping": 0.0, "difference_damping": 0.0}, {}),
    "both halves": ({"guidance": "both"}, {}),
    "guidance off": ({"guidance": "off"}, {}),
    "encoder": ({"encoder": "reuse"}, {}),
    "control computed": ({"control": "compute"}, {}),
    "attention": ({"attention": "reuse"}, {}),
    "gate": ({"attention": "reuse", "attention_gate": 0.5}, {}),
    "output": ({"depth": 0, "control": "reuse", "guidance": "both"}, {}),
    "maps": ({"fresh_values": True}, {}),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_run_equals_a_fixed_rule_with_the_key_steps_it_placed(pipe, name):
    """Bit for bit: the forecasts' coefficients are those of the distances that were made."""
    fields, changes = VARIATIONS[name]
    if changes.get("generator", 0) is None:
        changes = {**changes, "generator": [torch.Generator().manual_seed(s) for s in range(2)]}
    config = ADAPTIVE.replace(**fields)
    latents, report = draw(pipe, config, **changes)
    placed = keys_of(report)
    assert placed != RULE.key_steps and len(placed) < STEPS
    assert len(set(_distances(placed))) > 1
    if isinstance(changes.get("generator"), list):
        changes["generator"] = [torch.Generator().manual_seed(s) for s in range(2)]
    expected, fixed = draw(pipe, config.replace(adaptive=None, key_steps=placed), **changes)
    assert torch.equal(latents, expected)
    assert [row.control for row in report.rows] == [row.control for row in fixed.rows]
    assert report.macs == fixed.macs
    if config.depth == 0:
        forecast = [row.macs.total for row in report.rows if row.depth == 0]
        assert forecast and not any(forecast)


def _distances(keys):
    return [b - a for a, b in itertools.pairwise(keys)]


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler], ids=lambda c: c.__name__
)
def test_other_schedulers(scheduler):
    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet(), scheduler)
    latents, report = draw(pipe, ADAPTIVE, steps=STEPS)
    total = len(report.rows)
    fixed = RULE.replace(num_evaluations=total, key_steps=keys_of(report))
    assert torch.equal(latents, draw(pipe, fixed)[0])


def test_what_a_key_evaluation_computes_is_the_nearest_ones_of_the_rule(pipe):
    config = RULE.replace(
        adaptive=1e-6, conditional_key_steps=(10,), control_key_steps=(0, 2, 10), max_gap=2
    )
    rows = draw(pipe, config)[1].rows
    assert keys_of(hgc.Report("", rows, None, 0)) == (0, 2, *range(4, STEPS))
    for row in rows[4:]:
        like = min(RULE.key_steps, key=lambda key: abs(key - row.index))
        assert row.guidance == ("reuse" if like == 10 else "both")
        assert row.control == (("reused",) if like == 6 else ("computed",))


def test_forecasts_go_by_the_evaluations_that_wrote_what_they_read(pipe):
    """ControlNets and both halves are computed at some of the key evaluations only."""
    config = ADAPTIVE.replace(conditional_key_steps=(10,), control_key_steps=(0, 2, 10))
    latents, report = draw(pipe, config)
    placed = keys_of(report)
    controls = tuple(row.index for row in report.rows if row.control == ("computed",))
    halves = tuple(i for i in placed if report.rows[i].guidance == "reuse")
    assert set(placed) > set(controls) and halves
    fixed = config.replace(
        adaptive=None, key_steps=placed, control_key_steps=controls, conditional_key_steps=halves
    )
    assert torch.equal(latents, draw(pipe, fixed)[0])


def test_image_to_image_starts_with_a_key_evaluation():
    pipe = models.sd15_pipeline(
        models.small_unet(), models.small_controlnet(), cls=StableDiffusionControlNetImg2ImgPipeline
    )
    _, report = draw(
        pipe, ADAPTIVE, image=models.picture(3), control_image=models.picture(0), strength=0.7
    )
    first = report.rows[0]
    assert first.index > 0 and first.depth == "full"
    assert any(row.depth != "full" for row in report.rows)


def test_attention_is_reused_after_the_gate(pipe):
    config = ADAPTIVE.replace(attention="reuse", attention_gate=0.5)
    rows = draw(pipe, config)[1].rows
    for row in rows:
        is_key = row.depth == "full"
        computes = row.index < STEPS / 2 if is_key else row.index == 0
        assert row.attention == ("compute" if computes else "reuse")


# -- requests beside and after one another --------------------------------------------------


def test_requests_in_turns_place_their_own(pipe):
    expected = [draw(pipe, ADAPTIVE, seed=seed) for seed in range(2)]
    assert keys_of(expected[0][1]) != keys_of(expected[1][1])
    inner = models.sd15_pipeline(pipe.unet, pipe.controlnet)
    found = []

    def between(pipe, i, t, kwargs):
        if i in (3, 8):
            found.append(models.draw(inner, seed=1, steps=STEPS))
        return {}

    with hgc.install(pipe.unet, pipe.controlnet, config=ADAPTIVE):
        outer = models.draw(pipe, steps=STEPS, callback_on_step_end=between)
    assert torch.equal(outer, expected[0][0])
    assert len(found) == 2 and all(torch.equal(x, expected[1][0]) for x in found)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_after_an_exception_the_next_request_is_right(pipe, at):
    expected, _ = draw(pipe, ADAPTIVE, seed=1)

    def fail(pipe, i, t, kwargs):
        if i == at:
            raise ArithmeticError
        return {}

    with hgc.install(pipe.unet, pipe.controlnet, config=ADAPTIVE) as installed:
        with pytest.raises(ArithmeticError):
            models.draw(pipe, steps=STEPS, callback_on_step_end=fail)
        assert torch.equal(models.draw(pipe, steps=STEPS, seed=1), expected)
        assert installed._engine.registry.last.cache.bytes == 0
        assert not installed._engine.registry.last.schedule._under_way


def test_a_changed_text_is_computed_in_full(pipe):
    rule = RULE.replace(adaptive=1000.0)
    _, report = draw(pipe, rule, **models.change_text(5))
    assert report.rows[5].why == "the text changed" and 5 in keys_of(report)
    # its error could not be measured: what was cached was of the other text
    assert report.rows[7].why == report.rows[4].why


def test_errors_of_float64_are_measured():
    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet())
    pipe.to(torch.float64)
    texts = {f"{n}prompt_embeds": models.text(i).double() for i, n in enumerate(("", "negative_"))}
    _, report = draw(pipe, ADAPTIVE, **texts)
    assert any(row.why.startswith("error") for row in report.rows)


def test_a_bound_of_bytes_is_kept(pipe):
    with pytest.warns(hgc.HgcWarning, match="max_cache_bytes"):
        _, report = draw(pipe, ADAPTIVE.replace(max_cache_bytes=3000))
    assert report.peak_bytes <= 3000
    assert keys_of(report) == tuple(range(STEPS))


def test_kinds_of_evaluations_are_those_of_the_rule(pipe, monkeypatch):
    """One compiled function a kind, however the distances are. What is compiled does not matter
    here, so nothing is."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    kinds = {}
    for config in (RULE, ADAPTIVE):
        with hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
            eager = models.draw(pipe, steps=STEPS)
            installed.compile()
            assert torch.equal(models.draw(pipe, steps=STEPS), eager)
            kinds[config.adaptive] = installed._engine.functions.networks.kinds
    assert set(kinds[0.2]) == set(kinds[None])


# -- what is measured -----------------------------------------------------------------------


def measured(new, olds, *, half=False, is_pair=False, forecast=0.0, guidance="reuse"):
    """The error that a schedule reads two evaluations later, of key evaluation 4 after those at 0,
    and at 2 where there are two ``olds``."""
    config = ADAPTIVE.replace(guidance=guidance, feature_damping=forecast)
    schedule = AdaptiveSchedule(config, 4, STEPS)
    cache, made = Cache(), []
    for i, (old, cut) in enumerate(olds):
        cache.write("feature/2", old, evaluation=2 * i, history=2, half=cut)
        made.append(Evaluation(2 * i, StepPlan()))
    schedule.place(4, made)
    now = Evaluation(4, StepPlan(), half=half)
    schedule.measure(now, {"feature/2": new, "output": new}, cache, is_pair=is_pair)
    assert schedule._read(3) == {}
    return schedule._read(4).get(4)


def test_the_error_is_that_of_the_row_where_it_is_largest():
    old = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    new = old.clone()
    new[1] *= 1.25  # old is 0.8 of it
    new[2] *= 1.1
    assert measured(new, [(old, False)]) == pytest.approx(0.2)
    assert measured(old, [(old, False)]) == 0.0
    # half precision: norms of large features do not overflow
    big = torch.full((1, 64, 32, 32), 1e3, dtype=torch.float16)
    assert measured(big, [(big / 2, False)]) == pytest.approx(0.5, rel=1e-3)


def test_the_error_is_that_of_the_forecast():
    first, second = torch.ones(1, 2, 4, 4), torch.full((1, 2, 4, 4), 2.0)
    new = torch.full((1, 2, 4, 4), 3.0)
    olds = [(first, False), (second, False)]
    # as far ahead as the two are apart
    assert measured(new, olds, forecast=1.0) == pytest.approx(0.0, abs=1e-6)
    assert measured(new, olds) == pytest.approx(1 / 3)


def test_of_a_guidance_pair_the_conditional_half_counts():
    old = torch.ones(4, 2, 4, 4)
    new = torch.cat([3 * old[:2], 1.25 * old[2:]])
    assert measured(new, [(old, False)], is_pair=True) == pytest.approx(0.2)
    assert measured(new, [(old[2:], True)], is_pair=True) == pytest.approx(0.2)
    assert measured(new[2:], [(old, False)], half=True) == pytest.approx(0.2)
    assert measured(new, [(old, False)], is_pair=False) == pytest.approx(2 / 3)
    assert measured(new, [(old, False)], is_pair=True, guidance="both") == pytest.approx(2 / 3)


def test_what_is_no_number_is_computed():
    schedule = AdaptiveSchedule(ADAPTIVE, 4, STEPS)
    schedule._errors, schedule._distances = {2: float("nan")}, {2: 2}
    assert schedule._is_key(4, [0, 2])[0] and schedule._is_key(5, [0, 2, 4])[0]
    schedule._errors = {2: float("inf")}
    assert schedule._is_key(5, [0, 2, 4])[0]


def test_the_distance_follows_the_order_of_the_forecast():
    for forecast, apart in ((0.7, 4), (0.0, 8)):
        config = RULE.replace(
            adaptive=0.4, feature_damping=forecast, num_evaluations=30, max_gap=20
        )
        schedule = AdaptiveSchedule(config, 4, 30)
        # four times the error is allowed: twice the distance to first order, four times to none,
        # but at most twice what it was
        schedule._errors, schedule._distances = {9: 0.1}, {9: 2}
        assert not schedule._is_key(12, [0, 9])[0] and schedule._is_key(13, [0, 9])[0]
        # a quarter of the error is allowed
        schedule._errors, schedule._distances = {9: 1.6}, {9: 8}
        key_at = next(i for i in range(10, 30) if i >= 11 and schedule._is_key(i, [0, 9])[0])
        assert key_at - 9 == (4 if apart == 4 else 2)
