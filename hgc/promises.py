"""ControlNet residuals that are not computed until somebody reads them.

Where a plan reuses a ControlNet's residuals, few of them are read: a shallow evaluation of depth 1
reads the first of thirteen. The others are promises. A promise knows the value the plan meant
(``planned``) and how to compute the fresh one (``fresh``). What pipelines do with residuals on
their way to the UNet (adding those of several ControlNets, putting zeros before the conditional
half) gives promises again; anything else computes the fresh value, so that no code outside of hgc
can read a wrong one.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

__all__ = ["Promise", "PromiseSet", "Turn", "fresh", "zero_promise"]

Tensor = torch.Tensor
Terms = list[tuple[Tensor, float]]

_METADATA = {
    "size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex", "ndimension",
    "is_contiguous", "element_size", "get_device", "storage_offset", "is_inference", "__len__",
}  # fmt: skip


class Promise(torch.Tensor):
    """A tensor of known shape, dtype and device whose values are computed when they are read."""

    _planned: Callable[[bool], Terms | None]
    _fresh: Callable[[], Tensor]

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
        whole batch. None where the cache does not hold them: then the fresh value is the one."""
        return self._planned(half)

    def fresh(self) -> Tensor:
        """The fresh value, computed now."""
        return self._fresh()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Promise(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy = _LAZY.get(func)
        if lazy is not None:
            result = lazy(*args, **kwargs)
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


class Turn(Protocol):
    """What the promises of several tensors ask for the values of the one with number ``j``."""

    def planned(self, j: int, half: bool) -> Terms | None:
        """As :meth:`Promise.planned`."""

    def fresh(self, j: int) -> Tensor:
        """As :meth:`Promise.fresh`."""


T = TypeVar("T", bound=Turn)


class PromiseSet(Generic[T]):
    """Promises of tensors of ``shapes`` that ask ``turn`` for their values.

    Making a tensor costs more than most other things a host does in an evaluation, so promises that
    nobody holds any more are handed out again, after their turn was made another.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        turn: T,
    ) -> None:
        self.turn = turn
        self.promises = [
            Promise(
                shape, dtype, device,
                functools.partial(turn.planned, j), functools.partial(turn.fresh, j),
            )
            for j, shape in enumerate(shapes)
        ]  # fmt: skip
        self._unheld = self._references()

    def _references(self) -> list[int]:
        return [*map(sys.getrefcount, self.promises), *map(weakref.getweakrefcount, self.promises)]

    @property
    def is_held(self) -> bool:
        """Whether anybody else holds a promise, or something that was made from one."""
        return self._references() != self._unheld


def fresh(value: Any) -> Any:
    """``value`` with every promise in it (in lists, tuples and dicts too) computed."""
    if isinstance(value, Promise):
        return value.fresh()
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(v) for v in value)
    if isinstance(value, dict):
        return {k: fresh(v) for k, v in value.items()}
    return value


def zero_promise(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Promise:
    """Zeros that are added to nothing."""
    return Promise(
        shape,
        dtype,
        device,
        lambda half: [],
        lambda: torch.zeros(tuple(shape), dtype=dtype, device=device),
    )


def _like(
    x: Promise, planned: Callable[[bool], Terms | None], value: Callable[[], Tensor]
) -> Promise:
    return Promise(x.shape, x.dtype, x.device, planned, value)


def _terms(x: Any, half: bool) -> Terms | None:
    if isinstance(x, Promise):
        return x.planned(half)
    return [(x[x.shape[0] // 2 :] if half else x, 1.0)]


def _add(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    tensors = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    if alpha != 1 or not tensors or x.shape != y.shape:
        return NotImplemented

    def planned(half: bool) -> Terms | None:
        first, second = _terms(x, half), _terms(y, half)
        return None if first is None or second is None else first + second

    model = x if isinstance(x, Promise) else y
    return _like(model, planned, lambda: fresh(x) + fresh(y))


def _mul(x: Any, y: Any) -> Any:
    if not isinstance(x, Promise):
        x, y = y, x
    if isinstance(y, bool) or not isinstance(y, (int, float)):
        return NotImplemented

    def planned(half: bool) -> Terms | None:
        terms = x.planned(half)
        return None if terms is None else [(value, scale * y) for value, scale in terms]

    return _like(x, planned, lambda: x.fresh() * y)


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

    def planned(half: bool) -> Terms | None:
        terms = second.planned(False)
        if half or not terms:
            return terms
        return [(torch.cat([torch.zeros_like(value), value]), scale) for value, scale in terms]

    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    return Promise(
        shape,
        second.dtype,
        second.device,
        planned,
        lambda: torch.cat([first.fresh(), second.fresh()]),
    )


def _to(x: Promise, *args: Any, **kwargs: Any) -> Any:
    """A move to where the residual already is, as offloading hooks ask for."""
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
    torch.Tensor.add_: _add,
    torch.Tensor.__add__: _add,
    torch.Tensor.__radd__: _add,
    torch.Tensor.__iadd__: _add,
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
