"""What every training stage shares: a clock that survives restarts, and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch


class Clock:
    """Progress of a stage: by steps, or by minutes of training where `minutes` is given.

    Time spent before a restart counts, so a resumed run follows the same learning-rate curve.
    `until` (a Unix time) ends the stage then, however long it took to begin.
    """

    def __init__(
        self, steps: int, minutes: float | None = None, until: float | None = None
    ) -> None:
        self.steps, self.minutes = steps, minutes
        self._most_minutes, self._until = minutes, until
        self.load({"step": 0, "elapsed_s": 0.0})

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
        if self._until is not None:
            left = max(self._until - time.time(), 1e-9)
            self.minutes = min(self._most_minutes or math.inf, (self.elapsed_s + left) / 60)


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW whose rate, on a GPU, is a tensor there: a captured step reads it at every replay."""
    parameters = list(parameters)
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(
        parameters,
        torch.tensor(rate, device=device) if on_gpu else rate,
        betas=(0.9, 0.98),
        weight_decay=weight_decay,
        fused=True,
        capturable=on_gpu,
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments of a checkpoint; the options stay those of this device."""
    own = [
        {key: group[key] for key in ("lr", "fused", "capturable")}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Captured:
    """A training step as one CUDA graph: its thousands of small kernels cost one launch.

    step: takes int64 indices [batch] on the device, returns a detached scalar on it. It may not
        wait for the GPU, and all it reads between calls stays in place.

    The first calls run as they are, in a stream of their own as captures want it; they train too.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._step = step
        self._calls = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._index = self._loss = torch.empty(0)

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        if self._calls < self.WARM_UP:
            self._calls += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss = self._step(index)
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss
        if self._graph is None:
            self._index = index.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._loss = self._step(self._index)
            self._graph = graph
        self._index.copy_(index)
        self._graph.replay()
        return self._loss


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
        load_optimizer(optimizer, saved["optimizer"])
        clock.load(saved["clock"])

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(path, {**state, "clock": clock.state()})

    return save


def batches(
    count: int, size: int, seed: int, device: torch.device | None = None
) -> Iterator[torch.Tensor]:
    """Endless shuffled index batches, int64 [size], on `device`; None: the CPU."""
    if count < size:
        raise ValueError(f"size: expected at most the {count} scenes there are, got {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).to(device)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
