"""One evaluation of a ControlNet or a ControlNet-Union, and the scale of its residuals: pure
functions with the bits of diffusers' own forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from hgc.models.blocks import children, embed_time, mask_bias, run_encoder, run_mid_block
from hgc.models.layer_calls import LayerCalls, TimeRow, layer_calls

__all__ = [
    "control_function",
    "embed",
    "embed_condition",
    "run_controlnet",
    "run_controlnet_union",
    "scale_residuals",
]

Tensor = torch.Tensor


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
    fused: bool = False,
    time: TimeRow | None = None,
) -> list[Tensor]:
    """One evaluation of a ControlNet, before its scale.

    Args:
        hint: :func:`embed_condition`'s result.
        fused: Group norms take in what stands around them (:mod:`hgc.models.layer_calls`).
        time: :func:`embed`'s result and what follows of it, where it was made before; fused.

    Returns:
        The residual of each skip from the outermost on, and the middle block's last.
    """
    made = time or embed(
        net, sample, timestep, text, class_labels=class_labels, timestep_cond=timestep_cond,
        added_cond_kwargs=added_cond_kwargs,
    )  # fmt: skip
    layers = layer_calls(made, sample.shape[0], fused)
    sample = net._modules["conv_in"](sample) + hint
    return _residuals(net, sample, layers, text, wrap_text, attention_mask, cross_attention_kwargs)


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
    fused: bool = False,
    time: TimeRow | None = None,
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
    made = time or embed(
        net, sample, timestep, text, class_labels=class_labels, timestep_cond=timestep_cond,
        added_cond_kwargs=added_cond_kwargs, control_type=control_type,
    )  # fmt: skip
    layers = layer_calls(made, sample.shape[0], fused)
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
    joined = sample * 0.0
    for i, (condition, scale) in enumerate(zip(conditions, scales, strict=False)):
        alpha = net.spatial_ch_projs(x[:, i]).unsqueeze(-1).unsqueeze(-1)
        joined = joined + (condition + (alpha if scale is None else alpha * scale))
    sample = sample + joined
    return _residuals(net, sample, layers, text, wrap_text, attention_mask, cross_attention_kwargs)


def embed(
    net: Any,
    sample: Tensor,
    timestep: Tensor | float | int,
    text: Any,
    *,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
    control_type: Tensor | None = None,
) -> Tensor:
    """The embedding of time, class and what else there is, [B, E], in the dtype of ``sample``, of
    which the rows are all that is read beside. ``control_type``: of a ControlNet-Union."""
    part = net._modules.get
    emb = part("time_embedding")(embed_time(net, sample, timestep), timestep_cond)
    if part("class_embedding") is not None:
        if class_labels is None:
            raise ValueError("class_labels should be provided when num_class_embeds > 0")
        if net.config.class_embed_type == "timestep":
            class_labels = net.time_proj(class_labels)
        emb = emb + net.class_embedding(class_labels).to(dtype=net.dtype)
    if control_type is not None:
        kinds = net.control_type_proj(control_type.flatten()).reshape((sample.shape[0], -1))
        emb = emb + net.control_add_embedding(kinds.to(emb.dtype))
    if net.config.addition_embed_type == "text":
        emb = emb + net.add_embedding(text)
    if net.config.addition_embed_type == "text_time":
        assert added_cond_kwargs is not None
        pooled, ids = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        time_embeds = net.add_time_proj(ids.flatten()).reshape((pooled.shape[0], -1))
        joined = torch.concat([pooled, time_embeds], dim=-1)
        emb = emb + net.add_embedding(joined.to(emb.dtype))
    return emb


def _residuals(
    net: Any,
    sample: Tensor,
    layers: LayerCalls,
    text: Any,
    wrap_text: Any,
    attention_mask: Tensor | None,
    cross_attention_kwargs: dict[str, Any] | None,
) -> list[Tensor]:
    """The encoder of a ControlNet and its zero convolutions."""
    attention = {
        "encoder_hidden_states": text if wrap_text is None else wrap_text(text),
        "attention_mask": mask_bias(attention_mask, sample.dtype),
        "cross_attention_kwargs": cross_attention_kwargs,
    }
    sample, outputs = run_encoder(net, sample, layers, attention)
    sample = run_mid_block(net, sample, layers, attention)
    residuals = [
        zero_conv(output)
        for output, zero_conv in zip(outputs, children(net, "controlnet_down_blocks"), strict=True)
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
