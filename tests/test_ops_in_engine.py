"""The engine on the op library: which ops it calls, and what a choice of backend does to it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter

import models
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch.utils._python_dispatch import TorchDispatchMode

import hgc
import hgc_kernels as hk
from hgc import Config
from hgc.models import unet
from hgc_kernels import backend

SHALLOW = Config(num_evaluations=6, key_steps=(0, 3), depth=1)
MAPS = Config(num_evaluations=6, attention_gate=0.2, fresh_values=True)


@pytest.fixture
def ran(monkeypatch):
    """Calls that reached the dispatcher, an op."""
    calls = Counter()
    resolve = backend._resolve
    monkeypatch.setattr(
        backend, "_resolve", lambda op, *rest: calls.update([op]) or resolve(op, *rest)
    )
    with hk.use_backend("auto"):  # a choice, and so each call asks
        yield calls


@pytest.fixture(autouse=True)
def any_size_is_worth_an_op(monkeypatch):
    """The models of the tests are smaller than what the op is called for."""
    monkeypatch.setattr(unet, "_WORTH_AN_OP", 0)


def draw(pipe, config, **changes):
    with hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
        return models.draw(pipe, **changes), installed.report().rows


def test_decoder_inputs_go_through_gather_blocks(sd15, ran):
    _, rows = draw(sd15, SHALLOW)
    shallow = sum(row.depth == 1 for row in rows)
    assert shallow == 4
    # the last block is stepped through by layer, and the blocks before it are called whole
    layers = len(sd15.unet.up_blocks[-1].resnets)
    assert ran == {"gather_blocks": shallow + layers * (len(rows) - shallow)}


def test_small_decoder_inputs_are_joined_by_eager_with_the_same_bits(sd15, ran, monkeypatch):
    expected, _ = draw(sd15, SHALLOW)
    monkeypatch.setattr(unet, "_WORTH_AN_OP", 1 << 21)
    ran.clear()
    assert torch.equal(draw(sd15, SHALLOW)[0], expected)
    assert not ran
    with hk.use_backend("reference", "gather_blocks"):  # a choice is obeyed
        draw(sd15, SHALLOW)
    assert ran["gather_blocks"] > 0


def test_attention_that_keeps_maps_goes_through_attend_and_store(sd15, ran):
    draw(sd15, MAPS)
    # the last evaluation before the gate, in each cross-attention of both networks
    assert ran["attend_and_store"] % (16 + 7) == 0 and ran["attend_and_store"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backend_of_gather_blocks_changes_no_bit(dtype):
    pipe = models.sd15_pipeline().to(dtype)
    changes = {"prompt_embeds": models.text(0).to(dtype)}
    changes["negative_prompt_embeds"] = models.text(500).to(dtype)
    found = []
    for choice in ("native", "reference"):
        with hk.use_backend(choice, "gather_blocks"):
            found.append(draw(pipe, SHALLOW, **changes)[0])
    assert torch.equal(*found)


def test_an_explicit_backend_is_not_left(sd15):
    with (
        hk.use_backend("triton", "gather_blocks"),
        pytest.raises(hk.BackendError, match=r"gather_blocks.*triton"),
    ):
        draw(sd15, SHALLOW)
    with (
        hk.use_backend("native", "attend_and_store"),
        pytest.raises(hk.BackendError, match=r"attend_and_store.*native"),
    ):
        draw(sd15, MAPS)


def test_auto_says_once_that_the_kernels_are_missing(sd15, monkeypatch):
    expected, _ = draw(sd15, SHALLOW)
    key = ("gather_blocks", "native", "cpu")
    missing = backend.Implementation(*key[:2], ("cpu",), "", lambda device: "it was not built")
    monkeypatch.setattr(backend, "_resolved", {})
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr(backend, "_implementations", {**backend._implementations, key: missing})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with hk.use_backend("auto"):  # a choice, and so each call asks
            out, _ = draw(sd15, SHALLOW)
            draw(sd15, SHALLOW)
    said = [str(warning.message) for warning in said if "gather_blocks" in str(warning.message)]
    assert len(said) == 1 and "it was not built" in said[0]
    assert torch.equal(out, expected)


class Divisions(TorchDispatchMode):
    """Counts divisions by the number one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and isinstance(args[1], (int, float)):
            self.count += args[1] == 1
        return func(*args, **(kwargs or {}))


def factors(pipe):
    """The factors by which layers divide what they return, as they are and where they are."""
    return [
        (module.__dict__, name, module.__dict__[name])
        for model in (pipe.unet, pipe.controlnet)
        for module in model.modules()
        for kind, name in (
            (ResnetBlock2D, "output_scale_factor"),
            (Attention, "rescale_output_factor"),
        )
        if isinstance(module, kind)
    ]


def test_layers_do_not_divide_by_one(sd15):
    """The same bits, without the divisions of diffusers; a factor that says something is obeyed."""
    before = factors(sd15)
    before[0][0]["output_scale_factor"] = 2.0
    with Divisions() as plain:
        expected = models.draw(sd15)
    with hgc.install(sd15.unet, sd15.controlnet, config="exact"), Divisions() as ours:
        out = models.draw(sd15)
    assert torch.equal(out, expected)
    assert plain.count > 6 * 60 and ours.count == 0
    before[0][0]["output_scale_factor"] = 1.0
    with hgc.install(sd15.unet, sd15.controlnet, config=SHALLOW), Divisions() as ours:
        models.draw(sd15)
    assert ours.count == 0
    assert all(own[name] is factor for own, name, factor in before[1:])


def test_factors_are_put_back_whatever_happens(sd15):
    before = factors(sd15)
    inside = []

    def look(module, args):
        inside.append([own[name] for own, name, _ in before])
        copied = copy.deepcopy(sd15.unet)
        inside.append([m.output_scale_factor for m in copied.modules() if hasattr(m, "conv1")])
        raise RuntimeError("stop")

    layer = sd15.unet.up_blocks[1].resnets[0]
    with hgc.install(sd15.unet, sd15.controlnet, config="exact", trust=(type(layer),)):
        own = layer.forward

        def stopping(*args, **kwargs):
            look(layer, args)

        layer.__dict__["forward"] = stopping
        try:
            with pytest.raises(RuntimeError, match="stop"):
                models.draw(sd15)
        finally:
            del layer.__dict__["forward"]
        assert layer.forward == own
        assert all(held[name] is factor for held, name, factor in before)


def test_two_threads_leave_the_factors_as_they_were(sd15):
    before = factors(sd15)
    expected, found = models.draw(sd15), []
    with hgc.install(sd15.unet, sd15.controlnet, config="exact"):
        own = {**sd15.components, "scheduler": copy.deepcopy(sd15.scheduler)}
        pipes = [sd15, type(sd15)(**own, requires_safety_checker=False)]
        threads = [
            threading.Thread(target=lambda p=pipe: found.append(models.draw(p))) for pipe in pipes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2 and all(torch.equal(out, expected) for out in found)
    assert all(own[name] is factor for own, name, factor in before)
