from __future__ import annotations

import torch

from hgc_kernels import library
from hgc_kernels.ops.scatter_rows.reference import scatter_rows as reference


def fake(cache: torch.Tensor, fresh: torch.Tensor, rows: torch.Tensor) -> None:
    return None


library.define(
    "scatter_rows",
    "(Tensor(a!) cache, Tensor fresh, Tensor rows) -> ()",
    reference=reference,
    fake=fake,
)
