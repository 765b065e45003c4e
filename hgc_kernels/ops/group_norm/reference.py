from __future__ import annotations

import torch
import torch.nn.functional as F

from hgc_kernels.layout import dense_format, with_fresh_strides


def group_norm(
    x: torch.Tensor,  # [B, C, H, W]
    shift: torch.Tensor | None,  # [B, C]
    groups: int,
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    eps: float,
    silu: bool,
) -> torch.Tensor:
    memory_format = dense_format(x)
    if shift is not None:
        x = x + shift[:, :, None, None]
    out = torch.group_norm(x, groups, weight, bias, eps)
    if silu:
        out = F.silu(out)
    return with_fresh_strides(out, memory_format)
