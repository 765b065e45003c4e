"""Captured evaluations: the bits of the eager ones, by a recorder that runs on the CPU.

    pytest tests/test_capturing.py

It keeps each op with the tensors that the op read and wrote, as a CUDA graph keeps addresses, and
runs them again: a number that was not a tensor stays what it was, and so does a weight that was
replaced. The CUDA graphs themselves are tested in test_engine_gpu.py.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import models
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hgc
import hgc_kernels
from hgc import Config, StepPlan
from hgc.models.attention import cross_attentions
from hgc.models.captured import CapturedNetworks
from hgc.models.recorder import Recording, flatten
from hgc.planning.config import PRESETS
from hgc.warn import HgcWarning


def storage(x):
    return x.untyped_storage()._cdata


def tensors_in(*values):
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Keeps ops as they are run, and what each read and wrote."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = op(*args, **kwargs)
        read = {storage(x) for x in tensors_in(args, kwargs)}
        new = [x for x in tensors_in(out) if storage(x) not in read]
        if op._schema.is_mutable or new:
            # memory and strides of now: a tensor may be given others
            kept = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            self.steps.append((op, *kept, out, {id(x) for x in new}))
        return out

    def replay(self):
        for op, args, kwargs, out, new in self.steps:
            again = op(*args, **kwargs)
            for old, value in zip(tensors_in(out), tensors_in(again), strict=True):
                if id(old) in new:
                    old.copy_(value)


class OnCpu:
    """Records ops, and overwrites what graphs returned before anything else is replayed."""

    device_type = "cpu"

    def __init__(self):
        self.outputs = []
        self.released = 0

    def begin(self, device):
        for tensor in self.outputs:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 111)
        return True

    def record(self, call):
        with Tape() as tape:
            outputs = [x.clone() for x in call()]
        self.outputs += outputs
        return outputs, tape.replay

    def release(self):
        self.released += 1


class Captured:
    """A pipeline with hgc on it, which can be run with and without being captured."""

    def __init__(self, pipe, config, **options):
        self.pipe = pipe
        vouched = (Doubling, Louder, torch.nn.Conv2d)
        self.installed = hgc.install(pipe.unet, pipe.controlnet, config=config, trust=vouched)
        self.count = self.installed.config.num_evaluations
        self.recorder = OnCpu()
        self.networks = self.installed._engine.functions.networks = CapturedNetworks(
            pipe.unet, self.installed.controlnets, say=self.installed._engine.warn,
            recorder=self.recorder, **options,
        )  # fmt: skip

    def draw(self, **changes):
        return models.draw(self.pipe, **{"steps": self.count, **changes})

    def eager(self, **changes):
        self.installed._engine.functions.networks = None
        try:
            return self.draw(**changes)
        finally:
            self.installed._engine.functions.networks = self.networks

    def counts(self, **changes):
        """What a run's evaluations did."""
        before = self.networks.counts.copy()
        self.draw(**changes)
        return dict(self.networks.counts - before)


@contextlib.contextmanager
def captured(pipe, config, **options):
    made = Captured(pipe, config, **options)
    try:
        yield made
    finally:
        if made.installed._engine.patched:
            made.installed.uninstall()


FULL = StepPlan()
SHALLOW = Config(
    name="shallow",
    num_evaluations=6,
    key_steps=(0, 3, 5),
    depth=1,
    guidance="reuse",
    feature_damping=0.7,
)


def small_pipeline():
    return models.sd15_pipeline(models.small_unet(), models.small_controlnet())


@pytest.fixture
def shallow():
    with captured(small_pipeline(), SHALLOW) as made:
        yield made


def check(made, *calls):
    """Each call captured has the bits of the same one without; several times over."""
    eager = [made.eager(**call) for call in calls]
    for _ in range(3):
        for call, expected in zip(calls, eager, strict=True):
            assert torch.equal(made.draw(**call), expected)


def test_second_use_is_recorded_and_then_replayed(shallow):
    check(shallow, {"seed": 0}, {"seed": 1})
    counts = shallow.networks.counts
    kinds = shallow.networks.graphs
    assert counts["first use"] == counts["recorded"] == kinds == 4
    assert set(counts) == {"first use", "recorded", "replayed"}
    assert shallow.counts(seed=2) == {"replayed": 6 + 3}


CALLS = (
    {"seed": 0},
    {"seed": 1, **models.change_text(3)},
    {"size": 48},
    {"controlnet_conditioning_scale": 0.4, "guess_mode": True},
    {"num_images_per_prompt": 2},
)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name):
    with captured(small_pipeline(), Config.preset(name), limit=64) as made:
        steps = {"steps": min(made.count, 8)}
        check(made, *({**steps, **call} for call in CALLS))
        assert made.networks.counts["replayed"] > made.networks.counts["recorded"]
        assert set(made.networks.counts) == {"first use", "recorded", "replayed"}


MORE = {
    "encoder": SHALLOW.replace(encoder="reuse"),
    "attention": SHALLOW.replace(attention_gate=0.4),
    "maps": SHALLOW.replace(attention_gate=0.4, fresh_values=True),
    "adaptive": SHALLOW.replace(adaptive=0.3, num_evaluations=8),
    "steps": Config(
        num_evaluations=5,
        steps=(
            FULL,
            FULL,
            StepPlan(guidance="reuse"),
            StepPlan(control="reuse", depth=3, encoder="reuse", guidance="reuse"),
            StepPlan(control="off", depth=0),
        ),
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_other_points_of_the_plan_space(name):
    with captured(small_pipeline(), MORE[name], limit=64) as made:
        check(made, *CALLS[:3])
        assert made.networks.counts["replayed"] > 0
        assert set(made.networks.counts) == {"first use", "recorded", "replayed"}


def test_attention_maps_of_a_replayed_run():
    """What is added up of queries and keys comes out of the graphs."""
    with captured(small_pipeline(), MORE["maps"]) as made:
        made.eager()
        expected = made.installed.maps()
        for _ in range(3):
            made.draw()
            assert torch.equal(made.installed.maps(), expected)
        assert made.networks.counts["replayed"] > 0


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_true_topologies(name, request):
    with captured(request.getfixturevalue(name), SHALLOW) as made:
        check(made, {"steps": 4})
        assert made.counts(steps=4) == {"replayed": 4 + 3}


def test_several_controlnets():
    two = [models.small_controlnet(1), models.small_controlnet(5)]
    pipe = models.sd15_pipeline(models.small_unet(), MultiControlNetModel(two))
    call = {
        "image": [models.picture(0), models.picture(1)],
        "controlnet_conditioning_scale": [1.0, 2.0],
        "control_guidance_end": [0.5, 1.0],
    }
    with captured(pipe, SHALLOW) as made:
        check(made, call)
        kinds = {key[0].network for key in made.networks._graphs}
        assert kinds == {"unet", "controlnet0", "controlnet1"}


def test_no_buffer_of_a_graph_is_handed_out_or_kept(shallow):
    """Neither what a network returns, nor what a run keeps, lies in memory of a graph."""
    seen = []

    def look(module, args, output):
        seen.extend(tensors_in(output, args))
        run = shallow.installed._engine.registry.last
        for values in run.cache._entries.values():
            seen.extend(value.tensor for value in values)
        seen.extend(run.cache._kept.values())

    handles = [
        module.register_forward_hook(look)
        for module in (shallow.pipe.unet, shallow.pipe.controlnet)
    ]
    for seed in range(3):
        shallow.draw(seed=seed)
    for handle in handles:
        handle.remove()
    own = {
        storage(x)
        for graph in shallow.networks._graphs.values()
        for x in (*graph._inputs, *graph._outputs)
    }
    assert len(own) > 20 and len(seen) > 100
    assert own.isdisjoint(storage(x) for x in seen if type(x) is torch.Tensor)


def test_in_turns_and_through_an_exception(shallow):
    """A run within a run on one UNet, and one that ends in an exception."""
    other = small_pipeline()
    other.unet, other.controlnet = shallow.pipe.unet, shallow.pipe.controlnet

    def within(pipe, i, t, kwargs):
        if i == 2:
            inner.append(models.draw(other, seed=1))
        return {}

    def fails(pipe, i, t, kwargs):
        if i == 2:
            raise KeyboardInterrupt
        return {}

    eager = [shallow.eager(seed=seed) for seed in (0, 1)]
    for _ in range(3):
        inner = []
        assert torch.equal(shallow.draw(seed=0, callback_on_step_end=within), eager[0])
        assert torch.equal(inner[0], eager[1])
        with pytest.raises(KeyboardInterrupt):
            shallow.draw(seed=0, callback_on_step_end=fails)
    assert shallow.counts(seed=0) == {"replayed": 9}


def test_an_exception_in_a_replay_lets_the_graph_go(shallow, monkeypatch):
    eager = shallow.eager()
    for _ in range(2):
        shallow.draw()
    graph = next(iter(shallow.networks._graphs.values()))

    def fails():
        raise KeyboardInterrupt

    monkeypatch.setattr(graph, "_replay", fails)
    with pytest.raises(KeyboardInterrupt):
        shallow.draw()
    assert shallow.networks.graphs == 3
    assert torch.equal(shallow.draw(), eager)


# -- what a graph was recorded with -------------------------------------------------------------


def test_weights_are_read_where_they_are(shallow):
    """Written to, they are seen; replaced or moved, the graphs of their network go."""
    unet = shallow.pipe.unet
    last = unet.up_blocks[1].resnets[1]
    check(shallow, {})
    before = shallow.draw()
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.5)
    assert shallow.counts() == {"replayed": 9}
    assert torch.equal(shallow.draw(), shallow.eager())
    assert not torch.equal(shallow.draw(), before)
    changes = [
        lambda: setattr(unet.conv_out.weight, "data", unet.conv_out.weight.data * 2),
        lambda: setattr(
            unet.conv_in, "weight", torch.nn.Parameter(unet.conv_in.weight.detach() * 2)
        ),
        lambda: setattr(last, "conv1", models.small_unet(7).up_blocks[1].resnets[1].conv1),
    ]  # fmt: skip
    for change in changes:
        change()
        assert shallow.counts() == {"first use": 3, "recorded": 2, "replayed": 4}
        check(shallow, {})
        assert not torch.equal(shallow.draw(), before)
    # a layer that shallow evaluations do not run
    deep = unet.down_blocks[1].resnets[0]
    deep.conv1.weight.data = deep.conv1.weight.data * 2
    assert shallow.counts() == {"first use": 1, "recorded": 1, "replayed": 7}


def test_memory_formats_are_seen_at_the_same_addresses(shallow):
    """Weights that come back in another layout to where they were."""
    check(shallow, {})
    weight = shallow.pipe.unet.conv_in.weight
    before = weight.data_ptr()
    with torch.no_grad():
        values = weight.data.clone()
        strided = weight.data.as_strided(weight.shape, values.to(memory_format=CL).stride())
        weight.data = strided
        weight.copy_(values)
    assert weight.data_ptr() == before
    check(shallow, {})


CL = torch.channels_last


def test_lora(shallow):
    """Adapters that come, change their scale, are switched off, fused and go."""
    from peft import LoraConfig

    pipe, unet = shallow.pipe, shallow.pipe.unet
    pipe.register_modules(text_encoder=models.text_encoder())  # diffusers scales its layers too
    check(shallow, {})
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    unet.add_adapter(config, "a")
    check(shallow, {}, *({"cross_attention_kwargs": {"scale": scale}} for scale in (0.2, 0.7)))
    assert shallow.counts(cross_attention_kwargs={"scale": 0.2}) == {"replayed": 9}
    unet.add_adapter(config, "b")
    check(shallow, {})
    unet.set_adapters(["a", "b"], [0.5, 0.3])
    check(shallow, {})
    unet.disable_adapters()
    check(shallow, {})
    unet.enable_adapters()
    unet.fuse_lora()
    check(shallow, {})
    unet.unfuse_lora()
    unet.delete_adapters(["a", "b"])
    check(shallow, {})
    assert set(shallow.networks.counts) == {"first use", "recorded", "replayed"}


def test_freeu_comes_and_goes(shallow):
    """It writes into the buffers of a graph."""
    check(shallow, {})
    for factors in (
        {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4},
        {"s1": 1, "s2": 1, "b1": 2, "b2": 2},
    ):
        shallow.pipe.enable_freeu(**factors)
        check(shallow, {})
        assert shallow.counts() == {"replayed": 9}
    shallow.pipe.disable_freeu()
    check(shallow, {})


class Doubling(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def louder(forward):
    return lambda x: forward(x) * 1.5


class Louder(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 1.5


FOREIGN = {
    "a processor": (
        lambda unet: unet.set_attn_processor(Doubling()), "Attention"
    ),
    "a hook": (
        lambda unet: unet.conv_out.register_forward_hook(lambda m, a, out: out * 1.5),
        "Conv2d",
    ),
    "a forward": (
        lambda unet: setattr(unet.conv_out, "forward", louder(unet.conv_out.forward)),
        "Conv2d",
    ),
    "a layer": (
        lambda unet: setattr(unet, "conv_out", Louder(unet.conv_out)),
        "Louder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_code_runs_eagerly(shallow, name):
    change, where = FOREIGN[name]
    why = f"code that a graph does not hold, in {where}"
    check(shallow, {})
    before = shallow.draw()
    change(shallow.pipe.unet)
    counts = shallow.counts()
    # of the UNet; where all is computed in full, the ControlNet has a kind more
    assert counts.pop(why) == 6 and counts.pop("replayed") >= 3
    assert set(counts) <= {"first use", "recorded"}
    check(shallow, {})
    assert not torch.equal(shallow.draw(), before)


def test_another_setting_of_torch_is_another_graph(shallow):
    check(shallow, {})
    torch.backends.cuda.enable_math_sdp(False)
    try:
        assert shallow.counts() == {"first use": 4, "recorded": 3, "replayed": 2}
    finally:
        torch.backends.cuda.enable_math_sdp(True)
    with hgc_kernels.use_backend("reference", "gather_blocks"):
        check(shallow, {})
    assert shallow.counts() == {"replayed": 9}


def test_modes_of_torch(shallow):
    """Inference mode replays the same graphs; gradients, autocast and watching modes do not."""
    check(shallow, {})
    with torch.inference_mode():
        check(shallow, {})
    # inference tensors are no others
    assert shallow.counts() == {"replayed": 9}
    why = "gradients, autocast or a mode of torch"
    eager = shallow.eager()
    with FlopCounterMode(display=False) as counter:
        assert shallow.counts() == {why: 9}
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert shallow.counts() == {why: 9}
    torch.set_default_device("cpu")
    try:
        assert shallow.counts() == {"replayed": 9}
    finally:
        torch.set_default_device(None)
    assert torch.equal(shallow.draw(), eager)


def test_arguments_that_are_no_tensors_are_part_of_the_kind():
    """A number in them is not kept from the first call."""
    pipe, schedule = small_pipeline(), torch.full((8,), 500)
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = models.text(0, 2)
    with torch.no_grad(), captured(pipe, Config.preset("exact")) as made:
        for t, value in zip(schedule, (0.0, -0.0, False, 0, object(), None, 0.0, 0.0), strict=True):
            pipe.unet(sample, t, text, added_cond_kwargs={"nothing": value})
        assert made.networks.counts == {
            "first use": 5,
            "an argument that is no tensor or setting": 1,
            "recorded": 1,
            "replayed": 1,
        }


# -- limits, freeing, threads, failures -----------------------------------------------------------


def test_the_least_recently_used_graph_goes():
    with captured(small_pipeline(), SHALLOW, limit=3) as made:
        check(made, {})
        assert made.networks.graphs == 3 and made.recorder.released > 0
        check(made, {"size": 48}, {})
        assert made.networks.graphs == 3
        assert len(made.networks._graphs) <= 3 * 4


def test_reset_and_uninstall_free_the_graphs(shallow):
    def finders():
        return [weakref.ref(g) for g in shallow.networks._graphs.values()]

    check(shallow, {})
    graphs = finders()
    shallow.installed.reset()
    assert shallow.networks.graphs == 0 and shallow.recorder.released == 1
    gc.collect()
    assert len(graphs) == 4 and not any(graph() for graph in graphs)
    check(shallow, {})
    graphs = finders()
    shallow.installed.uninstall()
    assert shallow.installed._engine.functions.networks is None and shallow.networks.graphs == 0
    gc.collect()
    assert not any(graph() for graph in graphs)


def test_a_graph_holds_nothing_of_a_run(shallow):
    """What was copied in goes with the run that it belonged to."""
    held = []
    original = shallow.networks._by_graph

    def by_graph(kind, function, args):
        # schedulers keep their timesteps
        held.extend(weakref.ref(x) for x in tensors_in(args) if x.is_floating_point())
        return original(kind, function, args)

    shallow.networks._by_graph = by_graph
    for _ in range(3):
        shallow.draw()
    shallow.installed._engine.registry.clear()
    gc.collect()
    assert len(held) > 100 and not any(x() is not None for x in held)


def test_what_did_not_change_is_not_copied_again(shallow, monkeypatch):
    """Keys and values of the text are, once a run."""
    for _ in range(2):
        shallow.draw()
    graphs = {key[0].name: graph for key, graph in shallow.networks._graphs.items()}
    buffers = {id(x): name for name, graph in graphs.items() for x in graph._inputs}
    copied = []
    original = torch._foreach_copy_

    def copy(to, come):
        copied.extend(buffers[id(x)] for x in to if id(x) in buffers)
        original(to, come)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    shallow.draw()
    models_of = {"unet_full": shallow.pipe.unet, "controlnet0": shallow.pipe.controlnet}
    for name, model in models_of.items():
        # the keys and values and the text, and of a ControlNet the hint
        constant = 2 * len(cross_attentions(model)) + 1 + (name == "controlnet0")
        total = len(graphs[name]._inputs)
        assert copied.count(name) == total + 2 * (total - constant)


def test_inputs_that_are_written_to_are_copied_again():
    """Counted writes, other memory under one tensor, and what the function itself writes."""

    def function(values):
        values["a"].add_(1)  # as FreeU does
        return values["a"] * values["b"] + values["scale"]

    tensors, layout = [], []
    given = {"a": torch.ones(3), "b": torch.full((3,), 2.0), "scale": 0.5}
    assert flatten((given,), tensors, layout)
    graph = Recording(OnCpu(), function, tensors, tuple(layout))
    for _ in range(3):
        assert graph.run(tensors).tolist() == [4.5] * 3
    given["b"].mul_(2)
    assert graph.run(tensors).tolist() == [8.5] * 3
    given["b"].data = torch.full((3,), 3.0)
    assert graph.run(tensors).tolist() == [6.5] * 3
    with torch.inference_mode():
        tensors[1] = torch.full((3,), 5.0)
        assert graph.run(tensors).tolist() == [10.5] * 3
        tensors[1].mul_(2)  # not counted
        assert graph.run(tensors).tolist() == [20.5] * 3
    assert given["a"].tolist() == [1.0] * 3


def test_one_thread_replays_and_others_run_eagerly(shallow):
    eager = shallow.eager()
    for _ in range(2):
        shallow.draw()
    with shallow.networks._lock:
        found = []
        thread = threading.Thread(target=lambda: found.append(shallow.draw()))
        thread.start()
        thread.join()
    assert torch.equal(found[0], eager)
    assert shallow.networks.counts["another thread"] == 9
    found = []

    def work():
        own = small_pipeline()
        own.unet, own.controlnet = shallow.pipe.unet, shallow.pipe.controlnet
        found.extend(models.draw(own) for _ in range(4))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and all(torch.equal(one, eager) for one in found)


def test_what_cannot_be_recorded_runs_eagerly_and_is_said_once(monkeypatch):
    """A network that waits for the device; once it does not, a reset is enough."""
    forward = torch.nn.Conv2d.forward
    with captured(small_pipeline(), SHALLOW) as made:

        def waiting(self, x):
            return (
                forward(self, x) * (1.0 + 0.0 * x.sum().item()) if waits(self) else forward(self, x)
            )

        def waits(layer):
            return layer is made.pipe.unet.conv_out

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Conv2d, "forward", waiting)
            eager = made.eager()
            with pytest.warns(HgcWarning, match="runs eagerly: RuntimeError: oper") as said:
                for _ in range(3):
                    assert torch.equal(made.draw(), eager)
            messages = [str(w.message) for w in said if w.category is HgcWarning]
            assert len(messages) == len(set(messages)) == 3
            assert made.networks.counts["could not be recorded"] > 6
            assert {key[0].network for key in made.networks._graphs} == {"controlnet0"}
        made.installed.reset()
        check(made, {})
        assert made.counts() == {"replayed": 9}


def test_wrong_uses():
    pipe = small_pipeline()
    installed = hgc.install(pipe.unet, pipe.controlnet)
    with pytest.raises(ValueError, match="graphs must be an integer of at least 1; got 0"):
        installed.capture(graphs=0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch sees no"):
            installed.capture()
    assert installed._engine.functions.networks is None
    installed.uninstall()
    with pytest.raises(RuntimeError, match="not installed"):
        installed.capture()
