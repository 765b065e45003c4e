from __future__ import annotations

import torch

from hgc_kernels import backend, library
from hgc_kernels.ops.attend_and_store.reference import attend_and_store as reference


def fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, map: torch.Tensor
) -> torch.Tensor:
    return q.new_empty(q.shape)


library.define(
    "attend_and_store",
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor(a!) map) -> Tensor",
    reference=reference,
    fake=fake,
)
backend.register(
    "attend_and_store",
    "triton",
    "hgc_kernels.ops.attend_and_store.launch:attend_and_store",
    available=backend.triton_available,
)
