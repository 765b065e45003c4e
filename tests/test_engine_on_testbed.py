"""The cache on the model we ship: bitwise where it must be, and the MACs it says it does."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import hgc
from hgc import testbed
from hgc.report.macs import flop_counter, macs_of

STEPS = 5


@functools.cache
def pipeline(condition):
    return testbed.load_pipeline(list(condition) if isinstance(condition, tuple) else condition)


def draw(condition, *, steps=STEPS, scheduler=UniPCMultistepScheduler, **changes):
    """Latents of one held-out scene."""
    pipe = pipeline(condition)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    scene = testbed.held_out(1)[0]
    names = list(condition) if isinstance(condition, tuple) else [condition]
    images = [testbed.condition_image(scene, name) for name in names]
    arguments = {
        "prompt": scene.caption,
        "image": images if isinstance(condition, tuple) else images[0],
        "num_inference_steps": steps,
        "guidance_scale": testbed.GUIDANCE_SCALE,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **changes,
    }
    return pipe(**arguments).images


CASES = {
    **{name: (name, {}) for name in testbed.CONDITIONS},
    "no guidance": ("segmentation", {"guidance_scale": 1.0}),
    "guess_mode": ("canny", {"guess_mode": True}),
    "control ends": ("depth", {"control_guidance_end": 0.5}),
    "two controlnets": (("segmentation", "softedge"), {}),
    **{
        cls.__name__: ("segmentation", {"scheduler": cls})
        for cls in (DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, HeunDiscreteScheduler)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_exact_and_uninstalled_are_bitwise(name):
    condition, changes = CASES[name]
    pipe = pipeline(condition)
    reference = draw(condition, **changes)
    with hgc.install(pipe.unet, pipe.controlnet, config="exact"):
        assert torch.equal(draw(condition, **changes), reference)
    with hgc.install(pipe.unet, pipe.controlnet, config="turbo"):
        draw(condition, steps=10, **changes)
    assert torch.equal(draw(condition, **changes), reference)


@pytest.mark.parametrize("preset", ["exact", "paper", "balanced", "fast", "turbo"])
def test_counted_macs_are_those_of_a_real_run(preset):
    """Against torch's FLOP counter over the denoising loop, within 0.1%."""
    pipe = pipeline("segmentation")
    count = hgc.Config.preset(preset).num_evaluations
    # text encoder outside of the counted part; latents out, so the VAE is too
    with torch.no_grad():
        texts = pipe.encode_prompt("a circle", "cpu", 1, True)
    arguments = {"prompt": None, "prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    with hgc.install(pipe, config=preset) as installed:
        counter = flop_counter()
        with counter:
            draw("segmentation", steps=count, **arguments)
        report = installed.report()
    real = macs_of(counter)
    counted = hgc.count_macs(
        pipe.unet, pipe.controlnet, preset, num_evaluations=count, height=64,
        tokens=texts[0].shape[1],
    )  # fmt: skip
    assert counted.total == pytest.approx(real.total, rel=1e-3)
    assert counted.paper == pytest.approx(real.paper, rel=1e-3)
    assert report.macs.total == pytest.approx(real.total, rel=1e-3)
    assert [row.why for row in report.rows] == ["plan"] * count


@pytest.mark.parametrize("preset", ["paper", "balanced", "fast", "turbo"])
def test_presets_stay_near_the_uncached_image(preset):
    """Nearer, on a few scenes, than the same pipeline with half the steps of 20 is far."""
    pipe = pipeline("segmentation")
    reference = draw("segmentation", steps=20)
    count = hgc.Config.preset(preset).num_evaluations
    with hgc.install(pipe, config=preset):
        out = draw("segmentation", steps=count)
    few = draw("segmentation", steps=4)
    distance = (out - reference).norm() / reference.norm()
    assert 0 < distance < (few - reference).norm() / reference.norm()
