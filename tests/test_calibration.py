"""Calibration: budgets are kept, what is reported is what was measured, misuse is said."""

from __future__ import annotations

import functools

import models
import pytest
import torch
from diffusers import StableDiffusionControlNetImg2ImgPipeline

import hgc
from hgc.planning.config import Calibration, ConfigError, model_name
from hgc.warn import HgcWarning


def inputs(count=4):
    return [
        {
            "prompt_embeds": models.text(10 + i),
            "negative_prompt_embeds": models.text(50),
            "image": models.picture(i),
            "height": 32,
            "width": 32,
            "guidance_scale": 3.0,
        }
        for i in range(count)
    ]


@functools.cache
def found():
    pipe = models.sd15_pipeline()
    progress = []
    config = hgc.calibrate(
        pipe, inputs(), max_macs=0.5, steps=6, trials=6,
        on_progress=lambda label, done, total: progress.append((done, total)),
    )  # fmt: skip
    return pipe, config, progress


def test_the_budget_is_kept_and_the_models_are_left_as_they_were():
    pipe, config, progress = found()
    record = config.calibration
    count = hgc.count_macs(
        pipe.unet, pipe.controlnet, config, height=32, width=32, tokens=models.text(0).shape[1]
    )
    full = count.full_evaluation.total * 6
    assert count.total <= 0.5 * full
    assert record.macs_share == pytest.approx(count.total / full, abs=1e-6)
    assert "forward" not in vars(pipe.unet) and not pipe.unet._forward_pre_hooks
    assert progress[0] == (1, 6)
    assert all(done <= total for done, total in progress)
    assert record.model == model_name(pipe.unet)
    assert record.scheduler == "UniPCMultistepScheduler"
    assert record.uncached_steps == 6 and record.inputs == 4


@pytest.mark.parametrize("preset", [pytest.param("paper", marks=pytest.mark.slow), "fast"])
def test_a_preset_is_a_budget(preset):
    """The plan that is found costs at most what the preset does, at any number of steps."""
    pipe = models.sd15_pipeline()
    size = {"height": 32, "width": 32, "tokens": models.text(0).shape[1]}
    budget = hgc.count_macs(pipe.unet, pipe.controlnet, preset, **size)
    said = []
    config = hgc.calibrate(
        pipe, inputs(2), preset=preset, steps=10, trials=4, on_progress=lambda *a: said.append(a)
    )
    assert said
    found = hgc.count_macs(pipe.unet, pipe.controlnet, config, **size)
    assert config.name == f"{preset}-calibrated"
    assert found.total / (10 * found.full_evaluation.total) <= budget.total / budget.full.total


def test_the_distance_is_that_of_the_input_kept_out():
    pipe, config, _ = found()
    record = config.calibration

    def latents(steps):
        return pipe(
            **inputs()[3], num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).images  # fmt: skip

    reference = latents(6)
    with hgc.install(pipe, config=config):
        cached = latents(record.steps)
    distance = float((cached - reference).norm() / reference.norm())
    assert record.distance == pytest.approx(distance, rel=1e-3, abs=1e-6)
    assert record.distance == record.distance_worst
    plain = latents(record.fewer_steps)
    distance = float((plain - reference).norm() / reference.norm())
    assert record.fewer_steps_distance == pytest.approx(distance, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_it_is_deterministic_and_survives_json(tmp_path):
    pipe, config, _ = found()
    assert hgc.calibrate(pipe, inputs(), max_macs=0.5, steps=6, trials=6) == config
    config.to_json(tmp_path / "plan.json")
    assert hgc.Config.from_json(tmp_path / "plan.json") == config


@pytest.mark.slow
def test_a_distance_is_kept_to_with_fewer_macs():
    pipe, _, _ = found()
    config = hgc.calibrate(pipe, inputs(2), max_distance=0.5, steps=6, trials=8)
    assert config.calibration.distance <= 0.5
    assert config.calibration.macs_share < 0.9
    with pytest.raises(ValueError, match="max_distance=1e-09: the nearest plan found is at"):
        hgc.calibrate(pipe, inputs(1), max_distance=1e-9, steps=6, trials=4)


def drawn(pipe, config, steps):
    with hgc.install(pipe, config=config):
        return models.draw(pipe, steps=steps)


def test_on_another_model_the_rule_is_followed_with_a_warning():
    _, config, _ = found()
    steps = config.calibration.steps
    other = models.sd15_pipeline(unet=models.sd15_unet(sample_size=8))
    with pytest.warns(HgcWarning, match="was calibrated on UNet2DConditionModel.* follows key_"):
        images = drawn(other, config, steps)
    assert torch.equal(images, drawn(other, config.rule, steps))
    assert not torch.equal(images, drawn(other, config.replace(calibration=None), steps))
    with pytest.warns(HgcWarning, match="Its distance is not measured here"):  # no rule
        written = config.replace(key_steps=None, control_key_steps=None, conditional_key_steps=())
        hgc.install(other.unet, other.controlnet, config=written).uninstall()


def test_at_another_length_the_rule_is_followed_with_a_warning():
    pipe, config, _ = found()
    with pytest.warns(HgcWarning, match=r"evaluations; this run has 9, and follows key_steps"):
        images = drawn(pipe, config, 9)
    assert torch.equal(images, drawn(pipe, config.rule, 9))


@pytest.mark.slow
def test_a_preset_that_is_nearer_is_returned_with_a_warning(monkeypatch):
    """Plans that the search finds are made worse than they are: the presets must win."""
    from hgc.tune import calibrate as calibration

    distances = calibration.Trial.distances

    def worse(self, config, steps, which):
        found = distances(self, config, steps, which)
        own = config is not None and (config.steps is not None or config.name == "calibrated")
        return [10 * d for d in found] if own else found

    monkeypatch.setattr(calibration.Trial, "distances", worse)
    with pytest.warns(HgcWarning, match="the preset '.*' is expected to be nearer on other inputs"):
        config = hgc.calibrate(models.sd15_pipeline(), inputs(), max_macs=0.7, steps=8, trials=6)
    assert config.steps is None and config.calibration is not None
    assert config.calibration.macs_share <= 0.7


def test_at_other_timesteps_the_rule_is_followed_with_a_warning(recwarn):
    _, config, _ = found()
    steps = config.calibration.steps
    for scheduler, warns in (("trailing", True), ("linspace", False)):
        pipe = models.sd15_pipeline()
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, timestep_spacing=scheduler
        )
        recwarn.clear()
        images = drawn(pipe, config, steps)
        said = [str(w.message) for w in recwarn if w.category is HgcWarning]
        assert [("at other timesteps, those of UniPC" in s) for s in said] == [True] * warns, said
        assert torch.equal(images, drawn(pipe, config.rule, steps)) is warns


def test_with_another_scheduler_of_the_same_timesteps_the_rule_is_followed():
    """In a pipeline, and in a loop of one's own."""
    from diffusers import DPMSolverMultistepScheduler

    _, config, _ = found()
    steps = config.calibration.steps
    pipe = models.sd15_pipeline()
    own = pipe.scheduler.config
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(own)
    with pytest.warns(HgcWarning, match="calibrated with UniPC.* is DPMSolverMultistepSch"):
        images = drawn(pipe, config, steps)
    assert pipe.scheduler.timesteps.tolist() == list(config.calibration.timesteps)
    assert torch.equal(images, drawn(pipe, config.rule, steps))

    def loop(scheduler):
        scheduler.set_timesteps(steps)
        text, sample = models.text(3), torch.randn(1, pipe.unet.config.in_channels, 16, 16)
        for t in scheduler.timesteps:
            sample = scheduler.step(pipe.unet(sample, t, text).sample, t, sample).prev_sample
        return sample

    scheduler = DPMSolverMultistepScheduler.from_config(own)
    with (
        torch.no_grad(),
        hgc.install(pipe.unet, config=config, scheduler=scheduler),
        pytest.warns(HgcWarning, match="is DPMSolverMultistepScheduler"),
    ):
        loop(scheduler)


def test_timesteps_that_come_late_are_waited_for_at_the_second_evaluation(monkeypatch):
    """As on a GPU: the copy has an event, and what follows does not hang on when it is there."""
    from hgc.run import run

    waited = []

    class Event:
        def synchronize(self):
            waited.append(len(installed._engine.registry.last.report))

    monkeypatch.setattr(run, "to_host", lambda value: (value.clone(), Event()))
    pipe, config, _ = found()
    steps = config.calibration.steps
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    with (
        hgc.install(pipe, config=config) as installed,
        pytest.warns(HgcWarning, match="at other timesteps"),
    ):
        images = models.draw(pipe, steps=steps)
    assert waited == [1]
    assert torch.equal(images, drawn(pipe, config.rule, steps))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": {"prompt": "a"}}, TypeError, "inputs: expected a list of mappings, got dict"),
        ({"inputs": []}, ValueError, "inputs: expected at least one mapping"),
        ({"max_distance": 0.1}, ValueError, "one of the three"),
        ({"max_macs": None}, ValueError, "one of the three"),
        ({"preset": "fast"}, ValueError, "one of the three"),
        ({"max_macs": None, "preset": "fsat"}, ValueError, "no preset named 'fsat'"),
        ({"max_macs": None, "preset": "exact"}, ValueError, "preset: 'exact' has nothing to calib"),
        ({"max_macs": 1.5}, ValueError, "max_macs: expected a number between 0.0 and 1.0, got 1.5"),
        ({"trials": 1}, ValueError, "trials: expected an integer of at least 4, got 1"),
        ({"steps": 2}, ValueError, "steps: expected an integer of at least 3, got 2"),
        ({"max_macs": 0.01, "trials": 4}, ValueError, "max_macs=0.01: no plan"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"inputs": inputs(1), "max_macs": 0.5, "steps": 6, "trials": 6, **change}
    with pytest.raises(error, match=message):
        hgc.calibrate(models.sd15_pipeline(), arguments.pop("inputs"), **arguments)


def test_a_record_is_checked():
    good = found()[1].calibration
    with pytest.raises(ConfigError, match=r"Calibration\.steps must be an integer"):
        Calibration.from_dict({**vars(good), "steps": "ten"})
    with pytest.raises(ConfigError, match="lacks the field 'distance'"):
        Calibration.from_dict({k: v for k, v in vars(good).items() if k != "distance"})
    with pytest.raises(ConfigError, match=r"Config\.calibration must be"):
        hgc.Config(calibration={"steps": 3})


def test_a_part_of_a_run_is_not_calibrated():
    pipe = models.sd15_pipeline(cls=StableDiffusionControlNetImg2ImgPipeline)
    one = {
        "prompt_embeds": models.text(1), "negative_prompt_embeds": models.text(2),
        "image": models.picture(0), "control_image": models.picture(1), "strength": 0.6,
    }  # fmt: skip
    with pytest.raises(ValueError, match="6 evaluations of its 10 timesteps"):
        hgc.calibrate(pipe, [one], max_macs=0.5, steps=10, trials=4)
