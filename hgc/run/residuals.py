"""ControlNet residuals that are not computed until somebody reads them.

Where a plan reuses a ControlNet's residuals, few of them are read: a shallow evaluation of depth 1
reads the first of thirteen. The others are promises. A promise knows the value the plan meant
(``planned``) and how to compute the fresh one (``fresh``). What pipelines do with residuals on
their way to the UNet (adding those of several ControlNets, putting zeros before the conditional
half) gives promises again; anything else computes the fresh value, so that no code outside of hgc
can read a wrong one. What is written to that value, or added to the promise in place, counts: the
plan's value is not what it stands for any more.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

__all__ = ["Promise", "PromiseSet", "ResidualSource", "Zeros", "fresh", "zero_promise"]

Tensor = torch.Tensor
Terms = list[tuple[Tensor, float]]

_METADATA = {
    "size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex", "ndimension",
    "is_contiguous", "element_size", "get_device", "storage_offset", "is_inference", "__len__",
}  # fmt: skip


# Arguments that are passed by name and known below; `out`, say, is not.
_NAMED = {"alpha", "dim", "dtype", "device", "non_blocking", "copy", "memory_format"}


class Promise(torch.Tensor):
    """A tensor of known shape, dtype and device whose values are computed when they are read."""

    _planned: Callable[[bool], Terms | None]
    _fresh: Callable[[], Tensor]
    _value: Tensor | None = None  # once it was read
    _version = -1  # of that
    _made_of: Any = None  # promises that it asks, which are held as long as it is
    _touched: list[bool] | None = None  # of its set: not empty once one is not as it was made

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        planned: Callable[[bool], Terms | None],
        fresh: Callable[[], Tensor],
    ) -> Promise:
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        self._planned = planned
        self._fresh = fresh
        return self

    def planned(self, half: bool) -> Terms | None:
        """The terms, ``sum scale * value``, that the plan meant; of the conditional half or of the
        whole batch. None where the cache does not hold them, or where somebody may have written to
        the fresh value: then that is the one."""
        return None if self._is_written else self._planned(half)

    def fresh(self) -> Tensor:
        """The fresh value, computed at the first call."""
        if self._value is None:
            value = self._fresh()
            self._value = value
            self._version = -1 if value.is_inference() else value._version
            self._touch()
        return self._value

    @property
    def _is_written(self) -> bool:
        """Whether the value that was read may have been written to."""
        value = self._value
        if value is None:
            return False
        return value.is_inference() or value._version != self._version

    def _touch(self) -> None:
        if self._touched is not None:
            self._touched.append(True)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Promise(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy = _LAZY.get(func)
        if lazy is not None:
            result = lazy(*args, **kwargs) if kwargs.keys() <= _NAMED else NotImplemented
            if result is not NotImplemented:
                return result
        elif getattr(func, "__name__", "") in _METADATA or func.__name__ == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*fresh(args), **fresh(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*fresh(args), **fresh(kwargs or {}))


class ResidualSource(Protocol):
    """What the promises of several tensors ask for the values of the one with number ``j``."""

    def planned(self, j: int, half: bool) -> Terms | None:
        """The terms that the plan meant, or None: what :meth:`Promise.planned` returns."""

    def fresh(self, j: int) -> Tensor:
        """The value, computed at the first call."""


T = TypeVar("T", bound=ResidualSource)


_strong, _weak = sys.getrefcount, weakref.getweakrefcount


class PromiseSet(Generic[T]):
    """Promises of tensors of ``shapes`` that ask ``source`` for their values.

    Making a tensor costs more than most other things a host does in an evaluation, so promises that
    nobody holds any more are handed out again, after their source was made another.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        source: T,
    ) -> None:
        self.source = source
        self._asks = [
            (functools.partial(source.planned, j), functools.partial(source.fresh, j))
            for j in range(len(shapes))
        ]
        self.promises = [
            Promise(shape, dtype, device, *ask)
            for shape, ask in zip(shapes, self._asks, strict=True)
        ]
        self._touched: list[bool] = []
        for promise in self.promises:
            promise._touched = self._touched
        del promise
        self._unheld = self._holders()

    def _holders(self) -> int:
        """How many references there are to the promises, weak ones too."""
        return sum(map(_strong, self.promises)) + sum(map(_weak, self.promises))

    @property
    def is_held(self) -> bool:
        """Whether anybody else holds a promise, or something that was made from one."""
        return self._holders() != self._unheld

    @property
    def is_touched(self) -> bool:
        """Whether one was read, or added to in place."""
        return bool(self._touched)

    def hand_out(self) -> list[Promise]:
        """The promises as they were made. Where they are held, only if none :attr:`is_touched`."""
        if self._touched:
            for promise, (planned, value) in zip(self.promises, self._asks, strict=True):
                promise._planned, promise._fresh = planned, value
                promise._value = promise._made_of = None
            self._touched.clear()
        return list(self.promises)


def fresh(value: Any) -> Any:
    """``value`` with every promise in it (in lists, tuples and dicts too) computed."""
    if isinstance(value, Promise):
        return value.fresh()
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(v) for v in value)
    if isinstance(value, dict):
        return {k: fresh(v) for k, v in value.items()}
    return value


class Zeros:
    """A source whose promises are zeros, which are added to nothing."""

    def __init__(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device

    def planned(self, j: int, half: bool) -> Terms | None:
        """No terms."""
        return []

    def fresh(self, j: int) -> Tensor:
        """Zeros."""
        return torch.zeros(tuple(self._shapes[j]), dtype=self._dtype, device=self._device)


def zero_promise(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Promise:
    """Zeros that are added to nothing."""
    zeros = Zeros([shape], dtype, device)
    ask = functools.partial(zeros.planned, 0), functools.partial(zeros.fresh, 0)
    return Promise(shape, dtype, device, *ask)


Ask = tuple[Callable[[bool], Terms | None], Callable[[], Tensor]]


def _like(x: Promise, ask: Ask, *made_of: Any) -> Promise:
    promise = Promise(x.shape, x.dtype, x.device, *ask)
    promise._made_of = made_of
    return promise


def _ask(x: Any) -> Ask:
    """What to ask for the values that ``x`` has now, whatever is added to it later."""
    if isinstance(x, Promise):
        if not x._is_written:
            return x._planned, x._fresh
        x = x.fresh()
    return lambda half: [(x[x.shape[0] // 2 :] if half else x, 1.0)], lambda: x


def _sum(x: Any, y: Any) -> Ask:
    (planned_x, fresh_x), (planned_y, fresh_y) = _ask(x), _ask(y)

    def planned(half: bool) -> Terms | None:
        first, second = planned_x(half), planned_y(half)
        return None if first is None or second is None else first + second

    return planned, lambda: fresh_x() + fresh_y()


def _add(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    tensors = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    if alpha != 1 or not tensors or x.shape != y.shape:
        return NotImplemented
    return _like(x if isinstance(x, Promise) else y, _sum(x, y), x, y)


def _add_into(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    """``x += y``: whoever holds ``x`` sees the sum."""
    if not isinstance(x, Promise) or not isinstance(y, torch.Tensor):
        return NotImplemented
    if alpha != 1 or x.shape != y.shape or x._value is not None:
        return NotImplemented
    x._planned, x._fresh = _sum(x, y)
    x._made_of = (x._made_of, y)
    x._touch()
    return x


def _iadd(x: Any, y: Any) -> Any:
    # to a tensor that was computed: those who say so go on with the result
    return _add_into(x, y) if isinstance(x, Promise) else _add(x, y)


def _mul(x: Any, y: Any) -> Any:
    if not isinstance(x, Promise):
        x, y = y, x
    if isinstance(y, bool) or not isinstance(y, (int, float)):
        return NotImplemented
    planned_x, fresh_x = _ask(x)

    def planned(half: bool) -> Terms | None:
        terms = planned_x(half)
        return None if terms is None else [(value, scale * y) for value, scale in terms]

    return _like(x, (planned, lambda: fresh_x() * y), x)


def _zeros_like(x: Promise, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else zero_promise(x.shape, x.dtype, x.device)


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    """``cat([zeros_like(x), x])``: how pipelines give a conditional-only residual (guess_mode) the
    shape of the whole batch."""
    if dim != 0 or len(tensors) != 2 or not all(isinstance(t, Promise) for t in tensors):
        return NotImplemented
    first, second = tensors
    if first.shape != second.shape or first.planned(False) != []:
        return NotImplemented
    (_, fresh_first), (planned_second, fresh_second) = _ask(first), _ask(second)

    def planned(half: bool) -> Terms | None:
        terms = planned_second(False)
        if half or not terms:
            return terms
        return [(torch.cat([torch.zeros_like(value), value]), scale) for value, scale in terms]

    promise = Promise(
        (first.shape[0] + second.shape[0], *first.shape[1:]),
        second.dtype,
        second.device,
        planned,
        lambda: torch.cat([fresh_first(), fresh_second()]),
    )
    promise._made_of = (first, second)
    return promise


def _to(x: Promise, *args: Any, **kwargs: Any) -> Any:
    """A move to where the residual already is, as offloading hooks ask for."""
    if kwargs.get("copy"):
        return NotImplemented
    wanted = [*args, *(v for k, v in kwargs.items() if k in ("device", "dtype"))]
    for value in wanted:
        if isinstance(value, torch.dtype):
            if value != x.dtype:
                return NotImplemented
        elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
            device = torch.device(value)
            if device.type != x.device.type or device.index not in (None, x.device.index):
                return NotImplemented
        elif not isinstance(value, bool) and value is not None:
            return NotImplemented
    return x


_LAZY: dict[Any, Callable[..., Any]] = {
    torch.add: _add,
    torch.Tensor.add: _add,
    torch.Tensor.add_: _add_into,
    torch.Tensor.__add__: _add,
    torch.Tensor.__radd__: _add,
    torch.Tensor.__iadd__: _iadd,
    torch.mul: _mul,
    torch.Tensor.mul: _mul,
    torch.Tensor.__mul__: _mul,
    torch.Tensor.__rmul__: _mul,
    torch.zeros_like: _zeros_like,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.Tensor.to: _to,
    torch.Tensor.detach: lambda x: x,
    torch.Tensor.contiguous: lambda x, **kwargs: x,
}
