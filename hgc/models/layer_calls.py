"""How the layers of a network are run: each as diffusers has it, or with group norms that take in
what stands around them.

A fused layer is the same function in other kernels: the sum of a resnet and its embedding of time,
the group norm and the SiLU are one op (:func:`hgc_kernels.group_norm`), which keeps channels_last
where torch's own goes to NCHW and back. The embedding's SiLU is made once an evaluation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)

from hgc_kernels.layout import is_channels_last

__all__ = ["LayerCalls", "layer_calls"]

Tensor = torch.Tensor
# Blocks that run their resnets and attentions one after the other, and nothing else.
_IN_A_ROW = (
    CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D,
)  # fmt: skip
# As they are shipped: of a class that somebody vouches for, it may be replaced.
_FORWARDS = {
    cls: cls.forward
    for cls in (*_IN_A_ROW, ResnetBlock2D, Transformer2DModel, torch.nn.GroupNorm, torch.nn.SiLU)
}


class LayerCalls:
    """Calls the layers of a network in one evaluation, as diffusers does.

    Args:
        emb: Of time and class, [B, E].
    """

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
    @functools.cached_property
    def _active(self) -> Tensor:
        return F.silu(self.emb)

    def one_by_one(self, block: torch.nn.Module) -> bool:
        return _is_plain(block, *_IN_A_ROW)

    def resnet(self, resnet: Any, x: Tensor) -> Tensor:
        if not self._is_known_resnet(resnet, x):
            return super().resnet(resnet, x)
        part = resnet._modules
        hidden = part["conv1"](_norm(part["norm1"], x, silu=True))
        hidden = _norm(part["norm2"], hidden, part["time_emb_proj"](self._active), silu=True)
        hidden = part["conv2"](part["dropout"](hidden))
        shortcut = resnet.conv_shortcut
        out: Tensor = (x if shortcut is None else shortcut(x)) + hidden
        return out / resnet.output_scale_factor

    def _is_known_resnet(self, resnet: Any, x: Tensor) -> bool:
        return (
            _is_plain(resnet, ResnetBlock2D)
            and resnet.time_embedding_norm == "default"
            and resnet.upsample is None
            and resnet.downsample is None
            and resnet.time_emb_proj is not None
            and not resnet.skip_time_act
            and _is_silu(resnet.nonlinearity)
            and self.emb.dtype == x.dtype
            and _is_known_norm(resnet.norm1, x)
            and _is_known_norm(resnet.norm2, x)
        )

    def attention(self, layer: Any, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        if not (
            _is_plain(layer, Transformer2DModel)
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


def layer_calls(emb: Tensor, fused: bool) -> LayerCalls:
    """What calls the layers of an evaluation. Fused ones have no gradients and do not follow
    autocast: there they are diffusers' own."""
    if fused and not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled():
        return _FusedCalls(emb)
    return LayerCalls(emb)


def _norm(norm: Any, x: Tensor, shift: Tensor | None = None, *, silu: bool = False) -> Tensor:
    # the arguments are known to be right
    out: Tensor = torch.ops.hgc.group_norm.default(
        x, shift, norm.num_groups, norm.weight, norm.bias, norm.eps, silu
    )
    return out


def _is_plain(module: torch.nn.Module, *classes: type) -> bool:
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
        _is_plain(norm, torch.nn.GroupNorm)
        and type(norm.weight) is torch.nn.Parameter
        and norm.weight.dtype == x.dtype
        and norm.weight.device == x.device
        and norm.bias is not None
    )


def _is_silu(module: Any) -> bool:
    return _is_plain(module, torch.nn.SiLU)
