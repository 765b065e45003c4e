from __future__ import annotations

import math

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
from hgc_kernels.ops.attend_and_store.triton_kernel import attend_and_store_kernel


def heuristic(dtype: torch.dtype, s_q: int, s_kv: int, size: int, arch: int) -> LaunchConfig:
    """Tiles for a call. Raises Unsupported for a head size above 256."""
    block_d = head_block(size)
    keys = next_power_of_two(s_kv)
    if dtype == torch.float32:
        # Full fp32 runs on the ordinary units, with both operands in registers: small tiles.
        if block_d > 64:
            return LaunchConfig(16, 16, block_d, num_warps=8, num_stages=1)
        return LaunchConfig(32, min(keys, 32), block_d, num_warps=8, num_stages=1)
    # A text prompt (77 tokens) is one tile of 128: all scores of a query stay in registers.
    wide = block_d > 128
    block_n = keys if keys <= 128 else 32 if wide else 64
    # Triton 3.6.0 spills with 64 on sm_100.
    block_m = 64 if s_q > 32 and not (wide and 100 <= arch < 120) else 32
    return LaunchConfig(block_m, block_n, block_d, num_warps=8 if wide else 4, num_stages=2)


def attend_and_store(
    q: torch.Tensor,  # [B, S_q, H, D]
    k: torch.Tensor,  # [B, S_kv, H, D]
    v: torch.Tensor,  # [B, S_kv, H, D]
    scale: float,
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16]
) -> torch.Tensor:
    batch, s_q, heads, size = q.shape
    s_kv = k.shape[1]
    config = heuristic(q.dtype, s_q, s_kv, size, architecture(q))
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    stored = as_bytes(map)
    grid = (heads * -(-s_q // config.block_m) * batch,)
    with on_device_of(out):
        attend_and_store_kernel[grid](
            q, k, v, stored, out, scale / math.log(2), s_q, s_kv, heads,
            *q.stride(), *k.stride(), *v.stride(),
            D=size, S_KV_PAD=map.shape[3], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=config.block_d, IS_E4M3=map.dtype == torch.float8_e4m3fn,
            PRECISION=dot_precision(q.dtype), PACKED=packed_heads(q, k, v),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
