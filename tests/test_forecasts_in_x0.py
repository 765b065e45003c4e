"""Evaluations that compute nothing, and those that correct a forecast: x0 on a line in the log-SNR.

The expected outputs are made from what the UNet was given and gave, with the levels of noise that
the scheduler itself goes by.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import threading
import warnings
import weakref

import models
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

import hgc
from hgc import Config, ConfigError, StepPlan
from hgc.execute import functions
from hgc.run.noise import NoiseLevels
from hgc.warn import HgcWarning

SKIP = Config(
    name="skip", num_evaluations=8, key_steps=(0, 2, 5), depth=0, damping=0.6, guidance_damping=0.3
)
SCHEDULERS = {
    "UniPC": (UniPCMultistepScheduler, {}),
    "UniPC, Karras": (UniPCMultistepScheduler, {"use_karras_sigmas": True}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M, Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "Euler": (EulerDiscreteScheduler, {}),  # timesteps that are no integers
    "Euler, Karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "DDIM": (DDIMScheduler, {}),
    "DDIM, zero SNR": (
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "Heun": (HeunDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {}),
    "LMS": (LMSDiscreteScheduler, {}),
    "KDPM2 ancestral": (KDPM2AncestralDiscreteScheduler, {}),
}


def small(name="UniPC", prediction="epsilon", **kinds):
    cls, changes = SCHEDULERS[name]
    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet(), **kinds)
    pipe.scheduler = models.scheduler(cls, prediction_type=prediction, **changes)
    return pipe


def alpha_and_sigma(scheduler, index, t):
    """Of the sample that the UNet was given just now, as the scheduler has it."""
    if hasattr(scheduler, "sigmas"):
        between = hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order
        ratio = scheduler.sigmas_interpol[index - 1] if between else scheduler.sigmas[index]
        alpha = float(1 / (1 + ratio.double() ** 2).sqrt())
        return alpha, alpha * float(ratio)
    # bounded as diffusers bounds it where it divides by it
    alpha_squared = max(float(scheduler.alphas_cumprod[int(t)]), 2.0**-24)
    return alpha_squared**0.5, (1 - alpha_squared) ** 0.5


class Watched:
    """What the UNet of a pipeline was given and gave, evaluation by evaluation."""

    def __init__(self, pipe):
        self.seen, self.pipe = [], pipe

    def __enter__(self):
        def hook(module, args, kwargs, out):
            sample, t = args[0], args[1] if len(args) > 1 else kwargs["timestep"]
            index = int(t.storage_offset())
            levels = alpha_and_sigma(self.pipe.scheduler, index, t)
            out = out[0] if isinstance(out, tuple) else out.sample
            self.seen.append((index, sample[:, :4].double(), out.double(), *levels))

        self.handle = self.pipe.unet.register_forward_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, *exc):
        self.handle.remove()


def x0_of(prediction, sample, out, alpha, sigma):
    if prediction == "epsilon":
        return (sample - sigma * out) / alpha
    return alpha * sample - sigma * out if prediction == "v_prediction" else out


def out_of(prediction, sample, x0, alpha, sigma):
    if prediction == "epsilon":
        return (sample - alpha * x0) / sigma
    return (alpha * sample - x0) / sigma if prediction == "v_prediction" else x0


def log_snr(row):
    return math.log(row[3] / row[4])


def expected(seen, keys, i, prediction, damping, guidance_damping, correction=()):
    """The output of evaluation ``i`` by those of ``keys``."""
    _, sample, _, alpha, sigma = seen[i]
    past = [seen[k] for k in keys if k < i][-2:]
    x0 = [x0_of(prediction, *row[1:]) for row in past]
    snr = [log_snr(row) for row in (*past, seen[i])]
    forecast = x0[-1]
    gaps = torch.tensor([log_snr(seen[k]) for k in keys]).double().diff().abs()
    near = min(1.0, float(gaps[gaps > 1e-6].quantile(0.5)) / 0.6)
    damping, guidance_damping = (1 - (1 - each) * near for each in (damping, guidance_damping))
    if len(past) == 2 and snr[1] != snr[0]:
        ahead = (snr[2] - snr[1]) / (snr[1] - snr[0])
        ahead = max(-1.7, min(1.7, ahead))
        (u0, c0), (u1, c1) = (each.chunk(2) for each in x0)
        conditional = c1 + damping * ahead * (c1 - c0)
        difference = (c1 - u1) + guidance_damping * ahead * ((c1 - u1) - (c0 - u0))
        forecast = torch.cat([conditional - difference, conditional])
    for coefficient, value in zip(correction, x0[::-1], strict=False):
        forecast = forecast + coefficient * value
    return out_of(prediction, sample, forecast, alpha, sigma)


def check(pipe, prediction, config=SKIP, **changes):
    with hgc.install(pipe, config=config) as installed, Watched(pipe) as watched:
        draw = changes.pop("draw", models.draw)
        draw(pipe, **changes)
        rows = installed.report().rows
    keys = [row.index for row in rows if row.depth == "full"]
    skipped = [row.index for row in rows if row.depth == 0]
    seen = {row[0]: row for row in watched.seen}
    assert len(skipped) > 2 and all(rows[i - rows[0].index].why == "plan" for i in skipped)
    for i in skipped:
        gave, wanted = seen[i][2], expected(
            seen, keys, i, prediction, config.damping, config.guidance_damping,
            () if config.steps is None else config.steps[i].x0_correction,
        )  # fmt: skip
        # x0 is held in float32, and comes back divided by what it was multiplied with
        size = max(float(row[1].abs().max() + row[2].abs().max()) for row in watched.seen)
        worst = max((row[3] / row[4] + row[4] / row[3]) for row in (seen[k] for k in keys))
        bound = 64 * torch.finfo(torch.float32).eps * size * min(worst, 100.0)
        assert (gave - wanted).abs().max() <= bound, i
    return rows


KINDS = [
    *((name, "v_prediction") for name in SCHEDULERS),
    # noise says nothing of x0 where there is nothing but noise
    *((name, "epsilon") for name in SCHEDULERS if name != "DDIM, zero SNR"),
    *((name, "sample") for name in ("UniPC", "DPM++ 2M", "Euler", "DDIM, zero SNR")),
]


@pytest.mark.parametrize(("name", "prediction"), KINDS)
def test_an_output_says_the_x0_that_is_forecast(name, prediction):
    # runs of second order are computed in full in fewer steps
    steps = 10 if getattr(SCHEDULERS[name][0], "order", 1) == 2 else 8
    check(small(name, prediction), prediction, steps=steps)


def corrected(*coefficients):
    """SKIP with each of its forecasts corrected."""
    steps = list(hgc.plan(SKIP, 8))
    for i, step in enumerate(steps):
        if step.depth == 0:
            values = coefficients[: sum(s.is_key for s in steps[:i])]
            steps[i] = dataclasses.replace(step, x0_correction=values)
    return SKIP.replace(steps=tuple(steps))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_forecast_is_corrected_by_the_x0_of_key_evaluations(prediction):
    pipe = small("Euler", prediction)
    check(pipe, prediction, corrected(0.15, -0.1), steps=8)
    plain, _ = outputs(pipe, SKIP, steps=8)
    assert torch.equal(outputs(pipe, corrected(0.0, -0.0), steps=8)[0], plain)
    assert not torch.equal(outputs(pipe, corrected(0.01), steps=8)[0], plain)


def test_a_third_value_is_kept_for_a_correction():
    pipe = small()
    steps = list(corrected(0.1, -0.1).steps)
    alone = outputs(pipe, SKIP.replace(steps=tuple(steps)), steps=8)[1]
    steps[7] = dataclasses.replace(steps[7], x0_correction=(0.1, -0.1, 0.25))
    _, seen = outputs(pipe, SKIP.replace(steps=tuple(steps)), steps=8)
    assert torch.equal(torch.stack(seen[:7]), torch.stack(alone[:7]))
    with hgc.install(pipe, config=SKIP.replace(steps=tuple(steps))), Watched(pipe) as watched:
        models.draw(pipe, steps=8)
    first, last = watched.seen[0], watched.seen[7]
    more = 0.25 * x0_of("epsilon", *first[1:])
    wanted = alone[7] - more * last[3] / last[4]  # epsilon is (sample - alpha x0) / sigma
    assert (seen[7] - wanted).abs().max() <= 64 * 2**-23 * (wanted.abs() + more.abs()).max()


@pytest.mark.parametrize("name", ["UniPC", "Euler", "DDIM"])
def test_image_to_image_begins_later_in_the_schedule(name):
    pipe = small(name, "v_prediction", cls=StableDiffusionControlNetImg2ImgPipeline)

    def draw(pipe, **changes):
        return pipe(**models.request(pipe, steps=12, strength=0.7, **changes))

    config = SKIP.replace(num_evaluations=12, key_steps=(0, 4, 7, 10))
    rows = check(pipe, "v_prediction", config, draw=draw)
    assert rows[0].index > 0


def test_other_channels_beside_the_latents():
    """An inpainting UNet is given a mask and the masked picture too."""
    pipe = models.sd15_pipeline(
        models.small_unet(in_channels=9), models.small_controlnet(),
        cls=StableDiffusionControlNetInpaintPipeline,
    )  # fmt: skip

    def draw(pipe, **changes):
        return pipe(**models.request(pipe, steps=8, strength=1.0, **changes))

    check(pipe, "epsilon", draw=draw)


def test_without_guidance_the_batch_goes_by_the_first_damping():
    pipe = small()
    alone = SKIP.replace(guidance_damping=None)
    latents = {}
    for config in (SKIP, alone):
        with hgc.install(pipe, config=config):
            latents[config.guidance_damping] = models.draw(pipe, steps=8, guidance_scale=1.0)
    assert torch.equal(latents[0.3], latents[None])


# -- gains -----------------------------------------------------------------------------------


def shallow(gain, guidance_damping=None, steps=6):
    return Config(
        name="shallow", num_evaluations=steps, key_steps=(*range(0, steps, 2),), guidance="reuse",
        feature_damping=0.7, difference_damping=0.4,
        damping=0.6, guidance_damping=guidance_damping, gain=gain,
    )  # fmt: skip


def outputs(pipe, config, **changes):
    with hgc.install(pipe, config=config) as installed, Watched(pipe) as watched:
        latents = models.draw(pipe, **changes)
        assert {row.why for row in installed.report().rows} == {"plan"}
    return latents, [row[2] for row in watched.seen]


def test_a_gain_is_a_share_of_the_way_from_the_forecast_to_the_layers():
    pipe = small()
    skip = SKIP.replace(num_evaluations=6, key_steps=(0, 2, 4), guidance_damping=None)
    plain, whole = outputs(pipe, shallow(1.0))
    nothing, forecast = outputs(pipe, shallow(0.0))
    skipped, _ = outputs(pipe, skip)
    assert torch.equal(plain, outputs(pipe, shallow(1.0, guidance_damping=0.2))[0])
    assert torch.allclose(nothing, skipped, rtol=0, atol=float(64 * 2**-23 * skipped.abs().max()))
    # the first evaluation that the plans differ at is given the same by all three
    assert torch.equal(whole[0], forecast[0])
    half = outputs(pipe, shallow(0.25))[1][1]
    wanted = forecast[1] + 0.25 * (whole[1] - forecast[1])
    assert not torch.allclose(whole[1], forecast[1])
    assert (half - wanted).abs().max() <= 16 * 2**-23 * wanted.abs().max()


def test_a_gain_counts_less_where_key_evaluations_are_near():
    """As much less as a damping takes: by the median distance of neighbours, beside 0.6."""
    pipe, steps = small(), 40
    made = {
        gain: outputs(pipe, shallow(gain, steps=steps), steps=steps)[1][1]
        for gain in (0.0, 0.25, 1.0)
    }
    pipe.scheduler.set_timesteps(steps)
    alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    log_snr = 0.5 * (alphas / (1 - alphas)).log()
    spacing = float(log_snr[::2].diff().quantile(0.5)) / 0.6
    assert spacing < 0.8
    wanted = made[0.0] + 0.25 * spacing * (made[1.0] - made[0.0])
    assert not torch.allclose(made[1.0], made[0.0])
    assert (made[0.25] - wanted).abs().max() <= 16 * 2**-23 * wanted.abs().max()


def test_plans_that_forecast_nothing_are_refused():
    key = StepPlan()
    for step, match in (
        (StepPlan(control="reuse", depth=1, gain=0.5), "gain=0.5 corrects a forecast of x0"),
        (StepPlan(gain=0.5, damping=0.5), "gain=0.5 corrects a forecast of x0"),
        (StepPlan(damping=0.5), "damping is of a forecast that nothing reads"),
        (StepPlan(control="off", depth=0, guidance_damping=0.5), "guidance_damping needs damping"),
        (StepPlan(control="off", depth=0, x0_correction=(0.1,)), "x0_correction needs damping"),
        (StepPlan(x0_correction=(0.1,)), "x0_correction needs damping"),
        (
            StepPlan(control="off", depth=0, damping=0.5, x0_correction=(0.1, 0.1)),
            "x0_correction reads 2 key evaluations; 1 came before",
        ),
    ):
        with pytest.raises(ConfigError, match=f"evaluation 1: {match}"):
            hgc.plan(Config(num_evaluations=2, steps=(key, step)), 2)
    with pytest.raises(ConfigError, match=r"StepPlan.damping must lie in \[-2.0, 2.0\]; got 3"):
        StepPlan(damping=3)
    with pytest.raises(ConfigError, match=r"StepPlan.x0_correction must be a tuple; got 0.1"):
        StepPlan(x0_correction=0.1)


def test_a_rule_and_its_plan_are_the_same_as_json():
    assert Config.from_json(SKIP.to_json()) == SKIP
    steps = tuple(hgc.plan(SKIP, 8))
    assert {step.damping for step in steps if step.depth == 0} == {SKIP.damping}
    written = Config(num_evaluations=8, steps=steps)
    assert Config.from_json(written.to_json()) == written
    assert Config.from_json(corrected(0.15, -0.1).to_json()) == corrected(0.15, -0.1)


# -- nothing is launched ---------------------------------------------------------------------


class Launched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


VIEWS = {"slice", "view", "alias", "_unsafe_view", "split", "as_strided", "detach"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_evaluation_launches_its_forecast_and_nothing_else(dtype):
    pipe = small()
    for model in (pipe.unet, pipe.controlnet):
        model.to(dtype)
    launched = []
    text, cond = models.text(1, 2).to(dtype), models.picture(0).repeat(2, 1, 1, 1).to(dtype)
    pipe.scheduler.set_timesteps(8)
    sample = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1).to(dtype)
    with torch.no_grad(), hgc.install(pipe, config=SKIP) as installed:
        for t in pipe.scheduler.timesteps:
            with Launched() as ops:
                down, mid = pipe.controlnet(sample, t, text, cond, return_dict=False)
                out = pipe.unet(
                    sample, t, text, down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                ).sample  # fmt: skip
            launched.append([op for op in ops.ops if op not in VIEWS])
            sample = sample - 0.1 * out.mean(0, keepdim=True)
        macs = [row.macs.total for row in installed.report().rows]
    assert out.dtype == dtype
    follows_key = False
    for step, ops, done in zip(hgc.plan(SKIP, 8), launched, macs, strict=True):
        if step.depth == 0:
            # what the last two key evaluations differ by is made once
            once = {"sub"} if follows_key else set()
            assert len(ops) <= 5 + len(once)
            assert set(ops) <= {"lerp", "mul", "add_", "_to_copy"} | once
            assert done == 0
        else:
            assert len(ops) > 100 and done > 0
        follows_key = step.is_key


def test_residuals_that_somebody_reads_are_the_fresh_ones():
    pipe = small()
    text, cond = models.text(1, 2), models.picture(0).repeat(2, 1, 1, 1)
    sample = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
    pipe.scheduler.set_timesteps(8)
    schedule = pipe.scheduler.timesteps
    with torch.no_grad():
        plain = [pipe.controlnet(sample, t, text, cond, return_dict=False)[1] for t in schedule]
        with hgc.install(pipe, config=SKIP):
            for t, wanted in zip(schedule, plain, strict=True):
                down, mid = pipe.controlnet(sample, t, text, cond, return_dict=False)
                pipe.unet(
                    sample, t, text, down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                )  # fmt: skip
                assert torch.equal(mid + 0.0 * mid, wanted)


# -- changes in a run, and other runs ------------------------------------------------------------


def test_what_changes_in_a_run_is_computed_in_full():
    pipe = small()
    with hgc.install(pipe, config=SKIP) as installed:
        models.draw(pipe, steps=8, **models.change_text(3))
        rows = installed.report().rows
    assert [row.depth for row in rows] == ["full", 0, "full", "full", 0, "full", 0, 0]
    assert rows[3].why == "the text changed"


@pytest.mark.parametrize("control", ["off", "reuse"])
def test_an_evaluation_made_full_after_its_controlnet_has_its_residuals(control):
    """The UNet's arguments change at an evaluation whose ControlNet was left out."""
    pipe = small()
    text, cond = models.text(1, 2), models.picture(0).repeat(2, 1, 1, 1)
    sample = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
    pipe.scheduler.set_timesteps(3)
    depth = 0 if control == "off" else 1
    plan = (StepPlan(), StepPlan(control=control, depth=depth), StepPlan())
    found = []
    for config in (Config(num_evaluations=3, steps=plan), None):
        installed = None if config is None else hgc.install(pipe, config=config)
        with torch.no_grad():
            for i, t in enumerate(pipe.scheduler.timesteps):
                mask = torch.ones(2, models.TOKENS) if i == 1 else None
                down, mid = pipe.controlnet(sample, t, text, cond, return_dict=False)
                out = pipe.unet(
                    sample, t, text, encoder_attention_mask=mask,
                    down_block_additional_residuals=down, mid_block_additional_residual=mid,
                ).sample  # fmt: skip
                if i == 1:
                    found.append(out)
        if installed is not None:
            installed.uninstall()
    assert torch.equal(*found)


def test_threads_and_interleaved_runs():
    """One installation serves two pipelines of other schedulers, told the first one's."""
    pipes = [small("UniPC"), small("Euler")]
    pipes[1].unet, pipes[1].controlnet = pipes[0].unet, pipes[0].controlnet
    expected_latents = []
    for pipe in pipes:
        with hgc.install(pipes[0], config=SKIP):
            expected_latents.append(models.draw(pipe, steps=8))
    found = [None, None]
    with hgc.install(pipes[0], config=SKIP):

        def draw(i):
            found[i] = models.draw(pipes[i], steps=8)

        threads = [threading.Thread(target=draw, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        inner = []

        def callback(pipe, i, t, kwargs):
            if i == 3:
                inner.append(models.draw(copy.copy(pipes[1]), steps=8))
            return {}

        outer = models.draw(pipes[0], steps=8, callback_on_step_end=callback)
    for latents, expected in zip((*found, outer, inner[0]), 2 * expected_latents, strict=True):
        assert torch.equal(latents, expected)


# -- which scheduler --------------------------------------------------------------------------


def test_the_scheduler_of_a_pipeline_is_looked_up_at_every_run():
    pipe = small()
    with hgc.install(pipe, config=SKIP):
        models.draw(pipe, steps=8)
        pipe.scheduler = models.scheduler(EulerDiscreteScheduler, prediction_type="v_prediction")
        later = models.draw(pipe, steps=8)
    with hgc.install(pipe.unet, pipe.controlnet, config=SKIP, scheduler=pipe.scheduler):
        assert torch.equal(models.draw(pipe, steps=8), later)


@pytest.mark.parametrize("changes", [{"clip_sample": True}, {"thresholding": True}], ids=str)
def test_x0_that_a_scheduler_clips_is_not_forecast(changes):
    pipe = models.sd15_pipeline()
    pipe.scheduler = models.scheduler(DDIMScheduler, **changes)
    with hgc.install(pipe, config=SKIP), pytest.warns(HgcWarning, match="DDIMScheduler clips x0"):
        clipped = models.draw(pipe, steps=8)
    steps = tuple(step.in_output for step in hgc.plan(SKIP, 8))
    with hgc.install(pipe, config=Config(num_evaluations=8, steps=steps)):
        assert torch.equal(models.draw(pipe, steps=8), clipped)
    pipe.scheduler = models.scheduler(DDIMScheduler)  # clips nothing
    with warnings.catch_warnings(), hgc.install(pipe, config=SKIP):
        warnings.simplefilter("error", HgcWarning)
        models.draw(pipe, steps=8)


@pytest.mark.parametrize("scheduler", [None, FlowMatchEulerDiscreteScheduler()])
def test_without_a_scheduler_outputs_are_forecast_and_one_warning_says_so(scheduler):
    pipe = small()
    said = "scheduler is not known" if scheduler is None else "what FlowMatchEulerDiscreteScheduler"
    installed = hgc.install(pipe.unet, pipe.controlnet, config=SKIP, scheduler=scheduler)
    with installed:
        with pytest.warns(HgcWarning, match=f"{said}.* Outputs are forecast as the model gives"):
            latents = models.draw(pipe, steps=8)
        with warnings.catch_warnings():
            warnings.simplefilter("error", HgcWarning)
            models.draw(pipe, steps=8)
    steps = tuple(step.in_output for step in hgc.plan(SKIP, 8))
    assert {step.damping for step in steps} == {None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", HgcWarning)
        with hgc.install(pipe, config=Config(num_evaluations=8, steps=steps)):
            assert torch.equal(models.draw(pipe, steps=8), latents)
        # a plan that forecasts no output asks for none
        features = Config(name="features", num_evaluations=8, key_steps=(0, 2, 5))
        with hgc.install(pipe.unet, pipe.controlnet, config=features):
            models.draw(pipe, steps=8)


def test_a_pipeline_is_not_kept_alive():
    pipe = small()
    unet = pipe.unet
    installed = hgc.install(pipe, config=SKIP)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    installed.uninstall()
    assert "forward" not in unet.__dict__


def test_a_pipeline_stands_for_its_models():
    pipe = small()
    installed = hgc.install(pipe)
    assert installed.unet is pipe.unet and installed.controlnets == (pipe.controlnet,)
    with pytest.raises(RuntimeError, match="already installed"):
        hgc.install(pipe.unet)
    hgc.uninstall(pipe)


# -- placed by each run ------------------------------------------------------------------------


def test_a_run_places_its_keys_by_the_error_of_x0():
    pipe = small()
    config = Config(
        num_evaluations=12, key_steps=(0, 2, 4, 8), depth=0, damping=0.6, guidance_damping=0.3,
        adaptive=0.3,
    )  # fmt: skip
    with hgc.install(pipe, config=config) as installed:
        latents = models.draw(pipe, steps=12)
        rows = installed.report().rows
    keys = tuple(row.index for row in rows if row.depth == "full")
    assert keys != config.key_steps and 2 < len(keys) < 12
    assert any(row.why.startswith("error") for row in rows)
    with hgc.install(pipe, config=config.replace(adaptive=None, key_steps=keys)):
        assert torch.equal(models.draw(pipe, steps=12), latents)


def test_levels_of_noise_are_those_of_trained_timesteps():
    """Timesteps that are not the scheduler's own: by its alphas alone."""
    scheduler = models.scheduler(DDIMScheduler)
    timesteps = torch.tensor([999.0, 500.0, 500.5, 0.0])
    levels = NoiseLevels(scheduler, timesteps, (), is_own=False)
    ones, zeros = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    alphas = [float(levels.output(ones, zeros, i)) for i in range(4)]  # 1 / sigma
    for i, t in enumerate((999, 500, None, 0)):
        if t is not None:
            sigma = float(1 - scheduler.alphas_cumprod[t].double()) ** 0.5
            assert abs(alphas[i] * sigma - 1) < 4 * torch.finfo(torch.float32).eps
    assert alphas[1] > alphas[2] > 0.999 * alphas[1]


def test_a_scheduler_that_names_no_prediction_type_predicts_noise():
    scheduler = RePaintScheduler()
    assert "prediction_type" not in scheduler.config and NoiseLevels.fits(scheduler)
    levels = NoiseLevels(scheduler, torch.tensor([500]), [0], is_own=False)
    alpha = scheduler.alphas_cumprod[500].double()
    one = torch.ones(1, 1, 1, 1)
    expected = (1 - (1 - alpha).sqrt()) / alpha.sqrt()
    assert abs(levels.x0(one, one, 0).item() - expected) < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("steps", "keys", "share"),
    [(20, 7, 1.0), (20, 9, 0.91), (50, 17, 0.43), (50, 10, 0.73), (50, 1, 1.0)],
)
def test_a_forecast_is_damped_less_where_key_evaluations_are_near(steps, keys, share):
    """What is left of the damping is the median distance in log-SNR of neighbours, beside 0.6."""
    scheduler = models.scheduler(UniPCMultistepScheduler)
    scheduler.set_timesteps(steps)
    at = [round(k * (steps - 1) / max(keys - 1, 1)) for k in range(keys)]
    levels = NoiseLevels(scheduler, scheduler.timesteps, at, is_own=True)
    log_snr = -scheduler.sigmas[:steps].double().log()
    line = float((log_snr[4] - log_snr[3]) / (log_snr[3] - log_snr[1]))
    gap = float(log_snr[at].diff().quantile(0.5)) if keys > 1 else 1.0
    # the sigmas are rounded to fp32: each difference of two logarithms by two roundings
    bound = 16 * torch.finfo(torch.float32).eps / float(log_snr.diff().min())
    assert min(1.0, gap / 0.6) == pytest.approx(share, abs=0.005)  # two digits
    for damping in (1.0, 0.6, 0.25):
        expected = (1 - (1 - damping) * min(1.0, gap / 0.6)) * line
        assert abs(levels.slope(damping, 4, 3, 1) / expected - 1) < bound
    assert levels.slope(0.0, 4, 3, 1) == 0.0


def test_a_forecast_follows_its_line_only_so_far():
    """Where the last step leaps to almost no noise, and where two evaluations are at almost one
    level of it, as when a loop goes back and adds noise again."""
    scheduler = models.scheduler(EulerDiscreteScheduler)
    scheduler.set_timesteps(30)
    levels = NoiseLevels(scheduler, scheduler.timesteps, [0], is_own=True)
    log_snr = -scheduler.sigmas[:30].double().log()
    assert (log_snr[29] - log_snr[27]) / (log_snr[27] - log_snr[24]) > 2
    assert levels.slope(1.0, 29, 27, 24) == 1.7
    assert 0.3 < levels.slope(1.0, 20, 18, 16) < 1.7
    again = torch.tensor([900, 700, 500, 800, 499, 300])
    for key, previous in ((4, 2), (2, 4)):
        scheduler = models.scheduler(DDIMScheduler)
        levels = NoiseLevels(scheduler, again, [0], is_own=False)
        assert abs(levels.slope(0.6, 5, key, previous)) == 0.6 * 1.7


def test_levels_are_waited_for_once_the_first_evaluation_is_launched(monkeypatch):
    """A device that copies at the last moment: when somebody waits for the copy."""
    pipe = small()
    with hgc.install(pipe, config=SKIP):
        expected_latents = models.draw(pipe, steps=8)
    done, waits = [], []

    class Event:
        def __init__(self, copy, value):
            self.copy, self.value = copy, value

        def synchronize(self):
            self.copy.copy_(self.value)
            waits.append(len(done))

    def to_host(value):
        late = torch.full_like(value, 500)
        return late, Event(late, value)

    monkeypatch.setattr("hgc.run.noise.to_host", to_host)
    run_unet = functions.run_unet

    def launched(*args, **kwargs):
        out = run_unet(*args, **kwargs)
        done.append(1)
        return out

    monkeypatch.setattr(functions, "run_unet", launched)
    with hgc.install(pipe, config=SKIP):
        assert torch.equal(models.draw(pipe, steps=8), expected_latents)
    assert waits == [1, 1, 1]  # timesteps, alphas and sigmas, after the first evaluation
