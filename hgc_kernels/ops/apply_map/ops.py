from __future__ import annotations

import torch

from hgc_kernels import backend, library
from hgc_kernels.ops.apply_map.reference import apply_map as reference


def fake(map: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v.new_empty((v.shape[0], map.shape[1], v.shape[2], v.shape[3]))


library.define("apply_map", "(Tensor map, Tensor v) -> Tensor", reference=reference, fake=fake)
backend.register(
    "apply_map",
    "triton",
    "hgc_kernels.ops.apply_map.launch:apply_map",
    available=backend.triton_available,
)
