"""Seconds of a call, and how much of them other processes had the cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

__all__ = ["MOST_WAITED", "Timing", "timed"]

# Of a call's seconds: what waited longer says more about the machine than about the call.
MOST_WAITED = 0.05
# Share of a call's seconds that a thread of it must have run to count: an idle one that wakes for a
# moment waits for threads of its own process.
_WORKED = 0.05

_T = TypeVar("_T")
_THREADS = Path("/proc/self/task")


class Timing(NamedTuple):
    """One call.

    Attributes:
        seconds: From its beginning to its end.
        waited: Share of them in which a thread was ready to run and had no core: of the calling
            thread and those that worked too, the one that waited longest; None where the system
            does not say (other systems than Linux).
    """

    seconds: float
    waited: float | None


def _threads() -> dict[int, tuple[int, int]]:
    """Nanoseconds each thread of this process has run and has waited for a core, by its id."""
    found = {}
    for place in _THREADS.glob("*/schedstat"):
        try:
            ran, waited, _ = map(int, place.read_text().split())
        except (OSError, ValueError):  # the thread ended meanwhile
            continue
        found[int(place.parent.name)] = ran, waited
    return found


def timed(call: Callable[[], _T]) -> tuple[_T, Timing]:
    """What ``call`` returns, and its timing."""
    before = _threads()
    start = time.perf_counter()
    value = call()
    seconds = time.perf_counter() - start
    after, own = _threads(), threading.get_native_id()
    if own not in before or own not in after:
        return value, Timing(seconds, None)
    longest = 0.0
    for thread, (ran, waited) in after.items():
        ran_before, waited_before = before.get(thread, (0, 0))
        if thread == own or (ran - ran_before) / 1e9 >= _WORKED * seconds:
            longest = max(longest, (waited - waited_before) / 1e9 / seconds)
    return value, Timing(seconds, longest)
