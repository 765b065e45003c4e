"""How the layers of a network are run: each as diffusers has it, or with group norms that take in
what stands around them.

A fused layer is the same function in other kernels: the sum of a resnet and its embedding of time,
the group norm and the SiLU are one op (:func:`hgc_kernels.group_norm`), which keeps channels_last
where torch's own goes to NCHW and back. The embedding's SiLU is made once an evaluation, or with
what the resnets make of it once a run (:class:`TimeRow`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)

from hgc.models.structure import modules_inside
from hgc_kernels.layout import is_channels_last

__all__ = [
    "EMBEDDING", "LayerCalls", "TimeColumns", "TimeRow", "can_fuse", "is_plain", "layer_calls",
    "project_time", "projections",
]  # fmt: skip

Tensor = torch.Tensor
# Blocks that run their resnets and attentions one after the other, and nothing else.
_IN_A_ROW = (
    CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D,
)  # fmt: skip
# What embeds time, class and other settings of an evaluation.
EMBEDDING = (
    Timesteps, TimestepEmbedding, torch.nn.Linear, torch.nn.SiLU, torch.nn.Embedding,
    torch.nn.Identity,
)  # fmt: skip
# As they are shipped: of a class that somebody vouches for, it may be replaced.
_FORWARDS = {
    cls: cls.forward
    for cls in (*_IN_A_ROW, *EMBEDDING, ResnetBlock2D, Transformer2DModel, torch.nn.GroupNorm)
}


@dataclasses.dataclass(frozen=True, slots=True)
class TimeColumns:
    """Where things are in a :class:`TimeRow`.

    Attributes:
        width: Of the embedding of time and class, which comes first.
        shifts: What resnets project of it.
    """

    width: int
    shifts: dict[torch.nn.Module, slice]


@dataclasses.dataclass(frozen=True, slots=True)
class TimeRow:
    """What a timestep is to the layers of a network, made before the evaluation.

    Attributes:
        row: [B, ...], or [1, ...] where it is the same for the whole batch.
        columns: What is where in it.
    """

    row: Tensor
    columns: TimeColumns

    def emb(self, batch: int) -> Tensor:
        """The embedding, [B, E], new: a layer may write to it."""
        return self.row[:, : self.columns.width].expand(batch, -1).clone()

    def shift(self, resnet: Any, batch: int) -> Tensor | None:
        """What ``resnet`` adds before its second norm, [B, C], read-only; None where it is not
        known."""
        found = self.columns.shifts.get(resnet)
        return None if found is None else self.row[:, found].expand(batch, -1)


def projections(net: torch.nn.Module) -> list[Any]:
    """The resnets of ``net`` of which a :class:`TimeRow` can hold what they project."""
    return [
        part
        for part in modules_inside(net)
        if is_plain(part, ResnetBlock2D)
        and _projects(part)
        and is_plain(part.time_emb_proj, torch.nn.Linear)
    ]


def project_time(resnets: list[Any], emb: Tensor) -> tuple[Tensor, TimeColumns]:
    """Of embeddings of time and class, [R, E], the rows of their :class:`TimeRow`, [R, ...], with
    what each of ``resnets`` projects of them."""
    active = F.silu(emb)
    parts, shifts, end = [emb], {}, emb.shape[1]
    for resnet in resnets:
        projected = resnet.time_emb_proj(active)
        parts.append(projected)
        shifts[resnet] = slice(end, end + projected.shape[1])
        end += projected.shape[1]
    return torch.cat(parts, dim=1), TimeColumns(emb.shape[1], shifts)


class LayerCalls:
    """Calls the layers of a network in one evaluation, as diffusers does.

    Args:
        emb: Of time and class, [B, E].
    """

    emb: Tensor

    def __init__(self, emb: Tensor) -> None:
        self.emb = emb

    def one_by_one(self, block: torch.nn.Module) -> bool:
        """Whether the layers of ``block`` are to be run, and not the block."""
        return False

    def resnet(self, resnet: Any, x: Tensor) -> Tensor:
        """A resnet's output, [B, C, H, W]."""
        out: Tensor = resnet(x, self.emb)
        return out

    def attention(self, layer: Any, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """A transformer's output, [B, C, H, W]; ``arguments``: the text, masks and settings."""
        out: Tensor = layer(x, **arguments, return_dict=False)[0]
        return out

    def norm_out(self, norm: Any, activation: Any, x: Tensor) -> Tensor:
        """The last norm and its activation, [B, C, H, W]."""
        out: Tensor = activation(norm(x))
        return out


class _FusedCalls(LayerCalls):
    _time: TimeRow | None = None

    @functools.cached_property
    def _active(self) -> Tensor:
        return F.silu(self.emb)

    def one_by_one(self, block: torch.nn.Module) -> bool:
        return is_plain(block, *_IN_A_ROW)

    def resnet(self, resnet: Any, x: Tensor) -> Tensor:
        if not self._is_known_resnet(resnet, x):
            return super().resnet(resnet, x)
        part = resnet._modules
        hidden = part["conv1"](_norm(part["norm1"], x, silu=True))
        shift = None if self._time is None else self._time.shift(resnet, x.shape[0])
        if shift is None:
            shift = part["time_emb_proj"](self._active)
        hidden = _norm(part["norm2"], hidden, shift, silu=True)
        hidden = part["conv2"](part["dropout"](hidden))
        shortcut = resnet.conv_shortcut
        out: Tensor = (x if shortcut is None else shortcut(x)) + hidden
        return out / resnet.output_scale_factor

    def _is_known_resnet(self, resnet: Any, x: Tensor) -> bool:
        return (
            is_plain(resnet, ResnetBlock2D)
            and _projects(resnet)
            and resnet.upsample is None
            and resnet.downsample is None
            and (self.emb if self._time is None else self._time.row).dtype == x.dtype
            and _is_known_norm(resnet.norm1, x)
            and _is_known_norm(resnet.norm2, x)
        )

    def attention(self, layer: Any, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        if not (
            is_plain(layer, Transformer2DModel)
            and layer.is_input_continuous
            and _is_known_norm(layer.norm, x)
        ):
            return super().attention(layer, x, arguments)
        part, linear = layer._modules, layer.use_linear_projection
        batch, _, height, width = x.shape
        hidden = _norm(part["norm"], x)
        if not linear:
            hidden = part["proj_in"](hidden)
        inner, in_order = hidden.shape[1], is_channels_last(hidden)
        hidden = hidden.permute(0, 2, 3, 1).reshape(batch, height * width, inner)
        if linear:
            hidden = part["proj_in"](hidden)
        for block in part["transformer_blocks"]._modules.values():
            hidden = block(hidden, **arguments)
        if linear:
            hidden = part["proj_out"](hidden)
        hidden = hidden.reshape(batch, height, width, inner).permute(0, 3, 1, 2)
        if not in_order:
            hidden = hidden.contiguous()
        return (hidden if linear else part["proj_out"](hidden)) + x

    def norm_out(self, norm: Any, activation: Any, x: Tensor) -> Tensor:
        if not (_is_silu(activation) and _is_known_norm(norm, x)):
            return super().norm_out(norm, activation, x)
        return _norm(norm, x, silu=True)


class _TimedCalls(_FusedCalls):
    """Fused, with what the timestep is to the layers made before. The embedding itself is copied
    where a layer wants it."""

    def __init__(self, time: TimeRow, batch: int) -> None:
        self._time, self._batch = time, batch

    @functools.cached_property
    def emb(self) -> Tensor:  # type: ignore[override]
        assert self._time is not None
        return self._time.emb(self._batch)


def layer_calls(time: Tensor | TimeRow, batch: int, fused: bool) -> LayerCalls:
    """What calls the layers of an evaluation of ``batch`` rows: with the embedding of time and
    class, or with a row that was made of it before, which goes with fused layers."""
    if isinstance(time, TimeRow):
        return _TimedCalls(time, batch)
    return _FusedCalls(time) if fused and can_fuse() else LayerCalls(time)


def can_fuse() -> bool:
    """Whether layers may be fused: they have no gradients and do not follow autocast."""
    return not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled()


def _norm(norm: Any, x: Tensor, shift: Tensor | None = None, *, silu: bool = False) -> Tensor:
    # the arguments are known to be right
    out: Tensor = torch.ops.hgc.group_norm.default(
        x, shift, norm.num_groups, norm.weight, norm.bias, norm.eps, silu
    )
    return out


def is_plain(module: torch.nn.Module, *classes: type) -> bool:
    """Whether ``module`` is of one of ``classes``, and calling it is the forward that is shipped,
    and nothing else: no hooks, which move weights among others, and no forward of its own."""
    cls, own = type(module), module.__dict__
    return (
        cls in classes
        and cls.forward is _FORWARDS[cls]
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
    )


def _is_known_norm(norm: Any, x: Tensor) -> bool:
    return (
        is_plain(norm, torch.nn.GroupNorm)
        and type(norm.weight) is torch.nn.Parameter
        and norm.weight.dtype == x.dtype
        and norm.weight.device == x.device
        and norm.bias is not None
    )


def _projects(resnet: Any) -> bool:
    """Whether a resnet adds a projection of the embedding's SiLU, and nothing else of it."""
    return (
        resnet.time_embedding_norm == "default"
        and resnet.time_emb_proj is not None
        and not resnet.skip_time_act
        and _is_silu(resnet.nonlinearity)
    )


def _is_silu(module: Any) -> bool:
    return is_plain(module, torch.nn.SiLU) and not module.inplace
