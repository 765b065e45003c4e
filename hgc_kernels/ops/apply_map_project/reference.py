from __future__ import annotations

import torch

from hgc_kernels.layout import with_fresh_strides
from hgc_kernels.map_format import decode


def apply_map_project(
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16]
    v: torch.Tensor,  # [B, S_kv, H, D]
    weight: torch.Tensor,  # [C, H * D]
    bias: torch.Tensor | None,  # [C]
    residual: torch.Tensor | None,  # [B, S_q, C]
) -> torch.Tensor:
    probabilities = decode(map, v.shape[1]).transpose(1, 2)  # [B, H, S_q, S_kv]
    attended = torch.matmul(probabilities, v.transpose(1, 2).float()).to(v.dtype)
    out = torch.nn.functional.linear(attended.transpose(1, 2).flatten(2), weight, bias)
    return with_fresh_strides(out if residual is None else out + residual)
