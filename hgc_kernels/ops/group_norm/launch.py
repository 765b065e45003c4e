from __future__ import annotations

from dataclasses import dataclass

import torch

from hgc_kernels.backend import Unsupported
from hgc_kernels.launch_config import next_power_of_two, on_device_of
from hgc_kernels.layout import dense_format, is_channels_last
from hgc_kernels.ops.group_norm.triton_kernel import group_moments_kernel, group_norm_kernel

# Values of a tile: in half precision each thread holds 32 and as many sums and squares.
TILE = 4096
# Chunks of pixels whose moments are kept apart: each program of the second kernel reads them all.
CHUNKS = 32


@dataclass(frozen=True)
class Tiles:
    """Groups a tile, its pixels and channels, and pixels a chunk."""

    groups: int
    block_p: int
    block_c: int
    chunk_pixels: int
    chunks: int


def heuristic(pixels: int, group: int, groups: int, channels_last: bool) -> Tiles:
    """Tiles for images of ``pixels`` and ``groups`` of ``group`` channels. Raises Unsupported for
    a group of more than 4,096 channels."""
    if group > TILE:
        raise Unsupported(f"{group} channels a group are more than {TILE}")
    # What lies together is read in runs of 160 to 256 bytes of half precision. With longer ones
    # SD1.5's first level has fewer programs than an H100 multiprocessors.
    together = 1
    if channels_last:
        while together < groups and 2 * together * group <= 128:
            together *= 2
    block_c = next_power_of_two(together * group)
    block_p = min(TILE // block_c, next_power_of_two(pixels, 1))
    blocks = -(-pixels // block_p)
    chunk_pixels = -(-blocks // CHUNKS) * block_p
    return Tiles(together, block_p, block_c, chunk_pixels, -(-pixels // chunk_pixels))


def group_norm(
    x: torch.Tensor,  # [B, C, H, W]
    shift: torch.Tensor | None,  # [B, C]
    groups: int,
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    eps: float,
    silu: bool,
) -> torch.Tensor:
    batch, channels, height, width = x.shape
    pixels = height * width
    channels_last = is_channels_last(x)
    stride_p = x.stride(3)
    if not channels_last:
        if (width > 1 and stride_p != 1) or (height > 1 and x.stride(2) != width):
            raise Unsupported(f"pixels of an image have gaps, strides {x.stride()}")
        stride_p = 1
    for name, value in (("weight", weight), ("bias", bias), ("shift", shift)):
        if value is not None and channels > 1 and value.stride(-1) != 1:
            raise Unsupported(f"{name} has gaps, strides {value.stride()}")
    tiles = heuristic(max(pixels, 1), channels // groups, groups, channels_last)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=dense_format(x))
    if out.numel() == 0:
        return out
    moments = weight.new_empty((batch, groups, tiles.chunks, 2), dtype=torch.float32)
    rows = -(-groups // tiles.groups), batch
    strides = x.stride(0), x.stride(1), stride_p, 0 if shift is None else shift.stride(0)
    shape = {
        "GROUP": channels // groups, "GROUPS_A_TILE": tiles.groups, "BLOCK_P": tiles.block_p,
        "BLOCK_C": tiles.block_c, "HAS_SHIFT": shift is not None, "CHANNELS_LAST": channels_last,
        # with four Triton 3.6.0 spills in fp32 on sm_120
        "num_warps": 8 if x.dtype == torch.float32 else 4, "num_stages": 2,
    }  # fmt: skip
    added = weight if shift is None else shift  # never read where there is none
    with on_device_of(out):
        group_moments_kernel[(tiles.chunks, *rows)](
            x, added, moments, pixels, channels, tiles.chunk_pixels, *strides, **shape
        )
        group_norm_kernel[(-(-pixels // tiles.block_p), *rows)](
            x, added, moments, weight, bias, out, eps, pixels, channels, tiles.chunk_pixels,
            tiles.chunks, *strides, BLOCK_K=next_power_of_two(tiles.chunks, 1), SILU=silu, **shape,
        )  # fmt: skip
    return out
