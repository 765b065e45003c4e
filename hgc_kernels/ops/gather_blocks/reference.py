from __future__ import annotations

import torch

from hgc_kernels.layout import gathered_format, with_fresh_strides


def gather_blocks(
    hidden: torch.Tensor,  # [B, C_h, H, W]
    skip: torch.Tensor,  # [B, C_s, H, W]
    residual: torch.Tensor | None,  # [B, C_s, H, W]
    scale: float,
) -> torch.Tensor:
    memory_format = gathered_format(hidden, skip)
    if residual is not None:
        skip = skip + scale * residual
    return with_fresh_strides(torch.cat([hidden, skip], 1), memory_format)
