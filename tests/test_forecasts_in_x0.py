"""Evaluations that compute nothing, and those that correct a forecast: x0 on a line in the log-SNR.

The expected outputs are made from what the UNet was given and gave, with the levels of noise that
the scheduler itself goes by.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings

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
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

import hgc
from hgc import Config, ConfigError, StepPlan
from hgc.engine import HgcWarning
from hgc.noise import NoiseLevels

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


def expected(seen, keys, i, prediction, damping, guidance_damping):
    """The output of evaluation ``i`` by those of ``keys``."""
    _, sample, _, alpha, sigma = seen[i]
    past = [seen[k] for k in keys if k < i][-2:]
    x0 = [x0_of(prediction, *row[1:]) for row in past]
    snr = [torch.tensor(row[3] / row[4]).log().item() for row in (*past, seen[i])]
    forecast = x0[-1]
    if len(past) == 2 and snr[1] != snr[0]:
        ahead = (snr[2] - snr[1]) / (snr[1] - snr[0])
        (u0, c0), (u1, c1) = (each.chunk(2) for each in x0)
        conditional = c1 + damping * ahead * (c1 - c0)
        difference = (c1 - u1) + guidance_damping * ahead * ((c1 - u1) - (c0 - u0))
        forecast = torch.cat([conditional - difference, conditional])
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
            seen, keys, i, prediction, config.damping, config.guidance_damping
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
    check(small(name, prediction), prediction, steps=8)


@pytest.mark.parametrize("name", ["UniPC", "Euler", "DDIM"])
def test_image_to_image_begins_later_in_the_schedule(name):
    pipe = small(name, "v_prediction", cls=StableDiffusionControlNetImg2ImgPipeline)

    def draw(pipe, **changes):
        return pipe(**models.request(pipe, steps=12, strength=0.7, **changes))

    config = SKIP.replace(num_evaluations=12, key_steps=(0, 4, 7, 10))
    rows = check(pipe, "v_prediction", config, draw=draw)
    assert rows[0].index > 0
