from __future__ import annotations

import torch

from hgc_kernels import library
from hgc_kernels.layout import gathered_format
from hgc_kernels.ops.gather_blocks.reference import gather_blocks as reference


def fake(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    residual: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    batch, channels, height, width = hidden.shape
    return torch.empty(
        (batch, channels + skip.shape[1], height, width),
        dtype=hidden.dtype,
        device=hidden.device,
        memory_format=gathered_format(hidden, skip),
    )


library.define(
    "gather_blocks",
    "(Tensor hidden, Tensor skip, Tensor? residual, float scale) -> Tensor",
    reference=reference,
    fake=fake,
)
