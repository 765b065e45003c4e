"""What the forwards of a UNet and of a ControlNet share: the embedding of time, the encoder and the
middle block, with the bits of diffusers' own."""

from __future__ import annotations

from typing import Any

import torch

from hgc.models.layer_calls import LayerCalls

__all__ = ["children", "embed_time", "has_attention", "mask_bias", "run_encoder", "run_mid_block"]

Tensor = torch.Tensor


def children(module: torch.nn.Module, name: str) -> list[Any]:
    """The modules in the list ``module.name``, which may be None."""
    # an attribute of a module is slow to look up: each would cost more than a tensor's op
    found: Any = module._modules.get(name)
    if found is None:
        # None lies in `__dict__`; of what somebody wrapped a block in, it is an attribute
        found = getattr(module, name)
    return [] if found is None else list(found._modules.values())


def has_attention(block: torch.nn.Module) -> bool:
    """Whether a block takes the text."""
    return getattr(block, "has_cross_attention", False)


def mask_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A 0/1 mask [B, keys] as diffusers' additive bias [B, 1, keys]."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def embed_time(net: Any, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
    """The sinusoidal embedding of ``timestep``, [B, C]."""
    if not isinstance(timestep, Tensor):
        dtype = torch.float64 if isinstance(timestep, float) else torch.int64
        timestep = torch.tensor([timestep], dtype=dtype, device=sample.device)
    elif timestep.dim() == 0 and timestep.device != sample.device:
        timestep = timestep.to(sample.device)
    embedded: Tensor = net._modules["time_proj"](timestep.expand(sample.shape[0]))
    return embedded.to(sample.dtype)


def run_encoder(
    net: Any,
    sample: Tensor,  # [B, C, H, W], conv_in's output
    layers: LayerCalls,
    attention: dict[str, Any],
    count: int | None = None,
    intrablock: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The down blocks of a UNet or a ControlNet.

    Args:
        net: The model.
        sample: The first skip.
        layers: How layers are run.
        attention: What blocks with cross-attention are called with.
        count: How many of the outermost skips are computed; None for all.
        intrablock: Residuals of T2I-Adapters; consumed from the front, as diffusers does.

    Returns:
        The last block's output (of use where all is computed), and the skips from the outermost on.
    """
    skips = [sample]
    for block in children(net, "down_blocks"):
        if count is not None and len(skips) >= count:
            break
        with_attention = has_attention(block)
        extra = intrablock.pop(0) if intrablock else None
        resnets = children(block, "resnets")
        own = len(resnets) + len(children(block, "downsamplers"))
        whole = count is None or len(skips) + own <= count
        if whole and (extra is not None or not layers.one_by_one(block)):
            arguments = attention if with_attention else {}
            if with_attention and extra is not None:
                arguments = {**attention, "additional_residuals": extra}
            sample, outputs = block(sample, temb=layers.emb, **arguments)
            if extra is not None and not with_attention:
                # diffusers adds in place, so that the last skip of the block changes too
                sample += extra
            skips += outputs
            continue
        attentions = children(block, "attentions") if with_attention else []
        for i, resnet in enumerate(resnets if count is None else resnets[: count - len(skips)]):
            sample = layers.resnet(resnet, sample)
            if with_attention:
                sample = layers.attention(attentions[i], sample, attention)
                # a block without attention adds it after its downsampler, which is not run here
                if extra is not None and i == len(resnets) - 1:
                    sample = sample + extra
            skips.append(sample)
        if whole:
            for downsampler in children(block, "downsamplers"):
                sample = downsampler(sample)
                skips.append(sample)
    if intrablock and count is not None:
        intrablock.clear()
    return sample, skips


def run_mid_block(
    net: Any, sample: Tensor, layers: LayerCalls, attention: dict[str, Any]
) -> Tensor:
    """The middle block's output, [B, C, H, W]; ``sample`` where there is none."""
    block = net._modules.get("mid_block")
    if block is None:
        return sample
    if not layers.one_by_one(block):
        out: Tensor = block(sample, layers.emb, **(attention if has_attention(block) else {}))
        return out
    first, *others = children(block, "resnets")
    sample = layers.resnet(first, sample)
    for layer, resnet in zip(children(block, "attentions"), others, strict=True):
        sample = layers.resnet(resnet, layers.attention(layer, sample, attention))
    return sample
