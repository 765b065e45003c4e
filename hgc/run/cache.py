"""What a run keeps between evaluations: key values of named tensors, in buffers the run owns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

__all__ = ["Cache", "conditional_half"]

Tensor = torch.Tensor


def conditional_half(x: Tensor) -> Tensor:
    """The second half of a classifier-free guidance batch, a view."""
    return x[x.shape[0] // 2 :]


@dataclasses.dataclass(slots=True)
class _Value:
    tensor: Tensor  # owned by the cache; nobody else may write to it
    half: bool  # the conditional half only
    evaluation: int
    cut: Tensor | None = None  # a view of the conditional half of the whole batch

    def rows(self, half: bool) -> Tensor:
        if self.half or not half:
            return self.tensor
        if self.cut is None:
            self.cut = conditional_half(self.tensor)
        return self.cut


class Cache:
    """Named histories of key values.

    A value is copied in, into a buffer that the cache owns and reuses. What :meth:`read` returns
    may be such a buffer: it must not be written to.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._entries: dict[str, list[_Value]] = {}
        self._kept: dict[str, Tensor] = {}
        self._max_bytes = max_bytes
        self.bytes = 0
        self.peak_bytes = 0
        self.refused = False

    def reserve(self, count: int) -> bool:
        """Count ``count`` more bytes, of the cache or of who holds them until the run ends; False,
        and remembered, where they do not fit."""
        if self._max_bytes is not None and self.bytes + count > self._max_bytes:
            self.refused = True
            return False
        self.bytes += count
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return True

    def write(
        self, name: str, tensor: Tensor, *, evaluation: int, history: int, half: bool
    ) -> None:
        """Copy ``tensor`` in as the newest of at most ``history`` values of ``name``."""
        values = self._entries.setdefault(name, [])
        buffer = None
        while len(values) >= history:
            old = values.pop().tensor
            fits = old.shape == tensor.shape and old.dtype == tensor.dtype
            if buffer is None and fits and old.is_inference() == torch.is_inference_mode_enabled():
                buffer = old
            else:
                self.bytes -= old.nbytes
        if buffer is None:
            if not self.reserve(tensor.nbytes):
                self.drop([name])
                return
            buffer = torch.empty_like(tensor.detach())
        buffer.copy_(tensor.detach())
        values.insert(0, _Value(buffer, half, evaluation))

    def has(self, name: str, *, half: bool) -> bool:
        """Whether ``name`` can be read for the conditional half, or else for the whole batch."""
        values = self._entries.get(name)
        return bool(values and (half or not values[0].half))

    def read(
        self, name: str, coefficients: Sequence[float] = (1.0,), *, half: bool = False
    ) -> Tensor:
        """``sum_i coefficients[i] * value[i]``, newest first; read-only.

        Where fewer values are held than coefficients are given, the newest alone is returned.
        """
        values = self._entries[name]
        first, count = values[0], len(coefficients)
        if first.half and not half:
            raise KeyError(f"{name} holds the conditional half only")
        newest = first.rows(half)
        if count == 1 and coefficients[0] == 1.0:
            return newest
        if len(values) < count or not (half or all(not v.half for v in values[:count])):
            return newest
        if count == 2 and abs(coefficients[0] + coefficients[1] - 1.0) < 1e-6:
            # one rounding, in float32 inside the kernel
            return torch.lerp(newest, values[1].rows(half), coefficients[1])
        total = newest.float() * coefficients[0]
        for value, coefficient in zip(values[1:], coefficients[1:], strict=False):
            total = torch.add(total, value.rows(half).float(), alpha=coefficient)
        return total.to(newest.dtype)

    def add_to(
        self, total: Tensor, name: str, coefficients: Sequence[float], weight: float
    ) -> None:
        """``total += weight * read(name, coefficients)``, rounded in ``total``'s dtype alone. For
        values of the whole batch."""
        values = self._entries[name]
        if len(values) < len(coefficients):
            coefficients = (1.0,)
        for value, coefficient in zip(values, coefficients, strict=False):
            total.add_(value.tensor, alpha=weight * coefficient)

    def values(self, name: str) -> list[Tensor]:
        """The values held of ``name`` as they were written, newest first; read-only."""
        return [value.tensor for value in self._entries.get(name, ())]

    def evaluations(self, name: str) -> list[int]:
        """The evaluations that wrote the values held of ``name``, newest first."""
        return [value.evaluation for value in self._entries.get(name, ())]

    def subtract(self, name: str, coefficients: Sequence[float], x: Tensor) -> Tensor:
        """``cat([x - read(name, coefficients), x])``, new."""
        return torch.cat([x - self.read(name, coefficients), x])

    def blend(self, fresh: Tensor, name: str, coefficients: Sequence[float]) -> Tensor:
        """``coefficients[0] * fresh + sum_i coefficients[1 + i] * value[i]``, newest first; new.

        Where fewer values are held than coefficients are given, ``fresh`` itself.
        """
        values = self._entries.get(name, [])
        if len(values) < len(coefficients) - 1:
            return fresh
        total = fresh.float() * coefficients[0]
        for value, coefficient in zip(values, coefficients[1:], strict=False):
            total = torch.add(total, value.tensor.float(), alpha=coefficient)
        return total.to(fresh.dtype)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Hold ``tensor`` itself for the rest of the run, where the byte limit allows it."""
        if name not in self._kept and self.reserve(tensor.nbytes):
            self._kept[name] = tensor
        return tensor

    def kept(self, name: str) -> Tensor | None:
        """What :meth:`keep` holds under ``name``."""
        return self._kept.get(name)

    def put_buffer(self, name: str, buffer: Tensor, *, evaluation: int, half: bool) -> bool:
        """Hand a buffer over to the cache as the only value of ``name``; False if it is refused."""
        self.drop([name])
        if not self.reserve(buffer.nbytes):
            return False
        self._entries[name] = [_Value(buffer, half, evaluation)]
        return True

    def drop(self, names: Iterable[str]) -> None:
        """Forget the histories of ``names``."""
        for name in names:
            for value in self._entries.pop(name, ()):
                self.bytes -= value.tensor.nbytes

    def names(self) -> list[str]:
        """Names of the histories held."""
        return list(self._entries)

    def drop_history(self) -> None:
        """Forget every history, keeping what :meth:`keep` holds."""
        self.drop(self.names())

    def drop_kept(self, prefix: str = "") -> None:
        """Forget what :meth:`keep` holds under names that start with ``prefix``."""
        for name in [n for n in self._kept if n.startswith(prefix)]:
            self.bytes -= self._kept.pop(name).nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._kept.clear()
        self.bytes = 0

    def checksums(self) -> dict[str, list[float]]:
        """A float64 checksum of each tensor held, by name; it changes when somebody writes."""
        sums = {n: [_checksum(v.tensor) for v in values] for n, values in self._entries.items()}
        sums.update({n: [_checksum(t)] for n, t in self._kept.items()})
        return sums


def _checksum(x: Tensor) -> float:
    weights = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    return float((x.detach().double().reshape(-1) * weights.remainder(8191)).sum())
