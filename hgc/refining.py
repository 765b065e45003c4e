"""Coefficients refined on whole runs: Gauss-Newton on the error of what the pipeline returns.

:func:`hgc.fitting.fit` makes each forecast right by itself, on features of uncached runs. What
matters is the end of a run whose own errors go round: each coefficient moves the result, and one
may make good what another got wrong. Their number is small (tens), so the derivative of the error
with respect to all of them is measured, one run a coefficient, and a damped least-squares step is
taken. Solvers with fitted coefficients are found the same way (S4S, arXiv 2502.17423; Bespoke
Solvers, arXiv 2310.19075); here they include those of the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from hgc.config import Config, StepPlan
from hgc.planning import plan

__all__ = ["coefficients", "refine"]

Tensor = torch.Tensor

# A coefficient's change for its derivative. Results are smooth in them, and float32.
_CHANGE = 0.02
# Damping, in parts of the mean of the normal matrix' diagonal: which one is decided by what inputs
# say that were left out of the solution.
_DAMPING = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
_FOLDS = 8
_FIELDS = ("forecast", "control_forecast", "guidance_forecast", "output_forecast")
# Key values that a forecast takes in, where the caller does not say.
_ORDER = 2
# Key outputs that an output's forecast takes in.
_OUTPUTS = 2


@dataclasses.dataclass(frozen=True)
class _Coefficient:
    step: int
    field: str
    index: int


def widened(config: Config, order: int) -> Config:
    """``config`` with as many coefficients in each forecast as there are values to read, at most
    ``order``; the new ones are zero, so that nothing changes."""
    steps = plan(config, config.num_evaluations)
    wide: list[StepPlan] = []
    keys = computed = pairs = 0  # evaluations so far that wrote features, residuals, differences

    def padded(values: tuple[float, ...], count: int) -> tuple[float, ...]:
        return values + (0.0,) * (min(order, count) - len(values))

    for step in steps:
        changes: dict[str, tuple[float, ...]] = {}
        if not step.is_key:
            changes["forecast"] = padded(step.forecast, keys)
        if step.control == "reuse":
            changes["control_forecast"] = padded(step.of_residuals, computed)
        if step.guidance == "reuse":
            changes["guidance_forecast"] = padded(step.guidance_forecast, pairs)
        if step.depth != 0 and keys:
            outputs = 1 + min(_OUTPUTS, keys)
            values = step.output_forecast
            changes["output_forecast"] = values + (0.0,) * (outputs - len(values))
        wide.append(dataclasses.replace(step, **changes))
        keys += step.is_key
        computed += step.control == "compute" and step.depth != 0
        pairs += step.is_key and step.guidance == "both"
    return config.replace(steps=tuple(wide))


def _coefficients(steps: Sequence[StepPlan]) -> list[_Coefficient]:
    found: list[_Coefficient] = []
    for i, step in enumerate(steps):
        fields = []
        if not step.is_key:
            fields.append("forecast")
        if step.control == "reuse":
            fields.append("control_forecast")
        if step.guidance == "reuse":
            fields.append("guidance_forecast")
        if len(step.output_forecast) > 1:
            fields.append("output_forecast")
        for field in fields:
            values = step.of_residuals if field == "control_forecast" else getattr(step, field)
            found += [_Coefficient(i, field, j) for j in range(len(values))]
    return found


def _value(steps: Sequence[StepPlan], where: _Coefficient) -> float:
    step = steps[where.step]
    values = step.of_residuals if where.field == "control_forecast" else getattr(step, where.field)
    return float(values[where.index])


def _changed(config: Config, where: Sequence[_Coefficient], values: Sequence[float]) -> Config:
    assert config.steps is not None
    steps = list(config.steps)
    for one, value in zip(where, values, strict=True):
        step = steps[one.step]
        old = step.of_residuals if one.field == "control_forecast" else getattr(step, one.field)
        new = (*old[: one.index], round(float(value), 5), *old[one.index + 1 :])
        steps[one.step] = dataclasses.replace(step, **{one.field: new})
    return config.replace(steps=tuple(steps))


@dataclasses.dataclass
class _Normal:
    """What a linearised run says of each input: ``|r + J d|^2 = c + 2 g d + d A d``."""

    a: Tensor  # [inputs, coefficients, coefficients], of J^T J
    g: Tensor  # [inputs, coefficients], of J^T r
    c: Tensor  # [inputs]

    def step(self, which: Tensor, damping: float) -> Tensor:
        """The change of the coefficients that is best for the inputs ``which``. Each counts by its
        distance, not by its square: weights are one over what it is now."""
        weight = self.c[which].clamp_min(1e-12).rsqrt()
        a = torch.einsum("s,spq->pq", weight, self.a[which])
        g = torch.einsum("s,sp->p", weight, self.g[which])
        # the last part only keeps zeros solvable
        ridge = damping * a.diagonal().mean() + 1e-30
        return -torch.linalg.solve(a + ridge * torch.eye(len(g), dtype=a.dtype), g)

    def distances(self, change: Tensor) -> Tensor:
        """What the linearised run says of each input after ``change``."""
        square = self.c + 2 * self.g @ change + torch.einsum("spq,p,q->s", self.a, change, change)
        return square.clamp_min(0).sqrt()


def _normal(columns: Sequence[Sequence[Tensor]], now: Sequence[Tensor]) -> _Normal:
    a, g, c = [], [], []
    for s, error in enumerate(now):
        jacobian = torch.stack([column[s] for column in columns]).double()
        a.append(jacobian @ jacobian.T)
        g.append(jacobian @ error.double())
        c.append(error.double().square().sum())
    return _Normal(torch.stack(a), torch.stack(g), torch.stack(c))


def _mean(errors: Sequence[Tensor]) -> float:
    return sum(float(e.norm()) for e in errors) / len(errors)


def _damping(normal: _Normal) -> float:
    """The damping whose steps, found on all folds but one, are best for that one."""
    count = len(normal.c)
    folds = torch.arange(count) * min(_FOLDS, count) // count
    if int(folds[-1]) == 0:
        return _DAMPING[-2]
    totals = []
    for damping in _DAMPING:
        total = 0.0
        for fold in folds.unique():
            change = normal.step((folds != fold).nonzero().flatten(), damping)
            total += float(normal.distances(change)[folds == fold].sum())
        totals.append(total)
    return _DAMPING[totals.index(min(totals))]


def coefficients(config: Config, order: int = _ORDER) -> int:
    """How many coefficients :func:`refine` changes."""
    return len(_coefficients(widened(config, order).steps or ()))


def refine(
    config: Config,
    errors: Callable[[Config], list[Tensor]],
    *,
    rounds: int = 2,
    order: int = _ORDER,
    on_run: Callable[[float], None] = lambda distance: None,
) -> Config:
    """``config`` with coefficients that bring whole runs nearer to the uncached ones.

    Args:
        config: A plan, for its own number of evaluations.
        errors: Runs a plan and returns each input's error, flat, over the norm of its reference.
        rounds: Gauss-Newton steps, at most. Each makes one run for every coefficient.
        order: Key values that a forecast takes in, at most.
        on_run: Called after each run with the mean distance so far.

    Returns:
        ``config`` with ``steps``: the nearest plan on these inputs; ``config`` itself where nothing
        was gained.
    """
    best = widened(config, order)
    assert best.steps is not None
    where = _coefficients(best.steps)
    now = errors(best)
    start = _mean(now)
    on_run(start)
    gained = False
    for _ in range(rounds if where else 0):
        values = [_value(best.steps or (), one) for one in where]
        columns = []
        for one, value in zip(where, values, strict=True):
            moved = errors(_changed(best, [one], [value + _CHANGE]))
            columns.append([(m - n) / _CHANGE for m, n in zip(moved, now, strict=True)])
            on_run(_mean(now))
        normal = _normal(columns, now)
        change = normal.step(torch.arange(len(now)), _damping(normal))
        before = _mean(now)
        for share in (1.0, 0.5, 0.25):
            tried = _changed(
                best, where, [v + share * float(c) for v, c in zip(values, change, strict=True)]
            )
            found = errors(tried)
            on_run(min(before, _mean(found)))
            if _mean(found) < before:
                best, now, gained = tried, found, True
                break
        if _mean(now) > 0.97 * before:
            break
    return best if gained else config
