"""The embedding of time once a run: its bits, what it leaves out, and what makes it anew.

It is meant for GPUs, where launches cost, and here asked for on a CPU. Products of matrices are
made row by row, but for one test: then nothing hangs on how many rows there are, and no bit may
change.
"""

from __future__ import annotations

import contextlib
import copy

import models
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionControlNetPipeline as Pipeline
from diffusers import StableDiffusionXLControlNetUnionPipeline as UnionPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from test_capturing import OnCpu
from test_fusing import Norms, alike

import hgc
import hgc_kernels as hk
from hgc import Config
from hgc.execute.time_path import TimePath
from hgc.models.captured import CapturedNetworks

STEPS = 6
SHALLOW = Config(num_evaluations=STEPS, key_steps=(0, 3), depth=1)
HALF = Config(num_evaluations=STEPS, key_steps=(0, 1, 4), depth=1, guidance="reuse")


@pytest.fixture
def rows_alike(monkeypatch):
    """A row of a product does not hang on how many there are."""
    linear = F.linear

    def by_row(x, weight, bias=None):
        if x.dim() != 2:
            return linear(x, weight, bias)
        return torch.cat([linear(row, weight, bias) for row in x.split(1)])

    monkeypatch.setattr(F, "linear", by_row)


@contextlib.contextmanager
def installed(pipe, config=SHALLOW, *, batched, trust=()):
    with pytest.MonkeyPatch.context() as patched:
        if batched:
            patched.setattr(TimePath, "pays", staticmethod(lambda device: True))
        with hgc.install(pipe, config=config, trust=trust) as found:
            yield found.fuse()


def draw(pipe, config=SHALLOW, *, batched, trust=(), **changes):
    """Latents, and how many sines were taken: one for each embedding of timesteps."""
    with installed(pipe, config, batched=batched, trust=trust), Norms() as counted:
        request = models.request(pipe, steps=STEPS) if isinstance(pipe, UnionPipeline) else None
        latents = (
            models.draw(pipe, steps=STEPS, **changes) if request is None else pipe(**request).images
        )
    return latents, counted.ops["aten::sin"]


def several():
    nets = MultiControlNetModel([models.sd15_controlnet(1), models.sd15_controlnet(5)])
    return models.sd15_pipeline(controlnet=nets)


def union():
    return models.pipeline(UnionPipeline, models.small_xl_unet(), models.small_xl_union())


# the pipeline, and how often its networks take sines: of timesteps, sizes and a union's kinds
PIPELINES = {
    "sd15": (models.sd15_pipeline, 2),
    "sdxl": (models.sdxl_pipeline, 4),
    "several": (several, 3),
    "union": (union, 5),
}


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("config", ["paper", SHALLOW, HALF], ids=["paper", "shallow", "half"])
def test_no_bit_changes_and_time_is_embedded_once_a_run(name, config):
    make, in_a_run = PIPELINES[name]
    images = {"image": [models.picture(1), models.picture(2)]} if name == "several" else {}
    expected, sines = draw(make(), config, batched=False, **images)
    found, once = draw(make(), config, batched=True, **images)
    assert torch.equal(found, expected)
    assert once == in_a_run < sines


def test_products_of_all_timesteps_round_otherwise_and_no_more():
    pipe = models.sd15_pipeline()
    expected, _ = draw(pipe, batched=False)
    found, _ = draw(pipe, batched=True)
    alike(found, expected)


@pytest.mark.usefixtures("interpreted")
def test_the_kernels_take_the_rows():
    """A run by the Triton kernels, in their interpreter: shifts are views of a wider row."""
    pipe = models.pipeline(Pipeline, models.small_unet(), models.small_controlnet())
    expected, _ = draw(pipe, batched=False, size=16)
    with hk.use_backend("triton", "group_norm"):
        found, once = draw(pipe, batched=True, size=16)
    assert once == 2
    alike(found, expected)


def at(step, change):
    """Arguments of a call within which ``change`` is made of the pipeline after ``step``."""

    def callback(pipe, i, t, kwargs):
        if i == step:
            change(pipe)
        return {}

    return {"callback_on_step_end": callback}


def resnet_of(pipe):
    return pipe.unet.up_blocks[-1].resnets[-1]


def write(parameter):
    with torch.no_grad():
        parameter.mul_(1.5)


def replace(layer, name):
    old = getattr(layer, name)
    setattr(layer, name, torch.nn.Parameter(1.5 * old.detach()))


def another(pipe):
    resnet, old = resnet_of(pipe), resnet_of(pipe).time_emb_proj
    resnet.time_emb_proj = torch.nn.Linear(old.in_features, old.out_features)
    torch.nn.init.constant_(resnet.time_emb_proj.weight, 0.1)
    torch.nn.init.constant_(resnet.time_emb_proj.bias, 0.1)


def louder(module, args, out):
    return out * 1.5


def ones(pipe):
    layer = resnet_of(pipe).time_emb_proj
    layer.forward = lambda x: x.new_ones(len(x), layer.out_features)


class Doubling(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "a weight of the embedding is written to": lambda pipe: write(
        pipe.unet.time_embedding.linear_1.weight
    ),
    "of the ControlNet's": lambda pipe: write(pipe.controlnet.time_embedding.linear_2.weight),
    "a weight of a projection is written to": lambda pipe: write(
        resnet_of(pipe).time_emb_proj.weight
    ),
    "a weight is another": lambda pipe: replace(resnet_of(pipe).time_emb_proj, "bias"),
    "a projection is another": another,
    "a hook on a projection": lambda pipe: resnet_of(pipe).time_emb_proj.register_forward_hook(
        louder
    ),
    "a hook on the embedding": lambda pipe: pipe.unet.time_embedding.act.register_forward_hook(
        louder
    ),
    "a forward of a projection": ones,
    "a layer where there was none": lambda pipe: setattr(
        pipe.unet.time_embedding, "post_act", torch.nn.SiLU()
    ),
    "an activation where there was none": lambda pipe: setattr(
        pipe.unet, "time_embed_act", torch.nn.SiLU()
    ),
    "a weight that is no parameter": lambda pipe: resnet_of(pipe).time_emb_proj.__dict__.update(
        weight=2 * resnet_of(pipe).time_emb_proj.weight.detach()
    ),
    "a weight by .data": lambda pipe: setattr(
        resnet_of(pipe).time_emb_proj.weight,
        "data",
        2 * resnet_of(pipe).time_emb_proj.weight.detach(),
    ),
    "a class": lambda pipe: setattr(resnet_of(pipe).time_emb_proj, "__class__", Doubling),
    "a resnet": lambda pipe: pipe.unet.up_blocks[-1].resnets.__setitem__(
        -1, copy.deepcopy(pipe.unet.up_blocks[-1].resnets[-2])
    ),
    "a setting": lambda pipe: setattr(pipe.unet.time_proj, "flip_sin_to_cos", False),
    "a kind of projection": lambda pipe: setattr(
        resnet_of(pipe), "nonlinearity", torch.nn.ReLU()
    ),
}  # fmt: skip


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_the_middle_of_a_run_is_seen(name):
    unchanged, _ = draw(models.sd15_pipeline(), batched=True)
    found = [
        draw(models.sd15_pipeline(), batched=batched, **at(1, CHANGES[name]))[0]
        for batched in (False, True)
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0], unchanged)


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("which", ["a class's forward", "a hook on all modules"])
def test_code_of_all_modules_exchanged_in_the_middle_of_a_run(which):
    def hook(module, args, out):
        return 1.5 * out if isinstance(module, torch.nn.Linear) else None

    unchanged, _ = draw(models.sd15_pipeline(), batched=True)
    found = []
    for batched in (False, True):
        own, handles = torch.nn.Linear.forward, []

        def change(pipe, own=own, handles=handles):
            if which == "a class's forward":
                torch.nn.Linear.forward = lambda self, x: 1.5 * own(self, x)
            else:
                handles.append(torch.nn.modules.module.register_module_forward_hook(hook))

        try:
            found.append(draw(models.sd15_pipeline(), batched=batched, **at(1, change))[0])
        finally:
            torch.nn.Linear.forward = own
            for handle in handles:
                handle.remove()
    assert torch.equal(*found)
    assert not torch.equal(found[0], unchanged)


def loop(unet, schedule, *, batched, batch=2, **arguments):
    """Samples after a loop of one's own."""
    sample = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0)).repeat(batch, 1, 1, 1)
    text = models.text(0, batch)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        if batched:
            patched.setattr(TimePath, "pays", staticmethod(lambda device: True))
        with hgc.install(unet, config=SHALLOW, scheduler=models.scheduler()) as each:
            each.fuse()
            for t in schedule:
                sample = sample - 0.1 * unet(sample, t, text, return_dict=False, **arguments)[0]
    return sample


def in_inference_mode():
    with torch.inference_mode():
        return models.small_unet()


OTHERS = {
    "weights made in inference mode": (in_inference_mode, {}),
    "labels without a row a sample": (
        lambda: models.small_unet(num_class_embeds=4), {"class_labels": torch.tensor(3)},
    ),
    "labels": (
        lambda: models.small_unet(num_class_embeds=4), {"class_labels": torch.tensor([3, 1])},
    ),
    "a condition without a row a sample": (
        lambda: models.small_unet(time_cond_proj_dim=2), {"timestep_cond": torch.ones(2)},
    ),
    "a condition": (
        lambda: models.small_unet(time_cond_proj_dim=2), {"timestep_cond": torch.eye(2)},
    ),
    "an activation that writes into its input": (
        lambda: in_place(models.small_unet(resnet_time_scale_shift="scale_shift")), {},
    ),
    "no projection": (lambda: models.small_unet(resnet_skip_time_act=True), {}),
}  # fmt: skip


def in_place(unet):
    for module in unet.modules():
        if isinstance(module, torch.nn.SiLU):
            module.inplace = True
    return unet


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_other_kinds(name):
    make, arguments = OTHERS[name]
    # each timestep twice: what the first evaluation wrote into, the second would read
    schedule = torch.arange(30.0, 0.0, -10.0).repeat_interleave(2)
    expected, found = (loop(make(), schedule, batched=b, **arguments) for b in (False, True))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("rows_alike")
def test_sizes_and_timesteps_written_to_in_a_run_are_seen():
    def sizes(added, schedule):
        added["time_ids"].mul_(3.0)

    def timesteps(added, schedule):
        schedule[3:].mul_(0.5)

    for change in (None, sizes, timesteps):
        found = []
        for batched in (False, True):
            unet = models.sdxl_unet()
            schedule = torch.arange(60.0, 0.0, -10.0)
            added = {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)}
            sample, text = (
                torch.randn(2, 4, 16, 16, generator=torch.manual_seed(0)),
                models.text(0, 2),
            )
            with pytest.MonkeyPatch.context() as patched, torch.no_grad():
                if batched:
                    patched.setattr(TimePath, "pays", staticmethod(lambda device: True))
                scheduler = models.scheduler()
                with hgc.install(unet, config=SHALLOW, scheduler=scheduler) as each:
                    each.fuse()
                    for i, t in enumerate(schedule):
                        if i == 3 and change is not None:
                            change(added, schedule)
                        sample = (
                            sample
                            - 0.1
                            * unet(sample, t, text, added_cond_kwargs=added, return_dict=False)[0]
                        )
            found.append(sample)
        assert torch.equal(*found), change
        if change is None:
            plain = found[0]
        else:
            assert not torch.equal(found[0], plain)


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("targets", [["time_emb_proj"], ["linear_1"]], ids=str)
def test_adapters(targets):
    peft = pytest.importorskip("peft")

    def adapted():
        pipe = models.sd15_pipeline()
        torch.manual_seed(0)
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        return pipe

    without, _ = draw(models.sd15_pipeline(), batched=True)
    expected, sines = draw(adapted(), batched=False)
    found, fewer = draw(adapted(), batched=True)
    assert torch.equal(found, expected)
    assert not torch.equal(found, without)
    # the ControlNet's is made, and the UNet's where what embeds is as it was
    assert fewer == (2 if targets == ["time_emb_proj"] else 1 + STEPS) < sines


class Counting(torch.nn.Linear):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x)


@pytest.mark.usefixtures("rows_alike")
def test_a_class_that_is_vouched_for_is_called_at_each_evaluation():
    pipe = models.sd15_pipeline()
    resnet_of(pipe).time_emb_proj.__class__ = Counting
    expected, _ = draw(pipe, batched=False, trust=(Counting,))
    calls, Counting.calls = Counting.calls, 0
    found, _ = draw(pipe, batched=True, trust=(Counting,))
    assert torch.equal(found, expected)
    assert Counting.calls == calls > 0


def test_where_writes_are_not_counted_nothing_is_kept():
    pipe = models.sd15_pipeline()
    with torch.inference_mode():
        expected, sines = draw(pipe, batched=False)
        found, as_many = draw(pipe, batched=True)
    assert torch.equal(found, expected) and as_many == sines


@pytest.mark.usefixtures("rows_alike")
def test_where_memory_is_limited_features_have_it(recwarn):
    pipe = models.sd15_pipeline()
    config = Config(num_evaluations=STEPS, key_steps=(0, 3), depth=0)
    with installed(pipe, config, batched=False) as plain:
        expected = models.draw(pipe, steps=STEPS)
        peak = plain.report().peak_bytes
    found, sines = draw(pipe, config.replace(max_cache_bytes=peak), batched=True)
    assert torch.equal(found, expected)
    assert sines == 2 * 2  # networks and key evaluations
    assert not [str(w.message) for w in recwarn if issubclass(w.category, hgc.HgcWarning)]


@pytest.mark.usefixtures("rows_alike")
def test_captured_graphs_are_given_the_row():
    pipe = models.sd15_pipeline()
    with installed(pipe, batched=True) as found:
        engine = found._engine
        expected = [models.draw(pipe, seed, steps=STEPS) for seed in range(2)]
        networks = CapturedNetworks(pipe.unet, found.controlnets, say=engine.warn, recorder=OnCpu())
        engine.functions.stand_in(networks)
        for _ in range(3):
            for seed in range(2):
                assert torch.equal(models.draw(pipe, seed, steps=STEPS), expected[seed])
        other = models.draw(pipe, steps=STEPS + 1)
        before = dict(networks.counts)
        assert torch.equal(models.draw(pipe, steps=STEPS + 1), other)
    assert before["replayed"] > 0 and networks.counts["recorded"] == before["recorded"]
