"""The runs of one thread, and which of them an evaluation belongs to.

Runs are told apart by the identity of what a pipeline call builds once: one text tensor
(``encoder_hidden_states``), one condition tensor a ControlNet and one tensor of timesteps. It
passes the first two, and views of the third, at every evaluation. They are held by strong
reference, so that no address can be given to another tensor while a run lives, and compared by
identity. Nothing here reads a value on the device.
"""

from __future__ import annotations

import collections
import weakref
from typing import Any

import torch

from hgc.run.position import Position
from hgc.run.run import Run
from hgc.run.snapshot import TensorSnapshot, is_conditional_half

__all__ = ["RunRegistry"]

Tensor = torch.Tensor


class RunRegistry:
    """The runs of one thread, newest last; the least recently used goes first."""

    LIMIT = 4

    def __init__(self) -> None:
        self.runs: collections.OrderedDict[int, Run] = collections.OrderedDict()
        self.last: Run | None = None
        self.passed = False  # what came last was of no run, and computed by diffusers
        self.short = 0  # runs one after the other that ended after one or two evaluations
        self.crowded = False  # runs had to make room that were under way
        self._single: tuple[Any, ...] = ()

    def is_one_step(self, timestep: Any, text: Any) -> bool:
        """Whether a timestep that is alone in its tensor may be that of a run of one evaluation:
        its text was not seen at another such timestep."""
        if not isinstance(timestep, Tensor) or not isinstance(text, Tensor):
            return False
        if timestep.numel() > 1:
            return False
        seen = [reference() for reference in self._single]
        self._single = (weakref.ref(text), weakref.ref(timestep))
        return not seen or seen[0] is not text or seen[1] is timestep

    def is_past_end(self, text: Tensor, position: Position) -> bool:
        """Whether an evaluation is one more at the last timestep of the run that has just ended."""
        last = self.last
        return (
            last is not None
            and position.index == last.completed == position.total - 1
            and last.finished
            and (last.ended() is text or is_conditional_half(text, TensorSnapshot(last.ended())))
        )

    def add(self, run: Run) -> Run:
        """Take in a new run."""
        for old in list(self.runs.values()):
            if old.finished:
                continue
            # this one begins where an earlier one is, or one further: one loop, whose text or
            # timesteps are built anew
            begun = old.report[0].index if old.report else -1
            goes_on = 0 <= begun < run.position.index <= old.completed + 1
            if old.is_abandoned() or (goes_on and old.text.value is run.text.value):
                self.short += goes_on and len(old.report) < 3
                self.forget(old)
        while len(self.runs) >= self.LIMIT:
            old = self.runs.popitem(last=False)[1]
            self.crowded = self.crowded or not old.finished
            old.free()
        self.runs[id(run)] = run
        self.last = run
        return run

    def use(self, run: Run) -> None:
        """Mark ``run`` as the last used."""
        if run is not self.last:
            self.runs.move_to_end(id(run))
        self.last = run
        if len(run.report) > 2:
            self.short = 0

    def forget(self, run: Run) -> None:
        """Drop ``run`` and what it holds."""
        run.free()
        self.runs.pop(id(run), None)

    def clear(self) -> None:
        """Drop all runs."""
        for run in list(self.runs.values()):
            self.forget(run)
        self.last = None
        self.passed = False

    def _usable(self, position: Position) -> list[Run]:
        """Unfinished runs on the same timesteps, newest first."""
        return [
            run
            for run in reversed(self.runs.values())
            if not run.finished and run.position.same_schedule(position)
        ]

    def find(self, text: Tensor, position: Position, cond: Any = None) -> Run | None:
        """The run that an evaluation belongs to, or None where it starts a new one.

        Args:
            text: ``encoder_hidden_states`` of the call.
            position: Of its timestep.
            cond: The condition, for a ControlNet.
        """
        last = self.last
        if (
            last is not None
            and not last.finished
            and last.text.value is text
            and last.position.same_schedule(position)
            and last.text.is_(text)
        ):
            return self._resume(last, position)
        candidates = self._usable(position)
        for run in candidates:
            if run.text.is_(text) or is_conditional_half(text, run.text):
                return self._resume(run, position)
        # The text is not known. The same condition and schedule, one step on: the text changed.
        # Of several such runs (halves of guidance that are called one by one) none is known to be
        # the one: a new run.
        fitting = []
        for run in candidates:
            at = run.now.index if run.now is not None else run.completed
            under_way = run.now is not None and position.index == at
            if not under_way and position.index != at + 1:
                continue
            known_cond = cond is None or any(s.cond.is_(cond) for s in run.slots)
            if not known_cond or (cond is None and run.slots and not under_way):
                continue
            if under_way and cond is not None:
                continue
            if under_way:
                return run
            fitting.append(run)
        return fitting[0] if len(fitting) == 1 else None

    def _resume(self, run: Run, position: Position) -> Run | None:
        at = run.completed
        if position.index == at and run.now is None:
            return run  # called twice at one position: the caller marks it
        if position.index < at:
            # the loop was started again with the same objects, or goes backwards
            self.short += position.index == at - 1 and len(run.report) < 3
            self.forget(run)
            return None
        return run
