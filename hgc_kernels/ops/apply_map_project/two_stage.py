"""On a CPU: the compiled apply_map, then torch's own product, which nothing here would beat."""

from __future__ import annotations

import torch

from hgc_kernels.layout import with_fresh_strides
from hgc_kernels.library import native_apply_map


def apply_map_project(
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16]
    v: torch.Tensor,  # [B, S_kv, H, D]
    weight: torch.Tensor,  # [C, H * D]
    bias: torch.Tensor | None,  # [C]
    residual: torch.Tensor | None,  # [B, S_q, C]
) -> torch.Tensor:
    attended = native_apply_map(map, v).flatten(2)
    out = torch.nn.functional.linear(attended, weight, bias)
    return with_fresh_strides(out if residual is None else out.add_(residual))
