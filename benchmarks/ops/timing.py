"""Times of GPU work by the device's own clock, and what they are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

FLUSH_BYTES = {"cpu": 2**26, "cuda": 2**30}


def flush_caches(device: str) -> Callable[[], object]:
    """Writes a buffer larger than any cache. On a GPU that takes longer than a launch, so that the
    work behind it is queued before the device gets to it.
    """
    buffer = torch.empty(FLUSH_BYTES[device], dtype=torch.uint8, device=device)
    return lambda: buffer.fill_(1)


def device_seconds(
    functions: Sequence[Callable[[], object]], rounds: int = 50
) -> list[list[float]]:
    """Sorted seconds of each function on the GPU: interleaved, caches cold, by CUDA events."""
    flush = flush_caches("cuda")
    for function in functions:
        for _ in range(3):  # compiles, and fills the allocator's pool
            function()
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, found in zip(functions, events, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            begin.record()
            function()
            end.record()
            found.append((begin, end))
    torch.cuda.synchronize()
    return [sorted(a.elapsed_time(b) / 1e3 for a, b in found) for found in events]


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second of a 256 MiB copy on the GPU, reads and writes counted."""
    source = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    (seconds,) = device_seconds([lambda: target.copy_(source)], rounds=20)
    return 2 * source.numel() / percentile(seconds, 0.5)
