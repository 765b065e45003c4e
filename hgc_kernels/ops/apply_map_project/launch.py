from __future__ import annotations

from dataclasses import dataclass

import torch

from hgc_kernels import counts, launch_table
from hgc_kernels.launch_config import as_bytes, dot_precision, head_block, on_device_of
from hgc_kernels.map_format import FORMATS
from hgc_kernels.ops.apply_map.launch import E4M3_UNIT
from hgc_kernels.ops.apply_map.launch import apply_map as apply_map_triton
from hgc_kernels.ops.apply_map_project.triton_kernel import (
    apply_map_project_fold_kernel,
    apply_map_project_main_kernel,
)

# A data-centre GPU's ratio of matrix work to memory traffic, in operations and bytes a second. Only
# the ratio matters for the choice, and it differs little from A100 to H200.
_FLOPS_PER_S = 6e14
_BYTES_PER_S = 4e12


@dataclass(frozen=True)
class LaunchConfig:
    form: str  # "folded" or "two_stage"
    block_d: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    fold_block_n: int
    fold_block_c: int


def _seconds(flops: int, moved: int) -> float:
    return max(flops / _FLOPS_PER_S, moved / _BYTES_PER_S)


def estimate(
    batch: int,
    s_q: int,
    s_kv: int,
    heads: int,
    size: int,
    channels: int,
    itemsize: int,
    format: str,
) -> dict[str, float]:
    """Seconds that each form should take, by counted operations and bytes of its two kernels."""
    padded_size = head_block(size)
    folded = _seconds(
        counts.fold_flops(batch, s_kv, heads, padded_size, channels),
        counts.fold_bytes(batch, s_kv, heads, size, channels, itemsize),
    ) + _seconds(
        counts.folded_main_flops(batch, s_q, s_kv, heads, channels),
        counts.folded_main_bytes(batch, s_q, s_kv, heads, channels, itemsize, format),
    )
    two_stage = _seconds(
        # The tile of keys is padded to a power of two at most 64, the head to one.
        counts.apply_map_flops(batch, s_q, -(-s_kv // 64) * 64, heads, padded_size),
        counts.apply_map_bytes(batch, s_q, s_kv, heads, size, itemsize, format),
    ) + _seconds(
        counts.project_flops(batch * s_q, heads * size, channels),
        counts.project_bytes(batch * s_q, heads * size, channels, itemsize),
    )
    return {"folded": folded, "two_stage": two_stage}


def heuristic(
    dtype: torch.dtype,
    map_dtype: torch.dtype,
    batch: int,
    s_q: int,
    s_kv: int,
    heads: int,
    size: int,
    channels: int,
) -> LaunchConfig:
    """Form and tiles for a call. Raises Unsupported for a head size above 256."""
    format = next(name for name, stored in FORMATS.items() if stored == map_dtype)
    costs = estimate(batch, s_q, s_kv, heads, size, channels, dtype.itemsize, format)
    form = "folded" if costs["folded"] <= costs["two_stage"] else "two_stage"
    block_d = head_block(size)
    if dtype == torch.float32:
        return LaunchConfig(form, block_d, 32, 32, 16, 4, 1, 16, 32 if block_d <= 64 else 16)
    # Steps of 32 divide the inner size wherever the number of heads is even. Few queries get narrow
    # tiles, for more programs; 64 x 64 would also spill on sm_100 and sm_120.
    block_m, block_n = (128, 64) if s_q > 512 else (64, 32)
    return LaunchConfig(form, block_d, block_m, block_n, 32, 4, 3, 16, 64)


def bucket(
    config: LaunchConfig, dtype: torch.dtype, map_dtype: torch.dtype, s_q: int
) -> tuple[object, ...]:
    """What :func:`heuristic` looks at, as launch_table names it, with the form that it chose."""
    queries = "over 512 queries" if s_q > 512 else "up to 512 queries"
    return config.form, dtype, f"map {map_dtype}", queries, f"head {config.block_d}"


def _main(
    left: torch.Tensor,  # [B, M, K], last dimension contiguous
    right: torch.Tensor,  # [B, K, C]
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,  # [B, M, C]
    out: torch.Tensor,  # [B, M, C] contiguous
    unit: float,
    config: LaunchConfig,
) -> None:
    batch, rows, inner = left.shape
    channels = right.shape[2]
    grid = (batch * -(-rows // config.block_m) * -(-channels // config.block_n),)
    with on_device_of(out):
        apply_map_project_main_kernel[grid](
            as_bytes(left), right, out if bias is None else bias,
            out if residual is None else residual, out, unit, rows, inner, channels,
            left.stride(0), left.stride(1), *right.stride(),
            0 if bias is None else bias.stride(0),
            *((0, 0, 0) if residual is None else residual.stride()),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            IS_E4M3=left.dtype == torch.float8_e4m3fn, PRECISION=dot_precision(right.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def apply_map_project(
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16]
    v: torch.Tensor,  # [B, S_kv, H, D]
    weight: torch.Tensor,  # [C, H * D]
    bias: torch.Tensor | None,  # [C]
    residual: torch.Tensor | None,  # [B, S_q, C]
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    batch, s_kv, heads, size = v.shape
    s_q, padded_s_kv = map.shape[1], map.shape[3]
    channels = weight.shape[0]
    if config is None:
        config = heuristic(v.dtype, map.dtype, batch, s_q, s_kv, heads, size, channels)
        name = bucket(config, v.dtype, map.dtype, s_q)
        config = launch_table.measured("apply_map_project", v.device, name, config)
    out = v.new_empty((batch, s_q, channels))
    if out.numel() == 0:
        return out
    if config.form == "two_stage":
        attended = apply_map_triton(map, v).view(1, batch * s_q, heads * size)
        right = weight.t().unsqueeze(0)
        # One matrix product over the whole batch; the residual joins it only where a row of it
        # follows the next at one stride throughout.
        if residual is None or residual.stride(0) == s_q * residual.stride(1) or batch == 1:
            flat = None
            if residual is not None:
                flat = residual.as_strided(
                    (1, batch * s_q, channels), (0, residual.stride(1), residual.stride(2))
                )
            _main(attended, right, bias, flat, out.view(1, batch * s_q, channels), 1.0, config)
        else:
            attended = attended.view(batch, s_q, heads * size)
            _main(attended, right.expand(batch, -1, -1), bias, residual, out, 1.0, config)
        return out
    folded = v.new_empty((batch, heads * padded_s_kv, channels))
    grid = (
        batch
        * heads
        * -(-padded_s_kv // config.fold_block_n)
        * -(-channels // config.fold_block_c),
    )
    with on_device_of(out):
        apply_map_project_fold_kernel[grid](
            v, weight, folded, s_kv, heads, channels, *v.stride(), *weight.stride(),
            D=size, S_KV_PAD=padded_s_kv, BLOCK_N=config.fold_block_n, BLOCK_C=config.fold_block_c,
            BLOCK_D=config.block_d, PRECISION=dot_precision(v.dtype), num_warps=4, num_stages=1,
        )  # fmt: skip
    unit = E4M3_UNIT if map.dtype == torch.float8_e4m3fn else 1.0
    _main(map.view(batch, s_q, heads * padded_s_kv), folded, bias, residual, out, unit, config)
    return out
