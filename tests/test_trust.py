"""Code inside of models that hgc does not know: each patch that people make, in each place.

A run of such a model is the one without hgc, bit for bit, with one warning; the next request
without the patch is what it was, and so is the image after ``uninstall``.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
import types
import warnings

import models
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import hgc
from hgc.warn import HgcWarning
from hgc.watch.trust import Trust

STEPS = 5
CALLS: list[int] = []
ATTENTION = "up_blocks.1.attentions.0.transformer_blocks.0"
PLACES = {
    "the UNet": ("unet", ""),
    "a block": ("unet", "mid_block"),
    "a block run in part": ("unet", "up_blocks.1"),
    "a resnet": ("unet", "down_blocks.0.resnets.0"),
    "self-attention": ("unet", f"{ATTENTION}.attn1"),
    "cross-attention": ("unet", f"{ATTENTION}.attn2"),
    "a projection": ("unet", f"{ATTENTION}.attn2.to_k"),
    "the ControlNet": ("controlnet", ""),
    "a block of the ControlNet": ("controlnet", "mid_block"),
    "the condition embedding": ("controlnet", "controlnet_cond_embedding"),
}


def louder(out):
    """A call is counted, and the whole batch is needed: its rows are mixed."""
    CALLS.append(1)
    if isinstance(out, torch.Tensor):
        return out + 0.1 * out.mean(0, keepdim=True)
    if isinstance(out, tuple):
        return tuple(map(louder, out))
    return out


@contextlib.contextmanager
def forward_of_the_instance(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: louder(original(*args, **kwargs))
    try:
        yield
    finally:
        if isinstance(original, types.MethodType):
            del module.forward
        else:
            module.forward = original


@contextlib.contextmanager
def forward_of_the_class(module):
    cls = type(module)
    original = cls.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return louder(out) if self is module else out

    cls.forward = forward
    try:
        yield
    finally:
        cls.forward = original


@contextlib.contextmanager
def another_class(module):
    cls = type(module)

    class Other(cls):
        def forward(self, *args, **kwargs):
            return louder(super().forward(*args, **kwargs))

    module.__class__ = Other
    try:
        yield
    finally:
        module.__class__ = cls


@contextlib.contextmanager
def a_hook_with_kwargs(module):
    def hook(module, args, kwargs, out):
        for value in (*args, *kwargs.values()):
            # what is handed over is a tensor, and it is read
            assert value is None or isinstance(value, (torch.Tensor, tuple, list, dict, float, int))
        return louder(out)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def a_hook_before(module):
    handle = module.register_forward_pre_hook(lambda module, args: CALLS.append(1))
    try:
        yield
    finally:
        handle.remove()


PATCHES = {
    each.__name__.replace("_", " "): each
    for each in (
        forward_of_the_instance, forward_of_the_class, another_class, a_hook_with_kwargs,
        a_hook_before,
    )
}  # fmt: skip


@functools.cache
def pipeline():
    return models.sd15_pipeline(models.small_unet(), models.small_controlnet())


@functools.cache
def plain(config):
    """Latents without a patch: without hgc, or with it."""
    with hgc.install(pipeline(), config=config) if config else contextlib.nullcontext():
        return draw()


def draw():
    return models.draw(pipeline(), steps=STEPS)


def draws(patch, config=None):
    """Latents and calls of a patched request; the next without the patch is looked at too."""
    CALLS.clear()
    with patch:
        patched, calls = draw(), len(CALLS)
    assert torch.equal(draw(), plain(config))
    return patched, calls


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("place", PLACES)
def test_a_patch_is_obeyed(kind, place):
    model, name = PLACES[place]
    module = operator.attrgetter(model)(pipeline()).get_submodule(name)

    def patch():
        return PATCHES[kind](module)

    for config in (None, "exact", "turbo"):
        plain(config)
    right, calls = draws(patch())
    assert calls > 0
    # what stands before a model is called by its caller, whatever the model does
    stands_before = name == "" and kind not in ("forward of the class", "another class")
    for config in ("exact", "turbo"):
        # before it is installed: a model of another kind is refused by name
        with patch(), warnings.catch_warnings(record=True):
            CALLS.clear()
            try:
                with hgc.install(pipeline(), config=config):
                    image = draw()
                    if not stands_before or config == "exact":
                        assert torch.equal(image, right) and len(CALLS) == calls
            except TypeError as error:
                assert name == "" or "block of class Other" in str(error)
                assert any(kind in str(error) for kind in ("Other", type(module).__name__))
        with (
            hgc.install(pipeline(), config=config),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", HgcWarning)
            patched, again = draws(patch(), config)
            said = [str(w.message) for w in caught if w.category is HgcWarning]
        if stands_before:
            assert again >= STEPS and said == []
        else:
            assert len(said) == 1 and "leaves runs to diffusers" in said[0]
        if not stands_before or config == "exact":
            assert torch.equal(patched, right) and again == calls, said
    assert torch.equal(draw(), plain(None))


def attention_by_hand(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
    """Attention whose keys and values are those of the batch's first row."""
    CALLS.append(1)
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = map(
        attn.head_to_batch_dim, (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
    )
    out = torch.bmm(attn.get_attention_scores(query, key, None), value)
    return attn.to_out[0](attn.batch_to_head_dim(out)) * 1.5


class Own:
    __call__ = attention_by_hand


class OwnModule(torch.nn.Module):
    __call__ = attention_by_hand


def own_function(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
    return attention_by_hand(None, attn, hidden_states, encoder_hidden_states)


@contextlib.contextmanager
def processors(made, only):
    """Put ``made`` in the place of the processors whose name has ``only`` in it."""
    held = dict(pipeline().unet.attn_processors)
    pipeline().unet.set_attn_processor(
        {name: made if only in name else old for name, old in held.items()}
    )
    try:
        yield
    finally:
        pipeline().unet.set_attn_processor(held)


@contextlib.contextmanager
def call_of_the_class():
    own = AttnProcessor2_0.__call__
    AttnProcessor2_0.__call__ = attention_by_hand
    try:
        yield
    finally:
        AttnProcessor2_0.__call__ = own


PROCESSORS = {
    "a class": lambda: processors(Own(), "attn2"),
    "a class, in one layer": lambda: processors(Own(), f"{ATTENTION}.attn1"),
    "a module": lambda: processors(OwnModule(), "attn2"),
    "a function": lambda: processors(own_function, "attn1"),
    "__call__ of diffusers' class": call_of_the_class,
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_processor_is_obeyed(kind):
    for config in (None, "exact", "turbo"):
        plain(config)
    right, calls = draws(PROCESSORS[kind]())
    assert calls > 0 and not torch.equal(right, plain(None))
    for config in ("exact", "turbo"):
        with (
            hgc.install(pipeline(), config=config),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", HgcWarning)
            patched, again = draws(PROCESSORS[kind](), config)
            said = [str(w.message) for w in caught if w.category is HgcWarning]
        assert torch.equal(patched, right) and again == calls
        assert len(said) == 1 and "leaves runs to diffusers" in said[0]
        with PROCESSORS[kind](), hgc.install(pipeline(), config=config), warnings.catch_warnings():
            warnings.simplefilter("ignore", HgcWarning)
            assert torch.equal(draw(), right)
    assert torch.equal(draw(), plain(None))


@pytest.mark.parametrize("made", [Own(), own_function])
def test_a_processor_that_is_vouched_for_is_skipped(made):
    vouched = (own_function if made is own_function else Own,)
    with processors(made, "attn2"):
        CALLS.clear()
        right = models.draw(pipeline(), steps=10)
        calls = len(CALLS)
        with warnings.catch_warnings():
            warnings.simplefilter("error", HgcWarning)
            with hgc.install(pipeline(), config="exact", trust=vouched):
                assert torch.equal(models.draw(pipeline(), steps=10), right)
            CALLS.clear()
            with hgc.install(pipeline(), config="paper", trust=vouched) as installed:
                models.draw(pipeline(), steps=10)
                assert {row.depth for row in installed.report().rows} == {"full", 1}
            assert len(CALLS) < calls


def test_a_setting_of_a_processor_that_changes_in_a_run_is_seen_at_once():
    class Scaled(AttnProcessor2_0):
        def __init__(self):
            self.scale = 1.0

        def __call__(self, *args, **kwargs):
            return self.scale * super().__call__(*args, **kwargs)

    made = Scaled()

    def change(pipe, step, t, tensors):
        if step == 1:
            made.scale = 3.0
        return {}

    with processors(made, "attn1"), hgc.install(pipeline(), trust=(Scaled,)) as installed:
        models.draw(pipeline(), steps=20, callback_on_step_end=change)
        rows = installed.report().rows
    assert [row.index for row in rows if row.why == "the UNet's arguments changed"] == [2]


@pytest.mark.parametrize("config", ["exact", "paper", "turbo"])
def test_a_processor_that_comes_in_a_run_sees_tensors_and_leaves_the_rest_to_diffusers(config):
    seen = []

    class Stranger(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            seen.append(type(encoder_hidden_states))
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    attn = pipeline().unet.get_submodule(f"{ATTENTION}.attn2")

    def change(pipe, step, t, tensors):
        if step == 1:
            attn.processor = Stranger()  # not by set_attn_processor
        return {}

    try:
        with (
            hgc.install(pipeline(), config=config) as installed,
            pytest.warns(HgcWarning, match="Stranger is not known"),
        ):
            models.draw(pipeline(), steps=10, callback_on_step_end=change)
            rows = installed.report().rows
    finally:
        attn.processor = AttnProcessor2_0()
    assert set(seen) == {torch.Tensor}
    assert len(seen) == sum("Stranger is not known" in row.why for row in rows) > 4


def test_settings_go_to_the_processor_that_is_wrapped():
    with hgc.install(pipeline()):
        attn = pipeline().unet.get_submodule(f"{ATTENTION}.attn2")
        attn.processor.scale = 0.5
        assert attn.processor.scale == 0.5
    assert attn.processor.scale == 0.5
    del attn.processor.scale


def test_what_stands_beside_a_call_is_no_stranger():
    """Near misses: none of them changes what a call computes, and none is to be said."""
    unet = models.small_unet()
    trust = Trust([unet])
    assert trust.stranger() == ""

    def added(module):
        raise AssertionError

    class Same(UNet2DConditionModel):
        """Another name, no code."""

    block = unet.mid_block
    block.forward = types.MethodType(type(block).forward, block)  # put back by hand
    block.note = added  # no method of the class
    torch.nn.Module.added_by_somebody = added
    unet.__class__ = Same
    try:
        with torch.utils.flop_counter.FlopCounterMode(display=False):  # has hooks on all modules
            assert trust.stranger() == ""
    finally:
        del torch.nn.Module.added_by_somebody
    block.forward = types.MethodType(type(block).forward, models.small_unet().mid_block)
    assert trust.stranger() == (
        "forward of mid_block (UNetMidBlock2DCrossAttn) in the Same was replaced"
    )


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ("get_attention_scores", "get_attention_scores of .*attn1 .Attention. .* was replaced"),
        ("class", r"Attention.head_to_batch_dim was replaced"),
        ("register_module_forward_hook", "all modules is in place .register_module_forward_hook."),
        ("register_module_forward_pre_hook", "in place .register_module_forward_pre_hook."),
        ("dispatch", r"Module.__call__ was replaced"),
    ],
)
def test_other_ways_to_stand_in_a_call(patch, said):
    unet = models.small_unet()
    attn = unet.get_submodule(f"{ATTENTION}.attn1")
    with contextlib.ExitStack() as undo, pytest.MonkeyPatch.context() as monkeypatch:
        if patch == "get_attention_scores":
            attn.get_attention_scores = lambda *args: None
        elif patch == "class":
            monkeypatch.setattr(Attention, "head_to_batch_dim", lambda *args: None)
        elif patch == "dispatch":
            call = torch.nn.Module.__call__
            monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: call(*a, **k))
        else:
            handle = getattr(torch.nn.modules.module, patch)(lambda *args: None)
            undo.callback(handle.remove)
        found = Trust([unet]).stranger()
    assert re.search(said, found), found


def test_hooks_that_move_weights_are_known():
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    unet = models.small_unet()
    block = unet.up_blocks[1]
    trust, in_part = Trust([unet]), Trust([unet], [block])
    for hook in (AlignDevicesHook(), AlignDevicesHook(), ModelHook()):  # two make a sequence
        add_hook_to_module(block, hook, append=True)
        mine = type(hook) is ModelHook
        assert (trust.stranger() == "") is not mine
        assert "a hook is in place on up_blocks.1" in in_part.stranger() or mine


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"trust must be a tuple of classes.*; got \['Own'\]"):
        hgc.install(pipeline(), trust=["Own"])
    with pytest.raises(TypeError, match="trust must be a tuple of classes"):
        hgc.install(pipeline(), trust=(Own(),))
    assert "forward" not in pipeline().unet.__dict__
