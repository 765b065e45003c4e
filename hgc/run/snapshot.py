"""Values that features depend on, as they were when an evaluation saw them."""

from __future__ import annotations

from typing import Any

import torch

from hgc.run.cache import conditional_half

__all__ = ["Signature", "TensorSnapshot", "is_conditional_half", "same_tensor", "storage_of"]

Tensor = torch.Tensor


def storage_of(x: Tensor) -> int:
    """What is the same for all views of one memory, and of no other while one of them is held."""
    return x.untyped_storage()._cdata


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def same_tensor(x: Any, y: Any) -> bool:
    """Whether two values are the same tensor, or the same view of one. For values that are held."""
    if x is y:
        return True
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or type(x) is not type(y):
        return False
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and x.layout == y.layout == torch.strided
        and storage_of(x) == storage_of(y)
        and x.storage_offset() == y.storage_offset()
        and x.stride() == y.stride()
    )


# Compared by type and value, their subclasses too; everything else by identity.
_PLAIN = (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device)


class TensorSnapshot:
    """A value as it was when it was taken: compares unequal once it was written to."""

    __slots__ = ("_half", "items", "parts", "value", "version")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._half: Tensor | None = None
        self.version = _version(value) if isinstance(value, Tensor) else None
        # of a container each element is held, not the container: it may be filled with others later
        self.items: dict[Any, TensorSnapshot] | None = None
        self.parts: list[TensorSnapshot] | None = None
        if isinstance(value, dict):
            self.items = {k: TensorSnapshot(v) for k, v in value.items()}
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            self.parts = [TensorSnapshot(v) for v in value]

    def half(self) -> Tensor:
        """The conditional half of the tensor that is held: the same view each time."""
        if self._half is None:
            # detached: a view holds what it is a view of, see `Run.is_abandoned`
            self._half = conditional_half(self.value).detach()
        return self._half

    def is_(self, other: Any) -> bool:
        """Whether ``other`` is the value, and nobody has written to it since."""
        value, version = self.value, self.version
        if version is not None:
            if value is other:
                return version < 0 or bool(value._version == version)
            return same_tensor(value, other) and _version(other) == version
        if type(other) is not type(value):
            return False
        if self.items is not None:
            return other.keys() == self.items.keys() and all(
                held.is_(other[key]) for key, held in self.items.items()
            )
        if self.parts is not None:
            return len(other) == len(self.parts) and all(
                a.is_(b) for a, b in zip(self.parts, other, strict=True)
            )
        return value is other or (isinstance(value, _PLAIN) and bool(value == other))


class Signature:
    """Values that features depend on, as they were at an evaluation.

    Most are settings, which are compared as a whole; tensors, objects and what contains some are
    held one by one.
    """

    __slots__ = ("held", "is_plain", "types", "values")

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.types = tuple(map(type, values))
        self.values = values
        plain = all(kind in _PLAIN for kind in self.types)
        self.held = None if plain else TensorSnapshot(values)
        # settings alone: no tensor, and nothing that may hold one
        self.is_plain = plain

    def same(self, values: tuple[Any, ...]) -> bool:
        """Whether ``values`` are the same, none of them written to in between."""
        if self.held is not None:
            return self.held.is_(values)
        return tuple(map(type, values)) == self.types and values == self.values


def is_conditional_half(text: Tensor, whole: TensorSnapshot) -> bool:
    """Whether ``text`` is the conditional half of ``whole``, as guess_mode hands it over."""
    held = whole.value
    if held is text or not isinstance(held, Tensor) or held.dim() != text.dim() or held.dim() == 0:
        return False
    if storage_of(text) != storage_of(held) or _version(text) != whole.version:
        return False
    rows = text.shape[0]
    return 2 * rows == held.shape[0] and same_tensor(text, held[rows:])
