"""Coefficients refined on whole runs, and the outputs' forecast that they include."""

from __future__ import annotations

import dataclasses

import models
import pytest
import torch

import hgc
from hgc import Config, StepPlan
from hgc.planning.config import ConfigError
from hgc.tune.refine import coefficients, refine, widened
from hgc.tune.trial import Trial

STEPS = 6
SHALLOW = StepPlan(control="reuse", depth=1, guidance="reuse", forecast=(1.3, -0.3))
KEY = StepPlan()
PLAIN = (KEY, KEY, SHALLOW, KEY, SHALLOW, dataclasses.replace(KEY, guidance="reuse"))
BLENDS = ((1.0,), (0.9, 0.1), (1.2, -0.1, -0.1), (1.1, -0.2, 0.1), (0.8, 0.2), (1.05, -0.1, 0.02))


def blended(blends=BLENDS):
    steps = [dataclasses.replace(s, output_forecast=b) for s, b in zip(PLAIN, blends, strict=True)]
    return Config(num_evaluations=STEPS, steps=tuple(steps))


def cached(pipe, config, seed=0, **arguments):
    with hgc.install(pipe.unet, pipe.controlnet, config=config):
        return models.draw(pipe, seed, steps=STEPS, **arguments)


def test_an_output_is_combined_with_those_of_key_evaluations(sd15):
    """Against a hook that does the same by hand."""
    past, index = [], iter(range(STEPS))

    def blend(module, args, out):
        i = next(index)
        total = out[0] * BLENDS[i][0]
        for value, coefficient in zip(past, BLENDS[i][1:], strict=False):
            total = torch.add(total, value, alpha=coefficient)
        if PLAIN[i].is_key:
            past.insert(0, out[0].clone())
        return (total,)

    hook = sd15.unet.register_forward_hook(blend)
    expected = cached(sd15, Config(num_evaluations=STEPS, steps=PLAIN))
    hook.remove()
    assert torch.equal(cached(sd15, blended()), expected)
    assert not torch.equal(cached(sd15, Config(num_evaluations=STEPS, steps=PLAIN)), expected)


def test_a_computed_output_by_itself_is_left_alone(sd15):
    plain = cached(sd15, Config(num_evaluations=STEPS, steps=PLAIN))
    assert torch.equal(cached(sd15, blended([(1.0,)] * STEPS)), plain)
    assert torch.equal(cached(sd15, blended([(1.0,), *[(1.0, 0.0)] * (STEPS - 1)])), plain)
    assert not torch.equal(cached(sd15, blended([(1.0,), *[(1.01,)] * (STEPS - 1)])), plain)


def test_outputs_of_before_a_change_are_not_used(sd15):
    """A new text in the middle of a run: the next evaluation is computed, and its output stays as
    it is; the one after it has one key output, too few for its plan."""
    other = models.text(7)

    def change(pipe, i, t, kwargs):
        return {"prompt_embeds": torch.cat([models.text(50), other])} if i == 3 else {}

    drawn = []
    for blends in (BLENDS, (*BLENDS[:4], (1.0,), (1.0,))):
        with hgc.install(sd15.unet, sd15.controlnet, config=blended(blends)) as installed:
            drawn.append(
                models.draw(
                    sd15, 0, steps=STEPS, callback_on_step_end=change,
                    callback_on_step_end_tensor_inputs=["prompt_embeds"],
                )
            )  # fmt: skip
            row = installed.report().rows[4]
        assert row.depth == "full" and row.why != "plan"
    assert torch.equal(*drawn)


def test_the_fields_are_checked():
    with pytest.raises(ConfigError, match=r"StepPlan\.output_forecast must be a non-empty tuple"):
        StepPlan(output_forecast=())
    first = (StepPlan(output_forecast=(1.0, 0.1)), StepPlan())
    with pytest.raises(ConfigError, match="evaluation 0: output_forecast reads an output nothing"):
        hgc.plan(Config(num_evaluations=2, steps=first), 2)
    nothing = (StepPlan(), StepPlan(control="off", depth=0, output_forecast=(0.9,)))
    with pytest.raises(ConfigError, match=r"depth=0 computes nothing, so output_forecast must be"):
        hgc.plan(Config(num_evaluations=2, steps=nothing), 2)
    config = blended()
    assert Config.from_json(config.to_json()) == config
    assert not config.is_exact


def test_macs_do_not_depend_on_it():
    def macs(config):
        unet, net = models.sd15_unet(), models.sd15_controlnet()
        return hgc.count_macs(unet, net, config, num_evaluations=STEPS, height=32, width=32).total

    assert macs(blended()) == macs(Config(num_evaluations=STEPS, steps=PLAIN))


def test_widening_changes_no_bit(sd15):
    rule = Config(
        num_evaluations=STEPS, key_steps=(0, 2, 4), guidance="reuse", feature_damping=0.5,
        difference_damping=0.25, control_key_steps=(0, 2), conditional_key_steps=(4,),
    )  # fmt: skip
    wide = widened(rule)
    assert torch.equal(cached(sd15, wide), cached(sd15, rule))
    # a computed output at each but the first, with those of at most two keys
    assert coefficients(rule) == 2 + 2 + 3 + 3 + 3
    nothing = rule.replace(depth=0, guidance="both", feature_damping=0.5, conditional_key_steps=())
    assert coefficients(nothing) == 1 + 2 + 2 + 3 + 2
    assert torch.equal(cached(sd15, widened(nothing)), cached(sd15, nothing))
    with hgc.install(sd15, config=nothing):
        plain = models.draw(sd15, 0, steps=STEPS)
    with hgc.install(sd15, config=widened(nothing)):
        assert torch.equal(models.draw(sd15, 0, steps=STEPS), plain)
    assert {len(s.x0_correction) for s in widened(nothing).steps} == {0, 1, 2}


def test_the_least_squares_of_a_linear_run():
    """A run that is linear in its coefficients is solved in one round."""
    config = widened(Config(num_evaluations=4, key_steps=(0, 2), guidance="both"))
    best = torch.randn(coefficients(config), generator=torch.Generator().manual_seed(0)) / 10
    columns = torch.randn(12, len(best), 50, generator=torch.Generator().manual_seed(1))

    def values(plan):
        return torch.tensor([c for step in plan.steps[1:] for c in step.output_forecast])

    start = values(config)
    runs = []

    def errors(plan):
        runs.append(plan)
        return list(torch.einsum("p,spx->sx", values(plan) - start - best, columns))

    refined = refine(config, errors, rounds=1).config
    assert len(runs) == 1 + len(best) + 1
    # damped a little, and rounded to five digits
    assert values(refined).sub(start + best).norm() < 0.01 * best.norm()
    assert refined.key_steps == config.key_steps


def test_what_is_expected_of_an_input_is_what_the_others_make_of_it(monkeypatch):
    """Against a refinement that leaves it out, of runs whose errors are mostly noise."""
    from hgc.tune import refine as refining

    monkeypatch.setattr(refining, "_DAMPING", (1e-2,))
    config = widened(Config(num_evaluations=4, key_steps=(0, 2), guidance="both"))
    noise = torch.Generator().manual_seed(0)
    errors_at = torch.randn(8, 20, generator=noise)
    columns = torch.randn(8, coefficients(config), 20, generator=noise)

    def values(plan):
        return torch.tensor([c for step in plan.steps[1:] for c in step.output_forecast])

    def errors(plan, which=range(8)):
        moved = torch.einsum("p,spx->sx", values(plan) - values(config), columns)
        return [(errors_at + moved)[i] for i in which]

    refined = refine(config, errors)
    assert refined.config is not config
    measured = [float(error.norm()) for error in errors(refined.config)]
    for i in range(8):
        others = [j for j in range(8) if j != i]
        without = refine(config, lambda plan, others=others: errors(plan, others)).config
        assert refined.distances[i] == pytest.approx(float(errors(without)[i].norm()), rel=1e-4)
    assert sum(refined.distances) > 1.02 * sum(measured)


def test_what_gains_nothing_is_given_back():
    config = Config(num_evaluations=4, key_steps=(0, 2), guidance="both", feature_damping=0.5)
    found = refine(config, lambda plan: [torch.ones(3)] * 4)
    assert found.config is config and found.distances == pytest.approx([3**0.5] * 4)
    exact = Config.preset("exact")
    assert refine(exact, lambda plan: [torch.zeros(3)]).config is exact


@pytest.mark.parametrize("slope", [1e-4, float("nan")])
def test_steps_that_no_plan_can_take_are_not_tried(slope):
    """Runs that hardly depend on their coefficients, and runs that end in no number."""
    config = widened(Config(num_evaluations=4, key_steps=(0, 2), guidance="both"))

    def errors(plan):
        moved = plan is not config and plan.steps != config.steps
        total = sum(sum(step.output_forecast[1:]) for step in plan.steps)
        return [torch.tensor([1.0 + (slope * total if moved else 0.0), 0.3])] * 2

    assert refine(config, errors).config is config


def test_corrections_of_x0_are_found_again():
    """The runs to come near to are those of a plan whose corrections are known."""
    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet())
    rule = Config(num_evaluations=STEPS, key_steps=(0, 2, 4), depth=0)
    steps = list(widened(rule).steps)
    for i, planted in ((1, (0.05,)), (3, (0.06, -0.04)), (5, (-0.03, 0.05))):
        steps[i] = dataclasses.replace(steps[i], x0_correction=planted)

    def runs(config):
        with hgc.install(pipe, config=config):
            return [models.draw(pipe, seed, steps=STEPS).flatten() for seed in range(3)]

    wanted = runs(rule.replace(steps=tuple(steps)))

    def errors(config):
        return [(a - b) / b.norm() for a, b in zip(runs(config), wanted, strict=True)]

    def mean(config):
        return sum(float(error.norm()) for error in errors(config)) / 3

    refined = refine(rule, errors, rounds=1).config
    assert Config.from_json(refined.to_json()) == refined
    assert any(any(step.x0_correction) for step in refined.steps)
    # the least squares of a run that is nearly linear: what is left is of second order
    assert mean(refined) < 0.1 * mean(rule)


RULES = {
    "shallow": Config(num_evaluations=STEPS, key_steps=(0, 2, 4), guidance="reuse"),
    "fewer steps": Config(num_evaluations=4),
}


@pytest.mark.parametrize("name", ["shallow", pytest.param("fewer steps", marks=pytest.mark.slow)])
def test_real_runs_come_nearer_on_their_inputs_and_on_others(name):
    pipe = models.sd15_pipeline()
    items = [
        (
            pipe,
            {
                "prompt_embeds": models.text(i), "negative_prompt_embeds": models.text(50),
                "image": models.picture(i), "height": 32, "width": 32, "guidance_scale": 3.0,
            },
        )
        for i in range(6)
    ]  # fmt: skip
    trial = Trial(items, STEPS)
    rule = RULES[name]
    steps = rule.num_evaluations
    refined = refine(rule, lambda plan: trial.errors(plan, steps, range(4)), rounds=1).config
    assert Config.from_json(refined.to_json()) == refined

    def mean(config, which):
        distances = trial.distances(config, steps, which)
        return sum(distances) / len(distances)

    assert mean(refined, range(4)) < 0.8 * mean(rule, range(4))
    assert mean(refined, range(4, 6)) < 0.9 * mean(rule, range(4, 6))
