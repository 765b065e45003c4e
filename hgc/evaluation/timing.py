"""Seconds of a call, and how much of them other processes had the cores."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

__all__ = ["MOST_WAITED", "Timing", "timed"]

# Of a call's seconds: what waited longer says more about the machine than about the call.
MOST_WAITED = 0.05

_T = TypeVar("_T")
_THREADS = Path("/proc/self/task")


class Timing(NamedTuple):
    """One call.

    Attributes:
        seconds: From its beginning to its end.
        waited: Share of them in which the thread that waited longest was ready to run and had no
            core; None where the system does not say (other systems than Linux).
    """

    seconds: float
    waited: float | None


def _waits() -> dict[str, int]:
    """Nanoseconds each thread of this process has waited for a core, by its id."""
    found = {}
    for place in _THREADS.glob("*/schedstat"):
        try:
            found[place.parent.name] = int(place.read_text().split()[1])
        except (OSError, IndexError):  # the thread ended meanwhile
            continue
    return found


def timed(call: Callable[[], _T]) -> tuple[_T, Timing]:
    """What ``call`` returns, and its timing."""
    before = _waits()
    start = time.perf_counter()
    value = call()
    seconds = time.perf_counter() - start
    after = _waits()
    if not before or not after:
        return value, Timing(seconds, None)
    longest = max(waited - before.get(thread, 0) for thread, waited in after.items())
    return value, Timing(seconds, longest / 1e9 / seconds)
