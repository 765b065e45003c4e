"""Coefficients of a plan's own: those of residuals, and a plan written for one length only."""

from __future__ import annotations

import dataclasses

import models
import pytest
import torch

import hgc
from hgc import Config, StepPlan
from hgc.planning.rule import plan
from hgc.warn import HgcWarning

STEPS = 6


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
    rule = Config(
        num_evaluations=STEPS, key_steps=(0, 2, 4), depth=2, guidance="reuse", feature_damping=0.5,
        difference_damping=0.25,
    )  # fmt: skip
    written = rule.replace(name="written", steps=plan(rule, STEPS))
    with hgc.install(sd15.unet, sd15.controlnet, config=rule):
        expected = models.draw(sd15, 0, steps=STEPS + 3)
    with hgc.install(sd15.unet, sd15.controlnet, config=written) as installed:
        with pytest.warns(HgcWarning, match="'written' is for 6 evaluations; this run has 9"):
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
