"""Key evaluations that each run places by what it measures: :attr:`hgc.Config.adaptive`.

A key evaluation computes what the cache would have forecast, so there the error of the cache can be
measured: it is reduced on the device to one number, which is copied to pinned memory behind
everything else that is queued. The decision for evaluation ``i`` reads what evaluation ``i - 2``
showed at the latest: that is on the host before evaluation ``i - 1`` begins on the device, so
waiting for it, which makes the decision the same every time, leaves the device all the work of
that evaluation.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hgc.planning.config import Config, StepPlan
from hgc.planning.rule import Past, Rule, longest_gap, reads
from hgc.run.cache import Cache, conditional_half
from hgc.run.noise import NoiseLevels, to_host

if TYPE_CHECKING:
    from hgc.run.run import Evaluation

__all__ = ["AdaptiveSchedule"]

Tensor = torch.Tensor

_LATE = 2  # evaluations from the one that shows an error to the first that is decided by it
_GROWTH = 2  # a distance is at most so many times the one before


class AdaptiveSchedule:
    """Stands for a `hgc.run.schedule.Schedule` in a run that places its key evaluations itself.

    A step is planned when its evaluation begins, before any network is called. What later steps
    may read is kept, whichever they turn out to be.

    Args:
        config: With ``adaptive`` above 0.
        num_layers: Decoder layers of the model.
        total: Evaluations of the run.
        in_x0: Whether x0 can be forecast; else the model's own outputs are.

    Attributes:
        plan: A step an evaluation: what was decided, and for those to come what may read most.
        history, captures, residuals, needed, halves, keeps_attention: See
            :class:`hgc.run.schedule.Schedule`.
    """

    def __init__(self, config: Config, num_layers: int, total: int, *, in_x0: bool = True) -> None:
        assert config.adaptive is not None
        self._allowed = config.adaptive
        self._longest = longest_gap(config, total)
        self._rule, self._num_layers, self._in_x0 = Rule(config, total), num_layers, in_x0
        self._by_rule = frozenset(self._rule.keys)
        self._distances: dict[int, int] = {}  # of key evaluations from those before
        self._errors: dict[int, float] = {}
        self._under_way: dict[int, tuple[Tensor, Any]] = {}  # on their way to the host

        keys = [self._step(i, is_key=True, past=Past()) for i in range(total)]
        shallow = self._step(total, is_key=False, past=Past())
        self._otherwise = shallow  # the evaluation under way, were it no key
        self._entry = f"feature/{config.depth}"
        if config.depth == 0:
            self._entry = "output" if shallow.damping is None else "x0"
        # a forecast's error grows with the distance, that of a first-order one with its square
        first_order = config.feature_damping if config.depth else config.damping
        self._exponent = 0.5 if first_order else 1.0
        # cross-attention is kept for all layers where a key evaluation may reuse it
        self.plan = [key if key.attention == "reuse" else shallow for key in keys]
        self.history = 2 if first_order or config.forecasts_x0 or config.difference_damping else 1
        read = reads(shallow, num_layers)
        self.captures = tuple(sorted(n for n in read if n.startswith(("feature/", "skip/"))))
        self.residuals: list[tuple[str, ...]] = [()] * total
        self.needed: list[tuple[str, ...]] = [()] * total
        self.halves = any(step.tells_halves for step in (shallow, *keys))
        reuses = any(step.attention == "reuse" for step in (shallow, *keys))
        self.keeps_attention = [reuses and i < total - 1 for i in range(total)]
        # after each evaluation, what may be read
        self._will_read: list[tuple[frozenset[str], bool]] = [(frozenset(), False)]
        names, half_only = read, shallow.guidance != "both"
        for key in reversed(keys[1:]):
            more = reads(key, num_layers)
            names, half_only = names | more, half_only and (key.guidance != "both" or not more)
            self._will_read.insert(0, (names, half_only and bool(names)))

    def _step(self, at: int, *, is_key: bool, past: Past) -> StepPlan:
        step = self._rule.step(at, is_key=is_key, past=past)
        return step if self._in_x0 else step.in_output

    def whole(self, index: int) -> StepPlan:
        """The step of evaluation ``index`` with both halves of the batch computed."""
        return dataclasses.replace(self.plan[index], guidance="both", guidance_forecast=(1.0,))

    def will_read(self, *, after: int) -> tuple[frozenset[str], bool]:
        """Names that evaluations after ``after`` may read, and whether all of those need the
        conditional half only."""
        return self._will_read[after]

    def place(self, index: int, made: Sequence[Evaluation]) -> str:
        """Plan evaluation ``index`` after those in ``made``; returns why it is as it is."""
        keys = [row.index for row in made if row.plan.is_key]
        past = Past(
            keys,
            [row.index for row in made if row.plan.control == "compute"],
            [row.index for row in made if row.plan.is_key and row.plan.guidance == "both"],
        )
        is_key, why = self._is_key(index, keys)
        step = self._step(index, is_key=is_key, past=past)
        self._otherwise = self._step(index, is_key=False, past=past)
        self._distances[index] = index - keys[-1] if keys else 0
        names = reads(self._step(index, is_key=is_key, past=Past()), self._num_layers)
        self.plan[index] = step
        self.residuals[index] = tuple(sorted(n for n in names if n.startswith("residual/")))
        self.needed[index] = tuple(
            sorted(names - {"attention", "guidance", *self.residuals[index]})
        )
        return why

    def _is_key(self, index: int, keys: Sequence[int]) -> tuple[bool, str]:
        if not keys:
            return True, "plan"
        since, errors = index - keys[-1], self._read(index - _LATE)
        if since >= self._longest:
            return True, "max_gap"
        if not errors:
            return index in self._by_rule, "plan"
        newest = max(errors)
        error, over = errors[newest], self._distances[newest]
        why = f"error {error:.2g} over {over}"
        if math.isnan(error):
            return True, why
        factor = (self._allowed / error) ** self._exponent if error > 0.0 else _GROWTH
        return since >= max(1, round(over * min(factor, _GROWTH))), why

    def _read(self, upto: int) -> dict[int, float]:
        """The errors that evaluations up to ``upto`` showed. Waits for those to be on the host, not
        for what was queued after them."""
        for index in [i for i in self._under_way if i <= upto]:
            value, event = self._under_way.pop(index)
            if event is not None:
                event.synchronize()
            # not by a call of torch's: on a device such a call would wait, and this one is the same
            self._errors[index] = ctypes.c_float.from_address(value.data_ptr()).value
        return self._errors

    def measure(
        self,
        now: Evaluation,
        computed: Mapping[str, Tensor],
        cache: Cache,
        *,
        is_pair: bool,
        noise: NoiseLevels | None = None,
    ) -> None:
        """Measure how far what a key evaluation computed is from what the cache forecasts for it.

        Args:
            now: The evaluation, whose results are not in the cache yet.
            computed: Its features, its output and its x0, [B, C, H, W] each.
            cache: The run's.
            is_pair: Whether the batch may be a guidance pair: then its conditional half counts.
            noise: The run's, where it forecasts x0.
        """
        if now.index + _LATE >= len(self.plan):
            return  # nobody would read it
        new = computed[self._entry]
        half = now.half or (is_pair and self.halves and len(new) % 2 == 0)
        if not cache.has(self._entry, half=half):
            return  # the first one, or what was cached was dropped
        step = self._otherwise
        if self._entry == "x0":
            assert noise is not None and step.damping is not None
            old = noise.forecast(
                cache, now.index, step.damping, step.guidance_damping, is_pair=False
            )
            old = conditional_half(old) if half else old
        else:
            old = cache.read(self._entry, step.forecast, half=half)
        if half and len(new) == 2 * len(old):
            new = conditional_half(new)
        if new.shape == old.shape:
            self._under_way[now.index] = to_host((_norm(new - old) / _norm(new)).amax())


def _norm(x: Tensor) -> Tensor:
    """L2 norm of each row, [B] in float32."""
    rows = x.flatten(1)
    if x.dtype == torch.float64:  # which torch does not narrow on the way
        return torch.linalg.vector_norm(rows, dim=1).float()
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
