"""Coefficients of outputs, refined on whole runs: Gauss-Newton on the error of what comes back.

An output that is computed is combined with earlier ones; where nothing is run, x0 is
(:attr:`hgc.StepPlan.x0_correction`).

What matters is the end of a run whose own errors go round, those of its scheduler too. An output
that is combined with those of earlier key evaluations makes good for both, and such coefficients
are few (tens). So the derivative of the error with respect to all of them is measured, one run a
coefficient, and a damped least-squares step is taken. Solvers are learned with the same aim (S4S,
arXiv 2502.17423).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hgc.planning.config import Config, StepPlan
from hgc.planning.rule import plan

__all__ = ["Refined", "coefficients", "refine"]

Tensor = torch.Tensor

# A coefficient's change for its derivative. Results are smooth in them, and float32.
_CHANGE = 0.02
# Damping, in parts of the mean of the normal matrix' diagonal: which one is decided by what inputs
# say that were left out of the solution.
_DAMPING = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
_FOLDS = 8
# Of a coefficient. Where runs hardly depend on one, the least squares ask for more.
_LARGEST = 100.0
# Outputs of key evaluations that are combined with a computed one.
_OUTPUTS = 2


@dataclasses.dataclass(frozen=True)
class _Coefficient:
    step: int
    field: str
    index: int


def widened(config: Config) -> Config:
    """``config`` with as many coefficients of each output as there are outputs to read; the new
    ones are zero, so that nothing changes."""
    wide: list[StepPlan] = []
    keys = 0
    for step in plan(config, config.num_evaluations):
        field = _field(step)
        values = getattr(step, field)
        if field != "forecast":
            computed = field == "output_forecast"
            values += (0.0,) * (computed + min(_OUTPUTS, keys) - len(values))
        changes: dict[str, Any] = {field: values}
        wide.append(dataclasses.replace(step, **changes))
        keys += step.is_key
    return config.replace(steps=tuple(wide))


def _field(step: StepPlan) -> str:
    """Where a step has the coefficients that are refined."""
    if step.depth != 0:
        return "output_forecast"
    return "forecast" if step.damping is None else "x0_correction"


def _coefficients(steps: Sequence[StepPlan]) -> list[_Coefficient]:
    """Those of outputs, but of evaluations that read none: what is computed first is right."""
    found: list[_Coefficient] = []
    for i, step in enumerate(steps):
        field = _field(step)
        values = getattr(step, field)
        if step.depth == 0 or len(values) > 1:
            found += [_Coefficient(i, field, j) for j in range(len(values))]
    return found


def _value(steps: Sequence[StepPlan], where: _Coefficient) -> float:
    return float(getattr(steps[where.step], where.field)[where.index])


def _changed(config: Config, where: Sequence[_Coefficient], values: Sequence[float]) -> Config:
    assert config.steps is not None
    steps = list(config.steps)
    for one, value in zip(where, values, strict=True):
        step = steps[one.step]
        old = getattr(step, one.field)
        new = (*old[: one.index], round(float(value), 5), *old[one.index + 1 :])
        changes: dict[str, Any] = {one.field: new}
        steps[one.step] = dataclasses.replace(step, **changes)
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


def _left_out(normal: _Normal, damping: float, share: float = 1.0) -> Tensor:
    """What the linearised run says of each input after ``share`` of the change that is found on
    all folds but its own."""
    count = len(normal.c)
    folds = torch.arange(count) * min(_FOLDS, count) // count
    found = torch.empty(count, dtype=normal.c.dtype)
    for fold in folds.unique():
        change = normal.step((folds != fold).nonzero().flatten(), damping)
        found[folds == fold] = normal.distances(share * change)[folds == fold]
    return found


def _damping(normal: _Normal) -> float:
    """The damping whose changes are best for the inputs that they are not found on."""
    if len(normal.c) == 1:
        return _DAMPING[-2]
    totals = [float(_left_out(normal, damping).sum()) for damping in _DAMPING]
    return _DAMPING[totals.index(min(totals))]


@dataclasses.dataclass(frozen=True)
class Refined:
    """What :func:`refine` found.

    Attributes:
        config: The nearest plan on its inputs, with ``steps``; what it began with where nothing was
            gained.
        distances: Of each input, estimated by the linearised runs as though it had been left out;
            as measured where nothing was gained, and of one input alone.
    """

    config: Config
    distances: tuple[float, ...]


def coefficients(config: Config) -> int:
    """How many coefficients :func:`refine` changes."""
    return len(_coefficients(widened(config).steps or ()))


def refine(
    config: Config,
    errors: Callable[[Config], list[Tensor]],
    *,
    rounds: int = 1,
    on_run: Callable[[float], None] = lambda distance: None,
) -> Refined:
    """``config`` with coefficients of outputs that bring whole runs nearer to the uncached ones.

    Args:
        config: A plan, for its own number of evaluations.
        errors: Runs a plan and returns each input's error, flat, over the norm of its reference.
        rounds: Gauss-Newton steps, at most. Each makes one run for every coefficient.
        on_run: Called after each run with the mean distance so far.

    Returns:
        The plan, and what it is expected to be on inputs that it was not refined on.
    """
    best = widened(config)
    assert best.steps is not None
    where = _coefficients(best.steps)
    now = errors(best)
    on_run(_mean(now))
    gained, distances = False, [float(e.norm()) for e in now]
    for _ in range(rounds if where else 0):
        values = [_value(best.steps or (), one) for one in where]
        columns = []
        for one, value in zip(where, values, strict=True):
            moved = errors(_changed(best, [one], [value + _CHANGE]))
            columns.append([(m - n) / _CHANGE for m, n in zip(moved, now, strict=True)])
            on_run(_mean(now))
        normal = _normal(columns, now)
        damping = _damping(normal)
        change = normal.step(torch.arange(len(now)), damping)
        before = _mean(now)
        for share in (1.0, 0.5, 0.25):
            moved_to = [v + share * float(c) for v, c in zip(values, change, strict=True)]
            if not all(abs(value) < _LARGEST for value in moved_to):  # nor what is no number
                continue
            tried = _changed(best, where, moved_to)
            found = errors(tried)
            on_run(min(before, _mean(found)))
            if _mean(found) < before:
                best, now, gained = tried, found, True
                distances = [float(e.norm()) for e in found]
                if len(found) > 1:
                    distances = _left_out(normal, damping, share).tolist()
                break
        if _mean(now) > 0.97 * before:
            break
    return Refined(best if gained else config, tuple(distances))
