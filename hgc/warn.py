"""What hgc says to its user, once."""

from __future__ import annotations

import warnings

__all__ = ["HgcWarning", "WarnOnce"]


class HgcWarning(UserWarning):
    """hgc computes something in full that its plan would have reused, or a calibrated plan is used
    on something it was not measured on; the message says why."""


class WarnOnce:
    """Warnings of one installation: one for each key."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, key: str, message: str) -> None:
        if key not in self.said:
            self.said.add(key)
            warnings.warn(message, HgcWarning, stacklevel=2)
