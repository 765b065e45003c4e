"""The executor on real diffusers classes at small configurations."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import io
import itertools
import pickle
import tomllib
import warnings
from pathlib import Path

import models
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

import hgc
import hgc.models.supported
from hgc import Config, StepPlan
from hgc.warn import HgcWarning

SCHEDULERS = [
    DDIMScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
]
SOME = Config(
    name="some",
    num_evaluations=6,
    key_steps=(0, 3, 5),
    depth=2,
    guidance="reuse",
    feature_damping=0.7,
    difference_damping=0.7,
)


def residue(*modules):
    """Everything an installation could leave behind, by identity."""
    found = []
    for module in modules:
        found.append({k: id(v) for k, v in module.__dict__.items()})
        found.append({k: id(v) for k, v in module.attn_processors.items()})
        for name, child in module.named_modules():
            found.append((name, id(child), sorted(child.__dict__), len(child._forward_hooks)))
    return found


def loop(pipe, config, steps, *, count=None, same=True, seed=0, guidance=True, scale=1.0):
    """Call ControlNet and UNet as a pipeline does; with ``same``, on one input every time.

    Yields the UNet's outputs.
    """
    count = len(steps) if count is None else count
    batch = 2 if guidance else 1
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(1, 4, 16, 16, generator=generator).repeat(batch, 1, 1, 1)
    text = models.text(seed, batch)
    cond = models.picture(seed).repeat(batch, 1, 1, 1)
    schedule = torch.full((count,), 500) if same else torch.arange(count).flip(0) * 40
    added = None
    if pipe.unet.config.addition_embed_type == "text_time":
        added = {
            "text_embeds": models.text(seed + 7, batch)[:, 0, :8],
            "time_ids": torch.ones(batch, 6),
        }
    config = dataclasses.replace(config, num_evaluations=count, steps=tuple(steps))
    outputs = []
    with torch.no_grad(), hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
        for t in schedule:
            down, mid = pipe.controlnet(
                sample, t, text, cond, conditioning_scale=scale, added_cond_kwargs=added,
                return_dict=False,
            )  # fmt: skip
            outputs.append(
                pipe.unet(
                    sample, t, text, added_cond_kwargs=added,
                    down_block_additional_residuals=down, mid_block_additional_residual=mid,
                ).sample
            )  # fmt: skip
            if not same:
                sample = sample - 0.1 * outputs[-1].mean(0, keepdim=True)
        rows = installed._engine.registry.last.report
    return outputs, rows


# -- exact, and uninstall -------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_exact_is_bitwise(sd15, scheduler, guidance):
    pipe = models.sd15_pipeline(sd15.unet, sd15.controlnet, scheduler)
    reference = models.draw(pipe, guidance_scale=guidance)
    with hgc.install(pipe.unet, pipe.controlnet, config="exact"):
        assert torch.equal(models.draw(pipe, guidance_scale=guidance), reference)
    assert torch.equal(models.draw(pipe, guidance_scale=guidance), reference)


VARIATIONS = {
    "guess_mode": {"guess_mode": True},
    "guess_mode without guidance": {"guess_mode": True, "guidance_scale": 1.0},
    "control ends": {"control_guidance_end": 0.5},
    "control starts": {"control_guidance_start": 0.5},
    "scale": {"controlnet_conditioning_scale": 0.37},
    "scale zero": {"controlnet_conditioning_scale": 0.0},
    "two images": {"num_images_per_prompt": 2, "generator": None},
    "wide": {"width": 48, "image": models.picture(0, 32, 48)},
    "odd": {"height": 28, "width": 44, "image": models.picture(0, 28, 44)},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_exact_is_bitwise_in_variations(sd15, name):
    changes = dict(VARIATIONS[name])
    if "generator" in changes:
        changes["latents"] = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    reference = models.draw(sd15, **changes)
    with hgc.install(sd15.unet, sd15.controlnet, config="exact"):
        assert torch.equal(models.draw(sd15, **changes), reference)


def test_exact_is_bitwise_on_sdxl(sdxl):
    reference = models.draw(sdxl)
    with hgc.install(sdxl.unet, sdxl.controlnet, config="exact"):
        assert torch.equal(models.draw(sdxl), reference)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("as_list", [True, False])
def test_exact_is_bitwise_with_two_controlnets(sd15, scales, as_list):
    nets = [sd15.controlnet, models.sd15_controlnet(5)]
    pipe = models.sd15_pipeline(sd15.unet, MultiControlNetModel(nets))
    arguments = {
        "image": [models.picture(0), models.picture(1)],
        "controlnet_conditioning_scale": list(scales),
        "control_guidance_end": [1.0, 0.6],
    }
    reference = models.draw(pipe, **arguments)
    with hgc.install(pipe.unet, nets if as_list else pipe.controlnet, config="exact"):
        assert torch.equal(models.draw(pipe, **arguments), reference)


def test_exact_runs_no_controlnet_at_scale_zero(sd15, monkeypatch):
    calls = []
    block = sd15.controlnet.mid_block
    monkeypatch.setattr(
        block, "forward", lambda *a, _f=block.forward, **k: (calls.append(1), _f(*a, **k))[1]
    )
    installed = hgc.install(sd15.unet, sd15.controlnet, config="exact", trust=(type(block),))
    with installed:
        models.draw(sd15, steps=6, control_guidance_end=0.5)
        report = installed.report()
    assert len(calls) == 3
    assert [row.control for row in report.rows] == [("computed",)] * 3 + [("off",)] * 3


def test_uninstall_leaves_no_residue(sd15):
    before = residue(sd15.unet, sd15.controlnet)
    reference = models.draw(sd15)
    hgc.install(sd15.unet, sd15.controlnet, config="turbo")
    models.draw(sd15, steps=10)
    hgc.uninstall(sd15.unet, sd15.controlnet)
    assert residue(sd15.unet, sd15.controlnet) == before
    assert torch.equal(models.draw(sd15), reference)


# -- reuse is what the plan says -------------------------------------------------------------

POINTS = [
    *(StepPlan(control="reuse", depth=k) for k in range(1, 13)),
    *(StepPlan(control="reuse", depth=k, encoder="reuse") for k in (1, 3, 4, 12)),
    *(StepPlan(control="compute", depth=k) for k in (1, 6)),
    StepPlan(control="off", depth=0),
    StepPlan(control="reuse"),
    StepPlan(control="reuse", attention="reuse"),
    StepPlan(attention="reuse"),
    StepPlan(control="reuse", depth=5, attention="reuse"),
    StepPlan(control="reuse", depth=2, guidance="reuse"),
    StepPlan(control="reuse", depth=2, guidance="reuse", attention="reuse"),
    StepPlan(guidance="reuse"),
    StepPlan(guidance="reuse", attention="reuse", control="reuse"),
]


def close(value, reference, factor=64):
    """Within a few roundings of float32 at the size of the reference."""
    bound = factor * torch.finfo(torch.float32).eps * reference.abs().max()
    return bool((value - reference).abs().max() <= bound)


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("step", POINTS, ids=lambda s: str(s.to_dict()))
def test_reuse_on_an_unchanged_input_is_the_full_evaluation(sd15, step, scale):
    """Cached features of the same input are exact, so every point of the plan space must give the
    full evaluation back: bit for bit, but for the half batch and the scale's rounding."""
    outputs, rows = loop(sd15, Config(), [StepPlan(), StepPlan(), step, step], scale=scale)
    assert [row.plan for row in rows] == [StepPlan(), StepPlan(), step, step]
    for out in outputs[2:]:
        if step.guidance == "both" and scale == 1.0:
            assert torch.equal(out, outputs[0])
        else:
            assert close(out, outputs[0])


@pytest.mark.parametrize("step", POINTS, ids=lambda s: str(s.to_dict()))
def test_reuse_on_sdxl(sdxl, step):
    if isinstance(step.depth, int):
        step = dataclasses.replace(step, depth=min(step.depth, 9))
    outputs, rows = loop(sdxl, Config(), [StepPlan(), StepPlan(), step])
    assert rows[-1].plan == step
    assert close(outputs[-1], outputs[0])


@pytest.mark.parametrize("step", [p for p in POINTS if p.guidance == "both"][:4] + POINTS[-2:])
def test_reuse_is_reuse(sd15, step):
    """On changing inputs the same points must differ from the full evaluation."""
    full, _ = loop(sd15, Config(), [StepPlan()] * 3, same=False)
    reused, _ = loop(sd15, Config(), [StepPlan(), StepPlan(), step], same=False)
    assert torch.equal(full[1], reused[1])
    assert not torch.equal(full[2], reused[2])


def test_guidance_off_copies_the_conditional_half(sd15):
    steps = [StepPlan(), StepPlan(), StepPlan(guidance="off")]
    outputs, _ = loop(sd15, Config(), steps)
    first, second = outputs[2].chunk(2)
    assert torch.equal(first, second)
    assert close(second, outputs[0].chunk(2)[1])


@pytest.mark.parametrize("control", ["compute", "reuse"])
def test_a_scale_for_each_row_of_the_batch(sd15, control):
    """An evaluation of the conditional half takes that half's scales."""
    steps = [StepPlan(), StepPlan(), StepPlan(control=control, depth=2, guidance="off")]
    rows = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1)
    by_rows, _ = loop(sd15, Config(), steps, scale=rows)
    alike, _ = loop(sd15, Config(), steps, scale=0.8)
    assert close(by_rows[2], alike[2]) and not close(by_rows[1], alike[1])


def test_forecast_is_the_linear_combination(sd15):
    """At depth 0 the output itself is forecast: out = 1.5 * newest - 0.5 * one before."""
    steps = [StepPlan()] * 3 + [StepPlan(control="off", depth=0, forecast=(1.5, -0.5))]
    outputs, _ = loop(sd15, Config(), steps, same=False)
    assert close(outputs[3], 1.5 * outputs[2] - 0.5 * outputs[1], factor=8)
    steps[-1] = StepPlan(control="off", depth=0, forecast=(1.0, 0.5, -0.25))
    outputs, _ = loop(sd15, Config(), steps, same=False)
    expected = outputs[2] + 0.5 * outputs[1] - 0.25 * outputs[0]
    assert close(outputs[3], expected, factor=8)


def test_depth_the_model_does_not_have_is_refused(sdxl):
    with pytest.raises(ValueError, match=r"Config.depth must be at most 9.*got 12"):
        hgc.install(sdxl.unet, sdxl.controlnet, config=Config(key_steps=(0,), depth=12))


def test_a_block_that_was_wrapped_and_put_back_is_as_it_was():
    """As DeepCache's package leaves blocks: with their class's forward as an attribute."""
    pipe = models.sd15_pipeline()
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        reference = models.draw(pipe)
    up, _ = installed._engine.structure.boundary(SOME.depth)  # run in part
    block = pipe.unet.up_blocks[up]
    own = block.forward
    for forward, followed in ((own, True), (lambda *a, **k: own(*a, **k), False)):
        block.forward = forward
        with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
            images = models.draw(pipe)
            assert (set(whys(installed)) == {"plan"}) is followed
        assert torch.equal(images, reference) is followed


# -- scales, guidance windows, pairs ----------------------------------------------------------


def whys(installed):
    return [row.why for row in installed.report().rows]


def test_control_ending_is_obeyed(sd15):
    with hgc.install(sd15.unet, sd15.controlnet, config=SOME) as installed:
        models.draw(sd15, steps=6, control_guidance_end=0.7)
        rows = installed.report().rows
    assert [row.control for row in rows] == [
        ("computed",), ("reused",), ("reused",), ("computed",), ("off",), ("off",)
    ]  # fmt: skip
    assert rows[4].depth == "full" and "scale" in rows[4].why


def test_a_controlnet_at_scale_zero_leaves_the_plan_as_it_is(sd15):
    config = SOME.replace(num_evaluations=10, key_steps=(0, 5))
    with hgc.install(sd15, config=config) as installed:
        models.draw(sd15, steps=10, control_guidance_end=0.4)
        rows = installed.report().rows
    assert rows[4].control == ("off",) and "scale" in rows[4].why
    assert [(row.why, row.depth) for row in rows[6:]] == [("plan", SOME.depth)] * 4
    two = [sd15.controlnet, copy.deepcopy(sd15.controlnet)]
    pipe = models.sd15_pipeline(unet=sd15.unet, controlnet=MultiControlNetModel(two))
    with hgc.install(pipe, config=config) as installed:
        models.draw(
            pipe, steps=10, image=[models.picture(0)] * 2, controlnet_conditioning_scale=[1.0, 0.0]
        )
        rows = installed.report().rows
    assert {row.why for row in rows} == {"plan"}
    assert [row.control for row in rows if row.depth != "full"] == [("reused", "off")] * 8


def test_two_images_without_guidance_are_not_a_pair(sd15):
    """The same seed for two prompts: the halves are equal at the first evaluation only."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    arguments = {
        "prompt_embeds": models.text(0, 2),
        "negative_prompt_embeds": None,
        "image": models.picture(0).repeat(2, 1, 1, 1),
        "latents": latents.repeat(2, 1, 1, 1),
        "guidance_scale": 1.0,
        "steps": 8,
    }
    config = Config(num_evaluations=8, key_steps=(0, 4), depth=1, guidance="reuse")
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        models.draw(sd15, **arguments)
        assert {row.guidance for row in installed.report().rows} == {"both"}


def test_perturbed_attention_is_not_halved(sd15):
    """Perturbed-attention guidance without guidance: two rows with equal samples, no pair."""
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    config = Config(num_evaluations=8, key_steps=(0, 4), depth=1, guidance="reuse")
    original = sd15.unet.attn_processors
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    sd15.unet.set_attn_processor({**original, name: PAGIdentitySelfAttnProcessor2_0()})
    try:
        with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
            models.draw(sd15, steps=8)
            assert {row.guidance for row in installed.report().rows} == {"both"}
    finally:
        sd15.unet.set_attn_processor(dict(original))


def test_an_uninstalled_controlnet_is_said(sd15):
    with hgc.install(sd15.unet, config=SOME), pytest.warns(HgcWarning, match="Pass it too"):
        models.draw(sd15)


def test_processors_set_later_are_taken_in(sd15):
    from diffusers.models.attention_processor import AttnProcessor

    original = sd15.unet.attn_processors
    reference = models.draw(sd15)
    config = SOME.replace(attention="reuse")
    try:
        with hgc.install(sd15.unet, sd15.controlnet, config=config):
            models.draw(sd15)
            sd15.unet.set_attn_processor(AttnProcessor())
            plain = models.draw(sd15)
            assert all(
                hasattr(p, "inner") for n, p in sd15.unet.attn_processors.items() if "attn2" in n
            )
        assert all(type(p) is AttnProcessor for p in sd15.unet.attn_processors.values())
        assert (plain - reference).norm() < 0.2 * reference.norm()
    finally:
        sd15.unet.set_attn_processor(dict(original))


def test_halves_only_after_two_evaluations_agreed(sd15):
    config = Config(num_evaluations=8, key_steps=(0, 4), depth=1, guidance="reuse")
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        models.draw(sd15, steps=8)
        assert [row.guidance for row in installed.report().rows] == [
            "both", "both", "reuse", "reuse", "both", "reuse", "reuse", "reuse"
        ]  # fmt: skip


@pytest.mark.parametrize("mode", ["guess_mode", "two controlnets", "conditional keys"])
def test_reuse_stays_near_in_special_modes(sd15, mode):
    pipe, arguments, config = sd15, {}, SOME
    if mode == "guess_mode":
        arguments = {"guess_mode": True}
    if mode == "two controlnets":
        pipe = models.sd15_pipeline(
            sd15.unet, MultiControlNetModel([sd15.controlnet, models.sd15_controlnet(5)])
        )
        arguments = {"image": [models.picture(0), models.picture(1)]}
    if mode == "conditional keys":
        config = SOME.replace(conditional_key_steps=(5,))
    reference = models.draw(pipe, **arguments)
    with hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
        out = models.draw(pipe, **arguments)
        report = installed.report()
    assert [row.depth for row in report.rows] == ["full", 2, 2, "full", 2, "full"]
    assert set(whys_of(report)) == {"plan"}
    assert report.rows[-1].guidance == ("reuse" if mode == "conditional keys" else "both")
    distance = (out - reference).norm() / reference.norm()
    assert 0 < distance < 0.2


def whys_of(report):
    return [row.why for row in report.rows]


def test_controlnets_run_at_their_own_key_steps(sd15, monkeypatch):
    """A key step without them reads every residual from the cache: with the values of the step
    before it is the same evaluation."""
    rule = Config(num_evaluations=6, key_steps=tuple(range(6)), control_key_steps=(0, 2, 3))
    calls = []
    for name in ("controlnet_cond_embedding", "mid_block"):
        monkeypatch.setattr(
            getattr(sd15.controlnet, name), "forward",
            functools.partial(
                lambda name, forward, *a, **k: (calls.append(name), forward(*a, **k))[1],
                name, getattr(sd15.controlnet, name).forward,
            ),
        )  # fmt: skip
    vouched = (type(sd15.controlnet.controlnet_cond_embedding), type(sd15.controlnet.mid_block))
    installed = hgc.install(sd15.unet, sd15.controlnet, config=rule, trust=vouched)
    with installed:
        reused = models.draw(sd15)
        report = installed._engine.registry.last.report
    monkeypatch.undo()
    assert calls.count("mid_block") == 3 and calls.count("controlnet_cond_embedding") == 1
    assert [row.control[0] for row in report] == [
        "computed", "reused", "computed", "computed", "reused", "reused",
    ]  # fmt: skip
    assert all(row.plan.is_key for row in report)

    # the same by hand: diffusers' own UNet on residuals that are held back
    held, forward = [], sd15.controlnet.forward

    def at_intervals(*args, **kwargs):
        at_intervals.index += 1
        if at_intervals.index in (0, 2, 3):
            held[:] = [forward(*args, **kwargs)]
        return held[0]

    at_intervals.index = -1
    sd15.controlnet.forward = at_intervals
    try:
        by_hand = models.draw(sd15)
    finally:
        del sd15.controlnet.forward
    assert torch.equal(reused, by_hand)


def test_img2img_follows_the_plan_from_where_it_starts(sd15):
    pipe = models.sd15_pipeline(
        sd15.unet, sd15.controlnet, cls=StableDiffusionControlNetImg2ImgPipeline
    )
    arguments = {
        "image": models.picture(3), "control_image": models.picture(0), "strength": 0.5,
        "steps": 12,
    }  # fmt: skip
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        models.draw(pipe, **arguments)
        rows = installed.report().rows
    assert [row.index for row in rows] == [6, 7, 8, 9, 10, 11]
    assert rows[0].depth == "full" and 2 in [row.depth for row in rows]


# -- never another request's features --------------------------------------------------------

REQUESTS = {
    "prompt": {"seed": 1},
    "image": {"image": models.picture(7)},
    "size": {"size": 48, "image": models.picture(0, 48)},
    "steps": {"steps": 9},
    "guidance": {"guidance_scale": 2.0},
    "no guidance": {"guidance_scale": 1.0},
    "scale": {"controlnet_conditioning_scale": 0.4},
    "guess_mode": {"guess_mode": True},
    "same": {},
}


def fresh(pipe, config=SOME, **changes):
    """The result in an installation of its own on copied models."""
    other = copy.copy(pipe)
    unet, net = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.controlnet)
    other = type(pipe)(**{**pipe.components, "unet": unet, "controlnet": net}) if True else other
    other.set_progress_bar_config(disable=True)
    with hgc.install(unet, net, config=config):
        return models.draw(other, **changes)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_next_request_equals_a_fresh_one(sd15, name):
    expected = fresh(sd15, **REQUESTS[name])
    with hgc.install(sd15.unet, sd15.controlnet, config=SOME):
        models.draw(sd15)
        assert torch.equal(models.draw(sd15, **REQUESTS[name]), expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda c: c.__name__)
def test_another_scheduler_equals_a_fresh_one(sd15, scheduler):
    other = models.sd15_pipeline(sd15.unet, sd15.controlnet, scheduler)
    expected = fresh(other)
    with hgc.install(sd15.unet, sd15.controlnet, config=SOME):
        models.draw(sd15)
        assert torch.equal(models.draw(other), expected)


def test_another_strength_equals_a_fresh_one(sd15):
    pipe = models.sd15_pipeline(
        sd15.unet, sd15.controlnet, cls=StableDiffusionControlNetImg2ImgPipeline
    )
    arguments = {"image": models.picture(3), "control_image": models.picture(0), "steps": 10}
    expected = fresh(pipe, strength=0.4, **arguments)
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME):
        models.draw(pipe, strength=0.9, **arguments)
        assert torch.equal(models.draw(pipe, strength=0.4, **arguments), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("where", ["controlnet", "unet", "callback"])
def test_after_an_exception_the_next_request_equals_a_fresh_one(sd15, at, where, monkeypatch):
    expected = fresh(sd15, seed=1)
    count = itertools.count()

    def fail(*args, **kwargs):
        if next(count) == at:
            raise Stop
        return {}

    installed = hgc.install(sd15, config=SOME, trust=(torch.nn.Conv2d,))
    with installed:
        module, changes = None, {}
        if where == "callback":
            changes = {"callback_on_step_end": fail}
        else:
            module = {"controlnet": sd15.controlnet, "unet": sd15.unet}[where].conv_in
            module.forward = lambda x: (fail(), type(module).forward(module, x))[1]
        try:
            models.draw(sd15, **changes)
            raised = False
        except Stop:
            raised = True
        finally:
            if module is not None:
                del module.forward
        assert raised or where == "controlnet"  # a plan may call it fewer than `at` times
        assert torch.equal(models.draw(sd15, seed=1), expected)
        assert all(
            run.cache.bytes == 0 for run in installed._engine.registry.runs.values() if run.finished
        )


def test_interleaved_requests_on_one_unet(sd15):
    """B runs whole inside a callback of A, at every step of A."""
    expected_a, expected_b = fresh(sd15), fresh(sd15, seed=1)
    inner = models.sd15_pipeline(sd15.unet, sd15.controlnet)
    results = []

    def callback(pipe, i, t, kwargs):
        results.append(models.draw(inner, seed=1))
        return {}

    with hgc.install(sd15.unet, sd15.controlnet, config=SOME):
        a = models.draw(sd15, callback_on_step_end=callback)
    assert torch.equal(a, expected_a)
    assert len(results) == 6 and all(torch.equal(b, expected_b) for b in results)


def test_threads_that_share_a_unet(sd15):
    import threading

    expected = {seed: fresh(sd15, seed=seed) for seed in range(3)}
    results = {}

    def work(seed):
        pipe = models.sd15_pipeline(sd15.unet, sd15.controlnet)
        results[seed] = [models.draw(pipe, seed=seed) for _ in range(2)]

    with hgc.install(sd15.unet, sd15.controlnet, config=SOME):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, values in results.items():
        assert len(values) == 2 and all(torch.equal(v, expected[seed]) for v in values)


def test_one_step_evaluated_twice_is_computed_in_full(sd15):
    """Tiled pipelines evaluate several tiles at one timestep with one prompt."""
    text, schedule = models.text(0), torch.arange(8).flip(0) * 100
    tiles = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    with torch.no_grad():
        expected = [[sd15.unet(x, t, text).sample for x in tiles] for t in schedule]
        config = SOME.replace(guidance="both")
        with (
            hgc.install(sd15.unet, sd15.controlnet, config=config),
            pytest.warns(HgcWarning, match="evaluated more than once"),
        ):
            found = [[sd15.unet(x, t, text).sample for x in tiles] for t in schedule]
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert torch.equal(a, b)


def test_residuals_that_somebody_keeps_stay_those_of_their_evaluation(sd15):
    """Promises are handed out again, but for those that are held."""
    text, cond = models.text(0), models.picture(0)
    samples = [torch.randn(1, 4, 16, 16) for _ in range(8)]
    schedule = torch.arange(8).flip(0) * 100
    config = Config(num_evaluations=8, key_steps=(0,), depth=1)

    def residuals(i):
        return sd15.controlnet(samples[i], schedule[i], text, cond, return_dict=False)

    with torch.no_grad():
        expected = [residuals(i) for i in range(8)]
        with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
            kept, seen = {}, set()
            for i, t in enumerate(schedule):
                down, mid = residuals(i)
                sd15.unet(
                    samples[i], t, text, down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                )  # fmt: skip
                seen.add(id(down[0]))
                if i in (2, 3, 5):
                    kept[i] = (down[3], mid)
            assert all(
                row.control == {0: "reused"} for row in installed._engine.registry.last.report[1:]
            )
            assert len(seen) < 8  # some were handed out again
            for i, (third, mid) in kept.items():
                assert torch.equal(third + 0.0, expected[i][0][3])
                assert torch.equal(mid.clone(), expected[i][1])


def test_halves_called_one_by_one_are_two_runs(sd15):
    """Modular pipelines call ControlNet and UNet once a guidance half, at one timestep."""
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    cond, schedule = models.picture(0), torch.arange(6).flip(0) * 100
    texts = [models.text(0), models.text(1)]

    def evaluate(text, t):
        down, mid = sd15.controlnet(sample, t, text, cond, return_dict=False)
        return sd15.unet(
            sample, t, text, down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample  # fmt: skip

    with torch.no_grad():
        alone = []
        for text in texts:
            with hgc.install(sd15.unet, sd15.controlnet, config=SOME):
                alone.append([evaluate(text, t) for t in schedule])
        with hgc.install(sd15.unet, sd15.controlnet, config=SOME) as installed:
            together = [[evaluate(text, t) for text in texts] for t in schedule]
            assert len(installed._engine.registry.runs) == 2
    for i in range(6):
        for j in range(2):
            assert torch.equal(together[i][j], alone[j][i])


def test_the_same_text_on_another_schedule_is_another_run(sd15):
    """A loop that stops, and one that starts in the middle of a schedule of its own."""
    config = SOME.replace(guidance="both")
    sample, text = torch.randn(1, 4, 16, 16), models.text(0)
    first, second = torch.arange(6).flip(0) * 100, torch.arange(6).flip(0) * 100
    with torch.no_grad():
        with hgc.install(sd15.unet, config=config):
            expected = [sd15.unet(-sample, t, text).sample for t in second[4:]]
        with hgc.install(sd15.unet, config=config):
            for t in first[:4]:
                sd15.unet(sample, t, text)
            found = [sd15.unet(-sample, t, text).sample for t in second[4:]]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_timesteps_of_unknown_origin_are_computed_in_full(sd15):
    sample, text = torch.randn(1, 4, 16, 16), models.text(0)
    with torch.no_grad():
        expected = [sd15.unet(sample, t, text).sample for t in (900, 800, 700)]
        with (
            hgc.install(sd15.unet, sd15.controlnet, config=SOME),
            pytest.warns(HgcWarning, match="not one of several in a tensor of timesteps"),
        ):
            for t, out in zip((900, 800, 700), expected, strict=True):
                assert torch.equal(sd15.unet(sample, torch.tensor(t), text).sample, out)


# -- text that changes -----------------------------------------------------------------------


def test_changed_text_is_obeyed(sd15):
    config = Config(num_evaluations=6, key_steps=(0, 5), depth=1, guidance="reuse")
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        plain = models.draw(sd15)
        changed = models.draw(sd15, **models.change_text(3))
        rows = installed.report().rows
    assert rows[3].depth == "full" and rows[3].why == "the text changed"
    assert rows[4].depth == 1
    assert not torch.equal(plain, changed)
    with hgc.install(sd15.unet, sd15.controlnet, config="exact"):
        exact = models.draw(sd15, **models.change_text(3))
    assert torch.equal(exact, models.draw(sd15, **models.change_text(3)))


def test_changed_text_with_maps_applies_them_to_fresh_values(sd15, monkeypatch):
    import hgc_kernels

    applied = []
    original = hgc_kernels.apply_map
    monkeypatch.setattr(
        hgc_kernels, "apply_map", lambda m, v: (applied.append(tuple(v.shape)), original(m, v))[1]
    )
    config = Config(num_evaluations=6, attention_gate=0.2, fresh_values=True, map_format="fp32")
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        kept = models.draw(sd15, **models.change_text(3))
        rows = installed.report().rows
    assert [row.attention for row in rows] == ["compute"] * 2 + ["reuse"] * 4
    # once in each cross-attention of both networks; outputs are reused from then on
    assert len(applied) == 16 + 7
    with (
        hgc.install(sd15.unet, sd15.controlnet, config=config.replace(fresh_values=False)),
        pytest.warns(HgcWarning, match="fresh_values=True"),
    ):
        computed = models.draw(sd15, **models.change_text(3))
    reference = models.draw(sd15, **models.change_text(3))
    unchanged = models.draw(sd15)

    def distance(a, b):
        return float((a - b).norm() / b.norm())

    # the new text is there in all three, and the map of the first is not the second's own
    assert distance(kept, reference) < distance(unchanged, reference)
    assert distance(computed, reference) < distance(unchanged, reference)
    assert not torch.equal(kept, computed)


# -- nobody writes to the cache ---------------------------------------------------------------


def watch(installed, monkeypatch):
    """Checksums of the cache after each write must hold until the next."""
    from hgc.run.cache import Cache

    checked = []
    original = Cache.read

    def read(self, name, *args, **kwargs):
        before = self.checksums()
        previous = getattr(self, "_sums", None)
        names = set(before) & set(previous or {})
        written = getattr(self, "_written", set())
        for n in names - written:
            assert before[n] == previous[n], f"somebody wrote to {n}"
            checked.append(n)
        self._sums, self._written = before, set()
        return original(self, name, *args, **kwargs)

    def noting(method):
        inner = getattr(Cache, method)

        def note(self, name, *args, **kwargs):
            self._written = getattr(self, "_written", set()) | {name}
            return inner(self, name, *args, **kwargs)

        return note

    for method in ("write", "put_buffer"):
        monkeypatch.setattr(Cache, method, noting(method))
    monkeypatch.setattr(Cache, "read", read)
    return checked


@pytest.mark.parametrize("depth", [1, 4, 7, 12])
@pytest.mark.parametrize("forecast", [0.0, 0.7])
def test_nobody_writes_to_cached_tensors(sd15, monkeypatch, depth, forecast):
    nets = [sd15.controlnet, models.sd15_controlnet(5)]
    pipe = models.sd15_pipeline(sd15.unet, MultiControlNetModel(nets))
    config = Config(
        num_evaluations=6,
        key_steps=(0, 3),
        depth=depth,
        feature_damping=forecast,
        attention="reuse",
    )
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    try:
        with hgc.install(pipe.unet, nets, config=config) as installed:
            checked = watch(installed, monkeypatch)
            models.draw(pipe, image=[models.picture(0), models.picture(1)])
        assert len(checked) > 10
    finally:
        pipe.disable_freeu()


def test_freeu_is_obeyed(sd15):
    sd15.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    try:
        steps = [StepPlan(), StepPlan()] + [
            StepPlan(control="reuse", depth=k) for k in range(1, 13)
        ]
        outputs, _ = loop(sd15, Config(), steps)
        for out in outputs[1:]:
            assert torch.equal(out, outputs[0])
        reference = models.draw(sd15)
        with hgc.install(sd15.unet, sd15.controlnet, config="exact"):
            assert torch.equal(models.draw(sd15), reference)
    finally:
        sd15.disable_freeu()


# -- no sync in the loop ----------------------------------------------------------------------


@pytest.mark.parametrize("config", [SOME, SOME.replace(adaptive=0.3)], ids=["rule", "adaptive"])
def test_no_sync_in_the_loop(sd15, monkeypatch, config):
    """`.item()`, `bool(tensor)`, `.cpu()` and their like may not be called by the engine."""
    inside = []

    def forbid(name):
        original = getattr(torch.Tensor, name)

        def guarded(self, *args, **kwargs):
            assert not inside, f"Tensor.{name} was called in the loop"
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, guarded)

    for name in ("item", "__bool__", "cpu", "tolist", "numpy", "__int__", "__float__", "__index__"):
        forbid(name)
    with hgc.install(sd15.unet, sd15.controlnet, config=config):
        installed = {module: module.forward for module in (sd15.unet, sd15.controlnet)}
        for module, forward in installed.items():

            def watched(*args, _forward=forward, **kwargs):
                inside.append(1)
                try:
                    return _forward(*args, **kwargs)
                finally:
                    inside.pop()

            module.forward = watched
        try:
            models.draw(sd15)
            models.draw(sd15, guess_mode=True)
        finally:
            for module, forward in installed.items():
                module.forward = forward


# -- wrong uses, and what users do to models --------------------------------------------------


def test_installing_twice_says_how_to_uninstall(sd15):
    with hgc.install(sd15.unet, sd15.controlnet):
        with pytest.raises(
            RuntimeError, match=r"already installed.*hgc.uninstall\(unet, controlnet"
        ):
            hgc.install(sd15.unet, sd15.controlnet)
        with pytest.raises(RuntimeError, match="already installed on this ControlNetModel"):
            hgc.install(models.sd15_unet(), sd15.controlnet)
    with pytest.raises(RuntimeError, match="not installed"):
        hgc.uninstall(sd15.unet)


def test_models_of_other_families_are_refused_by_name(sd15):
    from diffusers import UNet2DModel

    with pytest.raises(TypeError, match="UNet2DConditionModel; got UNet2DModel"):
        hgc.install(
            UNet2DModel(
                block_out_channels=(8, 8),
                norm_num_groups=4,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
            )
        )
    with pytest.raises(TypeError, match=r"controlnet must be left out.*got ControlNetModel"):
        hgc.install(sd15, sd15.controlnet)
    with pytest.raises(TypeError, match=r"ControlNetModel, a list of them.*got AutoencoderKL"):
        hgc.install(sd15.unet, sd15.vae)
    odd = models.sd15_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D",) + ("DownBlock2D",) * 3,
    )
    with pytest.raises(
        TypeError, match="SimpleCrossAttnDownBlock2D; supported: CrossAttnDownBlock2D"
    ):
        hgc.install(odd)
    with pytest.raises(TypeError, match="Config or the name of a preset; got int"):
        hgc.install(sd15.unet, config=3)
    assert "forward" not in sd15.unet.__dict__


def test_a_compiled_module_is_refused(sd15):
    with pytest.raises(TypeError, match=r"compiled by torch.compile.*plain module"):
        hgc.install(torch.compile(sd15.unet), sd15.controlnet)


def test_copies_and_pickles_are_uninstalled(sd15, tmp_path):
    reference = models.draw(sd15)
    with hgc.install(sd15.unet, sd15.controlnet, config="turbo"):
        unet, net = copy.deepcopy(sd15.unet), copy.deepcopy(sd15.controlnet)
        buffer = io.BytesIO()
        pickle.dump(sd15.unet, buffer)
        sd15.unet.save_pretrained(tmp_path)
    buffer.seek(0)
    loaded = type(unet).from_pretrained(tmp_path)
    for other in (unet, pickle.load(buffer), loaded):
        pipe = models.sd15_pipeline(other, net)
        assert torch.equal(models.draw(pipe), reference)
        with hgc.install(other, net, config="exact"):
            assert torch.equal(models.draw(pipe), reference)
        assert type(next(iter(other.attn_processors.values()))).__module__.startswith("diffusers")


def test_offload_hooks_stay(sd15):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    calls = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    unet, net = copy.deepcopy(sd15.unet), copy.deepcopy(sd15.controlnet)
    pipe = models.sd15_pipeline(unet, net)
    add_hook_to_module(unet, Count())
    reference = models.draw(pipe)
    del calls[:]
    with hgc.install(unet, net, config="exact"):
        assert torch.equal(models.draw(pipe), reference)
        assert len(calls) == 6
    assert torch.equal(models.draw(pipe), reference)
    assert len(calls) == 12
    # installed first, hook later, hook removed first
    remove_hook_from_module(unet)
    installed = hgc.install(unet, net, config="exact")
    add_hook_to_module(unet, Count())
    models.draw(pipe)
    assert len(calls) == 18
    installed.uninstall()
    models.draw(pipe)
    assert len(calls) == 24
    remove_hook_from_module(unet)
    assert torch.equal(models.draw(pipe), reference)


def test_memory_is_freed_at_the_end_and_bounded(sd15):
    with hgc.install(sd15.unet, sd15.controlnet, config=SOME) as installed:
        models.draw(sd15)
        run = installed._engine.registry.last
        assert run.finished and run.cache.bytes == 0 and not run.cache.names()
        peak = installed.report().peak_bytes
        assert peak > 0
    small = SOME.replace(max_cache_bytes=peak // 3)
    reference = models.draw(sd15)
    with hgc.install(sd15.unet, sd15.controlnet, config=small) as installed:
        with pytest.warns(HgcWarning, match="max_cache_bytes"):
            out = models.draw(sd15)
        assert installed.report().peak_bytes <= peak // 3
    distance = (out - reference).norm() / reference.norm()
    assert distance < 0.2


def test_lora_scale_changes_are_obeyed(sd15):
    from peft import LoraConfig

    unet = copy.deepcopy(sd15.unet)
    unet.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k", "to_v", "to_q"])
    )
    pipe = models.sd15_pipeline(unet, sd15.controlnet)
    pipe.text_encoder = models.text_encoder()  # the pipeline scales its LoRA too
    weak = models.draw(pipe, cross_attention_kwargs={"scale": 0.1})
    strong = models.draw(pipe, cross_attention_kwargs={"scale": 0.9})
    assert not torch.equal(weak, strong)
    with hgc.install(unet, sd15.controlnet, config="exact"):
        assert torch.equal(models.draw(pipe, cross_attention_kwargs={"scale": 0.1}), weak)
        assert torch.equal(models.draw(pipe, cross_attention_kwargs={"scale": 0.9}), strong)

    def callback(pipe, i, t, kwargs):
        if i == 2:
            for module in pipe.unet.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", 3.0)
        return {}

    saved = copy.deepcopy(unet.state_dict())
    reference = models.draw(pipe, callback_on_step_end=callback)
    for module in unet.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 1.0)
    unet.load_state_dict(saved)
    with hgc.install(unet, sd15.controlnet, config="exact"):
        assert torch.equal(models.draw(pipe, callback_on_step_end=callback), reference)


@pytest.mark.parametrize("union", [False, True])
def test_a_controlnet_takes_the_lora_scale_as_its_class_does(union):
    """Not every class's forward scales its LoRA layers, and not in every release of diffusers."""
    from peft import LoraConfig, inject_adapter_in_model

    net = models.small_xl_union() if union else models.sd15_controlnet()
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    inject_adapter_in_model(lora, net)
    unet = models.small_xl_unet() if union else models.sd15_unet()
    sample, text = torch.ones(1, 4, 16, 16), models.text(0)
    added = {"text_embeds": torch.ones(1, 8), "time_ids": torch.ones(1, 6)} if union else None
    picture, kinds = models.picture(0), {}
    if union:
        picture, kinds = [picture], {"control_type": torch.eye(3)[:1], "control_type_idx": [0]}

    @torch.no_grad()
    def evaluate():
        outputs = []
        for t, scale in zip(torch.tensor([900, 600, 300]), (1.0, 0.1, 1.0), strict=True):
            down, mid = net(
                sample, t, text, picture, **kinds, added_cond_kwargs=added, return_dict=False,
                cross_attention_kwargs={"scale": scale},
            )  # fmt: skip
            outputs.append(
                unet(
                    sample, t, text, added_cond_kwargs=added, down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                ).sample
            )  # fmt: skip
        return torch.cat(outputs)

    reference = evaluate()
    with hgc.install(unet, net, config="exact") as installed:
        assert torch.equal(evaluate(), reference)
        assert [row.control for row in installed.report().rows] == [("computed",)] * 3


def test_a_release_that_hgc_was_not_tested_with_is_said(monkeypatch, sd15):
    reference = models.draw(sd15)
    ranges = hgc.models.supported.RELEASES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hgc.install(sd15.unet, sd15.controlnet).uninstall()
    for name, value, said, reused in (
        ("diffusers.__version__", "0.43.0", f"diffusers 0.43.0 .*{ranges['diffusers']} is;", False),
        ("diffusers.__version__", "0.34.0", f"diffusers 0.34.0 .*{ranges['diffusers']} is;", False),
        (
            "hgc.models.supported._KNOWN_SOURCES",
            (),
            f"forwards of .*{ranges['diffusers']} are;",
            False,
        ),
        ("torch.__version__", "2.15.0+cpu", f"torch 2.15.0.cpu .*{ranges['torch']} is", True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            with pytest.warns(HgcWarning, match=said) as caught:
                installed = hgc.install(sd15.unet, sd15.controlnet, config=SOME)
        assert len(caught) == 1
        with installed:
            assert torch.equal(models.draw(sd15), reference) != reused


def test_the_ranges_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for name, range_ in hgc.models.supported.RELEASES.items():
        assert name + range_ in project["dependencies"]


def test_report(sd15):
    with hgc.install(sd15.unet, sd15.controlnet, config=SOME) as installed:
        with pytest.raises(RuntimeError, match="call the pipeline first, in this thread"):
            installed.report()
        models.draw(sd15)
        report = installed.report()
    assert len(report.rows) == 6
    assert 0 < report.macs.total < report.full_macs.total
    assert report.macs.paper < report.macs.total
    assert all(row.milliseconds > 0 for row in report.rows)
    assert "some: " in str(report) and str(report).count("\n") == 7
    assert "milliseconds" in report.to_json()


def test_the_report_says_how_many_steps_a_plan_is_meant_for(sd15):
    for config, steps, said in ((SOME, 6, False), (SOME, 8, True), ("exact", 8, False)):
        with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
            models.draw(sd15, steps=steps)
            text = str(installed.report())
        assert ("some is meant for 6 evaluations, and this run made 8" in text) is said


# -- what an adversarial reading found ----------------------------------------------------------


def test_a_pair_that_ends_is_not_halved(sd15):
    """Guidance switched off by a callback: two images are left, and no pair."""
    rows = []
    first = sd15.unet.conv_in
    first.forward = lambda x: rows.append(len(x)) or type(first).forward(first, x)

    def callback(pipe, i, t, kwargs):
        if i == 2:
            pipe._guidance_scale = 1.0
            return {k: kwargs[k].chunk(2)[-1] for k in ("prompt_embeds", "image")}
        return {}

    config = Config(num_evaluations=8, key_steps=(0, 3, 4), depth=1, guidance="reuse")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    try:
        with hgc.install(sd15, config=config, trust=(type(first),)) as installed:
            models.draw(
                sd15,
                steps=8,
                prompt_embeds=models.text(0, 2),
                negative_prompt_embeds=models.text(500, 2),
                latents=latents,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "image"],
            )
            report = installed.report()
    finally:
        del first.forward
    assert rows == [4, 4, 2, 2, 2, 2, 2, 2]
    assert [row.batch for row in report.rows] == [4, 4, 4, 2, 2, 2, 2, 2]
    assert report.full_macs.total == pytest.approx(report.full_evaluation.total * 5.5)


def test_forwards_that_hgc_would_lose_are_refused(sd15):
    import types

    from diffusers import UNet2DConditionModel
    from diffusers.hooks import HookRegistry, ModelHook

    class Mine(UNet2DConditionModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    config = {k: v for k, v in sd15.unet.config.items() if not k.startswith("_")}
    with pytest.raises(TypeError, match="Mine with a forward of its own"):
        hgc.install(Mine(**config))
    unet = copy.deepcopy(sd15.unet)
    unet.forward = types.MethodType(lambda self, *a, **k: None, unet)
    with pytest.raises(TypeError, match=r"forward of unet .* was replaced"):
        hgc.install(unet)
    unet = copy.deepcopy(sd15.unet)
    HookRegistry.check_if_exists_or_initialize(unet).register_hook(ModelHook(), "mine")
    with pytest.raises(TypeError, match="diffusers hooks"):
        hgc.install(unet)


def test_hooks_on_a_block_run_in_part_are_kept(sd15):
    block = sd15.unet.up_blocks[3]
    reference = models.draw(sd15)
    handle = block.register_forward_hook(lambda m, a, out: out * 1.5)
    try:
        hooked = models.draw(sd15)
        assert not torch.equal(hooked, reference)
        with (
            hgc.install(sd15.unet, sd15.controlnet, config=SOME),
            pytest.warns(HgcWarning, match="a hook is in place on up_blocks.3"),
        ):
            assert torch.equal(models.draw(sd15), hooked)
    finally:
        handle.remove()


def test_a_lora_swapped_within_a_run_is_seen(sd15):
    from peft import LoraConfig

    def swap(unet, seed):
        if getattr(unet, "peft_config", None):
            unet.delete_adapters("default")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(
                LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k", "to_v"])
            )

    def callback(pipe, i, t, kwargs):
        if i == 2:
            swap(pipe.unet, 2)
        return {}

    unet = copy.deepcopy(sd15.unet)
    pipe = models.sd15_pipeline(unet, sd15.controlnet)
    swap(unet, 1)
    reference = models.draw(pipe, callback_on_step_end=callback)
    swap(unet, 1)
    with hgc.install(unet, sd15.controlnet, config="exact"):
        assert torch.equal(models.draw(pipe, callback_on_step_end=callback), reference)


def test_processors_changed_within_a_run(sd15):
    from diffusers.models.attention_processor import AttnProcessor

    original = sd15.unet.attn_processors

    def callback(pipe, i, t, kwargs):
        if i == 2:
            pipe.unet.set_attn_processor(AttnProcessor())
        return {}

    try:
        reference = models.draw(sd15, callback_on_step_end=callback)
        sd15.unet.set_attn_processor(dict(original))
        with hgc.install(sd15.unet, sd15.controlnet, config="exact"):
            assert torch.equal(models.draw(sd15, callback_on_step_end=callback), reference)
            saved = dict(sd15.unet.attn_processors)
            sd15.unet.set_default_attn_processor()
            models.draw(sd15)
            sd15.unet.set_attn_processor(dict(saved))
            models.draw(sd15)
        assert all(
            type(p).__module__.startswith("diffusers") for p in sd15.unet.attn_processors.values()
        )
    finally:
        sd15.unet.set_attn_processor(dict(original))


def test_unets_with_text_in_their_first_attention():
    unet = models.sd15_unet(only_cross_attention=True)
    pipe = models.sd15_pipeline(unet, models.sd15_controlnet())
    reference = models.draw(pipe)
    with hgc.install(unet, pipe.controlnet, config="exact"):
        assert torch.equal(models.draw(pipe), reference)


def test_gradients_through_the_unet(sd15):
    sample, text = torch.randn(1, 4, 16, 16), models.text(0)
    schedule = torch.arange(4).flip(0) * 100

    def gradients():
        found = []
        for t in schedule:
            x = sample.clone().requires_grad_()
            sd15.unet(x, t, text).sample.square().sum().backward()
            found.append(x.grad)
        sd15.unet.zero_grad()
        return found

    reference = gradients()
    with hgc.install(sd15.unet, config="exact"):
        for a, b in zip(gradients(), reference, strict=True):
            assert torch.equal(a, b)


def test_inference_mode_and_back(sd15):
    config = SOME.replace(guidance="both")
    sample, text = torch.randn(1, 4, 16, 16), models.text(0)
    schedule = torch.arange(6).flip(0) * 100
    with hgc.install(sd15.unet, config=config):
        for i, t in enumerate(schedule):
            with torch.inference_mode() if i % 2 else torch.no_grad():
                sd15.unet(sample, t, text)


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({}, {}),
        ({}, {"guess_mode": True}),
        ({"depth": 1, "control": "compute", "guidance": "reuse"}, {}),
    ],
)
def test_an_abandoned_run_is_forgotten(sd15, changes, arguments):
    """Also where views of its text were handed out."""

    def fail(pipe, i, t, kwargs):
        if i == 3:
            raise Stop
        return {}

    config = SOME.replace(**changes)
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        for seed in range(3):
            with contextlib.suppress(Stop):
                models.draw(sd15, seed=seed, callback_on_step_end=fail, **arguments)
            gc.collect()
        models.draw(sd15, **arguments)
        assert sum(run.cache.bytes for run in installed._engine.registry.runs.values()) == 0


@pytest.mark.parametrize("guess_mode", [False, True])
def test_one_more_call_at_the_end_is_no_run(sd15, guess_mode):
    """A second tile at the last timestep: computed by diffusers, and the report stays."""
    pipe, seen = sd15, {}
    forwards = pipe.controlnet.forward, pipe.unet.forward

    def once_more(pipe, i, t, kwargs):
        if i == 5:
            for model, (args, given) in seen.items():
                forward = forwards[model is pipe.unet]
                made, expected = model(*args, **given)[0], forward(*args, **given)[0]
                if model is pipe.unet:
                    assert torch.equal(made, expected)
        return {}

    def note(model, args, kwargs):
        seen.setdefault(model, (args, kwargs))
        seen[model] = args, {**kwargs, "return_dict": False}

    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        hooks = [
            model.register_forward_pre_hook(note, with_kwargs=True)
            for model in (pipe.controlnet, pipe.unet)
        ]
        models.draw(pipe, guess_mode=guess_mode, callback_on_step_end=once_more)
        for hook in hooks:
            hook.remove()
        assert len(installed.report().rows) == 6


def test_cross_attention_of_one_half_does_not_stand_for_both(sd15):
    """What an evaluation cannot read it computes, says so, and keeps for the next."""
    config = Config(
        num_evaluations=8, key_steps=(0, 1, 2, 4, 6), depth=1, conditional_key_steps=(2,),
        guidance="reuse", attention_gate=0.5, attention="reuse",
    )  # fmt: skip
    steps = hgc.plan(config, 8)
    assert [step.guidance for step in steps[2:5]] == ["reuse", "reuse", "both"]
    assert steps[4].attention == "reuse"
    computed = (*steps[:4], dataclasses.replace(steps[4], attention="compute"), *steps[5:])
    latents = {}
    for each in (config, Config(num_evaluations=8, steps=computed)):
        with hgc.install(sd15.unet, sd15.controlnet, config=each) as installed:
            latents[each] = models.draw(sd15, steps=8)
            rows = installed.report().rows
        assert [row.attention for row in rows[3:6]] == ["reuse", "compute", "reuse"]
    assert torch.equal(*latents.values())


def test_t2i_adapter_residuals_at_every_depth(sdxl):
    """Adapters add to the encoder; on an unchanged input every depth gives the full result."""
    unet = sdxl.unet
    text, schedule = models.text(0), torch.full((12,), 500)
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    added = {"text_embeds": models.text(7)[:, 0, :8], "time_ids": torch.ones(1, 6)}
    shapes = [(1, 8, 8, 8), (1, 16, 8, 8), (1, 16, 4, 4)]
    features = [
        torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)
    ]
    steps = [StepPlan()] * 3 + [StepPlan(control="off", depth=k) for k in range(1, 10)]
    config = Config(num_evaluations=12, steps=tuple(steps))

    def evaluate(t):
        return unet(
            sample, t, text, added_cond_kwargs=added,
            down_intrablock_additional_residuals=[f.clone() for f in features],
        ).sample  # fmt: skip

    with torch.no_grad():
        reference = evaluate(schedule[0])
        with hgc.install(unet, config=config):
            for t in schedule:
                assert torch.equal(evaluate(t), reference)
