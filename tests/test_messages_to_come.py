"""Texts that are said where they are not true, and what is to be said instead."""

from __future__ import annotations

import threading

import models
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from test_messages import SHALLOW, STEPS, enable_freeu, heard, made, one_more, reasons, with_weights

import hgc
from hgc import Config, ConfigError, StepPlan

__all__ = ["made"]
pytestmark = pytest.mark.xfail(strict=True, reason="said wrongly")


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

    config = Config(num_evaluations=10, key_steps=(0, 5), forecast=0.0)
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


def test_a_controlnets_forward_may_be_put_back_before_uninstalling_again(made):
    unet, net = made
    installed = hgc.install(unet, net)
    mine = net.forward
    net.forward = lambda *args, **kwargs: mine(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"ControlNetModel.forward was replaced"):
        installed.uninstall()
    net.forward = mine
    installed.uninstall()
    assert "forward" not in vars(unet) and "forward" not in vars(net)


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


def test_processors_with_weights_where_no_cross_attention_is_reused():
    pipe = pipeline()
    with_weights(pipe.unet, IPAdapterAttnProcessor2_0)
    assert heard(lambda: hgc.install(pipe, config=SHALLOW).uninstall())[0] == []


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
