"""What every training stage shares: a clock that survives restarts, and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class Clock:
    """Progress of a stage: by steps, or by minutes of training where `minutes` is given.

    Time spent before a restart counts, so a resumed run follows the same learning-rate curve.
    """

    def __init__(self, steps: int, minutes: float | None = None) -> None:
        self.steps, self.minutes = steps, minutes
        self.step, self.elapsed_s = 0, 0.0
        self._since = time.monotonic()

    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        by_steps = self.step / max(self.steps, 1)
        if self.minutes is None:
            return min(by_steps, 1.0)
        return min(max(by_steps, self.seconds() / (60 * self.minutes)), 1.0)

    def seconds(self) -> float:
        """Seconds trained, earlier runs of the same stage included."""
        return self.elapsed_s + time.monotonic() - self._since

    def rate(self, peak: float, warm_up: int = 100, floor: float = 0.02) -> float:
        """Learning rate: linear warm-up, then half a cosine down to `floor` of the peak."""
        wave = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.progress()))
        return peak * wave * min(1.0, (self.step + 1) / warm_up)

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "elapsed_s": self.seconds()}

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self._since = time.monotonic()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that an interrupted write leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, on `device`, or None where there is none. Loads tensors only, no code."""
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=True)


def resumed(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    clock: Clock,
    device: torch.device,
) -> Callable[[], None]:
    """Load the checkpoint of a stage where there is one; returns what writes the next."""
    saved = load_checkpoint(path, device)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        clock.load(saved["clock"])

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(path, {**state, "clock": clock.state()})

    return save


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless shuffled index batches, int64 [size]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
