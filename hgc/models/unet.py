"""One evaluation of a UNet at any depth: a pure function with the bits of diffusers' own forward.

Whole blocks are called as diffusers has them; only those of which a part is run are stepped through
by layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.utils.torch_utils import apply_freeu

import hgc_kernels
from hgc.models.blocks import (
    children,
    embed_time,
    has_attention,
    mask_bias,
    run_encoder,
    run_mid_block,
)
from hgc.models.layer_calls import LayerCalls, TimeRow, layer_calls
from hgc.models.structure import UNetStructure
from hgc_kernels import get_backend
from hgc_kernels.backend import is_chosen

__all__ = ["UP_BLOCKS", "Residuals", "embed", "freeu_of", "run_unet"]

Tensor = torch.Tensor
UP_BLOCKS = {CrossAttnUpBlock2D, UpBlock2D}
# Bytes of a result below which a call of the op costs more on a CPU than the pass that it saves.
_WORTH_AN_OP = 1 << 21


@dataclasses.dataclass(slots=True)
class Residuals:
    """ControlNet residuals as the UNet adds them: ``skip + scale * value``.

    Attributes:
        down: For each skip from the outermost on, the tensors to add, each with its scale, in the
            order in which they are added.
        mid: The same for the middle block's output.
    """

    down: list[list[tuple[Tensor, float]]]
    mid: list[tuple[Tensor, float]]


def _add(x: Tensor, terms: list[tuple[Tensor, float]]) -> Tensor:
    """``x`` plus the sum of ``terms``, rounded as diffusers rounds: terms, their sum, then x."""
    if not terms:
        return x
    first, *more = [value if scale == 1.0 else value * scale for value, scale in terms]
    return x + sum(more, first)


def _join(hidden: Tensor, skip: Tensor, terms: list[tuple[Tensor, float]]) -> Tensor:
    """A decoder layer's input: ``cat([hidden, skip + terms])``, in one pass where it pays."""
    if (
        torch.compiler.is_compiling()  # which fuses this with the norm that follows
        or (
            hidden.is_cpu
            and hidden.nbytes + skip.nbytes < _WORTH_AN_OP
            and get_backend("gather_blocks") == "auto"
        )
        # autocast around the UNet and not around the ControlNet
        or any(x.dtype != hidden.dtype for x in (skip, *(value for value, _ in terms)))
    ):
        return torch.cat([hidden, _add(skip, terms)], dim=1)
    if len(terms) > 1 or (terms and terms[0][0].shape != skip.shape):
        skip, terms = _add(skip, terms), []
    residual, scale = terms[0] if terms else (None, 1.0)
    if torch.is_grad_enabled() or is_chosen():
        return hgc_kernels.gather_blocks(hidden, skip, residual, scale=scale)
    # the arguments are known to be right
    return torch.ops.hgc.gather_blocks.default(hidden, skip, residual, scale)


def freeu_of(block: torch.nn.Module) -> tuple[float, ...] | None:
    """FreeU's four factors where it is enabled on an up block (it then writes into its input)."""
    if type(block) in UP_BLOCKS and not block.__dict__.get("s1"):
        return None
    factors = tuple([getattr(block, name, None) or 0.0 for name in ("s1", "s2", "b1", "b2")])
    return factors if all(factors) else None


def embed(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor | float | int,
    text: Any,
    *,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """The embedding of time, class and what else there is, [B, E], in the dtype of ``sample``, of
    which the rows are all that is read beside."""
    part: Callable[[str], Any] = unet._modules.get
    config = unet.config
    emb = part("time_embedding")(embed_time(unet, sample, timestep), timestep_cond)
    if part("class_embedding") is not None:
        class_emb = unet.get_class_embed(sample=sample, class_labels=class_labels)
        concat = config.class_embeddings_concat
        emb = torch.cat([emb, class_emb], dim=-1) if concat else emb + class_emb
    if config.addition_embed_type is not None:
        aug_emb = unet.get_aug_embed(
            emb=emb, encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs
        )
        emb = emb + aug_emb if aug_emb is not None else emb
    if part("time_embed_act") is not None:
        emb = part("time_embed_act")(emb)
    return emb


def run_unet(
    unet: UNet2DConditionModel,
    structure: UNetStructure,
    sample: Tensor,
    timestep: Tensor | float | int,
    text: Any,
    wrap_text: Any = None,
    *,
    depth: int | None = None,
    hidden: Tensor | None = None,
    skips: list[Tensor] | None = None,
    residuals: Residuals | None = None,
    capture: tuple[str, ...] = (),
    fused: bool = False,
    time: TimeRow | None = None,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
    intrablock_residuals: list[Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One evaluation of the UNet.

    Args:
        unet: The model.
        structure: Its layers.
        sample: [B, C, H, W].
        timestep: As diffusers takes it.
        text: ``encoder_hidden_states``, [B, S, D].
        wrap_text: Called with the projected text; its result is handed to the cross-attentions.
        depth: ``None`` computes everything; ``k >= 1`` the ``k`` outermost decoder layers.
        hidden: The cached input of the first of them, where ``depth`` is given.
        skips: Cached encoder skips from the outermost on; ``None`` computes them.
        residuals: Of the ControlNets; only those of skips that are read are used.
        capture: Names of the intermediate tensors to return, ``feature/k`` and ``skip/j``.
        fused: Group norms take in what stands around them (:mod:`hgc.models.layer_calls`).
        time: :func:`embed`'s result and what follows of it, where it was made before; fused.
        intrablock_residuals: Of T2I-Adapters; consumed from the front, as diffusers does.

    Returns:
        The output, [B, C, H, W], and the captured tensors by name. None of them is written to
        afterwards by this function.
    """
    part: Callable[[str], Any] = unet._modules.get
    config, size = unet.config, sample.shape
    attention_mask = mask_bias(attention_mask, sample.dtype)
    encoder_attention_mask = mask_bias(encoder_attention_mask, sample.dtype)
    if config.center_input_sample:
        sample = 2 * sample - 1.0

    made = time or embed(
        unet, sample, timestep, text, class_labels=class_labels, timestep_cond=timestep_cond,
        added_cond_kwargs=added_cond_kwargs,
    )  # fmt: skip
    layers = layer_calls(made, sample.shape[0], fused)
    if part("encoder_hid_proj") is not None:
        text = unet.process_encoder_hidden_states(
            encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs
        )
    if wrap_text is not None:
        text = wrap_text(text)
    if cross_attention_kwargs is not None and cross_attention_kwargs.get("gligen") is not None:
        cross_attention_kwargs = dict(cross_attention_kwargs)
        gligen = cross_attention_kwargs.pop("gligen")
        cross_attention_kwargs["gligen"] = {"objs": unet.position_net(**gligen)}
    attention = {
        "encoder_hidden_states": text,
        "cross_attention_kwargs": cross_attention_kwargs,
        "attention_mask": attention_mask,
        "encoder_attention_mask": encoder_attention_mask,
    }

    if skips is None:
        sample = part("conv_in")(sample)
        sample, skips = run_encoder(unet, sample, layers, attention, depth, intrablock_residuals)
    count = len(skips) if depth is None else depth
    captured = {name: skips[int(name[5:])] for name in capture if name.startswith("skip/")}

    down = [[]] * count if residuals is None else residuals.down
    if depth is None:
        sample = run_mid_block(unet, sample, layers, attention)
        # T2I-Adapter-XL; adds into a tensor nobody else holds yet
        extra = intrablock_residuals if part("mid_block") is not None else None
        if extra and sample.shape == extra[0].shape:
            sample = sample + extra.pop(0)
        hidden = sample if residuals is None else _add(sample, residuals.mid)
    assert hidden is not None
    wanted = {
        structure.boundary(int(name[8:])): name for name in capture if name.startswith("feature/")
    }
    out = _decode(
        unet, structure.boundary(count), hidden, skips[:count], down[:count], layers, attention,
        size, wanted, captured,
    )  # fmt: skip
    if part("conv_norm_out") is not None:
        out = layers.norm_out(part("conv_norm_out"), part("conv_act"), out)
    return part("conv_out")(out), captured


def _decode(
    unet: UNet2DConditionModel,
    first: tuple[int, int],
    hidden: Tensor,  # [B, C, h, w]
    skips: list[Tensor],
    residuals: list[list[tuple[Tensor, float]]],
    layers: LayerCalls,
    attention: dict[str, Any],
    size: torch.Size,
    wanted: dict[tuple[int, int], str],
    captured: dict[str, Tensor],
) -> Tensor:
    """The decoder layers from ``first``, (up block, layer in it), on; ``hidden`` is its input.

    The inputs of the layers that ``wanted`` names are put into ``captured``.
    """
    # the upsamplers of a size that is not halved evenly are told where to end
    uneven = any(length % 2**unet.num_upsamplers for length in size[-2:])
    end = len(skips)
    for b, block in enumerate(children(unet, "up_blocks")):
        if b < first[0]:
            continue
        resnets = children(block, "resnets")
        count = len(resnets)
        start = first[1] if b == first[0] else 0
        begin = end - (count - start)
        here, terms, end = skips[begin:end], residuals[begin:end], begin
        upsample_size = skips[end - 1].shape[2:] if uneven and end > 0 else None
        freeu = freeu_of(block)
        with_attention = has_attention(block)
        cut = start > 0 or any((b, layer) in wanted for layer in range(1, count))
        if not cut and not layers.one_by_one(block):
            if (b, 0) in wanted:
                captured[wanted[b, 0]] = _kept(hidden, freeu)
            summed = tuple(map(_add, here, terms))
            arguments = attention if with_attention else {}
            hidden = block(
                hidden, summed, temb=layers.emb, upsample_size=upsample_size, **arguments
            )
            continue
        attentions = children(block, "attentions") if with_attention else []
        for layer in range(start, count):
            if (b, layer) in wanted:
                captured[wanted[b, layer]] = _kept(hidden, freeu)
            skip, added = here[count - 1 - layer], terms[count - 1 - layer]
            if freeu is not None:
                s1, s2, b1, b2 = freeu
                hidden, skip = apply_freeu(
                    block.resolution_idx, hidden, _add(skip, added), s1=s1, s2=s2, b1=b1, b2=b2
                )
                added = []
            hidden = layers.resnet(resnets[layer], _join(hidden, skip, added))
            if with_attention:
                hidden = layers.attention(attentions[layer], hidden, attention)
        for upsampler in children(block, "upsamplers"):
            hidden = upsampler(hidden, upsample_size)
    return hidden


def _kept(hidden: Tensor, freeu: tuple[float, ...] | None) -> Tensor:
    """A block's input as it is to be kept: FreeU writes into it."""
    return hidden if freeu is None else hidden.clone()
