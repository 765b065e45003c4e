"""What hgc says: each text where it is true, and not in the case beside it."""

from __future__ import annotations

import copy
import gc
import re
import threading
import types
import warnings

import models
import pytest
import special_pipelines
import torch
from diffusers import (
    DDPMScheduler,
    HeunDiscreteScheduler,
    MarigoldNormalsPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor2_0

import hgc
from hgc import Calibration, Config, ConfigError, HgcWarning, StepPlan
from hgc.planning.config import model_name

STEPS = 6
SHALLOW = Config(num_evaluations=STEPS, key_steps=(0, 3), feature_damping=0.0)


def loop(unet, net, seed=0, every=1, looks=False):
    """A loop of one's own: the ControlNet is called at every ``every``-th step, whose residuals are
    handed over until the next; the UNet before, without residuals, where it ``looks``."""
    schedule, text = torch.arange(900, 900 - 100 * STEPS, -100).clone(), models.text(seed)
    sample, cond = torch.ones(1, 4, 16, 16), models.picture(seed)
    for i, t in enumerate(schedule):
        with torch.no_grad():
            if i % every == 0:
                down, mid = net(sample, t, text, cond, return_dict=False)
            if looks:
                unet(sample, t, text)
            out = unet(
                sample, t, text, down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            ).sample  # fmt: skip
        yield out


def heard(call):
    """The warnings of ``call()``, and what it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HgcWarning)
        out = call()
    return [str(w.message) for w in caught if w.category is HgcWarning], out


def said(*loops):
    """The warnings of ``loops``, made in turns, and what they gave."""
    return heard(lambda: [*zip(*loops, strict=True)])


@pytest.fixture
def made():
    return models.small_unet(), models.small_controlnet()


def test_residuals_of_a_controlnet_that_is_not_known(made):
    unet, net = made
    with hgc.install(unet, config=SHALLOW):
        (message,), _ = said(loop(unet, net))
    assert (
        "no ControlNet of this installation was called" in message
        and "hgc.install(pipe.unet, pipe" in message
    )
    with hgc.install(unet, net, config=SHALLOW):
        assert said(loop(unet, net))[0] == []


def test_a_controlnet_that_is_called_at_every_second_step(made):
    unet, net = made
    right = said(loop(unet, net, every=2))[1]
    with hgc.install(unet, net, config=SHALLOW):
        (message,), out = said(loop(unet, net, every=2))
    assert "evaluations in a row, which reuse nothing" in message
    assert all(torch.equal(a, b) for (a,), (b,) in zip(out, right, strict=True))


def test_a_unet_that_is_called_twice_a_step(made):
    unet, net = made
    right = said(loop(unet, net, looks=True))[1]
    with hgc.install(unet, net, config=SHALLOW) as installed:
        (message,), out = said(loop(unet, net, looks=True))
        assert len(installed.report().rows) == 2 * STEPS - 1
    assert message.startswith("one timestep was evaluated more than once")
    assert all(torch.equal(a, b) for (a,), (b,) in zip(out, right, strict=True))
    # nothing was to be reused
    with hgc.install(unet, net, config=Config(max_cache_bytes=100)):
        messages, out = said(loop(unet, net, looks=True))
    assert messages == []
    assert all(torch.equal(a, b) for (a,), (b,) in zip(out, right, strict=True))


def test_more_runs_in_a_thread_than_are_held(made):
    unet, net = made
    with hgc.install(unet, net, config=SHALLOW):
        assert said(*(loop(unet, net, seed) for seed in range(4)))[0] == []
        messages, _ = said(*(loop(unet, net, seed) for seed in range(5)))
    assert ["more than 4 runs are under way" in m for m in messages] == [True]


def test_two_unets_share_a_controlnet(made):
    unet, net = made
    other = models.small_unet(seed=5)
    with hgc.install(unet, net, config=SHALLOW) as installed:
        with pytest.raises(RuntimeError, match=r"installed on this ControlNetModel.*copy.deepcopy"):
            hgc.install(other, net, config=SHALLOW)
        with hgc.install(other, config=SHALLOW):
            for seed in range(6):
                messages, _ = said(loop(other, net, seed))
                assert ["copy.deepcopy" in m for m in messages] == [True] * (seed == 0)
        assert said(loop(unet, net))[0] == []
        assert sum(row.depth == 1 for row in installed.report().rows) == STEPS - 2
        own = copy.deepcopy(net)
        with hgc.install(other, own, config=SHALLOW):
            assert said(loop(other, own))[0] == []


def test_a_report_after_the_block():
    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet())
    with hgc.install(pipe) as installed:
        with pytest.raises(RuntimeError, match="call the pipeline first"):
            installed.report()
        models.draw(pipe, steps=4)
        within = installed.report()
    assert installed.report() == within
    assert installed.peak_bytes == within.peak_bytes


def test_a_report_where_no_run_was_made():
    unet = models.small_unet()
    with hgc.install(unet, config=SHALLOW) as installed, torch.no_grad():
        with pytest.warns(HgcWarning, match="not one of several in a tensor of timesteps"):
            for t in (900, 800):
                unet(torch.ones(2, 4, 16, 16), torch.full((2,), t), models.text(0, 2))
        with pytest.raises(RuntimeError, match="what this thread evaluated was left to diffusers"):
            installed.report()


def test_a_report_after_one_evaluation_that_is_no_run(made):
    unet, net = made
    with hgc.install(unet, net, config=SHALLOW) as installed, torch.no_grad():
        said(loop(unet, net))
        unet(torch.ones(1, 4, 16, 16), torch.tensor([500]), models.text(5))
        with pytest.raises(RuntimeError, match="was one evaluation alone"):
            installed.report()
        said(loop(unet, net))
        assert len(installed.report().rows) == STEPS


def test_a_picture_of_one_step_within_a_run_does_not_end_it(made):
    pipe, other = models.sd15_pipeline(*made), models.sd15_pipeline(*made)

    def preview(pipe, i, t, tensors):
        if i in (1, 4):
            models.draw(other, seed=7, steps=1)
        return {}

    with hgc.install(pipe, config=SHALLOW) as installed:
        alone = models.draw(pipe, steps=STEPS)
        assert torch.equal(models.draw(pipe, steps=STEPS, callback_on_step_end=preview), alone)
        assert [row.why for row in installed.report().rows] == ["plan"] * STEPS


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (lambda t: [t[len(t) - 1 - i] for i in range(len(t))], "are not taken in their order"),
        (lambda t: t.repeat_interleave(3)[::3], "evaluations were left out, before 3"),
        (lambda t: t, None),
        (lambda t: t.flip(0), None),
    ],
    ids=["backwards", "strided", "forwards", "flipped"],
)
def test_timesteps_that_are_not_taken_in_their_order(made, order, words):
    unet, net = made
    with hgc.install(unet, net, config=SHALLOW), torch.no_grad():
        sample, text, cond = torch.ones(1, 4, 16, 16), models.text(0), models.picture(0)

        def evaluate():
            for t in order(torch.arange(STEPS * 100, 0, -100)):
                down, mid = net(sample, t, text, cond, return_dict=False)
                unet(
                    sample, t, text, down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                )  # fmt: skip

        messages, _ = heard(evaluate)
    assert [words in message for message in messages] == [True] * (words is not None)


@pytest.mark.parametrize(("steps", "is_said"), [(9, True), (10, False)])
def test_a_solver_of_second_order_in_few_steps(made, steps, is_said):
    pipe = models.sd15_pipeline(*made, scheduler_class=HeunDiscreteScheduler)
    expected = models.draw(pipe, steps=steps)
    with hgc.install(pipe, config="balanced") as installed:
        messages, image = heard(lambda: models.draw(pipe, steps=steps))
        depths = [row.depth for row in installed.report().rows]
    assert ["HeunDiscreteScheduler takes differences" in m for m in messages] == [True] * is_said
    assert torch.equal(image, expected) == is_said and (0 in depths) == (not is_said)


def test_a_sample_that_does_not_begin_with_the_latents():
    pipe = special_pipelines.marigold(MarigoldNormalsPipeline)
    expected = special_pipelines.marigold_call(pipe, 0)
    with hgc.install(pipe, config="balanced"):
        messages, image = heard(lambda: special_pipelines.marigold_call(pipe, 0))
    assert len(messages) == 1 and "first channels of the sample do not change" in messages[0]
    assert torch.equal(image, expected)
    unet = models.small_unet(in_channels=9)
    pipe = models.pipeline(StableDiffusionInpaintPipeline, unet)
    with hgc.install(pipe, config="balanced") as installed:
        messages, _ = heard(lambda: pipe(**models.request(pipe, 0, strength=1.0)).images)
        assert messages == [] and 0 in [row.depth for row in installed.report().rows]


def test_a_model_that_predicts_variances_too():
    unet = models.small_unet(out_channels=8)
    pipe = models.pipeline(
        StableDiffusionPipeline, unet,
        scheduler=models.scheduler(DDPMScheduler, variance_type="learned_range"),
    )  # fmt: skip
    with hgc.install(pipe, config="balanced"):
        messages, out = heard(lambda: pipe(**models.request(pipe, 0)).images)
    assert len(messages) == 1 and "epsilon, v or x0 predicted, and nothing else" in messages[0]
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["paper", "balanced", "fast", "turbo"])
def test_a_label_is_no_preset(name):
    with pytest.raises(ConfigError, match=rf"Config.preset\('{name}'\) is the preset"):
        Config(name)
    assert Config(name, key_steps=(0, 3)).name == name
    assert Config("exact").is_exact


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_says_to_uninstall_first(strict):
    unet = models.small_unet()
    inputs = (torch.ones(2, 4, 16, 16), torch.tensor(5), models.text(0, 2))
    with hgc.install(unet), pytest.raises(Exception, match="hgc is installed on"):
        torch.export.export(unet, inputs, strict=strict)
    torch.export.export(unet, inputs, strict=False)


def test_uninstall_that_is_refused_takes_nothing_off():
    """What was put in a ControlNet's slot later is undone, and then everything comes off."""
    unet, net = models.sd15_unet(), models.sd15_controlnet()
    installed = hgc.install(unet, net)
    ours = net.forward
    net.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"ControlNetModel.forward was replaced"):
            installed.uninstall()
    net.forward = ours
    installed.uninstall()
    assert "forward" not in vars(unet) and "forward" not in vars(net)


def test_a_stranger_that_is_an_error_leaves_the_run_to_diffusers_all_the_same():
    """Warnings are errors, and the caller goes on."""
    pipe = models.sd15_pipeline()
    attention = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"

    class Stranger(type(pipe.unet.get_submodule(attention).processor)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    hidden, text = torch.randn(2, 4, 16, 16), models.text(0, 2)
    timesteps = torch.arange(6).flip(0)
    attn = pipe.unet.get_submodule(attention)
    with torch.no_grad(), hgc.install(pipe.unet, config=Config(key_steps=(0,), num_evaluations=6)):
        pipe.unet(hidden, timesteps[0], text)
        with warnings.catch_warnings():
            warnings.simplefilter("error", HgcWarning)
            pipe.unet.set_attn_processor(Stranger())
            with pytest.raises(HgcWarning, match="Stranger is not known"):
                pipe.unet(hidden, timesteps[1], text)
        again = pipe.unet(hidden, timesteps[1], text).sample
        assert isinstance(attn.processor, Stranger)
    assert torch.equal(again, pipe.unet(hidden, timesteps[1], text).sample)


# -- why an evaluation is not as the plan has it ------------------------------------------------


def reasons(change=None, at=1, config=SHALLOW, first=0):
    """Of each evaluation of a loop why it was as it was, by its index, where ``change`` was made to
    the state before one of them; and the warnings."""
    unet, nets = models.small_unet(), [models.small_controlnet(), models.small_controlnet(seed=4)]
    state = types.SimpleNamespace(
        unet=unet, other=nets[1], nets=nets[:1], text=models.text(0, 2), cond=models.picture(0),
        scale=1.0, given={}, sample=torch.ones(2, 4, 16, 16), leave_out=(),
    )  # fmt: skip
    schedule = torch.arange(900, 900 - 100 * STEPS, -100).clone()

    def evaluate(t):
        down = mid = None
        for net in state.nets if "control" not in state.leave_out else ():
            down, mid = net(state.sample, t, state.text, state.cond, state.scale, return_dict=False)
        if "unet" not in state.leave_out:
            unet(
                state.sample, t, state.text, down_block_additional_residuals=down,
                mid_block_additional_residual=mid, **state.given,
            )  # fmt: skip
        state.leave_out = ()

    def run():
        with hgc.install(unet, nets, config=config) as installed, torch.no_grad():
            for i in range(first, STEPS):
                if i == at and change is not None:
                    change(state)
                evaluate(schedule[i])
            return {row.index: row.why for row in installed.report().rows}, installed.peak_bytes

    messages, (rows, peak) = heard(run)
    return {i: why for i, why in rows.items() if why != "plan"}, messages, peak


def put(**values):
    return lambda state: vars(state).update(values)


def first_layer(state):
    """The cross-attention that every shallow evaluation computes."""
    return state.unet.get_submodule("up_blocks.1.attentions.1.transformer_blocks.0.attn2")


def write_to_weights(state):
    first_layer(state).to_k.weight.mul_(1.5)


def set_processors(state):
    state.unet.set_attn_processor(AttnProcessor())


def enable_freeu(state):
    state.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def one_more(state):
    state.nets.append(state.other)


def twice(state):
    state.nets = state.nets * 2


MASK = torch.ones(2, models.TOKENS)
CHANGES = {  # what is changed before evaluation 1, and the reason it gives; and a near miss
    "text": (put(text=models.text(5, 2)), "the text changed",
             lambda s: put(text=s.text[:])(s)),
    "scale": (put(scale=0.5), "a ControlNet's scale or arguments changed", put(scale=2 / 2)),
    "an argument": (put(given={"encoder_attention_mask": MASK}), "the UNet's arguments changed",
                    put(given={"encoder_attention_mask": None})),
    "FreeU": (enable_freeu, "FreeU changed", lambda s: s.unet.disable_freeu()),
    "weights": (write_to_weights, "the weights changed", lambda s: s.unet.to(torch.float32)),
    "processors": (set_processors, "the attention processors changed",
                   lambda s: s.unet.set_attn_processor(s.unet.attn_processors)),
    "a ControlNet more": (one_more, "other ControlNets or conditions were called", None),
    "another condition": (put(cond=models.picture(1)),
                          "other ControlNets or conditions were called",
                          lambda s: put(cond=s.cond[:])(s)),
    "the UNet left out": (put(leave_out=("unet",)), "the evaluation before this one did not end",
                          None),
    "both left out": (put(leave_out=("unet", "control")), "evaluations were left out", None),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_reason_is_given_where_it_is_one(name):
    change, reason, near = CHANGES[name]
    found, messages, _ = reasons(change)
    missed = 1 if "left out" in name else 0  # it is the next evaluation that sees it
    assert found.pop(1 + missed) == reason
    # the ControlNet's turn had been reused before: what it gave is not kept
    assert set(found.values()) <= {"residuals are not cached"} and 3 not in found
    assert messages == []
    assert reasons(near)[:2] == ({}, [])


def test_the_first_evaluation_is_computed_whatever_the_plan_says():
    assert reasons(first=1)[0] == {1: "first evaluation"}
    assert reasons(first=3)[0] == {}  # a key evaluation of the plan


def test_a_controlnet_that_is_called_twice_in_an_evaluation():
    found, (message,), _ = reasons(twice)
    reason = "a ControlNet was called twice in one evaluation"
    assert found == dict.fromkeys(range(1, STEPS), reason)
    assert message == f"{reason}: the rest of this run is computed in full"
    assert reasons(one_more, at=0)[:2] == ({}, [])  # two ControlNets, each called once


@pytest.mark.parametrize(
    ("changes", "share", "missing"),
    [
        ({}, 0.0, "feature/1"),
        ({"guidance": "reuse"}, 0.99, "guidance"),
        ({"steps": (StepPlan(), *(StepPlan(control="off", depth=0),) * 5)}, 0.0, "output"),
    ],
)
def test_what_does_not_fit_into_the_cache_is_named(changes, share, missing):
    config = SHALLOW.replace(**changes)
    _, _, peak = reasons(config=config)
    assert reasons(config=config.replace(max_cache_bytes=peak))[:2] == ({}, [])
    limit = int(share * peak)
    found, (message,), _ = reasons(config=config.replace(max_cache_bytes=limit))
    assert {*found.values()} == {f"{missing} is not cached"}
    assert message == (
        f"Config.max_cache_bytes={limit} is too small for this plan: evaluations are computed "
        "instead of reused"
    )


# -- warnings -----------------------------------------------------------------------------------


def test_gradients_are_recorded(made):
    unet, net = made

    def draw(config, grad):
        with hgc.install(unet, net, config=config), torch.set_grad_enabled(grad):
            schedule, text = torch.arange(900, 0, -150).clone(), models.text(0)
            return heard(lambda: [unet(torch.ones(1, 4, 16, 16), t, text) for t in schedule])[0]

    (message,) = draw(SHALLOW, True)
    assert message.startswith("gradients are recorded") and "torch.no_grad()" in message
    assert draw(SHALLOW, False) == draw("exact", True) == []


def test_a_scheduler_that_evaluates_twice_a_step_is_nothing_to_warn_of():
    pipe = models.sd15_pipeline(
        models.small_unet(), models.small_controlnet(), scheduler_class=HeunDiscreteScheduler
    )
    with hgc.install(pipe, config=SHALLOW) as installed:
        messages, _ = heard(lambda: models.draw(pipe, steps=3))
        assert messages == [] and len(installed.report().rows) == 5


def test_what_is_built_anew_for_each_evaluation(made):
    schedule, text = torch.arange(900, 900 - 100 * STEPS, -100).clone(), models.text(0)

    def draw(unet, anew):
        for i in range(STEPS):
            t, words = (schedule.clone()[i], text.clone()) if anew else (schedule[i], text)
            unet(torch.ones(1, 4, 16, 16), t, words)

    with hgc.install(made[0], config=SHALLOW) as installed, torch.no_grad():
        assert heard(lambda: draw(made[0], anew=False))[0] == []
        assert len(installed.report().rows) == STEPS
        (message,), _ = heard(lambda: draw(made[0], anew=True))
    assert message.startswith("runs end at once, so nothing is reused")


def test_a_unet_without_text(made):
    unet = models.small_unet(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D",
    )  # fmt: skip
    schedule, sample = torch.arange(900, 300, -100).clone(), torch.ones(1, 4, 16, 16)

    def draw(text):
        with hgc.install(unet, config=SHALLOW), torch.no_grad():
            return heard(lambda: [unet(sample, t, text) for t in schedule])[0]

    (message,) = draw(None)
    assert "without encoder_hidden_states" in message
    assert draw(models.text(0)) == []


def with_weights(unet, cls):
    """Processors of an IP-Adapter, or of ``cls``, in all cross-attentions."""
    made = {}
    for name, old in unet.attn_processors.items():
        attn = unet.get_submodule(name.removesuffix(".processor"))
        if attn.is_cross_attention:
            made[name] = cls(attn.inner_dim, models.TEXT, num_tokens=(4,)) if cls else old
        else:
            made[name] = old
    unet.set_attn_processor(made)


@pytest.mark.parametrize("change", [{"attention": "reuse"}, {"attention_gate": 0.5}], ids=str)
@pytest.mark.parametrize("weights", [True, False])
def test_processors_with_weights(weights, change):
    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet())
    with_weights(pipe.unet, IPAdapterAttnProcessor2_0 if weights else None)
    config = SHALLOW.replace(**change)
    messages, installed = heard(lambda: hgc.install(pipe, config=config))
    with installed:
        models.draw(pipe, steps=STEPS)
        attention = {row.attention for row in installed.report().rows}
    assert ["cross-attention is computed, everyth" in m for m in messages] == [True] * weights
    assert attention == ({"compute"} if weights else {"compute", "reuse"})  # what was done


def calibrated(its, changes):
    """A plan that was fitted on the small UNet, at the timesteps that the scheduler has now."""
    record = {
        "model": model_name(models.small_unet()), "scheduler": type(its).__name__,
        "steps": STEPS, "uncached_steps": STEPS, "macs_share": 0.5, "distance": 0.1,
        "distance_worst": 0.1, "fewer_steps": 3, "fewer_steps_distance": 0.2, "inputs": 4,
        "timesteps": tuple(map(float, its.timesteps)), **changes,
    }  # fmt: skip
    steps = tuple(hgc.plan(SHALLOW, STEPS))
    return SHALLOW.replace(name="mine", steps=steps, calibration=Calibration(**record))


MISFITS = {  # what the plan was calibrated on instead, changes of it, steps that are made
    "": ({}, {}, STEPS),
    "'mine' was calibrated on UNet of mine; this model is UNet2DCondition.*follows key_steps":
        ({"model": "UNet of mine"}, {}, STEPS),
    "'mine' was calibrated with DDIMScheduler; this run's scheduler is UniPC.*follows key_steps":
        ({"scheduler": "DDIMScheduler"}, {}, STEPS),
    "'mine' was calibrated at other timesteps, those of UniPC.*: from 900 to 1;.*follows key_st":
        ({"timesteps": (900.0, 700.0, 500.0, 300.0, 100.0, 1.0)}, {}, STEPS),
    "'mine' was calibrated at 6 steps of UniPC.*for 6 evaluations; this run has 5, and follows":
        ({}, {}, 5),
    "the plan 'mine' is for 6 evaluations and this run has 5: the rest of this run is computed in":
        ({}, {"key_steps": None, "calibration": None}, 5),
}  # fmt: skip


@pytest.mark.parametrize("text", MISFITS)
def test_a_calibrated_plan_on_something_else(text):
    pipe = models.sd15_pipeline(models.small_unet(), models.small_controlnet())
    record, changes, steps = MISFITS[text]
    pipe.scheduler.set_timesteps(STEPS)
    config = calibrated(pipe.scheduler, record).replace(**changes)

    def draw():
        with hgc.install(pipe, config=config):
            return models.draw(pipe, steps=steps)

    messages, _ = heard(draw)
    assert len(messages) == bool(text), messages
    assert re.match(text, "".join(messages)), messages


# -- what is refused ----------------------------------------------------------------------------


def test_a_forward_that_was_replaced_stands_in_the_way_of_uninstalling(made):
    unet, net = made
    installed = hgc.install(unet, net)
    mine = unet.forward
    unet.forward = lambda *args, **kwargs: mine(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"UNet2DConditionModel.forward was replaced .* undo"):
        installed.uninstall()
    unet.forward = mine
    installed.uninstall()
    assert "forward" not in vars(unet) and "forward" not in vars(net)
    for uninstall in (installed.uninstall, lambda: hgc.uninstall(unet), installed.compile):
        with pytest.raises(RuntimeError, match="hgc is not installed on th"):
            uninstall()


def test_models_that_hgc_cannot_run(made):
    unet, _ = made
    hgc.install(unet).uninstall()
    unet.up_blocks[1].resnets = unet.up_blocks[1].resnets[:1]
    with pytest.raises(TypeError, match=r"unet has 4 encoder skips and 3 decoder layers"):
        hgc.install(unet)
    unet = models.small_unet()
    unet.register_to_config(addition_embed_type="image_hint")
    with pytest.raises(TypeError, match="addition_embed_type='image_hint', which hgc does not"):
        hgc.install(unet)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "20"])
def test_a_number_of_evaluations_that_is_none(count):
    said = f"num_evaluations must be an integer of at least 1; got {re.escape(repr(count))}"
    with pytest.raises(ConfigError, match=said):
        hgc.plan("fast", count)
    with pytest.raises(ConfigError, match=f"Config.{said}"):
        Config(num_evaluations=count)
    with pytest.raises(ConfigError, match=said):
        hgc.count_macs(models.small_unet(), None, "fast", num_evaluations=count)
    assert len(hgc.plan("fast", 1)) == Config(num_evaluations=1).num_evaluations


RECORD = {"model": "m", "scheduler": "s", "steps": 6, "uncached_steps": 6, "macs_share": 0.5,
          "distance": 0.1, "distance_worst": 0.1, "fewer_steps": 3, "fewer_steps_distance": 0.2,
          "inputs": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "wrong", "right", "message"),
    [
        (Config, {"name": ""}, {"name": "a"}, "Config.name must be a non-empty string; got ''"),
        (Config, {"name": 3}, {"name": "3"}, "Config.name must be a non-empty string; got 3"),
        (Config, {"fresh_values": 1}, {"fresh_values": True},
         "Config.fresh_values must be a bool; got 1"),
        (Config, {"key_steps": 3}, {"key_steps": [0, 3]},
         "Config.key_steps must be a tuple of integers; got 3"),
        (Config, {"key_steps": (0, 2.0)}, {"key_steps": (0, 2)},
         "Config.key_steps must be an integer of at least 0; got 2.0"),
        (Config, {"steps": (3,), "num_evaluations": 1},
         {"steps": [StepPlan()], "num_evaluations": 1}, "Config.steps must be a tuple of StepPlan"),
        (StepPlan, {"depth": "all"}, {"depth": "full"},
         "StepPlan.depth must be an integer of at least 0; got 'all'"),
        (StepPlan, {"forecast": ()}, {"forecast": [1.0]},
         "StepPlan.forecast must be a non-empty tuple; got ()"),
        (Calibration, RECORD | {"timesteps": 3}, RECORD | {"timesteps": [3]},
         "Calibration.timesteps must be a list; got 3"),
        (Calibration, RECORD | {"model": 3}, RECORD | {"model": "3"},
         "Calibration.model must be a string; got 3"),
    ],
)  # fmt: skip
def test_a_value_that_is_wrong(make, wrong, right, message):
    with pytest.raises(ConfigError) as caught:
        make(**wrong)
    assert str(caught.value) == message
    make(**right)


def test_a_name_that_hgc_does_not_have():
    with pytest.raises(AttributeError, match="'hgc' has no attribute 'instal'"):
        hgc.instal  # noqa: B018
    assert all(hasattr(hgc, name) for name in hgc.__all__)


# -- texts that were once said where they were not true ------------------------------------------


def pipeline():
    return models.sd15_pipeline(models.small_unet(), models.small_controlnet())


class Stop(Exception):
    pass


def test_a_plan_that_forecasts_nothing_needs_no_scheduler():
    pipe = pipeline()
    with hgc.install(pipe.unet, pipe.controlnet, config="turbo") as installed:
        messages, _ = heard(lambda: models.draw(pipe, steps=4))
        assert {row.depth for row in installed.report().rows} == {"full"}
    assert messages == []


def test_requests_that_were_called_off_are_not_texts_built_anew():
    pipe = pipeline()

    def stop(pipe, i, t, kwargs):
        raise Stop

    def draw():
        for seed in range(6):
            with pytest.raises(Stop):
                models.draw(pipe, seed, callback_on_step_end=stop)

    with hgc.install(pipe, config=SHALLOW):
        assert heard(draw)[0] == []


@pytest.mark.parametrize("in_a_loop", [True, False])
def test_two_windows_a_step_whose_texts_are_built_anew(made, in_a_loop):
    """One loop; and beside it requests that begin in the middle of their schedule and are called
    off at once."""
    schedule, sample = torch.arange(900, 900 - 100 * STEPS, -100).clone(), torch.ones(1, 4, 16, 16)
    steps = range(STEPS) if in_a_loop else [2] * STEPS

    def evaluate():
        for i in steps:
            for window in range(1 + in_a_loop):
                made[0](sample, schedule[i], models.text(window))

    with hgc.install(made[0], config=SHALLOW), torch.no_grad():
        messages, _ = heard(evaluate)
    assert ["runs end at once" in message for message in messages] == [True] * in_a_loop


def test_one_loop_is_not_said_to_be_many_runs(made):
    """Its timesteps are built anew for each evaluation, its text once."""
    schedule, text = torch.arange(900, 900 - 100 * STEPS, -100).clone(), models.text(0)
    with hgc.install(made[0], config=SHALLOW), torch.no_grad():
        messages, _ = heard(
            lambda: [
                made[0](torch.ones(1, 4, 16, 16), schedule.clone()[i], text) for i in range(STEPS)
            ]
        )
    assert messages and not any("under way in this thread at once" in m for m in messages)


def test_three_changes_are_not_a_change_at_every_evaluation():
    pipe = pipeline()

    def change(pipe, i, t, kwargs):
        return {"prompt_embeds": models.text(i, 2)} if i < 3 else {}

    config = Config(num_evaluations=10, key_steps=(0, 5), feature_damping=0.0)
    with hgc.install(pipe, config=config) as installed:
        messages, _ = heard(
            lambda: models.draw(
                pipe, steps=10, callback_on_step_end=change,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            )
        )  # fmt: skip
        assert [row.depth for row in installed.report().rows].count(1) == 5
    assert not any("at every evaluation, so nothing is reused" in m for m in messages)


def test_a_controlnet_that_is_known_is_not_said_to_be_unknown(made):
    """It is called with a timestep for each row, by which no evaluation is found."""
    unet, net = made
    sample, text = torch.ones(1, 4, 16, 16), models.text(0)

    def draw():
        for t in torch.arange(900, 300, -100).clone():
            down, mid = net(sample, t.expand(1), text, models.picture(0), return_dict=False)
            unet(
                sample, t, text, down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            )  # fmt: skip

    with hgc.install(unet, net, config=SHALLOW), torch.no_grad():
        messages, _ = heard(draw)
    assert not any("does not know" in message for message in messages)


def test_a_report_on_one_step_does_not_ask_for_a_call():
    pipe = pipeline()
    with hgc.install(pipe) as installed:
        models.draw(pipe, steps=1)
        with pytest.raises(RuntimeError) as caught:
            installed.report()
    assert "call the pipeline first" not in str(caught.value)


@pytest.mark.parametrize("ask", ["report", "maps"])
def test_each_thread_is_told_of_its_own_calls(ask):
    unet, told = models.small_unet(), {}

    def tell(where):
        with pytest.raises(RuntimeError) as caught:
            getattr(installed, ask)()
        told[where] = "call the pipeline first" in str(caught.value)

    with hgc.install(unet, config=SHALLOW.replace(fresh_values=True)) as installed:
        with torch.no_grad():
            heard(
                lambda: [
                    unet(torch.ones(2, 4, 16, 16), torch.full((2,), t), models.text(0, 2))
                    for t in (900, 800)
                ]
            )
        tell("here")
        thread = threading.Thread(target=tell, args=("there",))
        thread.start()
        thread.join()
    assert told == {"here": False, "there": True}


def test_one_mistake_is_named_in_the_same_words(made):
    unet, net = made
    installed, told = hgc.install(unet, net), set()
    installed.uninstall()
    for use in (installed.uninstall, installed.compile, lambda: hgc.uninstall(unet)):
        with pytest.raises(RuntimeError) as caught:
            use()
        told.add(str(caught.value))
    assert len(told) == 1


@pytest.mark.parametrize("place", ["depth", "steps"])
def test_a_depth_that_the_model_does_not_have_is_named_by_its_field(made, place):
    config = SHALLOW.replace(depth=9)
    if place == "steps":
        steps = (StepPlan(), *(StepPlan(control="off", depth=9),) * 5)
        config = Config(num_evaluations=STEPS, steps=steps)
    for use in (hgc.install, hgc.count_macs):
        with pytest.raises(ConfigError, match=rf"Config.{place}.* at most 4.* got 9"):
            use(*made, config=config)


def test_a_plan_that_cannot_be_followed_is_refused_at_once(made):
    config = Config(num_evaluations=STEPS, steps=(StepPlan(depth=1),) * STEPS)
    with pytest.raises(ConfigError, match="evaluation 0: depth=1 reads a feature nothing wrote"):
        hgc.install(*made, config=config)


def test_a_number_of_graphs_that_is_none(made):
    with hgc.install(*made) as installed, pytest.raises(ValueError, match=r"graphs must be .*'x'"):
        installed.capture(graphs="x")


@pytest.mark.parametrize("config", [SHALLOW, Config(attention="reuse")], ids=["shallow", "full"])
def test_processors_with_weights_where_no_cross_attention_is_reused(config):
    pipe = pipeline()
    with_weights(pipe.unet, IPAdapterAttnProcessor2_0)
    assert heard(lambda: hgc.install(pipe, config=config).uninstall())[0] == []


@pytest.mark.parametrize("fresh_values", [True, False])
def test_fresh_values_is_not_advised_where_it_is_set(fresh_values):
    pipe = pipeline()
    config = SHALLOW.replace(attention="reuse", fresh_values=fresh_values)
    with hgc.install(pipe, config=config) as installed:
        with_weights(pipe.unet, IPAdapterAttnProcessor2_0 if fresh_values else None)
        messages, _ = heard(lambda: models.draw(pipe, steps=STEPS, **models.change_text(4)))
        assert installed.report().rows[4].why == "the text changed"
    assert ["Config(fresh_values=True) keeps" in m for m in messages].count(True) == (
        not fresh_values
    )


def test_a_reset_forgets_what_was_left_to_diffusers():
    pipe = pipeline()
    with hgc.install(pipe) as installed:
        models.draw(pipe, steps=1)
        models.draw(pipe, steps=4)
        installed.reset()
        with pytest.raises(RuntimeError, match="call the pipeline first"):
            installed.report()


def test_a_scheduler_is_known_when_its_pipeline_is_gone():
    pipe = pipeline()
    config = Config(num_evaluations=STEPS, key_steps=(0, 2, 4), depth=0)
    with hgc.install(pipe, config=config):
        expected = models.draw(pipe, steps=STEPS)
        other = type(pipe)(**pipe.components)
        del pipe
        gc.collect()
        messages, out = heard(lambda: models.draw(other, steps=STEPS))
    assert messages == []
    assert torch.equal(out, expected)


def test_a_report_says_what_was_done_with_the_text_of_another_length():
    pipe = pipeline()

    def change(pipe, i, t, kwargs):
        return {"prompt_embeds": torch.ones(2, 5, models.TEXT)} if i == 1 else {}

    config = SHALLOW.replace(attention="reuse", fresh_values=True)
    with hgc.install(pipe, config=config) as installed:
        models.draw(
            pipe, steps=STEPS, callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )  # fmt: skip
        row = installed.report().rows[2]
    assert (row.why, row.depth, row.attention) == ("the text changed", "full", "compute")


def test_a_batch_that_is_no_pair_is_not_as_planned():
    pipe = pipeline()
    config = SHALLOW.replace(guidance="reuse")
    with hgc.install(pipe, config=config) as installed:
        models.draw(pipe, steps=STEPS, guidance_scale=1.0)
        rows = installed.report().rows
    assert all(row.guidance == "both" for row in rows)
    assert "plan" not in {row.why for row in rows if row.depth == 1}


@pytest.mark.parametrize("change", [enable_freeu, one_more])
def test_what_is_no_argument_of_the_unet_is_not_said_to_be_one(change):
    assert reasons(change)[0][1] != "the UNet's arguments changed"
