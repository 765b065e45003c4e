"""What hgc says: each text where it is true, and not in the case beside it."""

from __future__ import annotations

import copy
import warnings

import models
import pytest
import torch

import hgc
from hgc import Config
from hgc.planning.config import ConfigError
from hgc.warn import HgcWarning

STEPS = 6
SHALLOW = Config(num_evaluations=STEPS, key_steps=(0, 3), forecast=0.0)


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


def said(*loops):
    """The warnings of ``loops``, made in turns, and what they gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HgcWarning)
        out = [*zip(*loops, strict=True)]
    return [str(w.message) for w in caught if w.category is HgcWarning], out


@pytest.fixture
def made():
    return models.small_unet(), models.small_controlnet()


def test_residuals_of_a_controlnet_that_is_not_known(made):
    unet, net = made
    with hgc.install(unet, config=SHALLOW):
        (message,), _ = said(loop(unet, net))
    assert "this installation does not know" in message and "hgc.install(pipe.unet, pipe" in message
    with hgc.install(unet, net, config=SHALLOW):
        assert said(loop(unet, net))[0] == []


def test_a_controlnet_that_is_called_at_every_second_step(made):
    unet, net = made
    right = said(loop(unet, net, every=2))[1]
    with hgc.install(unet, net, config=SHALLOW):
        (message,), out = said(loop(unet, net, every=2))
    assert "at every evaluation, so nothing is reused" in message
    assert all(torch.equal(a, b) for (a,), (b,) in zip(out, right, strict=True))


def test_a_unet_that_is_called_twice_a_step(made):
    unet, net = made
    right = said(loop(unet, net, looks=True))[1]
    with hgc.install(unet, net, config=SHALLOW) as installed:
        (message,), out = said(loop(unet, net, looks=True))
        assert len(installed.report().rows) == 2 * STEPS - 1
    assert message.startswith("one timestep was evaluated more than once")
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
        with pytest.warns(HgcWarning, match="not an element of a tensor of timesteps"):
            for t in (900, 800):
                unet(torch.ones(2, 4, 16, 16), torch.full((2,), t), models.text(0, 2))
        with pytest.raises(RuntimeError, match="evaluations of no run were computed by diffusers"):
            installed.report()


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
