"""MACs of SD1.5 and SDXL, from configs alone."""

from __future__ import annotations

import models
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

import hgc
from hgc.report import macs


@pytest.fixture(scope="module")
def sd15_meta():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        return unet, ControlNetModel(cross_attention_dim=768, attention_head_dim=8)


def test_sd15_uncached_run(sd15_meta):
    """20 steps, guidance, 512 x 512: 18.20T in the paper's convention, 21.73T with attention."""
    count = hgc.count_macs(*sd15_meta, "exact")
    assert count.full.paper == pytest.approx(18.20e12, rel=2e-3)
    assert count.full.total == pytest.approx(21.73e12, rel=2e-3)
    assert 0.97 * count.full.total < count.total < count.full.total


@pytest.mark.parametrize(
    ("preset", "limit"),
    [("paper", 6.70e12), ("balanced", 5.6e12), ("fast", 4.6e12), ("turbo", 4.0e12)],
)
def test_presets_keep_their_promise(sd15_meta, preset, limit):
    count = hgc.count_macs(*sd15_meta, preset)
    assert count.num_evaluations == hgc.Config.preset(preset).num_evaluations
    assert 0.8 * limit < count.paper <= limit


def test_count_of_one_evaluation_by_hand():
    """Without a ControlNet and attention the count is that of the convolutions and linears."""
    with torch.device("meta"):
        unet = models.sd15_unet()
    count = hgc.count_macs(unet, None, "exact", num_evaluations=3, height=128)
    assert len(count.evaluations) == 3
    assert count.full.total == 3 * count.full_evaluation.total
    # the text is projected once: later evaluations cost less
    assert count.evaluations[0].total == count.full_evaluation.total
    assert count.evaluations[1].total < count.evaluations[0].total


def test_evaluations_cost_what_they_do_in_a_run_of_them_all(monkeypatch):
    """Each kind is run once a model and shape, not once a plan."""
    runs, plain = [], macs._run
    monkeypatch.setattr(macs, "_run", lambda *given: runs.append(given[1]) or plain(*given))
    macs._known.cache_clear()
    unet, net = models.small_unet(), models.small_controlnet()
    described = macs._describe(unet), (macs._describe(net),)
    mixed = hgc.Config(
        num_evaluations=8, key_steps=(0, 2, 4, 6), control_key_steps=(0, 4), depth=2,
        conditional_key_steps=(4, 6), guidance="reuse",
    )  # fmt: skip
    for config in (mixed, hgc.Config.preset("paper"), hgc.Config.preset("turbo")):
        count = hgc.count_macs(unet, net, config, num_evaluations=8, height=32)
        shapes = macs.Shapes(2, 16, 16, condition=2)
        kinds = [(step.in_output, (False,)) for step in hgc.plan(config, 8)]
        assert list(count.evaluations) == plain(described, kinds, shapes, True), config.name
        again = config.replace(name="again", damping=0.3, feature_damping=0.2)
        assert hgc.count_macs(unet, net, again, num_evaluations=8, height=32).done == count.done
    # without hgc, of `mixed`, and the shallow evaluations of `paper`
    assert len(runs) == 3


def test_wrong_sizes_are_refused(sd15_meta):
    with pytest.raises(ValueError, match="height must be a positive multiple of 8; got 100"):
        hgc.count_macs(*sd15_meta, "paper", height=100)
    with pytest.raises(TypeError, match="got str"):
        hgc.count_macs("sd15")
