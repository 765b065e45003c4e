"""Arguments of :func:`hgc.generate`, each checked alone."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

from hgc.generation.items import GenerateError

__all__ = ["device_names", "number", "path", "size_in_pixels", "whole"]


def whole(name: str, given: Any, lowest: int) -> int:
    """An integer of at least ``lowest``."""
    if isinstance(given, bool) or not isinstance(given, int) or given < lowest:
        raise GenerateError(f"{name} must be an integer of at least {lowest}; got {given!r}")
    return given


def number(name: str, given: Any) -> float:
    """A finite number."""
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        try:
            if math.isfinite(found := float(given)):
                return found
        except OverflowError:
            pass
    raise GenerateError(f"{name} must be a finite number; got {given!r}")


def size_in_pixels(given: Any) -> tuple[int, int]:
    """Height and width, multiples of 8."""
    if (
        not isinstance(given, tuple | list)
        or len(given) != 2
        or any(isinstance(side, bool) or not isinstance(side, int) for side in given)
        or any(side < 8 or side % 8 for side in given)
    ):
        raise GenerateError(
            f"size must be two multiples of 8 pixels, height and width; got {given!r}"
        )
    return given[0], given[1]


def path(name: str, given: Any) -> None:
    """A path, or None."""
    if given is not None and not isinstance(given, str | os.PathLike):
        raise GenerateError(f"{name} must be one path; got {type(given).__name__} {given!r}")


def device_names(given: Any) -> list[str]:
    """One device or several, as torch names them."""
    import torch

    names = [given] if isinstance(given, str) else given
    try:
        if not isinstance(names, Sequence) or not names:
            raise TypeError
        for name in names:
            if not isinstance(name, str):
                raise TypeError
            torch.device(name)
    except (TypeError, RuntimeError):
        raise GenerateError(
            f"device must be a name such as 'cpu' or 'cuda:0', or a list of them; got {given!r}"
        ) from None
    return list(names)
