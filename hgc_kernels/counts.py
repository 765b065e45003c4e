"""Bytes that must move and floating-point operations that must be done, an op. One
multiply-accumulate is two.

Every GB/s and every share of a peak in this project is computed with these functions. They count
each operand once, as if caches were perfect, and padding as work where the format has it.
"""

from __future__ import annotations

from hgc_kernels.map_format import FORMATS, padded


def gather_blocks_bytes(
    batch: int,
    hidden_channels: int,
    skip_channels: int,
    pixels: int,
    itemsize: int,
    *,
    residual: bool = True,
) -> int:
    """hidden, skip and residual read once, the result written once."""
    read = hidden_channels + skip_channels * (2 if residual else 1)
    return batch * pixels * itemsize * (read + hidden_channels + skip_channels)


def eager_gather_blocks_bytes(
    batch: int,
    hidden_channels: int,
    skip_channels: int,
    pixels: int,
    itemsize: int,
    *,
    residual: bool = True,
) -> int:
    """cat([hidden, skip + scale * residual]) as three ops: the product and the sum are written and
    read again.
    """
    moved = 2 * (hidden_channels + skip_channels)  # cat
    if residual:
        moved += 2 * skip_channels + 3 * skip_channels  # product, sum
    return batch * pixels * itemsize * moved


def scatter_rows_bytes(rows: int, row_elements: int, itemsize: int) -> int:
    return 2 * rows * row_elements * itemsize


def attend_and_store_bytes(
    batch: int, s_q: int, s_kv: int, heads: int, size: int, itemsize: int, format: str
) -> int:
    """q, k, v read, the result and the map written."""
    tokens = (2 * s_q + 2 * s_kv) * heads * size * itemsize
    return batch * (tokens + s_q * heads * padded(s_kv) * FORMATS[format].itemsize)


def attend_and_store_flops(batch: int, s_q: int, s_kv: int, heads: int, size: int) -> int:
    return 4 * batch * heads * s_q * s_kv * size


def apply_map_bytes(
    batch: int, s_q: int, s_kv: int, heads: int, size: int, itemsize: int, format: str
) -> int:
    """The map and the values read, the result written."""
    tokens = (s_q + s_kv) * heads * size * itemsize
    return batch * (tokens + s_q * heads * padded(s_kv) * FORMATS[format].itemsize)


def apply_map_flops(batch: int, s_q: int, s_kv: int, heads: int, size: int) -> int:
    return 2 * batch * heads * s_q * s_kv * size


def project_bytes(
    rows: int, inner: int, channels: int, itemsize: int, *, residual: bool = True
) -> int:
    """A linear layer over `rows` rows with bias and residual."""
    tensors = rows * inner + inner * channels + channels + rows * channels * (2 if residual else 1)
    return tensors * itemsize


def project_flops(rows: int, inner: int, channels: int) -> int:
    return 2 * rows * inner * channels


def apply_map_project_bytes(
    batch: int,
    s_q: int,
    s_kv: int,
    heads: int,
    size: int,
    channels: int,
    itemsize: int,
    format: str,
    *,
    residual: bool = True,
) -> int:
    """Map, values, projection, bias and residual read, the result written; nothing in between."""
    map_bytes = batch * s_q * heads * padded(s_kv) * FORMATS[format].itemsize
    read = batch * s_kv * heads * size + heads * size * channels + channels
    return map_bytes + (read + batch * s_q * channels * (2 if residual else 1)) * itemsize


def apply_map_project_flops(
    batch: int, s_q: int, s_kv: int, heads: int, size: int, channels: int
) -> int:
    """Of the definition: map times values, then the projection."""
    return apply_map_flops(batch, s_q, s_kv, heads, size) + project_flops(
        batch * s_q, heads * size, channels
    )


def cross_attention_flops(
    batch: int, s_q: int, s_kv: int, heads: int, size: int, channels: int, context: int
) -> int:
    """A whole cross-attention: four projections and attention between them."""
    inner = heads * size
    return (
        project_flops(batch * s_q, channels, inner)
        + 2 * project_flops(batch * s_kv, context, inner)
        + attend_and_store_flops(batch, s_q, s_kv, heads, size)
        + project_flops(batch * s_q, inner, channels)
    )


def fold_bytes(batch: int, s_kv: int, heads: int, size: int, channels: int, itemsize: int) -> int:
    """Values and projection read, folded values [batch, heads * padded s_kv, channels] written."""
    read = batch * s_kv * heads * size + heads * size * channels
    return (read + batch * heads * padded(s_kv) * channels) * itemsize


def fold_flops(batch: int, s_kv: int, heads: int, size: int, channels: int) -> int:
    return 2 * batch * heads * padded(s_kv) * size * channels


def folded_main_bytes(
    batch: int, s_q: int, s_kv: int, heads: int, channels: int, itemsize: int, format: str
) -> int:
    """Map, folded values, bias and residual read, the result written."""
    map_bytes = batch * s_q * heads * padded(s_kv) * FORMATS[format].itemsize
    tensors = batch * heads * padded(s_kv) * channels + channels + 2 * batch * s_q * channels
    return map_bytes + tensors * itemsize


def folded_main_flops(batch: int, s_q: int, s_kv: int, heads: int, channels: int) -> int:
    return 2 * batch * s_q * heads * padded(s_kv) * channels
