"""From a :class:`~hgc.Config` to one :class:`~hgc.StepPlan` an evaluation. Pure: no torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from hgc.config import Config, ConfigError, StepPlan

__all__ = ["check_plan", "plan", "scaled_key_steps"]


def scaled_key_steps(
    key_steps: Sequence[int], reference: int, num_evaluations: int
) -> tuple[int, ...]:
    """Key steps written for ``reference`` evaluations, carried over to ``num_evaluations``.

    A longer run keeps the share of key steps; a shorter one keeps their number, since its
    neighbouring evaluations lie further apart and are less alike. Where they lie in the run, as a
    fraction, is kept by linear interpolation; the first and, where it was one, the last stay.
    """
    if num_evaluations == reference:
        return tuple(key_steps)
    count = len(key_steps)
    if num_evaluations > reference:
        count = max(count, round(count * num_evaluations / reference))
    if num_evaluations <= count:
        return tuple(range(num_evaluations))
    if count == 1:
        return (0,)
    span = max(reference - 1, 1)
    keys: list[int] = []
    for j in range(count):
        position = j * (len(key_steps) - 1) / (count - 1)
        low = min(int(position), len(key_steps) - 1)
        high = min(low + 1, len(key_steps) - 1)
        key = key_steps[low] + (position - low) * (key_steps[high] - key_steps[low])
        keys.append(int(key / span * (num_evaluations - 1) + 0.5))
    # Rounding may let two keys meet: push later ones up, then the last ones back inside the run.
    for j in range(1, count):
        keys[j] = max(keys[j], keys[j - 1] + 1)
    for j in range(count - 1, -1, -1):
        keys[j] = min(keys[j], num_evaluations - (count - j))
    return tuple(keys)


def _first_order(damping: float, keys: Sequence[int], at: int) -> tuple[float, ...]:
    """Coefficients at evaluation ``at`` of a first-order forecast over the last two of ``keys``."""
    past = [k for k in keys if k < at]
    if damping == 0.0 or len(past) < 2:
        return (1.0,)
    slope = round(damping * (at - past[-1]) / (past[-1] - past[-2]), 6)
    return (1.0 + slope, -slope)


def plan(config: Config | str, num_evaluations: int) -> list[StepPlan]:
    """The plan of a run: what each of its evaluations computes and what it reads from the cache.

    Args:
        config: A :class:`~hgc.Config`, or the name of a preset.
        num_evaluations: Evaluations of the run, at least 1. It is the number of steps for a
            first-order scheduler; a second-order one makes more.

    Returns:
        ``num_evaluations`` step plans.

    Raises:
        ConfigError: ``num_evaluations`` is not a positive integer; ``config.steps`` is a plan for
            another number; or the plan computes what nothing reads or reads what nothing wrote.
    """
    config = Config.of(config)
    if isinstance(num_evaluations, bool) or not isinstance(num_evaluations, int):
        raise ConfigError(f"num_evaluations must be an integer; got {num_evaluations!r}")
    if num_evaluations < 1:
        raise ConfigError(f"num_evaluations must be at least 1; got {num_evaluations}")
    if config.steps is not None and (
        num_evaluations == config.num_evaluations or config.key_steps is None
    ):
        if num_evaluations != config.num_evaluations:
            raise ConfigError(
                f"the plan {config.name!r} is for {config.num_evaluations} evaluations; "
                f"got num_evaluations={num_evaluations}"
            )
        steps = list(config.steps)
    else:
        steps = _from_rule(config, num_evaluations)
    check_plan(steps)
    return steps


def _from_rule(config: Config, num_evaluations: int) -> list[StepPlan]:
    reference = config.num_evaluations
    if config.key_steps is None:
        keys: tuple[int, ...] = tuple(range(num_evaluations))
    else:
        keys = scaled_key_steps(config.key_steps, reference, num_evaluations)
    conditional = carried_over(config, config.conditional_key_steps, keys, num_evaluations)
    if config.guidance == "both" and config.depth > 0:
        # what follows reads both halves of the features
        conditional = {k for k in conditional if k + 1 in keys or k + 1 == num_evaluations}
    control = set(keys)
    if config.control_key_steps is not None:
        reference_keys = range(reference) if config.key_steps is None else config.key_steps
        without = set(reference_keys) - set(config.control_key_steps)
        control -= carried_over(config, tuple(sorted(without)), keys, num_evaluations)
    gate = config.attention_gate * num_evaluations
    both = [k for k in keys if k not in conditional]
    # a ControlNet computed between keys writes its residuals too
    between = range(num_evaluations) if config.control == "compute" and config.depth > 0 else ()
    computed = sorted(control | (set(between) - set(keys)))
    steps = []
    for i in range(num_evaluations):
        forecast = _first_order(config.forecast, keys, i)
        of_residuals = _first_order(config.forecast, computed, i)
        of_guidance = _first_order(config.guidance_forecast, both, i)
        if i in keys:
            half = i in conditional
            steps.append(
                StepPlan(
                    control="compute" if i in control else "reuse",
                    attention="reuse" if i >= gate and i > 0 else "compute",
                    guidance="reuse" if half else "both",
                    guidance_forecast=of_guidance if half else (1.0,),
                    control_forecast=None if i in control else of_residuals,
                )
            )
        elif config.depth == 0:
            steps.append(StepPlan(control="off", depth=0, forecast=forecast))
        else:
            steps.append(
                StepPlan(
                    control=config.control,
                    depth=config.depth,
                    encoder=config.encoder,
                    attention=config.attention,
                    guidance=config.guidance,
                    forecast=forecast,
                    guidance_forecast=of_guidance if config.guidance == "reuse" else (1.0,),
                    control_forecast=None if of_residuals == forecast else of_residuals,
                )
            )
    return steps


def carried_over(
    config: Config, chosen: Sequence[int], keys: Sequence[int], num_evaluations: int
) -> set[int]:
    """The key steps of this run nearest, in order of rank, to those ``chosen`` of the rule's; never
    the first."""
    if not chosen:
        return set()
    reference = config.key_steps
    if reference is None:
        reference = tuple(range(config.num_evaluations))
    if num_evaluations == config.num_evaluations:
        return set(chosen)
    if len(keys) < len(reference) or len(keys) == num_evaluations:
        return set()
    last = max(len(reference) - 1, 1)
    ranks = {reference.index(k) / last for k in chosen}
    return {keys[round(r * (len(keys) - 1))] for r in ranks} - {keys[0]}


def check_plan(steps: Sequence[StepPlan]) -> None:
    """Refuse a plan that reads what nothing wrote, or computes what nothing reads.

    Raises:
        ConfigError: names the evaluation and the field.
    """
    if not steps:
        raise ConfigError("a plan must have at least one evaluation")
    full = False  # a full evaluation was made: features and outputs can be in the cache
    residuals = False  # ControlNet residuals can be
    difference = False  # both halves were computed at a full evaluation
    both_rows = False  # the newest cached features hold both halves
    for i, step in enumerate(steps):
        if not step.is_key and not full:
            raise ConfigError(f"evaluation {i}: depth={step.depth!r} reads a feature nothing wrote")
        if step.control == "reuse" and not residuals:
            raise ConfigError(f"evaluation {i}: control='reuse' reads residuals nothing wrote")
        if step.attention == "reuse" and not full:
            raise ConfigError(f"evaluation {i}: attention='reuse' reads an output nothing wrote")
        if step.guidance == "reuse" and not difference:
            raise ConfigError(f"evaluation {i}: guidance='reuse' reads a difference nothing wrote")
        if (
            isinstance(step.depth, int)
            and step.depth > 0
            and step.guidance == "both"
            and not both_rows
        ):
            raise ConfigError(
                f"evaluation {i}: guidance='both' reads features of which the last key step "
                "computed the conditional half only"
            )
        if step.depth == 0:
            for name, idle in (("control", "off"), ("attention", "compute"), ("guidance", "both")):
                if getattr(step, name) != idle:
                    raise ConfigError(
                        f"evaluation {i}: depth=0 computes nothing, so {name} must be {idle!r}; "
                        f"got {getattr(step, name)!r}"
                    )
            if step.output_forecast != (1.0,):
                raise ConfigError(
                    f"evaluation {i}: depth=0 computes nothing, so output_forecast must be (1.0,) "
                    f"and forecast says what is read; got {step.output_forecast!r}"
                )
        if len(step.output_forecast) > 1 and not full:
            raise ConfigError(f"evaluation {i}: output_forecast reads an output nothing wrote")
        if step.is_key and step.encoder == "reuse":
            raise ConfigError(f"evaluation {i}: encoder='reuse' needs an integer depth")
        if step.is_key:
            full = True
            residuals = residuals or step.control == "compute"
            difference = difference or step.guidance == "both"
            both_rows = step.guidance == "both"


@functools.lru_cache(maxsize=4096)
def reads(step: StepPlan, num_layers: int) -> frozenset[str]:
    """Names of the cache entries an evaluation reads on a model of ``num_layers`` decoder layers.

    ``feature/k``: the input of the ``k``-th outermost decoder layer (ControlNet's share of it
    included); ``skip/j``: the ``j``-th
    encoder skip before any residual; ``residual/j``: a ControlNet's residual for it (``mid`` for
    the middle block's); ``guidance``; ``output``; ``attention``.
    """
    names: set[str] = set()
    used = range(num_layers) if step.is_key else range(int(step.depth))
    if step.depth == 0:
        return frozenset({"output"})
    if not step.is_key:
        names.add(f"feature/{step.depth}")
        if step.encoder == "reuse":
            names |= {f"skip/{j}" for j in used}
    if step.control == "reuse":
        names |= {f"residual/{j}" for j in used}
        if step.is_key:
            names.add("residual/mid")
    if step.guidance == "reuse":
        names.add("guidance")
    if step.attention == "reuse":
        names.add("attention")
    if len(step.output_forecast) > 1:
        names.add("output")
    return frozenset(names)
