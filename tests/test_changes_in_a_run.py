"""What features depend on and no argument shows: each change of it within a run must be obeyed."""

from __future__ import annotations

import contextlib
import functools
import warnings

import compatibility
import models
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import hgc
from hgc import Config, StepPlan
from hgc.warn import HgcWarning

SOME = Config(
    name="some", num_evaluations=8, key_steps=(0, 4), depth=1, guidance="reuse", feature_damping=0.7
)


def at_step(step, change):
    """Arguments of a call that do ``change(pipe)`` after ``step``."""

    def callback(pipe, i, tensors):
        if i == step:
            change(pipe)
        return {}

    return compatibility.callback(callback)


def plans(installation):
    return [row.depth for row in installation.report().rows]


# -- attention processors that keep what they see ---------------


class Controller:
    """Edits attention from the fifth evaluation on; counts its calls to know where it stands, as
    the controllers of prompt-to-prompt do."""

    def __init__(self, layers):
        self.layers, self.calls = layers, 0

    def edit(self, out):
        self.calls += 1
        return out * (1.0 if self.calls <= 4 * self.layers else 0.2)


class Controlled:
    def __init__(self, controller):
        self.controller = controller

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        out = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return self.controller.edit(out)


class Storing:
    """Keeps its last output, as that of self-attention guidance does."""

    def __init__(self):
        self.seen = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        self.seen = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return self.seen


def closing_over(calls):
    class Closed:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            calls.append(1)
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)

    return Closed()


class Stateless:
    """A processor of one's own with nothing but settings."""

    def __init__(self):
        self.scale = 0.5

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        out = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return out * self.scale


def with_processor(processor, only=""):
    """Put ``processor`` (or one a layer) on the attentions of a pipeline."""

    def put(pipe):
        pipe.unet.set_attn_processor(
            {
                name: processor if only in name else old
                for name, old in pipe.unet.attn_processors.items()
            }
        )

    return put


@pytest.mark.parametrize("when", ["before", "after the second step"])
def test_a_controller_that_counts_its_calls_is_called_at_every_evaluation(when):
    def request(pipe):
        layers = len(pipe.unet.attn_processors)
        controller = Controller(layers)
        put = with_processor(Controlled(controller))
        if when == "before":
            put(pipe)
            return compatibility.call(pipe, 0), controller.calls / layers
        return compatibility.call(pipe, 0, **at_step(1, put)), controller.calls / layers

    expected, count = request(compatibility.sd())
    pipe = compatibility.sd()
    with (
        hgc.install(pipe.unet, pipe.controlnet, config=SOME),
        pytest.warns(HgcWarning, match="Controlled is not known.*leaves runs to diffusers"),
    ):
        image, called = request(pipe)
    assert called == count
    if when == "before":
        assert torch.equal(image, expected)


@pytest.mark.parametrize("kind", ["stores", "closes over", "a function"])
@pytest.mark.parametrize("layer", ["attn1", "attn2"])
def test_processors_with_state_are_called_at_every_evaluation(kind, layer):
    calls = []

    def function(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        calls.append(1)
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)

    made = {"stores": Storing, "closes over": lambda: closing_over(calls)}
    pipe = compatibility.sd()
    with_processor(made.get(kind, lambda: function)(), only=f"mid_block.attentions.0.trans"
                   f"former_blocks.0.{layer}")(pipe)  # fmt: skip
    reference = compatibility.call(pipe, 0)
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(compatibility.call(pipe, 0), reference)


def test_processors_that_are_vouched_for_do_not_stop_reuse():
    pipe = compatibility.sd()
    with_processor(Stateless())(pipe)
    with hgc.install(pipe, config=SOME, trust=(Stateless,)) as installed:
        compatibility.call(pipe, 0)
        assert plans(installed).count(1) == 6


# -- hooks ---------------


@pytest.mark.parametrize("of", ["unet", "controlnet"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_inside_a_model_is_called_at_every_evaluation(of, kind):
    pipe, calls = compatibility.sd(), []
    reference = compatibility.call(pipe, 0)
    handle = getattr(getattr(pipe, of).mid_block, kind)(lambda *args: calls.append(1))
    with (
        hgc.install(pipe.unet, pipe.controlnet, config=SOME),
        pytest.warns(HgcWarning, match="a hook is in place on mid_block"),
    ):
        assert torch.equal(compatibility.call(pipe, 0), reference)
    assert len(calls) == compatibility.STEPS
    handle.remove()


def test_a_hook_on_the_model_itself_does_not_stop_reuse():
    pipe, calls = compatibility.sd(), []
    pipe.unet.register_forward_hook(lambda *args: calls.append(1))
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        compatibility.call(pipe, 0)
        assert plans(installed).count(1) == 6
    assert len(calls) == compatibility.STEPS


# -- gradients ---------------


def gradients(unet, text, *, wanted="sample"):
    """Gradients at each of four timesteps of one run."""
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    schedule, found = torch.arange(8).flip(0) * 100, []
    for t in schedule:
        x, c = sample.clone(), text
        if wanted == "sample":
            x.requires_grad_()
        (unet(x, t, c).sample ** 2).sum().backward()
        if wanted == "sample":
            found.append(x.grad)
        elif wanted == "text":
            found.append(c.grad.clone())
            c.grad = None
        else:
            found.append(unet.mid_block.resnets[0].conv1.weight.grad.clone())
        unet.zero_grad()
    return found


@pytest.mark.parametrize("wanted", ["sample", "text", "weights"])
def test_gradients_are_those_of_the_whole_model(wanted):
    unet = models.small_unet()
    unet.requires_grad_(wanted == "weights")
    text = models.text(0, 2).requires_grad_(wanted == "text")
    expected = gradients(unet, text, wanted=wanted)
    with (
        hgc.install(unet, config=SOME.replace(guidance="both")),
        pytest.warns(HgcWarning, match="gradients are recorded"),
    ):
        found = gradients(unet, text, wanted=wanted)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), k


# -- what is switched between evaluations ---------------


def loop(pipe, seed, around):
    """A loop of one's own; ``around(i)`` is the context of evaluation ``i``."""
    steps = compatibility.evaluations(pipe, seed)
    for i in range(compatibility.STEPS):
        with around(i):
            latents = next(steps)
    return latents


@pytest.mark.parametrize("config", ["exact", "some"])
@pytest.mark.parametrize("first", [True, False])
def test_autocast_switched_within_a_run(config, first):
    def around(i):
        return torch.autocast("cpu", torch.bfloat16, enabled=(i < 3) == first)

    pipe = compatibility.sd()
    reference = loop(pipe, 0, around)
    with hgc.install(
        pipe.unet, pipe.controlnet, config=SOME if config == "some" else config
    ) as installed:
        image = loop(pipe, 0, around)
        if config == "exact":
            assert torch.equal(image, reference)
        else:
            assert "changed" in installed.report().rows[3].why


@pytest.mark.parametrize("config", ["exact", "some"])
def test_a_lora_hot_swapped_within_a_run(config):
    def swap(pipe):
        pipe.load_lora_weights(compatibility.lora_weights(2), adapter_name="lora1", hotswap=True)

    def request(pipe):
        pipe.load_lora_weights(compatibility.lora_weights(1), adapter_name="lora1")
        return compatibility.call(pipe, 0, **at_step(1, swap))

    reference = request(compatibility.with_lora())
    pipe = compatibility.with_lora()
    with hgc.install(
        pipe.unet, pipe.controlnet, config=SOME if config == "some" else config
    ) as installed:
        image = request(pipe)
        if config == "exact":
            assert torch.equal(image, reference)
        else:
            assert [row.why for row in installed.report().rows][2] != "plan"


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_adapters_of_other_kinds_switched_within_a_run(kind):
    import peft

    def request(pipe):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(peft, kind)(r=2, target_modules=["to_k", "to_v"], init_weights=False)
            pipe.unet.add_adapter(config, "mine")
        return compatibility.call(pipe, 0, **at_step(1, lambda p: p.unet.disable_adapters()))

    reference = request(compatibility.sd())
    pipe = compatibility.sd()
    with hgc.install(pipe.unet, pipe.controlnet, config="exact"):
        assert torch.equal(request(pipe), reference)


def _with_lora(**settings):
    import peft

    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = ["to_q", "to_k", "to_v"]
        config = peft.LoraConfig(
            r=4, init_lora_weights=False, target_modules=targets, **settings
        )  # fmt: skip
        pipe.unet.add_adapter(config)
    return pipe


def _text_projected():
    unet = models.small_unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj")
    return models.sd15_pipeline(unet, models.small_controlnet())


def _biased():
    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet())
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2.to_k"):
            bias = torch.linspace(-1, 1, module.out_features)
            module.bias = torch.nn.Parameter(bias, requires_grad=False)
    return pipe


def _write(*names):
    def write(pipe):
        with torch.no_grad():
            for name, weight in pipe.unet.named_parameters():
                if any(each in name for each in names):
                    weight.mul_(3)

    return write


def _load_adapter(pipe):
    import peft

    found = peft.get_peft_model_state_dict(pipe.unet)
    peft.set_peft_model_state_dict(pipe.unet, {name: 3 * value for name, value in found.items()})


def _replace_projection(pipe):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pipe.unet.encoder_hid_proj = torch.nn.Linear(16, 16).requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (_with_lora, _write("lora_B")),
        (_with_lora, _load_adapter),
        (_text_projected, _write("encoder_hid_proj")),
        (_text_projected, _replace_projection),
        (_biased, _write("to_k.bias")),
    ],
    ids=["adapter written", "adapter loaded", "projection written", "projection replaced", "bias"],
)
def test_what_keys_and_values_are_made_by_changes_within_a_run(make, change):
    reference = models.draw(make(), **at_step(2, change))
    pipe = make()
    with hgc.install(pipe, config="exact"):
        assert torch.equal(models.draw(pipe, **at_step(2, change)), reference)
    assert not torch.equal(models.draw(make()), reference)
    pipe = make()
    with hgc.install(pipe, config=Config(name="some", num_evaluations=6, key_steps=(0, 4))) as some:
        models.draw(pipe, **at_step(2, change))
        assert "the weights changed" in [row.why for row in some.report().rows]


def test_an_adapter_with_dropout_draws_at_every_evaluation():
    def draw(pipe):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return models.draw(pipe)

    reference = draw(_training())
    pipe = _training()
    with hgc.install(pipe, config="exact"):
        assert torch.equal(draw(pipe), reference)


def _training():
    pipe = _with_lora(lora_dropout=0.5)
    pipe.unet.train()
    return pipe


def test_an_ip_adapter_exchanged_within_a_run():
    def other(pipe):
        pipe.unload_ip_adapter()
        pipe.unet._load_ip_adapter_weights([compatibility.ip_adapter_weights(pipe.unet, seed=6)])
        pipe.set_ip_adapter_scale(1.0)

    def request(pipe):
        return compatibility.ip_call(pipe, 0, **at_step(1, other))

    pipe = compatibility.with_ip_adapter()
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            request(pipe)
        assert [row.why for row in installed.report().rows][2] != "plan"


def halves(unet, seed, *, steps=8, change_at=5):
    """A loop that calls once a guidance half, whose conditional prompt is another from
    ``change_at`` on, and the text anew."""
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    schedule, texts = torch.arange(steps).flip(0) * 100, [models.text(1), models.text(2)]
    for i, t in enumerate(schedule):
        if i == change_at:
            texts[0] = models.text(3)
        with torch.no_grad():
            conditional, unconditional = (unet(sample, t, text).sample for text in texts)
            sample = sample - 0.05 * (unconditional + 5 * (conditional - unconditional))
    return sample


def test_a_prompt_changed_in_a_loop_of_halves_gets_no_map_of_the_other_half(monkeypatch):
    """Which of two runs on one schedule a new text continues is not known: it starts a new one."""
    import hgc_kernels

    unet, applied = models.small_unet(), []
    original = hgc_kernels.apply_map
    monkeypatch.setattr(hgc_kernels, "apply_map", lambda m, v: applied.append(1) or original(m, v))
    config = Config(
        num_evaluations=8, key_steps=(0, 4), depth=2, attention="reuse", fresh_values=True
    )
    with hgc.install(unet, config=config), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        halves(unet, 0)
        assert not applied


def test_a_hook_on_what_is_kept_for_the_run_is_called_at_every_evaluation():
    """Under ``exact`` too, which projects a constant text once."""
    pipe, calls = compatibility.sd(), []
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    layer.register_forward_hook(lambda module, args, out: calls.append(1) or out * 0.5)
    embedding = pipe.controlnet.controlnet_cond_embedding.conv_in
    embedding.register_forward_hook(lambda *args: calls.append(1))
    reference, before = compatibility.call(pipe, 0), len(calls)
    with (
        hgc.install(pipe.unet, pipe.controlnet, config="exact"),
        pytest.warns(HgcWarning, match="a hook is in place on mid_block.*attn2.to_k"),
    ):
        assert torch.equal(compatibility.call(pipe, 0), reference)
    assert len(calls) == 2 * before == 4 * compatibility.STEPS


@pytest.mark.parametrize("change", ["a weight", "another weight", "a setting"])
def test_a_condition_embedding_that_changes_is_computed_again(change):
    """It is computed once a run where nothing changes, under ``exact`` too."""

    def edit(pipe):
        layer = pipe.controlnet.controlnet_cond_embedding.conv_in
        if change == "a weight":
            layer.weight.data.add_(0.5)
            layer.bias.add_(1.0)
        elif change == "another weight":
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 2.0, requires_grad=False)
        else:
            layer.padding_mode = "circular"
            layer._reversed_padding_repeated_twice = [1, 1, 1, 1]

    def request():
        pipe = compatibility.sd()
        pipe.controlnet.requires_grad_(False)
        return pipe, lambda: compatibility.call(pipe, 0, **at_step(1, edit))

    _, plain = request()
    pipe, cached = request()
    with hgc.install(pipe, config="exact"):
        assert torch.equal(cached(), plain())


def test_a_forward_replaced_on_a_layer_is_obeyed():
    """What adapters outside of peft do: a multiplier of theirs changes within a run."""

    class Adapter:
        multiplier = 1.0

    def patch(pipe):
        adapter = Adapter()
        layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        original = type(layer).forward
        layer.forward = lambda x: adapter.multiplier * original(layer, x)
        return adapter

    def request(pipe, adapter):
        return compatibility.call(
            pipe, 0, **at_step(1, lambda p: setattr(adapter, "multiplier", 3))
        )

    pipe = compatibility.sd()
    reference = request(pipe, patch(pipe))
    pipe = compatibility.sd()
    adapter = patch(pipe)
    with hgc.install(pipe.unet, pipe.controlnet, config="exact"):
        assert torch.equal(request(pipe, adapter), reference)


# -- what hgc cannot tell apart is said ---------------


def test_a_unet_that_is_called_without_text_is_computed_in_full():
    unet = models.small_unet(
        cross_attention_dim=(8, 16), class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16, class_embeddings_concat=True,
    )  # fmt: skip
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def request():
        with torch.no_grad():
            return [
                unet(sample, t, None, class_labels=models.text(0, 2)[:, 0]).sample
                for t in torch.arange(8).flip(0) * 100
            ]

    reference = request()
    with (
        hgc.install(unet, config=SOME),
        pytest.warns(HgcWarning, match="without encoder_hidden_states"),
    ):
        for a, b in zip(request(), reference, strict=True):
            assert torch.equal(a, b)


def test_four_edits_of_one_sample_are_no_pair():
    """Halves of a batch that holds one sample four times: guidance of two images made from one
    noise, or one image with three prompts. Nothing is halved while they are alike."""
    unet = models.small_unet()
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    schedule, text = torch.arange(8).flip(0) * 100, models.text(0, 4)
    for rows, halved in ((4, False), (2, True)):
        with hgc.install(unet, config=SOME) as installed, torch.no_grad():
            for t in schedule:
                unet(sample.expand(rows, -1, -1, -1), t, text[:rows])
            assert ("reuse" in {row.guidance for row in installed.report().rows}) == halved


def test_a_batch_that_is_no_pair_any_more_is_not_halved():
    """Another sample in one half, from the sixth evaluation on. On a CPU that is seen at once."""
    unet = models.small_unet()
    both = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    schedule, text = torch.arange(8).flip(0) * 100, models.text(0, 2)

    def outputs():
        with torch.no_grad():
            return [
                unet(both if i >= 5 else both[:1].expand(2, -1, -1, -1), t, text).sample
                for i, t in enumerate(schedule)
            ]

    reference = outputs()
    with hgc.install(unet, config=SOME) as installed:
        found, rows = outputs(), installed.report().rows
    assert rows[3].guidance == "reuse" and rows[5].why == "the batch is no pair any more"
    assert torch.equal(found[5], reference[5])
    assert {row.guidance for row in rows[5:]} == {"both"}


def test_a_run_whose_warning_is_an_error_begins_anew():
    """The same objects again: what the warning had interrupted is looked at then."""
    calibration = hgc.Calibration("another", "DDIM", 4, 20, 0.3, 0.1, 0.1, 5, 0.2, 4)
    config = Config(num_evaluations=4, key_steps=(0,), calibration=calibration)
    unet = models.small_unet()
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    schedule, text, calls = torch.arange(8).flip(0) * 100, models.text(0), []

    def loop():
        with torch.no_grad():
            for t in schedule:
                unet(sample, t, text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        installed = hgc.install(unet, config=config)
    unet.mid_block.resnets[0].register_forward_hook(lambda *args: calls.append(1))
    with installed, warnings.catch_warnings():
        warnings.simplefilter("error", HgcWarning)
        with pytest.raises(HgcWarning, match="a hook is in place"):
            loop()
        loop()
    assert len(calls) == 8


# -- more than one run -------------------------------------------------------------------------


class Louder(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 3.0 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize("others", [(), (0,)])
def test_exchanged_processors_are_seen_by_every_run_under_way(others):
    """Two loops in turns on one UNet: the second must see what the first has noticed."""

    def loop(which):
        unet, out = models.small_unet(), []
        texts = [models.text(1), models.text(2)]
        schedules = [torch.arange(900, 100, -100).clone() for _ in range(2)]
        samples = [
            torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
        ]
        config = SOME.replace(guidance="both")
        installed = hgc.install(unet, config=config, trust=(Louder,))
        with torch.no_grad(), warnings.catch_warnings(), installed:
            warnings.simplefilter("ignore", HgcWarning)
            for i in range(8):
                if i == 2:
                    unet.set_attn_processor(Louder())
                for run in which:
                    sample = unet(samples[run], schedules[run][i], texts[run]).sample
                    if run == 1:
                        out.append(sample.clone())
        return out

    alone, among = loop((1,)), loop((*others, 1))
    assert all(map(torch.equal, alone, among))


INNER = "mid_block.attentions.0.transformer_blocks.0.attn1.processor"


@pytest.mark.parametrize("how", ["method", "attribute"])
@pytest.mark.parametrize("back", [False, True])
def test_a_processor_exchanged_where_a_shallow_evaluation_does_not_look(how, back):
    """`set_attn_processor` is obeyed at once, an assignment at the next key evaluation; and so is
    putting the old one back in between."""
    unet = models.small_unet()
    inner = unet.get_submodule(INNER.removesuffix(".processor"))

    def put(processor):
        if how == "method":
            unet.set_attn_processor({**unet.attn_processors, INNER: processor})
        else:
            inner.processor = processor

    text, schedule = models.text(1), torch.arange(900, 100, -100).clone()
    sample, new = models.text(0)[:1].new_ones(1, 4, 16, 16), Louder()
    config = Config(num_evaluations=8, key_steps=(0, 3, 6), feature_damping=0.0)
    installed = hgc.install(unet, config=config, trust=(Louder,))
    with torch.no_grad(), installed:
        old = inner.processor
        for i, t in enumerate(schedule):
            if i == 1:
                put(new)
            if i == 4 and back:
                put(old)
            unet(sample, t, text)
        rows = installed.report().rows
    at = [1, *([4] if back else [])] if how == "method" else [3, *([6] if back else [])]
    changed = [i for i, row in enumerate(rows) if row.why == "the attention processors changed"]
    assert changed == at


def test_freeu_that_comes_and_goes_is_seen_by_two_runs_in_turns():
    """What one run has looked at does not stand for what the other was computed with."""
    unet = models.small_unet()
    texts = [models.text(1), models.text(2)]
    schedules = [torch.arange(900, 100, -100).clone() for _ in range(2)]
    config, seen = Config(num_evaluations=8, key_steps=(0, 4), feature_damping=0.0), []
    with torch.no_grad(), hgc.install(unet, config=config) as installed:
        for i in range(8):
            if i == 2:
                unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
            if i == 6:
                unet.disable_freeu()
            for run in (0, 1):
                unet(torch.ones(1, 4, 16, 16), schedules[run][i], texts[run])
                seen.append((run, i, installed._engine.registry.last.report[-1].why))
    changed = [(run, i) for run, i, why in seen if why == "FreeU changed"]
    assert sorted(changed) == [(0, 2), (0, 6), (1, 2), (1, 6)]


def test_freeu_that_came_before_a_run_in_between_is_seen_by_the_one_around_it():
    """The run in between never knew another state, so it sees no change itself."""
    unet = models.small_unet()
    texts = [models.text(1), models.text(2)]
    schedules = [torch.arange(900, 100, -100).clone() for _ in range(2)]
    config, seen = Config(num_evaluations=8, key_steps=(0, 6), feature_damping=0.0), []
    with torch.no_grad(), hgc.install(unet, config=config) as installed:
        for run, steps in ((0, range(3)), (1, range(3)), (0, range(3, 8))):
            if run == 1:
                unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
            for i in steps:
                unet(torch.ones(1, 4, 16, 16), schedules[run][i], texts[run])
                seen.append((run, i, installed._engine.registry.last.report[-1].why))
    changed = [(run, i) for run, i, why in seen if why == "FreeU changed"]
    assert changed == [(0, 3)]


def test_processors_exchanged_between_the_controlnet_and_the_unet(sd15):
    """Within one evaluation: the UNet has others than the ControlNet's call has seen."""
    before, calls = dict(sd15.unet.attn_processors), []

    def draw(config):
        calls.clear()
        with contextlib.ExitStack() as stack:
            if config is not None:
                installed = hgc.install(sd15.unet, sd15.controlnet, config=config, trust=(Louder,))
                stack.enter_context(installed)
            held = sd15.controlnet.forward
            sd15.controlnet.forward = functools.partial(exchange, held)
            try:
                return models.draw(sd15, steps=5)
            finally:
                sd15.controlnet.forward = held
                if config is None:
                    del sd15.controlnet.forward

    def exchange(held, *args, **kwargs):
        out = held(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            sd15.unet.set_attn_processor(Louder())
        return out

    try:
        plain = draw(None)
        sd15.unet.set_attn_processor(dict(before))
        assert torch.equal(draw("exact"), plain)
    finally:
        sd15.unet.set_attn_processor(dict(before))


def test_an_output_from_the_cache_is_not_the_caches_own(sd15):
    """Depth 0 with one value held and two coefficients: a scheduler keeps what it is given."""
    steps = (StepPlan(), *[StepPlan(control="off", depth=0, forecast=(1.5, -0.5))] * 2, StepPlan())
    schedule, text = torch.arange(900, 500, -100).clone(), models.text(1)
    sample, given = torch.randn(1, 4, 16, 16), []
    with torch.no_grad(), hgc.install(sd15.unet, config=Config(num_evaluations=4, steps=steps)):
        for t in schedule:
            given.append(sd15.unet(sample, t, text).sample)
    assert len({out.data_ptr() for out in given}) == 4
    assert torch.equal(given[1], given[0]) and not torch.equal(given[3], given[0])


def test_a_controlnet_outside_of_autocast():
    """Its residuals have another dtype than the skips."""
    unet, net = models.small_unet(), models.small_controlnet()
    schedule, text = torch.arange(900, 300, -100).clone(), models.text(1)
    sample, cond = torch.randn(1, 4, 16, 16), models.picture(0)
    with torch.no_grad(), hgc.install(unet, net, config=SOME.replace(guidance="both")):
        for t in schedule:
            down, mid = net(sample, t, text, cond, return_dict=False)
            with torch.autocast("cpu", torch.bfloat16):
                out = unet(
                    sample, t, text, down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                ).sample  # fmt: skip
            assert out.isfinite().all()


# -- residuals ---------------------------------------------------------------------------------


def halved(down, mid):
    for x in (*down, mid):
        x.mul_(0.5)


def halved_by_views(down, mid):
    for x in (*down, mid):
        x.view(-1)[:] *= 0.5


def raised(down, mid):
    for x in (*down, mid):
        x += torch.ones(tuple(x.shape))


def as_new(edit):
    """What ``edit`` does in place, done to copies."""

    def made(down, mid):
        copies = [x.clone() for x in (*down, mid)]
        edit(copies[:-1], copies[-1])
        return copies[:-1], copies[-1]

    return made


def raised_anew(down, mid):
    *down, mid = (x + torch.ones(tuple(x.shape)) for x in (*down, mid))
    return down, mid


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize(
    ("edit", "anew"),
    [
        (halved, as_new(halved)),
        (halved_by_views, as_new(halved_by_views)),
        (raised, raised_anew),
    ],
)
@pytest.mark.parametrize("guidance", ["both", "reuse"])
def test_residuals_are_written_to_in_place(edit, anew, guidance, scale):
    """A loop of one's own that edits what the ControlNet gave, in place, at some evaluations."""
    config = SOME.replace(guidance=guidance)
    text = torch.cat([models.text(500), models.text(1)])
    cond = torch.cat([models.picture(1)] * 2)

    def drawn(change):
        unet, net = models.small_unet(), models.small_controlnet()
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with hgc.install(unet, net, config=config), torch.no_grad():
            for i, t in enumerate(torch.linspace(900, 10, 8).long()):
                both = torch.cat([x] * 2)
                down, mid = net(both, t, text, cond, scale, return_dict=False)
                if i in (2, 3, 5):
                    down, mid = change(down, mid) or (down, mid)
                out = unet(
                    both, t, text, down_block_additional_residuals=down,
                    mid_block_additional_residual=mid, return_dict=False,
                )[0]  # fmt: skip
                del down, mid
                x = x - 0.1 * out[1:]
        return x

    found = drawn(edit)
    assert torch.equal(found, drawn(anew))
    assert torch.equal(found, drawn(lambda down, mid: None)) == (scale == 0 and edit is not raised)


# -- blocks ------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """A block in another module, which passes calls and attributes on to it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)

    def __getattr__(self, name):
        if name == "block":
            return super().__getattr__(name)
        return getattr(self.block, name)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("freeu", [False, True])
@pytest.mark.parametrize("unet", [models.small_unet, models.small_xl_unet])
def test_blocks_are_wrapped_after_hgc_is_installed(unet, freeu, depth):
    """A wrapper stands where the block was: what it says of itself is what the block says."""

    def drawn(*, wrapped):
        if unet is models.small_unet:
            pipe = models.sd15_pipeline(unet(), models.small_controlnet())
        else:
            pipe = models.sdxl_pipeline(unet(), models.small_xl_controlnet())
        if freeu:
            pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
        config = SOME.replace(depth=depth)
        with hgc.install(pipe, config=config, trust=(Wrapped,)) as installed:
            for model in (pipe.unet, pipe.controlnet) if wrapped else ():
                model.mid_block = Wrapped(model.mid_block)
                blocks = [model.down_blocks, getattr(model, "up_blocks", ())]
                for found in blocks:
                    for i, block in enumerate(found):
                        found[i] = Wrapped(block)
            latents = models.draw(pipe, steps=8)
            assert plans(installed).count(depth) == 6
            return latents

    assert torch.equal(drawn(wrapped=True), drawn(wrapped=False))
