"""Where an evaluation stands in its run, read off its timestep without a copy to the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

__all__ = ["Position", "position_of"]

Tensor = torch.Tensor


@dataclasses.dataclass(slots=True)
class Position:
    """Where an evaluation stands in its run, read off the timestep tensor without a sync."""

    timestep: Tensor | None  # None: of a run that was freed
    index: int
    total: int
    storage: int  # of the timesteps; theirs alone while ``timestep`` is held
    base: Tensor | None = None  # what ``timestep`` is a view of, where torch says so

    def same_schedule(self, other: Position) -> bool:
        """Whether both timesteps are views of one tensor."""
        held = self.timestep is not None and other.timestep is not None
        return held and self.storage == other.storage


def position_of(timestep: Any, last: Position | None = None) -> Position | None:
    """The position, or None where ``timestep`` is not an element of a tensor of timesteps.

    ``last``: that of an evaluation before, of which ``timestep`` may be a neighbour.
    """
    if not isinstance(timestep, Tensor) or timestep.dim() != 0:
        return None
    base = timestep._base
    if base is not None and last is not None and base is last.base:
        return Position(timestep, timestep.storage_offset(), last.total, last.storage, base)  # type: ignore[arg-type]
    if timestep.is_meta:
        return None
    storage = timestep.untyped_storage()
    total = storage.nbytes() // timestep.element_size()
    if total < 2:
        return None
    return Position(timestep, int(timestep.storage_offset()), total, storage._cdata, base)
