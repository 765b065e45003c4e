"""What the evaluations of a run are to do, and what they read: the same for runs of one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hgc.planning.config import Config, StepPlan
from hgc.planning.rule import Rule, plan, reads
from hgc.run.adaptive import AdaptiveSchedule
from hgc.run.evaluation import Evaluation

__all__ = ["FULL_STEP", "Schedule", "Schedules"]

FULL_STEP = StepPlan()


class Schedule:
    """A plan, and what its evaluations read: the same for every run of its length.

    Attributes:
        plan: A step an evaluation.
        history: How many key values of a feature its forecasts read at most.
        captures: Intermediate tensors of the UNet that are read. The same at every key evaluation,
            so that compiled ones are one graph.
        residuals: For each evaluation, what it reads of a ControlNet.
        needed: For each evaluation, what else must be cached before any network is called.
        halves: Whether any evaluation tells the halves of the batch apart.
        keeps_attention: For each evaluation, whether a later one reuses cross-attention.
    """

    def __init__(self, steps: Sequence[StepPlan], num_layers: int) -> None:
        self.plan = tuple(steps)
        self.history = max(
            max(
                len(s.forecast), len(s.of_residuals), len(s.guidance_forecast),
                len(s.output_forecast) - 1, len(s.x0_correction),
                2 if s.damping is not None else 1,
            )
            for s in steps
        )  # fmt: skip
        self._reads = [reads(step, num_layers) for step in steps]
        read = set[str]().union(*self._reads)
        self.captures = tuple(sorted(n for n in read if n.startswith(("feature/", "skip/"))))
        self.residuals = [
            tuple(sorted(n for n in names if n.startswith("residual/"))) for names in self._reads
        ]
        self.needed = [
            tuple(sorted(names - {"attention", "guidance", *residuals}))
            for names, residuals in zip(self._reads, self.residuals, strict=True)
        ]
        self.halves = any(step.tells_halves for step in steps)
        later = [i for i, step in enumerate(steps) if step.attention == "reuse"]
        self.keeps_attention = [bool(later) and i < later[-1] for i in range(len(steps))]
        self._whole: dict[int, StepPlan] = {}
        self._will_read: dict[int, tuple[frozenset[str], bool]] = {}

    def place(self, index: int, made: Sequence[Evaluation]) -> str:
        """Why evaluation ``index``, after those in ``made``, is as ``plan`` has it."""
        return "plan"

    def whole(self, index: int) -> StepPlan:
        """The step of evaluation ``index`` with both halves of the batch computed."""
        if index not in self._whole:
            self._whole[index] = dataclasses.replace(
                self.plan[index], guidance="both", guidance_forecast=(1.0,)
            )
        return self._whole[index]

    def will_read(self, *, after: int) -> tuple[frozenset[str], bool]:
        """Names that evaluations after ``after`` read before they fall out of the history, and
        whether all of those need the conditional half only."""
        if after not in self._will_read:
            self._will_read[after] = self._find_will_read(after)
        return self._will_read[after]

    def _find_will_read(self, after: int) -> tuple[frozenset[str], bool]:
        names: set[str] = set()
        half_only = True
        overwritten = dict.fromkeys(("features", "residual", "guidance", "attention"), 0)
        for step, read in zip(self.plan[after + 1 :], self._reads[after + 1 :], strict=True):
            for name in read:
                group = name.partition("/")[0]
                if overwritten.get(group, overwritten["features"]) < self.history:
                    names.add(name)
                    # outputs are kept whole whoever reads them
                    if step.guidance == "both" and group not in ("output", "x0"):
                        half_only = False
            overwritten["residual"] += step.control == "compute"
            overwritten["features"] += step.is_key
            overwritten["guidance"] += step.is_key and step.guidance == "both"
            overwritten["attention"] += step.is_key and step.attention == "compute"
            if min(overwritten.values()) >= self.history:
                break
        return frozenset(names), half_only and bool(names)


class Schedules:
    """The schedules of one configuration on one model, by length."""

    def __init__(self, config: Config, num_layers: int) -> None:
        self.config = config
        self._num_layers = num_layers
        self._known: dict[tuple[int, str], Schedule] = {}

    def of(self, total: int, *, in_x0: bool = True) -> Schedule | AdaptiveSchedule:
        """What the configuration plans for ``total`` evaluations, or what plans them in one run.

        in_x0: Whether the run can forecast x0; the model's own outputs are forecast otherwise.
        """
        if self.config.adaptive:
            return AdaptiveSchedule(self.config, self._num_layers, total, in_x0=in_x0)
        return self._of(total, "x0" if in_x0 else "output")

    def forecast_x0(self, total: int) -> bool:
        """Whether evaluations of a run of ``total`` forecast x0."""
        config = self.config
        if config.adaptive or not config.forecasts_x0:
            return config.forecasts_x0
        if not config.plans(total):
            return False
        return any(step.damping is not None for step in self._of(total, "x0").plan)

    def key_evaluations(self, total: int) -> tuple[int, ...]:
        """Indices of those of ``total`` that run the UNet in full; of an adaptive configuration
        those of its rule, from which runs depart."""
        if self.config.adaptive:
            return tuple(Rule(self.config, total).keys)
        return tuple(i for i, step in enumerate(self._of(total, "x0").plan) if step.is_key)

    def full(self, total: int) -> Schedule:
        """Every evaluation in full."""
        return self._of(total, "full")

    def _of(self, total: int, kind: str) -> Schedule:
        if (total, kind) not in self._known:
            steps = [FULL_STEP] * total if kind == "full" else plan(self.config, total)
            if kind == "output":
                steps = [step.in_output for step in steps]
            self._known[total, kind] = Schedule(steps, self._num_layers)
        return self._known[total, kind]
