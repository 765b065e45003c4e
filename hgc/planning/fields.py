"""Checks of the fields of configurations and plans."""

from __future__ import annotations

import difflib
import math
from typing import Any

__all__ = ["ConfigError", "choice", "integer", "number", "unknown_keys"]


class ConfigError(ValueError):
    """A value in a :class:`Config` or :class:`StepPlan` is wrong; the message names the field."""


def choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{owner}.{name} must be one of {', '.join(choices)}; got {value!r}")


def integer(owner: str, name: str, value: object, minimum: int) -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{owner}.{name} must be an integer of at least {minimum}; got {value!r}")


def number(owner: str, name: str, value: object, low: float, high: float) -> None:
    """Raise unless ``value`` is a finite number of [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{owner}.{name} must be a finite number; got {value!r}")
    if not low <= value <= high:
        raise ConfigError(f"{owner}.{name} must lie in [{low}, {high}]; got {value!r}")


def unknown_keys(owner: str, data: dict[str, Any], known: set[str]) -> None:
    """Raise where ``data`` has a key that is not ``known``, with the nearest one."""
    unknown = sorted(set(data) - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{owner} has no field {unknown[0]!r}{hint} (fields: {sorted(known)})")
