"""Compiled evaluations: one graph a kind, equal to the eager ones.

    pytest tests/test_compile.py
    pytest tests/test_compile.py -m slow    # every preset under Inductor, SDXL's topology

Dynamo's tracing takes longest, so the models are small: four decoder layers. A backend that runs a
graph as it was traced shows what Dynamo makes of an evaluation; Inductor shows the numbers.
"""

from __future__ import annotations

import contextlib
import copy
import logging

import models
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch.utils import _pytree as pytree

import hgc
import hgc_kernels
from hgc import Config, StepPlan
from hgc.models.attention import cross_attentions, wrap
from hgc.models.compiled import CompiledNetworks
from hgc.planning.config import PRESETS
from hgc.warn import HgcWarning

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
}
SMALL_UNET = {
    **SMALL,
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SHALLOW = Config(
    name="shallow",
    num_evaluations=6,
    key_steps=(0, 3, 5),
    depth=1,
    guidance="reuse",
    feature_damping=0.7,
)
FULL = StepPlan()


def steps(*plans):
    return Config(name="steps", num_evaluations=len(plans), steps=plans)


def small_pipeline():
    return models.sd15_pipeline(models.sd15_unet(**SMALL_UNET), models.sd15_controlnet(**SMALL))


class Overwriting:
    """Runs graphs as they were traced, counts them, and does with their outputs what CUDA graphs
    do: they lie in memory that belongs to the graph, and the next call of any graph overwrites it.
    """

    def __init__(self):
        self.graphs = 0
        self.handed_out = []

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            # inputs are copied in before anything is overwritten
            args = [a.clone() if type(a) is torch.Tensor else a for a in args]
            for tensor in self.handed_out:
                tensor.fill_(float("nan"))
            outputs = [
                o.clone() if isinstance(o, torch.Tensor) else o for o in graph.forward(*args)
            ]
            self.handed_out = [
                o for o in outputs if isinstance(o, torch.Tensor) and o.is_floating_point()
            ]
            return outputs

        return run


class Compiled:
    """A pipeline with hgc on it, which can be run with and without being compiled."""

    def __init__(self, pipe, config):
        self.pipe = pipe
        self.backend = Overwriting()
        self.installed = hgc.install(pipe.unet, pipe.controlnet, config=config)
        self.count = self.installed.config.num_evaluations
        assert self.installed.compile(backend=self.backend) is self.installed

    @property
    def kinds(self):
        return self.installed._engine.functions.networks.kinds

    def draw(self, **changes):
        return models.draw(self.pipe, **{"steps": self.count, **changes})

    def eager(self, **changes):
        compiled, self.installed._engine.functions.networks = (
            self.installed._engine.functions.networks,
            None,
        )
        try:
            return self.draw(**changes)
        finally:
            self.installed._engine.functions.networks = compiled


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """pytest keeps every record for its report, and Dynamo's traces are hundreds of megabytes."""
    logging.getLogger("torch.__trace").disabled = True
    yield
    logging.getLogger("torch.__trace").disabled = False


@contextlib.contextmanager
def compiled(pipe, config):
    made = Compiled(pipe, config)
    try:
        yield made
    finally:
        made.installed.uninstall()
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def shallow():
    with compiled(small_pipeline(), SHALLOW) as made:
        yield made


# -- one graph a kind -------------------------------------------------------------------------


def test_the_number_of_graphs_is_the_number_of_kinds(shallow):
    """No graph break (fullgraph), the bits of the eager evaluation, and nothing compiled again
    over three runs with other prompts and noise."""
    eager = [shallow.eager(seed=seed) for seed in range(3)]
    held = shallow.installed.peak_bytes
    assert torch.equal(shallow.draw(seed=0), eager[0])
    kinds = shallow.kinds
    assert {k.name for k in kinds} == {
        "controlnet0", "unet_full", "unet_depth1", "unet_depth1_half"
    }  # fmt: skip
    assert shallow.backend.graphs == len(kinds) == 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            assert torch.equal(shallow.draw(seed=seed), eager[seed])
    assert shallow.backend.graphs == 4 and shallow.kinds == kinds
    assert shallow.installed.peak_bytes == held


def test_a_scale_is_no_kind(shallow):
    """A ControlNet's scale travels as a tensor: changing it compiles nothing."""
    call = {"controlnet_conditioning_scale": 0.3}
    eager = shallow.eager(**call)
    shallow.draw()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(shallow.draw(**call), eager)
    assert shallow.backend.graphs == 4


def test_what_the_pipeline_is_handed_outlives_the_next_evaluation(shallow):
    """A scheduler may keep the UNet's output (PNDM does, without guidance)."""
    outputs = []
    handle = shallow.pipe.unet.register_forward_hook(
        lambda module, args, output: outputs.append(output[0])
    )
    try:
        shallow.draw()
    finally:
        handle.remove()
    assert len(outputs) == 6 and all(out.isfinite().all() for out in outputs)


def test_interleaved_requests_on_one_set_of_graphs(shallow):
    """Two requests in turns on one UNet: each as if it were alone."""
    other = small_pipeline()
    other.unet, other.controlnet = shallow.pipe.unet, shallow.pipe.controlnet
    eager = [shallow.eager(seed=seed) for seed in (0, 1)]
    inner = []

    def second(pipe, i, t, kwargs):
        if i == 2:
            inner.append(models.draw(other, seed=1))
        return {}

    outer = shallow.draw(seed=0, callback_on_step_end=second)
    assert torch.equal(outer, eager[0]) and torch.equal(inner[0], eager[1])
    assert shallow.backend.graphs == 4


def test_no_sync_in_a_compiled_loop(shallow, monkeypatch):
    """`.item()` and its like may not be called once every kind was compiled."""
    shallow.draw()
    inside = []

    def forbidden(name):
        original = getattr(torch.Tensor, name)

        def guarded(self, *args, **kwargs):
            assert not inside, f"Tensor.{name} was called in the loop"
            return original(self, *args, **kwargs)

        return guarded

    def watched(run):
        def watching(*args, **kwargs):
            inside.append(1)
            try:
                return run(*args, **kwargs)
            finally:
                inside.pop()

        return watching

    for name in ("item", "__bool__", "cpu", "tolist", "numpy", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden(name))
    for module in (shallow.pipe.unet, shallow.pipe.controlnet):
        monkeypatch.setattr(module, "forward", watched(module.forward))
    shallow.draw(seed=1)


def test_another_size_or_batch_compiles_once_more_and_is_right(shallow):
    for call in ({"size": 48}, {"num_images_per_prompt": 2}):
        eager, again = shallow.eager(steps=2, **call), shallow.eager(steps=2, seed=4, **call)
        before = shallow.backend.graphs
        # a function a size: nothing is compiled again, and no shape becomes dynamic
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(shallow.draw(steps=2, **call), eager)
            assert shallow.backend.graphs == before + 2
            assert torch.equal(shallow.draw(steps=2, seed=4, **call), again)
        assert shallow.backend.graphs == before + 2


MORE = {
    # plan, kinds of the ControlNet's evaluations, of the UNet's
    "conditional keys, encoder": (
        steps(
            FULL,
            FULL,
            StepPlan(guidance="reuse"),
            StepPlan(control="reuse", depth=3, encoder="reuse", guidance="reuse"),
            StepPlan(control="off", depth=0),
        ),
        2,
        3,
    ),
    "maps": (
        Config(num_evaluations=6, attention_gate=0.2, fresh_values=True, map_format="fp32"), 3, 3
    ),
    "exact": (Config.preset("exact").replace(num_evaluations=4), 1, 1),
    "attention": (
        steps(FULL, StepPlan(attention="reuse"), StepPlan(control="reuse", attention="reuse")), 2, 2
    ),
}  # fmt: skip
SLOW = ("exact", "attention", "maps")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MORE],
)
def test_other_points_of_the_plan_space(name):
    config, control_kinds, unet_kinds = MORE[name]
    with compiled(small_pipeline(), config) as made:
        eager = [made.eager(seed=seed) for seed in range(2)]
        assert torch.equal(made.draw(seed=0), eager[0])
        names = [kind.name for kind in made.kinds]
        assert sum(name.startswith("controlnet") for name in names) == control_kinds
        assert sum(name.startswith("unet") for name in names) == unet_kinds
        assert made.backend.graphs == len(names) == len(set(names))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(made.draw(seed=1), eager[1])
        if name == "maps":
            # the cached map on the values of another text
            eager_changed = made.eager(**models.change_text(3))
            assert torch.equal(made.draw(**models.change_text(3)), eager_changed)
            # what is added up of queries and keys comes out of the graphs
            looked = made.installed.maps()
            made.eager(**models.change_text(3))
            assert torch.equal(looked, made.installed.maps())
            assert {kind.mode for kind in made.kinds} == {"compute", "map", "output"}


@pytest.mark.slow
def test_two_controlnets_and_an_end_of_guidance():
    pipe = small_pipeline()
    pipe.controlnet = MultiControlNetModel(
        [models.sd15_controlnet(1, **SMALL), models.sd15_controlnet(5, **SMALL)]
    )
    call = {
        "image": [models.picture(0), models.picture(1)],
        "controlnet_conditioning_scale": [1.0, 2.0],
        "control_guidance_end": [0.5, 1.0],
    }
    with compiled(pipe, SHALLOW) as made:
        assert torch.equal(made.draw(**call), made.eager(**call))
        names = {kind.name for kind in made.kinds}
    assert {"controlnet0", "controlnet1", "unet_full"} <= names


@pytest.mark.slow
def test_sdxl_is_one_graph_a_kind(sdxl):
    with compiled(sdxl, SHALLOW) as made:
        for seed in range(2):
            assert torch.equal(made.draw(seed=seed), made.eager(seed=seed))
        assert made.backend.graphs == len(made.kinds) == 4


@pytest.mark.slow
def test_residuals_of_adapters_are_taken_as_diffusers_takes_them():
    """In a graph, and out of the caller's list."""
    pipe = small_pipeline()
    unet, schedule = pipe.unet, torch.full((4,), 500)
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    shapes = [(1, 8, 16, 16), (1, 16, 8, 8)]
    features = [
        torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)
    ]

    def evaluate(t):
        given = [f.clone() for f in features]
        out = unet(sample, t, models.text(0), down_intrablock_additional_residuals=given).sample
        return out, len(given)

    config = steps(FULL, FULL, *(StepPlan(control="off", depth=k) for k in (1, 4)))
    with torch.no_grad():
        reference, left = evaluate(schedule[0])
        with hgc.install(unet, config=config) as installed:
            installed.compile(backend="eager")
            for t in schedule:
                out, now_left = evaluate(t)
                assert torch.equal(out, reference)
                assert now_left == left
    torch._dynamo.reset()


@pytest.mark.slow
def test_changed_lora_scales_are_obeyed():
    from peft import LoraConfig

    pipe = small_pipeline()
    pipe.register_modules(text_encoder=models.text_encoder())  # diffusers scales its layers too
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    calls = [{}, {"cross_attention_kwargs": {"scale": 0.2}}]
    with compiled(pipe, SHALLOW) as made:
        eager = [made.eager(**call) for call in calls]
        for call, expected in zip(calls, eager, strict=True):
            assert torch.equal(made.draw(**call), expected)
    assert not torch.equal(*eager)


# -- Inductor -------------------------------------------------------------------------------


def ulp_bound(reference):
    """Twice the rounding of a float32 value at each element's size."""
    return 2 * (reference.float() + 0.3 - 0.3 - reference.float()).abs().max().double()


def walk_bound(reference, network):
    """What the order of the additions may change, which Inductor is free to choose.

    An element of the output comes of a sum in each layer, of as many terms as a row of its weights
    has. A term added rounds by up to half an epsilon of the output's size, up or down: a random
    walk of as many steps as all these sums have terms, so that its length grows with their root
    (Higham and Mary, doi:10.1137/18M1226312). Eager's own error is one such walk, and now and then
    a short one: alone it would be no measure.
    """
    terms = sum(p[0].numel() for p in network.parameters() if p.dim() > 1)
    return terms**0.5 * torch.finfo(torch.float32).eps / 2 * reference.abs().max()


def join(hidden, skip, terms):
    for value, scale in terms:
        skip = skip + value * scale
    return torch.cat([hidden, skip], dim=1)


def attend_and_store(q, k, v, buffer, op=hgc_kernels.attend_and_store):
    op(q.float(), k.float(), v.float(), buffer)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def apply_map(stored, values, op=hgc_kernels.apply_map):
    return op(stored, values.float()).double()


class Checking(CompiledNetworks):
    """Compares each compiled call with the same function in eager mode, in float32 and float64.

    The rule: at most twice the error of the eager evaluation in the same dtype or, where that is
    more, the walk of another order of its sums; and two roundings.
    """

    def __init__(self, unet, nets, options):
        super().__init__(unet, nets, options)
        self.modules = {self._networks[id(m)]: m for m in (unet, *nets)}
        self.doubles = {id(m): copy.deepcopy(m).double() for m in (unet, *nets)}
        for double in self.doubles.values():
            # a copy is an uninstalled model
            for name, attn in cross_attentions(double).items():
                attn.processor = wrap(name, attn.processor)
        self.checked = set()

    def _function(self, kind, make):
        compiled = super()._function(kind, make)
        plain = make()

        def both(*args):
            out = compiled(*args)
            double = self.double(plain)
            args64 = pytree.tree_map(
                lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, args
            )
            with pytest.MonkeyPatch.context() as patch:
                # the ops take no float64
                patch.setattr("hgc.models.unet._join", join)
                patch.setattr("hgc_kernels.attend_and_store", attend_and_store)
                patch.setattr("hgc_kernels.apply_map", apply_map)
                references = pytree.tree_leaves(double(*args64))
            for got, eager, reference in zip(
                pytree.tree_leaves(out), pytree.tree_leaves(plain(*args)), references, strict=True
            ):
                if torch.is_tensor(got):
                    error = (got.double() - reference).abs().max()
                    twice = 2 * (eager.double() - reference).abs().max()
                    walk = walk_bound(reference, self.modules[kind.network])
                    bound = torch.maximum(twice, walk) + ulp_bound(reference)
                    assert error <= bound, f"{kind.name}: {error:.3g} > {bound:.3g}"
            self.checked.add(kind.name)
            return out

        return both

    def double(self, function):
        """``function`` on the float64 copy of its network."""
        cells = []
        for cell in function.__closure__:
            value = cell.cell_contents
            cells.append(type(cell)(self.doubles.get(id(value), value)))
        return type(function)(
            function.__code__, function.__globals__, function.__name__, None, tuple(cells)
        )


def check_under_inductor(pipe, config, count):
    with hgc.install(pipe, config=config) as installed:
        installed.compile()
        installed._engine.functions.networks = Checking(pipe.unet, [pipe.controlnet], {})
        models.draw(pipe, steps=count)
        assert installed._engine.functions.networks.checked == {
            k.name for k in installed._engine.functions.networks.kinds
        }
        return installed._engine.functions.networks.checked


@pytest.mark.timeout(1500)  # a C++ compiler runs once for each of some dozens of kernels
def test_a_preset_under_inductor():
    one_level = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "layers_per_block": 1,
    }
    unet = models.sd15_unet(
        **one_level, mid_block_type=None, up_block_types=("CrossAttnUpBlock2D",)
    )
    pipe = models.sd15_pipeline(unet, models.sd15_controlnet(**one_level))
    assert check_under_inductor(pipe, "turbo", 8) == {"controlnet0", "unet_full"}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [*PRESETS, *MORE])
def test_every_preset_under_inductor(sd15, name):
    config = MORE[name][0] if name in MORE else Config.preset(name)
    check_under_inductor(sd15, config, config.num_evaluations if name in MORE else 10)


# -- what users compile themselves --------------------------------------------------------------


def count_into(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def test_regional_compile_passes_through():
    """Blocks compiled one by one: one graph serves all blocks of a shape at every evaluation, and
    hgc adds only that of the half batch."""
    pipe = small_pipeline()
    plain = []
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=count_into(plain))
    reference = models.draw(pipe)
    torch._dynamo.reset()

    pipe, graphs = small_pipeline(), []
    with hgc.install(pipe.unet, pipe.controlnet, config=SHALLOW) as installed:
        eager = [models.draw(pipe, seed=seed) for seed in range(2)]
        # what hgc had wrapped by then is unwrapped at the next run
        pipe.unet.compile_repeated_blocks(fullgraph=True, backend=count_into(graphs))
        assert torch.equal(models.draw(pipe, seed=0), eager[0])
        count = len(graphs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(models.draw(pipe, seed=1), eager[1])
        assert installed.report().rows[1].depth == 1
        assert 0 < len(plain) <= count == len(graphs) <= 2 * len(plain)
        with pytest.raises(RuntimeError, match=r"compiled one by one.*not both"):
            installed.compile()
    with hgc.install(pipe.unet, pipe.controlnet, config="exact"):
        assert torch.equal(models.draw(pipe), reference)
    assert len(graphs) == count
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiling_an_installed_model_is_refused(fullgraph):
    """``unet.compile()`` would trace hgc's bookkeeping: it says what to call instead."""
    pipe = small_pipeline()
    with hgc.install(pipe.unet, pipe.controlnet, config=SHALLOW):
        compiled = torch.compile(pipe.unet, backend="eager", fullgraph=fullgraph)
        expected = torch._dynamo.exc.Unsupported if fullgraph else TypeError
        with pytest.raises(expected, match=r"call .compile\(\) of the Installation"):
            compiled(torch.randn(2, 4, 16, 16), torch.arange(9)[3], models.text(0, 2))
        pipe.unet.compile(backend="eager", fullgraph=fullgraph)
        with pytest.raises(expected, match=r"call .compile\(\) of the Installation"):
            models.draw(pipe)
    torch._dynamo.reset()


def test_wrong_uses():
    pipe = small_pipeline()
    installed = hgc.install(pipe.unet, pipe.controlnet)
    with pytest.raises(TypeError, match="modus"):
        installed.compile(modus="reduce-overhead")
    with pytest.raises(RuntimeError, match="modus"):
        installed.compile(mode="modus")
    assert installed._engine.functions.networks is None
    installed.compile(backend="eager")
    installed.uninstall()
    assert installed._engine.functions.networks is None
    with pytest.raises(RuntimeError, match="not installed"):
        installed.compile()


def test_with_an_unknown_diffusers_it_says_that_nothing_is_compiled(monkeypatch):
    pipe = small_pipeline()
    monkeypatch.setattr("diffusers.__version__", "0.43.0")
    with pytest.warns(HgcWarning, match="every evaluation is computed in full"):
        installed = hgc.install(pipe.unet, pipe.controlnet)
    with installed, pytest.warns(HgcWarning, match="compile does nothing"):
        installed.compile()
