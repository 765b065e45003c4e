"""Attention maps of the tokens, and prompts that change within a run."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F

import hgc
from hgc import Config

KEPT = Config(num_evaluations=6, key_steps=(0, 3, 5), guidance="reuse", fresh_values=True)


class Recorder:
    """The plain attention processor, keeping the probabilities of every call."""

    def __init__(self, maps: list[torch.Tensor]) -> None:
        self.maps = maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        query, key, value = map(attn.head_to_batch_dim, (query, key, value))
        scores = attn.get_attention_scores(query, key)
        if encoder_hidden_states is not None:
            self.maps.append(scores.unflatten(0, (-1, attn.heads)).mean(dim=1))
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, value)))


def expected(pipe, rows, size, **changes):
    """The mean maps of an ordinary run without hgc: of the last ``rows`` rows of each batch."""
    kept: list[torch.Tensor] = []
    original = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(Recorder(kept))
    try:
        models.draw(pipe, **changes)
    finally:
        pipe.unet.set_attn_processor(original)
    total = 0
    for found in kept:
        height, width = size
        while height * width != found.shape[1]:
            height, width = -(-height // 2), -(-width // 2)
        grid = found[-rows:].transpose(1, 2).unflatten(-1, (height, width))
        if (height, width) != size:
            grid = F.interpolate(grid, size=size, mode="bilinear")
        total = total + grid
    return total / len(kept)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
def test_maps_are_the_mean_over_layers_and_steps(sd15, guidance, height, width):
    arguments = {
        "guidance_scale": guidance, "height": height, "width": width,
        "image": models.picture(0, height, width),
    }  # fmt: skip
    size = (height // 2, width // 2)
    reference = expected(sd15, 1, size, **arguments)
    plain = models.draw(sd15, **arguments)
    config = Config(fresh_values=True)
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        assert torch.equal(models.draw(sd15, **arguments), plain)  # looking changes nothing
        maps = installed.maps()
    assert maps.shape == (1, models.TOKENS, *size)
    assert torch.allclose(maps.sum(dim=1), torch.ones(1, *size), atol=1e-5)
    assert (maps - reference).abs().max() <= 1e-5
    assert maps.std() > 1e-3


def test_maps_of_key_evaluations_of_a_cached_run(sd15):
    """Near the maps of all evaluations, of two images too, and nothing else stays held."""
    arguments = {"num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(2)}
    reference = expected(sd15, 2, (16, 16), **arguments)
    arguments["generator"] = torch.Generator().manual_seed(2)
    with hgc.install(sd15.unet, sd15.controlnet, config=KEPT) as installed:
        models.draw(sd15, **arguments)
        maps = installed.maps()
        assert installed._engine.registry.last.cache.bytes == 0
    assert maps.shape == (2, models.TOKENS, 16, 16)
    assert (maps - reference).norm() < 0.1 * reference.norm()


def test_maps_that_were_not_kept_say_how_to_keep_them(sd15):
    with hgc.install(sd15.unet, sd15.controlnet) as installed:
        with pytest.raises(RuntimeError, match="call the pipeline first"):
            installed.maps()
        models.draw(sd15)
        with pytest.raises(RuntimeError, match=r"Config\(fresh_values=True\)"):
            installed.maps()
    tight = KEPT.replace(max_cache_bytes=0)
    with hgc.install(sd15.unet, sd15.controlnet, config=tight) as installed:
        with pytest.warns(hgc.HgcWarning, match="max_cache_bytes"):
            models.draw(sd15)
        with pytest.raises(RuntimeError, match="max_cache_bytes"):
            installed.maps()


def schedule(prompts):
    """Another prompt after some steps."""

    def callback(pipe, i, t, tensors):
        if i in prompts:
            return {"prompt_embeds": torch.cat([models.text(500), prompts[i]])}
        return {}

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }


def test_a_prompt_schedule_keeps_the_layout_of_the_first(sd15, monkeypatch):
    """Each new prompt's values go through the maps of the first prompt, in every layer."""
    import hgc_kernels

    stored, applied = {}, []
    attend, apply = hgc_kernels.attend_and_store, hgc_kernels.apply_map

    def attending(q, k, v, buffer):
        out = attend(q, k, v, buffer)
        scores = torch.einsum("bqhd,bkhd->bqhk", q, k) / q.shape[-1] ** 0.5
        stored[buffer.data_ptr()] = scores.softmax(-1)
        return out

    def applying(buffer, values):
        applied.append((buffer.data_ptr(), values))
        out = apply(buffer, values)
        first = stored[buffer.data_ptr()][-out.shape[0] :]
        reference = torch.einsum("bqhk,bkhd->bqhd", first, values)
        assert (out - reference).abs().max() <= 1e-5 * reference.abs().max() + 1e-6
        return out

    monkeypatch.setattr(hgc_kernels, "attend_and_store", attending)
    monkeypatch.setattr(hgc_kernels, "apply_map", applying)
    config = Config(num_evaluations=6, attention_gate=0.3, fresh_values=True, map_format="fp32")
    prompts = {2: models.text(77), 3: models.text(78)}
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        models.draw(sd15, **schedule(prompts))
        maps = installed.maps()
        assert installed.report().rows[3].attention == "reuse"
    assert len(applied) == 2 * (16 + 7)  # once a layer of both networks for each new prompt
    halves = {values.shape[0] for _, values in applied}
    assert halves == {2}
    with hgc.install(sd15.unet, sd15.controlnet, config=config) as installed:
        models.draw(sd15)
        assert (maps - installed.maps()).norm() < 0.05 * maps.norm()  # the first prompt's


# -- the picture ------------------------------------------------------------------------------


def test_plot_maps_draws_a_panel_a_word(tmp_path):
    figure_of = pytest.importorskip("matplotlib.figure")
    maps = torch.rand(1, 5, 8, 8)
    image = torch.rand(32, 32, 3)
    figure = hgc.plot_maps(maps, image, ["a", "red", "red"], path=tmp_path / "maps.png")
    assert isinstance(figure, figure_of.Figure)
    assert (tmp_path / "maps.png").stat().st_size > 1000
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == ["a", "red", "red"]
    assert all(len(axis.images) == 2 for axis in drawn)
    assert (drawn[1].images[1].get_array() == maps[0, 1].numpy()).all()
    figure = hgc.plot_maps(maps, words={"red house": [1, 2], "sky": 4})
    first = next(axis for axis in figure.axes if axis.images)
    assert first.get_title() == "red house"
    assert torch.allclose(torch.tensor(first.images[0].get_array().data), maps[0, 1:3].sum(0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"words": ["a"] * 6}, "at most 5 words"),
        ({"words": {"sky": 5}}, r"words\['sky'\] must name tokens below 5; got 5"),
        ({"words": "a red house"}, "list of at most"),
        ({"maps": torch.rand(2, 5, 8, 8)}, r"got \(2, 5, 8, 8\)"),
        ({"image": torch.rand(8, 8)}, r"image must be \[H, W, 3\]"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        hgc.plot_maps(**{"maps": torch.rand(5, 8, 8), **changes})


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hybrid-grained-cache\[plot\]"):
        hgc.plot_maps(torch.rand(5, 8, 8))
