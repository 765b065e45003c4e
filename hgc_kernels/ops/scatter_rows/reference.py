from __future__ import annotations

import torch


def scatter_rows(cache: torch.Tensor, fresh: torch.Tensor, rows: torch.Tensor) -> None:
    if (
        cache.dtype == torch.float8_e4m3fn
    ):  # indexed writes do not know this dtype; its bytes will do
        cache, fresh = cache.view(torch.uint8), fresh.view(torch.uint8)
    cache.index_copy_(0, rows, fresh)
