"""The pure functions the executor calls: tensors in, tensors out, no state.

:func:`run_unet` is one evaluation of a UNet at any depth, :func:`run_controlnet` one of a
ControlNet before its scale, :func:`run_controlnet_union` one of a ControlNet-Union. Whole blocks
are called as diffusers has them; only the partially run blocks are stepped through by layer. All
equal diffusers' own forwards bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
)
from diffusers.utils.torch_utils import apply_freeu

import hgc_kernels
from hgc.models.structure import UNetStructure
from hgc_kernels import get_backend

__all__ = [
    "UP_BLOCKS",
    "Residuals",
    "control_function",
    "embed_condition",
    "run_controlnet",
    "run_controlnet_union",
    "run_unet",
    "scale_residuals",
]

Tensor = torch.Tensor
# torch's own namespaces are large: a look-up in one misses the processor's caches
_is_compiling = torch.compiler.is_compiling
_cat = torch.cat


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
    if len(terms) == 1:
        value, scale = terms[0]
        return x + value if scale == 1.0 else x + value * scale
    total: Tensor | None = None
    for value, scale in terms:
        term = value if scale == 1.0 else value * scale
        total = term if total is None else total + term
    assert total is not None
    return x + total


# Bytes of a result below which a call of the op costs more on a CPU than the pass that it saves.
_WORTH_AN_OP = 1 << 21


def _join(hidden: Tensor, skip: Tensor, terms: list[tuple[Tensor, float]]) -> Tensor:
    """A decoder layer's input: ``cat([hidden, skip + terms])``, in one pass where it pays."""
    if _is_compiling():
        # the compiler fuses this with the norm that follows; an opaque op would stand between
        return torch.cat([hidden, _add(skip, terms)], dim=1)
    small = hidden.is_cpu and hidden.nbytes + skip.nbytes < _WORTH_AN_OP
    if small and get_backend("gather_blocks") == "auto":
        return _cat([hidden, _add(skip, terms)], 1)
    if len(terms) > 1 or (terms and terms[0][0].shape != skip.shape):
        skip, terms = _add(skip, terms), []
    residual, scale = terms[0] if terms else (None, 1.0)
    if skip.dtype != hidden.dtype or (residual is not None and residual.dtype != skip.dtype):
        # autocast around the UNet and not around the ControlNet
        return torch.cat([hidden, _add(skip, terms)], dim=1)
    if torch.is_grad_enabled():
        return hgc_kernels.gather_blocks(hidden, skip, residual, scale=scale)
    # the arguments are known to be right
    return torch.ops.hgc.gather_blocks.default(hidden, skip, residual, scale)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A 0/1 mask [B, keys] as diffusers' additive bias [B, 1, keys]."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


# Modules are slow to look attributes up in: at every evaluation each costs more than a tensor's op.


def _parts(module: torch.nn.Module, name: str) -> list[Any]:
    """The modules in the list ``module.name``, which may be None."""
    found: Any = module._modules.get(name)
    if found is None:
        # None lies in `__dict__`; of what somebody wrapped a block in, it is an attribute
        found = getattr(module, name)
    return [] if found is None else list(found._modules.values())


def _named_parts(module: torch.nn.Module, name: str) -> dict[str, Any]:
    """As :func:`_parts`, by their names in the list, which are :data:`_NAMES`."""
    found: Any = module._modules.get(name)
    if found is None:
        found = getattr(module, name)
    return {} if found is None else found._modules


_NAMES = tuple(map(str, range(100)))

# What diffusers does not say it of.
_WITHOUT_ATTENTION = {DownBlock2D, UpBlock2D, UNetMidBlock2D}
UP_BLOCKS = {CrossAttnUpBlock2D, UpBlock2D}


def _has_attention(block: torch.nn.Module) -> bool:
    found = block.__dict__.get("has_cross_attention")
    if found is None and type(block) not in _WITHOUT_ATTENTION:
        found = getattr(block, "has_cross_attention", False)
    return bool(found)


def freeu_of(block: torch.nn.Module) -> tuple[float, ...] | None:
    """FreeU's four factors where it is enabled on an up block (it then writes into its input)."""
    if type(block) in UP_BLOCKS and not block.__dict__.get("s1"):
        return None
    factors = tuple([getattr(block, name, None) or 0.0 for name in ("s1", "s2", "b1", "b2")])
    return factors if all(factors) else None


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
        intrablock_residuals: Of T2I-Adapters; consumed from the front, as diffusers does.

    Returns:
        The output, [B, C, H, W], and the captured tensors by name. None of them is written to
        afterwards by this function.
    """
    part: Callable[[str], Any] = unet._modules.get
    full = depth is None
    count = structure.num_layers if depth is None else depth
    captured: dict[str, Tensor] = {}

    config, size = unet.config, sample.shape
    if attention_mask is not None:
        attention_mask = _bias(attention_mask, sample.dtype)
    if encoder_attention_mask is not None:
        encoder_attention_mask = _bias(encoder_attention_mask, sample.dtype)
    if config.center_input_sample:
        sample = 2 * sample - 1.0

    emb = part("time_embedding")(_time(unet, sample, timestep), timestep_cond)
    if part("class_embedding") is not None:
        class_emb = unet.get_class_embed(sample=sample, class_labels=class_labels)
        concat = config.class_embeddings_concat
        emb = torch.cat([emb, class_emb], dim=-1) if concat else emb + class_emb
    if config.addition_embed_type is not None:
        aug_emb = unet.get_aug_embed(
            emb=emb, encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs
        )
        emb = emb + aug_emb if aug_emb is not None else emb
    time_embed_act = part("time_embed_act")
    if time_embed_act is not None:
        emb = time_embed_act(emb)
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
        sample, skips = _encode(
            unet, structure, sample, emb, attention, count, intrablock_residuals, full
        )
    for name in capture:
        kind, _, index = name.partition("/")
        if kind == "skip":
            captured[name] = skips[int(index)]

    down = residuals.down if residuals is not None else [[] for _ in range(count)]
    if full:
        mid_block = part("mid_block")
        if mid_block is not None:
            if _has_attention(mid_block):
                sample = mid_block(sample, emb, **attention)
            else:
                sample = mid_block(sample, emb)
            # T2I-Adapter-XL; adds into a tensor nobody else holds yet
            if intrablock_residuals and sample.shape == intrablock_residuals[0].shape:
                sample = sample + intrablock_residuals.pop(0)
        hidden = _add(sample, residuals.mid) if residuals is not None else sample
    assert hidden is not None
    out = _decode(
        unet, structure, hidden, skips, down, emb, attention, count, size, capture, captured
    )
    conv_norm_out = part("conv_norm_out")
    if conv_norm_out is not None:
        out = part("conv_act")(conv_norm_out(out))
    return part("conv_out")(out), captured


def _time(net: Any, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
    """The sinusoidal embedding of ``timestep``, [B, C]."""
    if not isinstance(timestep, Tensor):
        dtype = torch.float64 if isinstance(timestep, float) else torch.int64
        timestep = torch.tensor([timestep], dtype=dtype, device=sample.device)
    elif timestep.dim() == 0 and timestep.device != sample.device:
        timestep = timestep.to(sample.device)
    batch = sample.shape[0]
    # the same view, found faster
    of_each = timestep[None] if batch == 1 and timestep.dim() == 0 else timestep.expand(batch)
    embedded: Tensor = net._modules["time_proj"](of_each)
    return embedded if embedded.dtype == sample.dtype else embedded.to(sample.dtype)


def _layer(attentions: list[Any], index: int, sample: Tensor, attention: dict[str, Any]) -> Tensor:
    if not attentions:
        return sample
    return attentions[index](sample, **attention, return_dict=False)[0]


def _encode(
    unet: UNet2DConditionModel,
    structure: UNetStructure,
    sample: Tensor,
    emb: Tensor,
    attention: dict[str, Any],
    count: int,
    intrablock: list[Tensor] | None,
    full: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The ``count`` outermost skips, and the encoder's last output where everything is run."""
    sample = unet._modules["conv_in"](sample)
    skips = [sample]
    for block in _parts(unet, "down_blocks") if full or count > 1 else ():
        if len(skips) >= count and not full:
            break
        with_attention = _has_attention(block)
        extra = intrablock.pop(0) if intrablock else None
        resnets = _parts(block, "resnets")
        last = len(resnets) - 1
        # of a list, `len`: not every torch that compiles this traces `bool` of one
        more = last + (len(_parts(block, "downsamplers")) > 0)
        whole = full or count - len(skips) > more
        if whole:
            if with_attention:
                added = {} if extra is None else {"additional_residuals": extra}
                sample, outputs = block(sample, temb=emb, **attention, **added)
            else:
                sample, outputs = block(sample, temb=emb)
                if extra is not None:
                    # diffusers adds in place, so that the last skip of the block changes too
                    sample += extra
            skips += list(outputs)
            continue
        attentions = _parts(block, "attentions") if with_attention else []
        for i, resnet in enumerate(resnets):
            if len(skips) >= count:
                break
            sample = _layer(attentions, i, resnet(sample, emb), attention)
            # a block without attention adds it after its downsampler, which is not run here
            if i == last and extra is not None and with_attention:
                sample = sample + extra
            skips.append(sample)
    if intrablock and not full:
        intrablock.clear()
    return sample, skips


def _decode(
    unet: UNet2DConditionModel,
    structure: UNetStructure,
    hidden: Tensor,
    skips: list[Tensor],
    residuals: list[list[tuple[Tensor, float]]],
    emb: Tensor,
    attention: dict[str, Any],
    count: int,
    latent_size: torch.Size,
    capture: tuple[str, ...],
    captured: dict[str, Tensor],
) -> Tensor:
    """The ``count`` outermost decoder layers on ``hidden``."""
    wanted: dict[tuple[int, int], str] = {}
    for name in capture:
        kind, _, index = name.partition("/")
        if kind == "feature":
            wanted[structure.boundary(int(index))] = name
    first_block, first_layer = structure.boundary(count)
    remaining = count
    blocks = _named_parts(unet, "up_blocks")
    for b in range(first_block, len(blocks)):
        block = blocks[_NAMES[b]]
        resnets = _named_parts(block, "resnets")
        layers = len(resnets)
        start = first_layer if b == first_block else 0
        here = skips[remaining - (layers - start) : remaining]
        terms = residuals[remaining - (layers - start) : remaining]
        remaining -= layers - start
        size = None
        if remaining > 0:
            up_factor = 2**unet.num_upsamplers
            if any(length % up_factor for length in latent_size[-2:]):
                size = skips[remaining - 1].shape[2:]
        freeu = freeu_of(block) is not None
        with_attention = _has_attention(block)
        inside = len(wanted) > 0 and any(pb == b and layer > 0 for pb, layer in wanted)
        if (b, start) in wanted:
            # FreeU writes into the block's input, which is the tensor we are asked for
            captured[wanted[(b, start)]] = hidden.clone() if freeu else hidden
        if start == 0 and not inside:
            summed = tuple(_add(skip, t) for skip, t in zip(here, terms, strict=True))
            if with_attention:
                hidden = block(hidden, summed, temb=emb, upsample_size=size, **attention)
            else:
                hidden = block(hidden, summed, temb=emb, upsample_size=size)
            continue
        attentions = _named_parts(block, "attentions") if with_attention else {}
        for layer in range(start, layers):
            if layer > start and (b, layer) in wanted:
                captured[wanted[(b, layer)]] = hidden.clone() if freeu else hidden
            skip, added = here[layers - 1 - layer], terms[layers - 1 - layer]
            if freeu:
                hidden, skip = apply_freeu(
                    block.resolution_idx,
                    hidden,
                    _add(skip, added),
                    s1=block.s1,
                    s2=block.s2,
                    b1=block.b1,
                    b2=block.b2,
                )
                added = []
            joined = _join(hidden, skip, added)
            hidden = resnets[_NAMES[layer]](joined, emb)
            if attentions:
                hidden = attentions[_NAMES[layer]](hidden, **attention, return_dict=False)[0]
        for upsampler in _parts(block, "upsamplers"):
            hidden = upsampler(hidden, size)
    return hidden


def embed_condition(net: ControlNetModel | ControlNetUnionModel, controlnet_cond: Tensor) -> Tensor:
    """The condition image's embedding, [B, C, H, W]: the same at every evaluation of a run."""
    order = net.config.controlnet_conditioning_channel_order
    if order == "bgr" and not isinstance(net, ControlNetUnionModel):
        controlnet_cond = torch.flip(controlnet_cond, dims=[1])
    elif order != "rgb":
        raise ValueError(f"unknown `controlnet_conditioning_channel_order`: {order}")
    return net.controlnet_cond_embedding(controlnet_cond)


def run_controlnet(
    net: ControlNetModel,
    sample: Tensor,
    timestep: Tensor | float | int,
    text: Any,
    hint: Tensor,
    wrap_text: Any = None,
    *,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
) -> list[Tensor]:
    """One evaluation of a ControlNet, before its scale.

    Args:
        hint: :func:`embed_condition`'s result.

    Returns:
        The residual of each skip from the outermost on, and the middle block's last.
    """
    emb, added = _control_embedding(
        net, sample, timestep, text, class_labels, timestep_cond, added_cond_kwargs
    )
    emb = emb if added is None else emb + added
    sample = net._modules["conv_in"](sample) + hint
    return _control_encoder(
        net, sample, emb, text, wrap_text, attention_mask, cross_attention_kwargs
    )


def control_function(net: Any) -> Callable[..., list[Tensor]]:
    """:func:`run_controlnet`, or :func:`run_controlnet_union` where ``net`` is one of those."""
    return run_controlnet_union if isinstance(net, ControlNetUnionModel) else run_controlnet


def run_controlnet_union(
    net: ControlNetUnionModel,
    sample: Tensor,
    timestep: Tensor | float | int,
    text: Any,
    hints: list[Tensor],
    wrap_text: Any = None,
    *,
    control_type: Tensor,
    control_type_idx: list[int],
    weights: list[float] | None,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
) -> list[Tensor]:
    """One evaluation of a ControlNet-Union, before the scale of its residuals.

    Args:
        hints: :func:`embed_condition`'s result for each condition, [B, C, H, W].
        control_type: 1 where a kind of control is given, [B, kinds].
        control_type_idx: The kind of each condition.
        weights: The scale of each condition where there are several, which are weighed before the
            encoder; None where the one scale is that of the residuals.

    Returns:
        As :func:`run_controlnet`.
    """
    emb, added = _control_embedding(
        net, sample, timestep, text, class_labels, timestep_cond, added_cond_kwargs
    )
    kinds = net.control_type_proj(control_type.flatten()).reshape((sample.shape[0], -1))
    emb = emb + net.control_add_embedding(kinds.to(emb.dtype))
    emb = emb if added is None else emb + added

    sample = net.conv_in(sample)
    scales: Sequence[float | None] = [None] * len(hints) if weights is None else weights
    inputs, conditions = [], []
    for hint, kind, scale in zip(hints, control_type_idx, scales, strict=False):
        feature = torch.mean(hint, dim=(2, 3)) + net.task_embedding[kind]
        feature = feature.unsqueeze(1)
        inputs.append(feature if scale is None else feature * scale)
        conditions.append(hint if scale is None else hint * scale)
    x = torch.cat([*inputs, torch.mean(sample, dim=(2, 3)).unsqueeze(1)], dim=1)
    for layer in net.transformer_layes:
        x = layer(x)
    fused = sample * 0.0
    for i, (condition, scale) in enumerate(zip(conditions, scales, strict=False)):
        alpha = net.spatial_ch_projs(x[:, i]).unsqueeze(-1).unsqueeze(-1)
        fused = fused + (condition + (alpha if scale is None else alpha * scale))
    return _control_encoder(
        net, sample + fused, emb, text, wrap_text, attention_mask, cross_attention_kwargs
    )


def _control_embedding(
    net: Any,
    sample: Tensor,
    timestep: Tensor | float | int,
    text: Any,
    class_labels: Tensor | None,
    timestep_cond: Tensor | None,
    added_cond_kwargs: dict[str, Any] | None,
) -> tuple[Tensor, Tensor | None]:
    """The embedding of time and class, and what is to be added to it."""
    part = net._modules.get
    emb = part("time_embedding")(_time(net, sample, timestep), timestep_cond)
    if part("class_embedding") is not None:
        if class_labels is None:
            raise ValueError("class_labels should be provided when num_class_embeds > 0")
        if net.config.class_embed_type == "timestep":
            class_labels = net.time_proj(class_labels)
        emb = emb + net.class_embedding(class_labels).to(dtype=net.dtype)
    if net.config.addition_embed_type == "text":
        return emb, net.add_embedding(text)
    if net.config.addition_embed_type == "text_time":
        assert added_cond_kwargs is not None
        pooled, ids = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        time_embeds = net.add_time_proj(ids.flatten()).reshape((pooled.shape[0], -1))
        return emb, net.add_embedding(torch.concat([pooled, time_embeds], dim=-1).to(emb.dtype))
    return emb, None


def _control_encoder(
    net: Any,
    sample: Tensor,
    emb: Tensor,
    text: Any,
    wrap_text: Any,
    attention_mask: Tensor | None,
    cross_attention_kwargs: dict[str, Any] | None,
) -> list[Tensor]:
    """The encoder of a ControlNet and its zero convolutions."""
    attention = {
        "encoder_hidden_states": text if wrap_text is None else wrap_text(text),
        "attention_mask": _bias(attention_mask, sample.dtype),
        "cross_attention_kwargs": cross_attention_kwargs,
    }
    outputs = [sample]
    for block in _parts(net, "down_blocks"):
        if _has_attention(block):
            sample, more = block(sample, temb=emb, **attention)
        else:
            sample, more = block(sample, temb=emb)
        outputs += list(more)
    mid_block = net._modules.get("mid_block")
    if mid_block is not None:
        if _has_attention(mid_block):
            sample = mid_block(sample, emb, **attention)
        else:
            sample = mid_block(sample, emb)
    residuals = [
        zero_conv(output)
        for output, zero_conv in zip(outputs, _parts(net, "controlnet_down_blocks"), strict=True)
    ]
    return [*residuals, net._modules["controlnet_mid_block"](sample)]


def scale_residuals(
    net: ControlNetModel | ControlNetUnionModel,
    residuals: list[Tensor],
    scale: float | Tensor,
    guess_mode: bool,
    *,
    owned: bool = True,
) -> list[Tensor]:
    """Residuals as a ControlNet returns them: scaled, and pooled where its config says so.

    ``owned``: ``residuals`` may be returned themselves. Not those in a graph's own memory.
    """
    pooled = net.config.global_pool_conditions
    if guess_mode and not pooled:
        scales = torch.logspace(-1, 0, len(residuals), device=residuals[0].device) * scale
        out = [r * s for r, s in zip(residuals, scales, strict=True)]
    elif owned and isinstance(scale, (int, float)) and scale == 1.0:
        out = residuals  # the same bits, thirteen launches less
    else:
        out = [r * scale for r in residuals]
    return [torch.mean(r, dim=(2, 3), keepdim=True) for r in out] if pooled else out
