"""Fitted coefficients: what is recorded is what the executor caches, and fits are least squares."""

from __future__ import annotations

import dataclasses

import models
import pytest
import torch
from diffusers import StableDiffusionControlNetImg2ImgPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

import hgc
from hgc import Config, StepPlan
from hgc.tune.fit import Products, fit
from hgc.warn import HgcWarning

STEPS = 6
RULE = Config(
    num_evaluations=STEPS, key_steps=(0, 2, 4), depth=2, guidance="reuse", feature_damping=0.5,
    difference_damping=0.25,
)  # fmt: skip


def recorded(pipe, *seeds, **changes):
    products = Products((1, 2))
    for seed in seeds:
        rows = None if changes.get("guidance_scale") == 1.0 else 2
        with products.recording(pipe.unet, pipe.controlnet, pair_rows=rows):
            models.draw(pipe, seed, steps=STEPS, **changes)
    return products


@pytest.mark.parametrize("guess_mode", [False, True])
def test_what_is_recorded_is_what_the_cache_holds(sd15, guess_mode):
    products = recorded(sd15, 0, guess_mode=guess_mode)
    # everything is computed until the fourth evaluation, whose plan makes the cache keep all this
    shallow = StepPlan(control="reuse", depth=2, guidance="reuse")
    steps = (*[StepPlan()] * 4, shallow, StepPlan())
    seen = {}

    def look(pipe, i, t, kwargs):
        if i == 3:
            cache = installed._engine.registry.last.cache
            for name in ("feature/2", "control0/residual/0", "control0/residual/1", "guidance"):
                half = name != "guidance"
                seen[name.removeprefix("control0/")] = float(
                    cache.read(name, half=half).double().square().sum()
                )
        return {}

    config = Config(num_evaluations=STEPS, steps=steps)
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        models.draw(sd15, 0, steps=STEPS, guess_mode=guess_mode, callback_on_step_end=look)
    assert len(seen) == 4
    for name, square in seen.items():
        found = products._sums[name][3, 3].item()
        scale = 1.0
        if guess_mode and name.startswith("residual"):
            # the ControlNet returns them scaled, the cache holds them before
            scale = float(torch.logspace(-1, 0, 13)[int(name[-1])]) ** 2
        # the same bits, but for one rounding where the ControlNet has scaled them
        rounding = 2 * torch.finfo(torch.float32).eps if scale != 1.0 else 1e-12
        assert found == pytest.approx(square * scale, rel=rounding), name
    assert not sd15.unet._forward_hooks and not sd15.controlnet._forward_hooks


def test_coefficients_are_those_of_least_squares(sd15):
    products = recorded(sd15, 0, 1)
    fitted = fit(RULE, products)
    assert [s.is_key for s in fitted.steps] == [i in (0, 2, 4) for i in range(STEPS)]
    feature = products.of(["feature/2"])

    def error(coefficients, at, past):
        c = torch.tensor([1.0, *(-c for c in coefficients)], dtype=torch.float64)
        which = [at, *past]
        return float(c @ feature[which][:, which] @ c)

    for at, past in ((1, [0]), (3, [2, 0]), (5, [4, 2])):
        best = fitted.steps[at].forecast
        assert len(best) == len(past)
        for j in range(len(past)):
            for change in (-0.02, 0.02):
                other = list(best)
                other[j] += change
                assert error(best, at, past) < error(other, at, past)
        assert error(best, at, past) < error([1.0, *[0.0] * (len(past) - 1)], at, past)
    assert fitted.steps[3].control_forecast != fitted.steps[3].forecast
    assert fitted.steps[3].guidance_forecast not in (fitted.steps[3].forecast, (1.0,))
    assert fit(RULE, products, order=1).steps[5].forecast == pytest.approx(
        [float(feature[4, 5] / feature[4, 4])], abs=1e-3
    )


def test_a_fitted_plan_comes_nearer(sd15):
    products = recorded(sd15, 0)
    reference = models.draw(sd15, 0, steps=STEPS)

    def distance(config):
        with hgc.install(sd15.unet, sd15.controlnet, config=config):
            return float((models.draw(sd15, 0, steps=STEPS) - reference).norm())

    plain = RULE.replace(feature_damping=0.0, difference_damping=0.0)
    assert distance(fit(plain, products, order=1)) < distance(plain)


def test_without_guidance_and_without_a_controlnet(sd15):
    products = recorded(sd15, 0, guidance_scale=1.0)
    assert products.of(["guidance"]) is None
    fitted = fit(RULE.replace(guidance="both"), products)
    assert fitted.steps[1].guidance_forecast == (1.0,)
    bare = models.pipeline(hgc_class(), sd15.unet)
    alone = Products((1,))
    with alone.recording(bare.unet, None, pair_rows=2):
        models.draw(bare, 0, steps=STEPS, image=None)
    assert alone.of(["residual/0"]) is None
    assert fit(RULE.replace(depth=1), alone).steps[1].control_forecast is None


def hgc_class():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline


def test_residuals_have_coefficients_of_their_own(sd15):
    def draw(**changes):
        shallow = StepPlan(control="reuse", depth=1, forecast=(0.5,), **changes)
        config = Config(num_evaluations=STEPS, steps=(*[StepPlan()] * 3, *[shallow] * 3))
        with hgc.install(sd15.unet, sd15.controlnet, config=config):
            return models.draw(sd15, 0, steps=STEPS)

    # nothing is left of a residual times zero
    assert torch.equal(draw(control_forecast=(0.0,)), draw_off(sd15))
    assert torch.equal(draw(), draw(control_forecast=(0.5,)))
    assert not torch.equal(draw(), draw(control_forecast=(1.0,)))


def draw_off(pipe):
    off = StepPlan(control="off", depth=1, forecast=(0.5,))
    config = Config(num_evaluations=STEPS, steps=(*[StepPlan()] * 3, *[off] * 3))
    with hgc.install(pipe.unet, pipe.controlnet, config=config):
        return models.draw(pipe, 0, steps=STEPS)


def test_a_run_of_another_length_follows_the_rule(sd15):
    fitted = fit(RULE, recorded(sd15, 0)).replace(name="fitted")
    with hgc.install(sd15.unet, sd15.controlnet, config=RULE):
        expected = models.draw(sd15, 0, steps=STEPS + 3)
    with hgc.install(sd15.unet, sd15.controlnet, config=fitted) as installed:
        with pytest.warns(HgcWarning, match="'fitted' is for 6 evaluations; this run has 9"):
            found = models.draw(sd15, 0, steps=STEPS + 3)
        assert sum(row.plan.is_key for row in installed._engine.registry.last.report) < STEPS + 3
    assert torch.equal(found, expected)


def test_json_keeps_the_coefficients():
    step = StepPlan(control="reuse", depth=1, control_forecast=(1.25, -0.25))
    config = Config(num_evaluations=2, key_steps=(0,), steps=(StepPlan(), step))
    assert Config.from_json(config.to_json()) == config
    assert dataclasses.replace(step, control_forecast=None).of_residuals == step.forecast
    with pytest.raises(ValueError, match=r"StepPlan\.control_forecast must be a non-empty tuple"):
        StepPlan(control_forecast=())


@pytest.mark.parametrize(
    "changes", [{"controlnet_conditioning_scale": 0.0}, {"control_guidance_start": 0.5}]
)
def test_residuals_that_are_zero(sd15, changes):
    fitted = fit(RULE, recorded(sd15, 0, **changes))
    for step in fitted.steps:
        assert all(abs(c) < 10 for c in (*step.of_residuals, *step.forecast))


def test_one_network_with_several_conditions(sd15):
    both = models.sd15_pipeline(sd15.unet, MultiControlNetModel([sd15.controlnet, sd15.controlnet]))
    products = recorded(both, 0, image=[models.picture(0), models.picture(1)])
    assert products.of(["residual/0"]).shape == (STEPS, STEPS)


def test_a_part_of_a_run_is_not_calibrated():
    pipe = models.sd15_pipeline(cls=StableDiffusionControlNetImg2ImgPipeline)
    one = {
        "prompt_embeds": models.text(1), "negative_prompt_embeds": models.text(2),
        "image": models.picture(0), "control_image": models.picture(1), "strength": 0.6,
    }  # fmt: skip
    with pytest.raises(ValueError, match="6 evaluations of its 10 timesteps"):
        hgc.calibrate(pipe, [one], max_macs=0.5, steps=10, trials=4)
