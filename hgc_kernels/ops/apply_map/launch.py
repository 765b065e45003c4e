from __future__ import annotations

import torch

from hgc_kernels.launch_config import (
    LaunchConfig,
    architecture,
    as_bytes,
    dot_precision,
    head_block,
    next_power_of_two,
    on_device_of,
    packed_heads,
)
from hgc_kernels.ops.apply_map.triton_kernel import apply_map_kernel

E4M3 = torch.float8_e4m3fn
# What decode_e4m3 leaves: 448 for the format, 2^-8 for reading its bytes as fp16.
E4M3_UNIT = 256.0 / 448.0


def heuristic(dtype: torch.dtype, s_q: int, s_kv: int, size: int, arch: int) -> LaunchConfig:
    """Tiles for a call. Raises Unsupported for a head size above 256."""
    block_d = head_block(size)
    wide = block_d > 128
    if dtype == torch.float32:
        block_m = 32 if block_d <= 64 else 16
        return LaunchConfig(block_m, 16, block_d, num_warps=8 if wide else 4, num_stages=1)
    # Steps of 64 keys take more registers than a thread has on sm_120, and of a prompt's 77 tokens
    # they would load more of nothing.
    block_n = min(next_power_of_two(s_kv), 32)
    block_m = 64 if s_q > 32 else 32
    # Triton 3.6.0 spills with two on sm_120.
    stages = 1 if arch >= 120 and block_d == 128 else 2
    return LaunchConfig(block_m, block_n, block_d, num_warps=8 if wide else 4, num_stages=stages)


def apply_map(
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16]
    v: torch.Tensor,  # [B, S_kv, H, D]
) -> torch.Tensor:
    batch, s_kv, heads, size = v.shape
    s_q = map.shape[1]
    config = heuristic(v.dtype, s_q, s_kv, size, architecture(v))
    out = v.new_empty((batch, s_q, heads, size))
    if out.numel() == 0:
        return out
    is_e4m3 = map.dtype == E4M3
    grid = (heads * -(-s_q // config.block_m) * batch,)
    with on_device_of(out):
        apply_map_kernel[grid](
            as_bytes(map), v, out, E4M3_UNIT if is_e4m3 else 1.0, s_q, s_kv, heads, *v.stride(),
            D=size, S_KV_PAD=map.shape[3], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=config.block_d, IS_E4M3=is_e4m3, PRECISION=dot_precision(v.dtype),
            PACKED=packed_heads(v),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
