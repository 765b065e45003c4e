from __future__ import annotations

import torch

from hgc_kernels import backend, checks
from hgc_kernels.map_format import check_map
from hgc_kernels.ops.apply_map_project.reference import apply_map_project as reference


def apply_map_project(
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16]
    v: torch.Tensor,  # [B, S_kv, H, D]
    weight: torch.Tensor,  # [C, H * D]
    bias: torch.Tensor | None = None,  # [C]
    residual: torch.Tensor | None = None,  # [B, S_q, C]
) -> torch.Tensor:
    """A whole cached cross-attention, from stored map and fresh values to the block's output: [B,
    S_q, C], new.

    Equivalent to:
        x = hgc_kernels.apply_map(map, v).flatten(2)              # [B, S_q, H * D]
        return torch.nn.functional.linear(x, weight, bias) + residual

    map as for `apply_map`; v, weight, bias and residual: fp32, fp16 or bf16, one dtype, any
    strides. Where a gradient is wanted the reference runs. Raises TypeError (dtype, type) or
    ValueError (shape, device, layout of the map).
    """
    checks.tensor("v", v, 4, checks.FLOATS)
    batch, s_kv, heads, size = v.shape
    if size < 1:
        raise ValueError(f"v: expected a head size of at least 1, got shape {tuple(v.shape)}")
    check_map(map, "v", v, s_kv)
    s_q = map.shape[1]
    checks.shape("map", map, (batch, s_q, heads, map.shape[3]))
    checks.tensor("weight", weight, 2, checks.FLOATS)
    channels = weight.shape[0]
    checks.shape("weight", weight, (channels, heads * size))
    operands = [("weight", weight)]
    if bias is not None:
        checks.tensor("bias", bias, 1, checks.FLOATS)
        checks.shape("bias", bias, (channels,))
        operands.append(("bias", bias))
    if residual is not None:
        checks.tensor("residual", residual, 3, checks.FLOATS)
        checks.shape("residual", residual, (batch, s_q, channels))
        operands.append(("residual", residual))
    for name, value in operands:
        checks.same_dtype(name, value, "v", v)
        checks.same_device(name, value, "v", v)
    if checks.wants_grad("apply_map_project", v, weight, bias, residual):
        with backend.autocast_off(v.device.type):
            return reference(map, v, weight, bias, residual)
    return torch.ops.hgc.apply_map_project.default(map, v, weight, bias, residual)
