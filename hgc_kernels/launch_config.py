"""What every Triton launch chooses. Each op's `launch.py` has one heuristic that does."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from hgc_kernels.backend import Unsupported

MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles of queries, keys and a head, warps a program and stages of a loop."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def next_power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and at least `least`, what matrix instructions
    want.
    """
    power = least
    while power < n:
        power *= 2
    return power


def head_block(size: int) -> int:
    """The tile of a head: one power of two, as two tiles are miscompiled for Hopper (decision 016).
    Raises Unsupported above 256.
    """
    if size > MAX_HEAD_SIZE:
        raise Unsupported(f"head size {size} is above {MAX_HEAD_SIZE}")
    return next_power_of_two(size)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products stay fp32: TF32 would lose to eager PyTorch, which computes in full."""
    return "ieee" if dtype == torch.float32 else "tf32"


def architecture(x: torch.Tensor) -> int:
    """The compute capability of x's GPU, as 90 for 9.0, on which tiles were measured; that too
    where x is on none."""
    return _capability(x.device.index) if x.is_cuda else 90


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def as_bytes(map: torch.Tensor) -> torch.Tensor:
    """An e4m3 map as the bytes that the kernels read and write; others as they are."""
    return map.view(torch.uint8) if map.dtype == torch.float8_e4m3fn else map


def packed_heads(*operands: torch.Tensor) -> bool:
    """Whether all heads [B, S, H, D] of a token lie one after the other, as a projection [B, S,
    H * D] leaves them.
    """
    return all(x.stride(3) == 1 and x.stride(2) == x.shape[3] for x in operands)


def on_device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Makes x's GPU the current one: Triton launches there, on its current stream, wherever the
    tensors lie.
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
