"""What hgc says to its user, once."""

from __future__ import annotations

import warnings

__all__ = ["HgcWarning", "WarnOnce"]


class HgcWarning(UserWarning):
    """What was asked of hgc is not done, or not as well: something is computed that the plan would
    have reused, or forecast from less. The message says why, and what to do."""


class WarnOnce:
    """Warnings of one installation: one for each key."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, key: str, message: str) -> None:
        if key not in self.said:
            self.said.add(key)
            warnings.warn(message, HgcWarning, stacklevel=2)
