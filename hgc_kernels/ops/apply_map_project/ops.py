from __future__ import annotations

import torch

from hgc_kernels import backend, library
from hgc_kernels.ops.apply_map_project.reference import apply_map_project as reference


def fake(
    map: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return v.new_empty((v.shape[0], map.shape[1], weight.shape[0]))


library.define(
    "apply_map_project",
    "(Tensor map, Tensor v, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    reference=reference,
    fake=fake,
)
backend.register(
    "apply_map_project",
    "triton",
    "hgc_kernels.ops.apply_map_project.launch:apply_map_project",
    available=backend.triton_available,
)
backend.register(
    "apply_map_project",
    "native",
    "hgc_kernels.ops.apply_map_project.two_stage:apply_map_project",
    devices=("cpu",),
    available=library.native_missing,
)
