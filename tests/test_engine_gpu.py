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


@pytest.mark.parametrize("config", [SOME, SOME.replace(adaptive=0.3)], ids=["rule", "adaptive"])
def test_nothing_waits_for_the_gpu(pipe, config):
    """Under torch's sync debug mode no call of the engine may synchronise."""
    with hgc.install(pipe.unet, pipe.controlnet, config=config):
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


def test_key_evaluations_that_a_run_places_do_not_hang_on_timing(pipe):
    """Whether the device is ahead of the host or far behind, the decisions are the same, and the
    picture is that of a fixed rule with the key steps that were placed."""
    config = SOME.replace(adaptive=0.3, num_evaluations=16)
    found = []
    for busy in (False, True, True):
        with hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
            if busy:
                torch.cuda._sleep(500_000_000)
            latents = draw(pipe, steps=16)
            rows = installed.report().rows
        found.append((latents, tuple(row.index for row in rows if row.depth == "full")))
    placed = found[0][1]
    assert 2 < len(placed) < 16 and any(row.why.startswith("error ") for row in rows)
    fixed = config.replace(adaptive=None, key_steps=placed)
    with hgc.install(pipe.unet, pipe.controlnet, config=fixed):
        expected = draw(pipe, steps=16)
    for latents, keys in found:
        assert keys == placed and torch.equal(latents, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_evaluations_follow_the_eager_ones(pipe, mode):
    """Three runs: the first compiles, the second records the graphs, the third replays them."""
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        eager = [draw(pipe, steps=10, prompt_embeds=text(pipe, s)).float() for s in range(3)]
        installed.compile(mode=mode)
        kinds = None
        for seed in range(3):
            out = draw(pipe, steps=10, prompt_embeds=text(pipe, seed)).float()
            # another compiler rounds otherwise at every layer of ten evaluations
            bound = 64 * torch.finfo(pipe.unet.dtype).eps * eager[seed].abs().max()
            assert (out - eager[seed]).abs().max() <= bound
            assert kinds is None or kinds == installed._compiled.kinds
            kinds = installed._compiled.kinds
    torch._dynamo.reset()


def text(pipe, seed):
    return models.text(seed).to("cuda", pipe.unet.dtype)


def test_nothing_waits_for_the_gpu_when_compiled(pipe):
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        installed.compile(mode="reduce-overhead")
        for _ in range(3):
            draw(pipe, steps=10)
        for role in ("unet", "controlnet"):

            def watched(*args, _run=getattr(installed._compiled, f"run_{role}"), **kwargs):  # noqa: B008
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return _run(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            setattr(installed._compiled, f"run_{role}", watched)
        draw(pipe, steps=10)
    torch._dynamo.reset()
