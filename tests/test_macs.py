"""MACs of SD1.5 and SDXL, from configs alone."""

from __future__ import annotations

import models
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

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
        shapes = macs.Shapes(2, 16, 16, pixels_a_latent=2)
        kinds = [(step.in_output, (False,), True) for step in hgc.plan(config, 8)]
        parts = plain(described, kinds, shapes, True)
        assert list(count.evaluations) == [sum(each, macs.Macs()) for each in parts], config.name
        again = config.replace(name="again", damping=0.3, feature_damping=0.2)
        assert hgc.count_macs(unet, net, again, num_evaluations=8, height=32).done == count.done
    # without hgc, of `mixed`, and the shallow evaluations of `paper`
    assert len(runs) == 3


def test_wrong_sizes_are_refused(sd15_meta):
    with pytest.raises(ValueError, match="height must be a positive multiple of 8; got 100"):
        hgc.count_macs(*sd15_meta, "paper", height=100)
    with pytest.raises(TypeError, match="got str"):
        hgc.count_macs("sd15")


# what UNets may take beside the sample, the time and the text: changes of the UNet's config and of
# the ControlNet's (None: no ControlNet), the width of the text, what each of them is handed
_LABELS, _PROJECTED = torch.tensor([3, 4]), torch.ones(2, 12)
_PROJECTION = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12}
_HIDDEN = {"encoder_hid_dim": 24}
_OF_BOTH = ("text_embeds", "image_embeds")
CONFIGS = {
    "class labels": (
        {"num_class_embeds": 10}, {"num_class_embeds": 10}, models.TEXT,
        {"class_labels": _LABELS}, {"class_labels": _LABELS},
    ),
    "projected labels": (
        _PROJECTION, _PROJECTION, models.TEXT,
        {"class_labels": _PROJECTED}, {"class_labels": _PROJECTED},
    ),
    "simple projection": (
        {**_PROJECTION, "class_embed_type": "simple_projection"}, None, models.TEXT,
        {"class_labels": _PROJECTED}, {},
    ),
    "labels like timesteps": (
        {"class_embed_type": "timestep"}, {"class_embed_type": "timestep"}, models.TEXT,
        {"class_labels": torch.ones(2)}, {"class_labels": torch.ones(2)},
    ),
    "embedded labels": (
        {"class_embed_type": "identity"}, None, models.TEXT,
        {"class_labels": torch.ones(2, 32)}, {},
    ),
    "text and image": (
        {
            **_HIDDEN, "encoder_hid_dim_type": "text_image_proj",
            "addition_embed_type": "text_image",
        },
        None, 24,
        {"added_cond_kwargs": {k: torch.ones(2, models.TEXT) for k in _OF_BOTH}}, {},
    ),
    "layers of tuples": (
        {"transformer_layers_per_block": ((1, 1), (1, 1))}, None, models.TEXT, {}, {},
    ),
    "projected text": ({**_HIDDEN, "encoder_hid_dim_type": "text_proj"}, None, 24, {}, {}),
    "projected image": (
        {**_HIDDEN, "encoder_hid_dim_type": "image_proj"}, None, 24,
        {"added_cond_kwargs": {"image_embeds": torch.ones(2, 24)}}, {},
    ),
    "added text": (
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {}, models.TEXT, {}, {},
    ),
    "a width a block": (
        {"cross_attention_dim": (models.TEXT, 24), "mid_block_type": None}, None, models.TEXT,
        {}, {},
    ),
    "the same widths": ({"cross_attention_dim": (models.TEXT,) * 2}, {}, models.TEXT, {}, {}),
    "guidance embedded": (
        {"time_cond_proj_dim": 8}, {}, models.TEXT, {"timestep_cond": torch.ones(2, 8)}, {},
    ),
    "a condition of five channels": ({}, {"conditioning_channels": 5}, models.TEXT, {}, {}),
}  # fmt: skip


def counted(unet, net, evaluations, text=models.TEXT, unet_takes=None, net_takes=None):
    """MACs of a loop over two rows, by torch's counter."""
    counter = macs.flop_counter()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, unet.config.in_channels, 16, 16, generator=generator)
    text = torch.randn(2, 7, text, generator=generator)
    with torch.no_grad(), counter:
        condition = net and torch.ones(2, net.config.conditioning_channels, 32, 32)
        for t in torch.arange(evaluations) + 5:
            down, mid = None, None
            if net is not None:
                down, mid = net(sample, t, text, condition, return_dict=False, **(net_takes or {}))
            unet(
                sample, t, text, down_block_additional_residuals=down,
                mid_block_additional_residual=mid, return_dict=False, **(unet_takes or {}),
            )  # fmt: skip
    return macs.macs_of(counter)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_else_a_unet_takes_is_counted(name):
    """Counts and reports, with hgc and without, are those of the calls themselves."""
    changes, net_changes, text, unet_takes, net_takes = CONFIGS[name]
    unet = models.small_unet(**changes)
    net = None if net_changes is None else models.small_controlnet(**net_changes)
    given = (3, text, unet_takes, net_takes)
    full = counted(unet, net, *given)
    count = hgc.count_macs(
        unet, net, "exact", num_evaluations=3, height=32 if net else 128, tokens=7
    )
    with hgc.install(unet, net, config="exact") as installed:
        done = counted(unet, net, *given)
        report = installed.report()
    assert count.full == report.full_macs == full
    assert count.done == report.macs == done


def test_evaluations_that_are_left_to_diffusers_are_counted_as_what_they_are():
    """diffusers projects the text and embeds the condition at each of them."""
    unet, net = models.small_unet(), models.small_controlnet()
    unet.mid_block.register_forward_hook(lambda module, args, out: out)
    with hgc.install(unet, net, config="exact") as installed:
        with pytest.warns(hgc.HgcWarning, match="leaves runs to diffusers"):
            done = counted(unet, net, 3)
        report = installed.report()
    assert {row.macs for row in report.rows} == {report.full_evaluation}
    assert report.macs == report.full_macs == done


@pytest.mark.parametrize("nets", [1, 2])
def test_a_controlnet_that_a_promise_computed_is_counted(nets):
    """Of two, whose promises are read of the first alone."""
    unet, made = models.small_unet(), [models.small_controlnet(seed) for seed in range(1, nets + 1)]
    config = hgc.Config(num_evaluations=4, key_steps=(0, 2), depth=1)
    sample, text, condition = torch.ones(2, 4, 16, 16), models.text(0, 2), torch.ones(2, 3, 32, 32)
    reports = {}
    with torch.no_grad():
        alone = macs.flop_counter()
        with alone:
            made[0](sample, torch.tensor(5), text, condition)
        for reads in (False, True):
            with hgc.install(unet, made, config=config) as installed:
                for i, t in enumerate(torch.arange(4) + 5):
                    down = [net(sample, t, text, condition, return_dict=False) for net in made]
                    if reads and i == 1:
                        down[0][0][0].sum()
                    first, mid = down[0]
                    for more, at in down[1:]:
                        first, mid = [a + b for a, b in zip(first, more, strict=True)], mid + at
                    unet(
                        sample, t, text, down_block_additional_residuals=first,
                        mid_block_additional_residual=mid,
                    )  # fmt: skip
                reports[reads] = installed.report().rows
    assert reports[True][1].control == ("computed", *["reused"] * (nets - 1))
    extra = reports[True][1].macs.total - reports[False][1].macs.total
    assert extra == macs.macs_of(alone).total


@pytest.mark.parametrize(
    "config", ["exact", hgc.Config(num_evaluations=4, depth=1)], ids=["exact", "shallow"]
)
def test_a_controlnet_with_a_text_of_another_width_is_counted(config):
    """The text of the UNet is a change at the first evaluation, and not at the others."""
    unet, net = models.small_unet(encoder_hid_dim=24), models.small_controlnet()
    sample, condition = torch.ones(2, 4, 16, 16), torch.ones(2, 3, 32, 32)
    texts, done = (models.text(0, 2), torch.ones(2, 7, 24)), []
    with hgc.install(unet, net, config=config) as installed, torch.no_grad():
        for t in torch.arange(4) + 5:
            counter = macs.flop_counter()
            with counter:
                down, mid = net(sample, t, texts[0], condition, return_dict=False)
                unet(
                    sample, t, texts[1], down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                )  # fmt: skip
            done.append(macs.macs_of(counter))
        report = installed.report()
    assert [row.macs for row in report.rows] == done


def loop(unet, net, config, before=lambda i: None, mode=torch.no_grad, reads=()):
    """MACs of each of six evaluations of a guidance pair, by torch's counter, and the report."""
    done = []
    with hgc.install(unet, net, config=config) as installed, mode():
        sample = torch.ones(2, 4, 16, 16)
        text, condition = models.text(0, 2).clone(), torch.ones(2, 3, 32, 32)
        for i, t in enumerate(torch.arange(6) + 5):
            before(i)
            counter = macs.flop_counter()
            with counter:
                down, mid = net(sample, t, text, condition, return_dict=False)
                if i in reads:
                    mid.sum()
                unet(
                    sample, t, text, down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                )  # fmt: skip
            done.append(macs.macs_of(counter))
        return done, installed.report()


HALVES = hgc.Config(
    num_evaluations=6, key_steps=(0, 2, 4), conditional_key_steps=(4,), guidance="reuse", depth=1
)


def test_what_diffusers_is_left_with_in_the_middle_of_a_run_is_counted():
    """The ControlNet is computed by hgc yet in the evaluation in which the UNet is found changed,
    and by diffusers in those after it."""

    class Own(AttnProcessor2_0):
        pass

    unet, net = models.small_unet(), models.small_controlnet()

    def change(i):
        if i == 2:
            unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Own()

    with pytest.warns(hgc.HgcWarning, match="leaves runs to diffusers"):
        done, report = loop(unet, net, HALVES, change)
    assert [row.macs for row in report.rows] == done
    assert done[1].total < done[2].total < done[3].total == report.full_evaluation.total


def test_a_half_that_is_computed_in_full_once_more_is_counted():
    done, report = loop(models.small_unet(), models.small_controlnet(), HALVES, reads=(3, 4))
    assert [row.macs for row in report.rows] == done
    assert [row.guidance for row in report.rows[3:]] == ["reuse"] * 3


@pytest.mark.filterwarnings("ignore:gradients are recorded")
@pytest.mark.parametrize("config", ["exact", HALVES], ids=["exact", "halves"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_evaluations_that_keep_nothing_are_counted(mode, config):
    """Where gradients are recorded, and of tensors of inference mode, the text is projected and the
    condition embedded at each."""
    done, report = loop(models.small_unet(), models.small_controlnet(), config, mode=mode)
    assert [row.macs for row in report.rows] == done
    if config == "exact":
        assert set(done) == {report.full_evaluation}
