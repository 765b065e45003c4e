"""The executor on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import models
import pytest
import torch

import hgc
from hgc import Config

pytestmark = pytest.mark.gpu

SOME = Config(
    name="some",
    num_evaluations=10,
    key_steps=(0, 4, 9),
    depth=2,
    guidance="reuse",
    forecast=0.7,
    guidance_forecast=0.7,
)


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def pipe(request):
    if not torch.cuda.is_available():
        pytest.fail("`pytest -m gpu` needs a CUDA GPU, and torch sees none")
    return models.sd15_pipeline().to("cuda", request.param)


@pytest.fixture(autouse=True)
def deterministic():
    """Bitwise comparisons are made under deterministic cuDNN settings."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def draw(pipe, **changes):
    generator = torch.Generator("cuda").manual_seed(0)
    arguments = {
        "prompt_embeds": models.text(0).to("cuda", pipe.unet.dtype),
        "negative_prompt_embeds": models.text(500).to("cuda", pipe.unet.dtype),
        "generator": generator,
        **changes,
    }
    return models.draw(pipe, **arguments)


def test_exact_and_uninstalled_are_bitwise(pipe):
    reference = draw(pipe, steps=10)
    with hgc.install(pipe.unet, pipe.controlnet, config="exact"):
        assert torch.equal(draw(pipe, steps=10), reference)
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME):
        draw(pipe, steps=10)
    assert torch.equal(draw(pipe, steps=10), reference)


def test_halves_are_taken_on_a_gpu_too(pipe):
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        draw(pipe, steps=10)
        rows = installed.report().rows
    assert [row.guidance for row in rows] == ["both"] * 2 + ["reuse"] * 2 + ["both"] + [
        "reuse"
    ] * 4 + ["both"]
    assert {row.why for row in rows} == {"plan"}


def test_nothing_waits_for_the_gpu(pipe):
    """Under torch's sync debug mode no call of the engine may synchronise."""
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME):
        draw(pipe, steps=10)  # warm-up: libraries may synchronise when they load
        installed = {module: module.forward for module in (pipe.unet, pipe.controlnet)}
        for module, forward in installed.items():

            def watched(*args, _forward=forward, **kwargs):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return _forward(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            module.forward = watched
        try:
            draw(pipe, steps=10)
        finally:
            for module, forward in installed.items():
                module.forward = forward
