"""Whether a batch is a classifier-free guidance pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hgc.run.noise import to_host

__all__ = ["PairCheck"]

Tensor = torch.Tensor


class PairCheck:
    """Whether the batch is a classifier-free guidance pair: one sample twice, with two texts. A
    check is of one text: where it changes, another begins.

    Two images made from one seed without guidance look like a pair at the first evaluation and
    then part, since their texts differ: two evaluations must agree. Every later one is compared
    too. On a GPU the comparison runs on the device and is read an evaluation later.
    """

    EVALUATIONS = 2

    def __init__(self, assume: bool | None = None) -> None:
        self._assume = assume
        self._pending: list[tuple[Tensor | bool, Any]] = []
        self._agreed = 0
        self._refuted = False
        # of the text, which is the same for as long as a check lasts
        self._texts_differ: Tensor | bool | None = None

    @property
    def wants(self) -> bool:
        """Whether another evaluation is to be compared."""
        return not self._refuted

    def refute(self) -> None:
        """The batch is not, or may not be, a pair."""
        self._refuted = True

    def compare(self, sample: Tensor, text: Tensor) -> Sequence[Tensor] | None:
        """Start the comparison of the halves of ``sample`` and of ``text``. Returns the halves of
        ``sample``, where it has two."""
        halves: Sequence[Tensor] | None = None
        batch = sample.shape[0]
        if batch % 2 or text.shape[0] != batch:
            self._refuted = True
        elif self._assume is not None:
            self._pending.append((self._assume, None))
        else:
            # slices: a host comes to them sooner than to `chunk`
            first, second = halves = sample[: batch // 2], sample[batch // 2 :]
            if sample.is_cpu:
                if not self._differs(text) or not torch.equal(first, second):
                    self._refuted = True
                elif batch == 2 or not self._all_alike(sample):
                    self._agreed += 1
            else:
                equal = torch.eq(first, second).all() & self._differs(text)
                if batch > 2:
                    equal = torch.stack([equal, torch.eq(sample[1:], sample[:1]).all()])
                self._pending.append(to_host(equal))
        return halves

    def _differs(self, text: Tensor) -> Tensor | bool:
        """Whether the halves of ``text`` differ."""
        if self._texts_differ is None:
            first, second = text.chunk(2)
            self._texts_differ = (
                not torch.equal(first, second) if text.is_cpu else torch.ne(first, second).any()
            )
        return self._texts_differ

    @staticmethod
    def _all_alike(sample: Tensor) -> bool:
        """One sample four times or more: several edits of one image, or images made from one noise.
        Such an evaluation says nothing."""
        return torch.equal(sample[1:], sample[:1].expand_as(sample[1:]))

    def confirmed(self) -> bool:
        """Whether enough evaluations agreed. Waits for a copy started an evaluation ago."""
        if self._pending:
            self._read()
        return not self._refuted and self._agreed >= self.EVALUATIONS

    def _read(self) -> None:
        for flag, event in self._pending:
            if event is not None:
                event.synchronize()
            several = isinstance(flag, Tensor) and flag.dim() > 0
            pair, alike = flag.tolist() if several else (bool(flag), False)  # type: ignore[union-attr]
            if not pair:
                self._refuted = True
            elif not alike:
                self._agreed += 1
        self._pending.clear()
