from __future__ import annotations

import torch

from hgc_kernels import backend, library
from hgc_kernels.layout import dense_format
from hgc_kernels.ops.group_norm.reference import group_norm as reference


def fake(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=dense_format(x))


library.define(
    "group_norm",
    "(Tensor x, Tensor? shift, int groups, Tensor weight, Tensor bias, float eps, bool silu)"
    " -> Tensor",
    reference=reference,
    fake=fake,
)
backend.register(
    "group_norm",
    "triton",
    "hgc_kernels.ops.group_norm.launch:group_norm",
    available=backend.triton_available,
)
