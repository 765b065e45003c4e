"""Fused group norms in the engine: what is the same, and where they are not used."""

from __future__ import annotations

from collections import Counter

import models
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline as Pipeline
from diffusers import StableDiffusionXLControlNetUnionPipeline as UnionPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.resnet import ResnetBlock2D
from test_capturing import OnCpu
from torch.utils._python_dispatch import TorchDispatchMode

import hgc
import hgc_kernels as hk
from hgc import Config
from hgc.models import layer_calls
from hgc.models.captured import CapturedNetworks

STEPS = 6
SHALLOW = Config(num_evaluations=STEPS, key_steps=(0, 3), depth=1)


class Norms(TorchDispatchMode):
    """Counts group norms of torch and of hgc."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops[op.name()] += 1
        return op(*args, **(kwargs or {}))

    @property
    def found(self):
        return self.ops["aten::native_group_norm"], self.ops["hgc::group_norm"]


def draw(pipe, config=SHALLOW, *, fuse=True, trust=(), **changes):
    """The latents, and how many norms were torch's and hgc's."""
    with hgc.install(pipe, config=config, trust=trust) as installed:
        if fuse:
            assert installed.fuse() is installed
        with Norms() as counted:
            latents = models.draw(pipe, steps=STEPS, **changes)
    return latents, counted.found


def alike(found, expected):
    """Other kernels round otherwise at every layer of a run."""
    bound = 64 * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= bound


@pytest.mark.parametrize("config", ["paper", "balanced", SHALLOW], ids=str)
def test_on_a_cpu_no_bit_changes(sd15, config):
    expected, (torchs, none) = draw(sd15, config, fuse=False)
    found, (left, ours) = draw(sd15, config)
    assert torch.equal(found, expected)
    assert none == left == 0 and ours == torchs > 0


def test_networks_of_every_kind():
    several = MultiControlNetModel([models.sd15_controlnet(1), models.sd15_controlnet(5)])
    pipes = {
        "linear projections": (models.sdxl_pipeline(), {}),
        "several ControlNets": (
            models.sd15_pipeline(controlnet=several),
            {"image": [models.picture(1), models.picture(2)]},
        ),
    }
    for name, (pipe, changes) in pipes.items():
        expected, (torchs, _) = draw(pipe, fuse=False, **changes)
        found, counts = draw(pipe, **changes)
        assert torch.equal(found, expected), name
        assert counts == (0, torchs), name


def test_a_union_of_controlnets():
    pipe = models.pipeline(UnionPipeline, models.small_xl_unet(), models.small_xl_union())
    found = []
    for fuse in (False, True):
        with hgc.install(pipe, config=SHALLOW) as installed:
            if fuse:
                installed.fuse()
            found.append(pipe(**models.request(pipe, steps=STEPS)).images)
    assert torch.equal(*found)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_kernels_in_the_engine(memory_format):
    """The whole of a run by the Triton kernels, in their interpreter."""
    pipe = models.pipeline(Pipeline, models.small_unet(), models.small_controlnet())
    expected, _ = draw(pipe, fuse=False, size=16)
    for model in (pipe.unet, pipe.controlnet):
        model.to(memory_format=memory_format)
    with hk.use_backend("triton", "group_norm"):
        found, (left, ours) = draw(pipe, size=16)
    assert left == 0 and ours > 0
    alike(found, expected)


def test_channels_last_stays_from_layer_to_layer():
    """No layer goes to NCHW and back: what a convolution reads and writes is channels_last."""
    pipe = models.pipeline(Pipeline, models.small_unet(), models.small_controlnet())
    expected, _ = draw(pipe, fuse=False)
    seen = Counter()
    for model in (pipe.unet, pipe.controlnet):
        model.to(memory_format=torch.channels_last)
        for name, module in model.named_modules():
            if name.endswith(("conv1", "conv2", "proj_in", "proj_out")):
                module.register_forward_hook(
                    lambda m, args, out: seen.update(
                        x.is_contiguous(memory_format=torch.channels_last) for x in (*args, out)
                    )
                )
    found, _ = draw(pipe, trust=(torch.nn.Conv2d,))
    alike(found, expected)
    assert seen[True] > 0 and seen[False] == 0


def louder(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs) * 1.5


PATCHES = {
    "a hook on a norm": lambda unet: unet.up_blocks[1].resnets[0].norm1.register_forward_hook(
        lambda m, args, out: out * 1.5
    ),
    "a hook on a SiLU": lambda unet: unet.mid_block.resnets[0].nonlinearity.register_forward_hook(
        lambda m, args, out: out * 1.5
    ),
    "a resnet's forward": lambda unet: setattr(
        unet.mid_block.resnets[0], "forward", louder(unet.mid_block.resnets[0].forward)
    ),
    "a transformer's forward": lambda unet: setattr(
        unet.mid_block.attentions[0], "forward", louder_first(unet.mid_block.attentions[0].forward)
    ),
    "a block's hook": lambda unet: unet.mid_block.register_forward_hook(
        lambda m, args, out: out * 1.5
    ),
    "a norm without an affine part": lambda unet: setattr(
        unet.mid_block.resnets[0], "norm1", torch.nn.GroupNorm(4, 16, affine=False)
    ),
    "an output divided by two": lambda unet: setattr(
        unet.mid_block.resnets[0], "output_scale_factor", 2.0
    ),
}  # fmt: skip


def louder_first(forward):
    return lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 1.5,)


@pytest.mark.parametrize("name", PATCHES)
def test_what_is_patched_and_vouched_for_runs_as_it_is(name):
    pipe = models.sd15_pipeline()
    before, _ = draw(pipe)
    PATCHES[name](pipe.unet)
    vouched = tuple({type(module) for module in pipe.unet.modules()})
    expected, _ = draw(pipe, fuse=False, trust=vouched)
    found, _ = draw(pipe, trust=vouched)
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("cls", [ResnetBlock2D, torch.nn.GroupNorm, torch.nn.SiLU])
def test_a_class_that_is_patched_and_vouched_for_runs_as_it_is(cls, monkeypatch):
    pipe = models.sd15_pipeline()
    before, _ = draw(pipe)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args: own(self, *args) * 1.1)
    expected, _ = draw(pipe, fuse=False, trust=(cls,))
    found, _ = draw(pipe, trust=(cls,))
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_weights_that_hooks_bring():
    accelerate = pytest.importorskip("accelerate")
    pipe = models.sd15_pipeline()
    expected, _ = draw(pipe, "balanced", fuse=False)
    for model in (pipe.unet, pipe.controlnet, pipe.vae):
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    found, _ = draw(pipe, "balanced")
    assert torch.equal(found, expected)


def test_autocast_and_gradients_are_left_to_diffusers(sd15):
    for context in (torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        found = []
        for fuse in (False, True):
            with hgc.install(sd15, config=SHALLOW) as installed:
                if fuse:
                    installed.fuse()
                sample, text = torch.randn(2, 4, 16, 16), models.text(3, 2)
                torch.manual_seed(0)
                with context, Norms() as counted:
                    found.append(sd15.unet(torch.ones_like(sample), 5, text).sample)
        assert torch.equal(*found)
        assert counted.found[1] == 0


def test_a_captured_run_has_the_bits_of_a_fused_one(sd15, monkeypatch):
    calls, norm = [], layer_calls._norm
    monkeypatch.setattr(layer_calls, "_norm", lambda *a, **kw: calls.append(a) or norm(*a, **kw))
    with hgc.install(sd15, config=SHALLOW) as installed:
        engine = installed.fuse()._engine
        expected = models.draw(sd15, steps=STEPS)
        a_run = len(calls)
        networks = CapturedNetworks(
            sd15.unet, installed.controlnets, say=engine.warn, recorder=OnCpu()
        )
        engine.functions.stand_in(networks)
        for _ in range(3):
            before = len(calls)
            assert torch.equal(models.draw(sd15, steps=STEPS), expected)
        assert len(calls) == before > a_run  # the last run was replayed
        assert networks.graphs > 0
        installed.fuse()
        assert networks.graphs == 0


def test_compiled_networks_are_not_fused(sd15, monkeypatch):
    calls = []
    monkeypatch.setattr(layer_calls, "_norm", lambda *a, **kw: calls.append(a))
    with hgc.install(sd15, config="balanced") as installed:
        installed.compile(backend="eager").fuse()
        models.draw(sd15, steps=2)
    assert not calls


def test_uninstalled_it_is_gone(sd15):
    installed = hgc.install(sd15, config="balanced").fuse()
    installed.uninstall()
    with pytest.raises(RuntimeError, match="hgc is not installed on this UNet2DConditionModel"):
        installed.fuse()
    assert draw(sd15, "balanced", fuse=False)[1][1] == 0


def test_exact_is_not_fused(sd15):
    with (
        hgc.install(sd15, config="exact") as installed,
        pytest.raises(ValueError, match=r"config \(exact\) is exact, which promises the bits"),
    ):
        installed.fuse()
