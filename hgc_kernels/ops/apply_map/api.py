from __future__ import annotations

import torch

from hgc_kernels import backend, checks
from hgc_kernels.map_format import check_map
from hgc_kernels.ops.apply_map.reference import apply_map as reference


def apply_map(
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16]
    v: torch.Tensor,  # [B, S_kv, H, D]
) -> torch.Tensor:
    """Apply a stored attention map to fresh values: [B, S_q, H, D] in the dtype of v, new and
    contiguous.

    Equivalent to:
        p = hgc_kernels.map_probabilities(map, v.shape[1])       # [B, S_q, H, S_kv]
        return torch.einsum("bqhk,bkhd->bqhd", p, v.float()).to(v.dtype)

    map: contiguous, any format, whatever the dtype of v. v: fp32, fp16 or bf16, any strides. Where
    a gradient is wanted the reference runs. Raises TypeError (dtype, type) or ValueError (shape,
    device, layout of the map).
    """
    checks.tensor("v", v, 4, checks.FLOATS)
    batch, s_kv, heads, size = v.shape
    if size < 1:
        raise ValueError(f"v: expected a head size of at least 1, got shape {tuple(v.shape)}")
    check_map(map, "v", v, s_kv)
    checks.shape("map", map, (batch, map.shape[1], heads, map.shape[3]))
    if checks.wants_grad("apply_map", v):
        with backend.autocast_off(v.device.type):
            return reference(map, v)
    result: torch.Tensor = backend.call("apply_map", map, v)
    return result
