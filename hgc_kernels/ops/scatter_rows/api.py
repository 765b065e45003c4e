from __future__ import annotations

import torch

from hgc_kernels import checks
from hgc_kernels.map_format import MAP_DTYPES

MAX_DIMS = 16  # as the kernels' RowLoops


def scatter_rows(
    cache: torch.Tensor,  # [N, ...], written in place
    fresh: torch.Tensor,  # [B, ...]
    rows: torch.Tensor,  # [B] int64
) -> None:
    """Write recomputed samples into a cache in place.

    Equivalent to:
        cache[rows] = fresh

    fp32, fp16, bf16 or float8_e4m3fn; any strides; 1 to 16 dimensions. `rows` must be distinct
    and in [0, N). `fresh` must not overlap `cache`. Rows that are not named keep their bits. The
    values are written, no gradient flows.

    Raises TypeError (dtype, type), ValueError (shape, device, rows that repeat) or IndexError (a
    row outside [0, N)); the values of `rows` are seen on CPU only. On a GPU a row out of range is
    dropped: nothing is written for it.
    """
    checks.tensor("cache", cache, None, MAP_DTYPES)
    checks.tensor("fresh", fresh, None, MAP_DTYPES)
    if not 1 <= cache.ndim <= MAX_DIMS:
        raise ValueError(
            f"cache: expected 1 to {MAX_DIMS} dimensions, got shape {tuple(cache.shape)}"
        )
    if fresh.ndim != cache.ndim or fresh.shape[1:] != cache.shape[1:]:
        raise ValueError(
            f"fresh: expected the shape of cache {tuple(cache.shape)} but for the first size, "
            f"got {tuple(fresh.shape)}"
        )
    checks.same_dtype("fresh", fresh, "cache", cache)
    checks.same_device("fresh", fresh, "cache", cache)
    checks.rows("rows", rows, cache, fresh.shape[0], cache.shape[0], distinct=True)
    for size, stride in zip(cache.shape, cache.stride(), strict=True):
        if size > 1 and stride == 0:
            raise ValueError(
                f"cache: expected memory of its own for every element, got strides {cache.stride()}"
            )
    if torch.is_grad_enabled() and (cache.requires_grad or fresh.requires_grad):
        cache, fresh = cache.detach(), fresh.detach()
    torch.ops.hgc.scatter_rows.default(cache, fresh, rows)
