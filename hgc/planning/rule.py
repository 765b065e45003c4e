"""From a :class:`~hgc.Config` to one :class:`~hgc.StepPlan` an evaluation. Pure: no torch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

from hgc.planning.config import Config, ConfigError, StepPlan

__all__ = ["Past", "Rule", "bounds", "check_plan", "longest_gap", "plan", "scaled_key_steps"]


def scaled_key_steps(
    key_steps: Sequence[int], reference: int, num_evaluations: int
) -> tuple[int, ...]:
    """Key steps written for ``reference`` evaluations, carried over to ``num_evaluations``.

    A longer run keeps the share of key steps; a shorter one keeps their number, since its
    neighbouring evaluations lie further apart and are less alike. Where they lie in the run, as a
    fraction, is kept by linear interpolation. The first stays, and the last where it is the end of
    the run; where it is not, the end of the run counts as one more that is not made.
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
    # what is interpolated ends where the run does: with its last evaluation, or after it
    ends = key_steps[-1] == reference - 1
    marks = (*key_steps,) if ends else (*key_steps, reference)
    intervals = count - 1 if ends else count
    length = num_evaluations - 1 if ends else num_evaluations
    keys: list[int] = []
    for j in range(count):
        position = j * (len(marks) - 1) / intervals
        low = min(int(position), len(marks) - 1)
        high = min(low + 1, len(marks) - 1)
        key = marks[low] + (position - low) * (marks[high] - marks[low])
        keys.append(int(key / marks[-1] * length + 0.5))
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
            another number; the plan computes what nothing reads or reads what nothing wrote; or
            ``config.adaptive`` leaves the plan to the run.
    """
    config = Config.of(config)
    if type(num_evaluations) is not int or num_evaluations < 1:
        raise ConfigError(
            f"num_evaluations must be an integer of at least 1; got {num_evaluations!r}"
        )
    if config.adaptive:
        raise ConfigError(
            f"Config.adaptive={config.adaptive:g} leaves the plan to each run: "
            "Installation.report() says what one did; replace(adaptive=None) is the rule's plan, "
            "replace(adaptive=0.0) computes the most"
        )
    if not config.plans(num_evaluations):
        raise ConfigError(
            f"the plan {config.name!r} is for {config.num_evaluations} evaluations; "
            f"got num_evaluations={num_evaluations}"
        )
    if config.steps is not None and num_evaluations == config.num_evaluations:
        steps = list(config.steps)
    else:
        steps = _from_rule(config, num_evaluations)
    check_plan(steps)
    return steps


@dataclasses.dataclass(frozen=True)
class Past:
    """What forecasts can read: the evaluations, rising, that wrote it.

    Attributes:
        keys: Those that computed everything, or everything of the conditional half.
        controls: Those that computed the ControlNets.
        differences: Those that computed everything of both halves.
    """

    keys: Sequence[int] = ()
    controls: Sequence[int] = ()
    differences: Sequence[int] = ()


class Rule:
    """The rule of a :class:`~hgc.Config`, for runs of one length.

    Attributes:
        keys: The evaluations that it makes key ones.
        past: What forecasts can read where it is followed.
    """

    def __init__(self, config: Config, num_evaluations: int) -> None:
        reference = config.num_evaluations
        every = config.key_steps is None or config.adaptive == 0.0
        self.keys: tuple[int, ...] = tuple(range(num_evaluations))
        if not every:
            self.keys = scaled_key_steps(config.key_steps or (), reference, num_evaluations)
        keys = self.keys
        conditional = carried_over(config, config.conditional_key_steps, keys, num_evaluations)
        if config.guidance == "both" and config.depth > 0:
            # what follows reads both halves of the features
            conditional = {k for k in conditional if k + 1 in keys or k + 1 == num_evaluations}
            if config.adaptive is not None:  # what follows is not known
                conditional = set()
        control = set(keys)
        if config.control_key_steps is not None:
            reference_keys = range(reference) if config.key_steps is None else config.key_steps
            without = set(reference_keys) - set(config.control_key_steps)
            control -= carried_over(config, tuple(sorted(without)), keys, num_evaluations)
        # a ControlNet computed between keys writes its residuals too
        computes = config.control == "compute" and config.depth > 0
        between = range(num_evaluations) if computes else ()
        self._config, self._conditional, self._control = config, conditional, control
        self._gate = config.attention_gate * num_evaluations
        self.past = Past(
            keys,
            sorted(control | (set(between) - set(keys))),
            [k for k in keys if k not in conditional],
        )

    def step(self, at: int, *, is_key: bool, past: Past) -> StepPlan:
        """Evaluation ``at`` as a key one, or as one of the others. A key evaluation where the rule
        has none is as the nearest one of the rule's."""
        config = self._config
        forecast = _first_order(config.feature_damping, past.keys, at)
        of_residuals = _first_order(config.feature_damping, past.controls, at)
        of_guidance = _first_order(config.difference_damping, past.differences, at)
        if is_key:
            like = min(self.keys, key=lambda key: abs(key - at))
            half, computes = like in self._conditional, like in self._control
            return StepPlan(
                control="compute" if computes else "reuse",
                attention="reuse" if at >= self._gate and at > 0 else "compute",
                guidance="reuse" if half else "both",
                guidance_forecast=of_guidance if half else (1.0,),
                control_forecast=None if computes else of_residuals,
            )
        if config.depth == 0:
            return StepPlan(
                control="off",
                depth=0,
                forecast=_first_order(config.damping, past.keys, at),
                damping=config.damping,
                guidance_damping=config.guidance_damping,
            )
        corrects = config.gain != 1.0
        return StepPlan(
            control=config.control,
            depth=config.depth,
            encoder=config.encoder,
            attention=config.attention,
            guidance=config.guidance,
            forecast=forecast,
            guidance_forecast=of_guidance if config.guidance == "reuse" else (1.0,),
            control_forecast=None if of_residuals == forecast else of_residuals,
            damping=config.damping if corrects else None,
            guidance_damping=config.guidance_damping if corrects else None,
            gain=config.gain,
        )


def _from_rule(config: Config, num_evaluations: int) -> list[StepPlan]:
    rule = Rule(config, num_evaluations)
    keys = set(rule.keys)
    return [rule.step(i, is_key=i in keys, past=rule.past) for i in range(num_evaluations)]


def bounds(config: Config, num_evaluations: int) -> tuple[Config, Config]:
    """Configurations that cost the least and the most that a run of an adaptive one can: a key
    evaluation every ``max_gap``, and all."""
    keys = tuple(range(0, num_evaluations, longest_gap(config, num_evaluations)))
    half = bool(config.conditional_key_steps) and config.guidance != "both"
    least = config.replace(
        num_evaluations=num_evaluations, key_steps=keys, adaptive=None, max_gap=None,
        conditional_key_steps=keys[1:] if half else (),
        control_key_steps=None if config.control_key_steps is None else (0,),
    )  # fmt: skip
    most = least.replace(
        key_steps=tuple(range(num_evaluations)), conditional_key_steps=(), control_key_steps=None
    )
    return least, most


def longest_gap(config: Config, num_evaluations: int) -> int:
    """The largest distance of two key evaluations in an adaptive run: ``max_gap``, or twice the
    largest of the rule's."""
    if config.max_gap is not None:
        return config.max_gap
    keys = (*Rule(config, num_evaluations).keys, num_evaluations)
    return 2 * max(b - a for a, b in itertools.pairwise(keys))


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
    keys = 0
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
        corrects = step.depth != 0 and step.gain != 1.0
        if corrects and (step.is_key or step.damping is None):
            raise ConfigError(
                f"evaluation {i}: gain={step.gain} corrects a forecast of x0, so depth must be an "
                "integer and damping be given"
            )
        if step.damping is not None and not (corrects or step.depth == 0):
            raise ConfigError(f"evaluation {i}: damping is of a forecast that nothing reads")
        for name in ("guidance_damping", "x0_correction"):
            if getattr(step, name) not in (None, ()) and step.damping is None:
                raise ConfigError(f"evaluation {i}: {name} needs damping")
        if len(step.x0_correction) > keys:
            raise ConfigError(
                f"evaluation {i}: x0_correction reads {len(step.x0_correction)} key evaluations; "
                f"{keys} came before"
            )
        if len(step.output_forecast) > 1 and not full:
            raise ConfigError(f"evaluation {i}: output_forecast reads an output nothing wrote")
        if step.is_key and step.encoder == "reuse":
            raise ConfigError(f"evaluation {i}: encoder='reuse' needs an integer depth")
        if step.is_key:
            keys, full = keys + 1, True
            difference = difference or step.guidance == "both"
            both_rows = step.guidance == "both"
        residuals = residuals or step.control == "compute"


@functools.lru_cache(maxsize=4096)
def reads(step: StepPlan, num_layers: int) -> frozenset[str]:
    """Names of the cache entries an evaluation reads on a model of ``num_layers`` decoder layers.

    ``feature/k``: the input of the ``k``-th outermost decoder layer (ControlNet's share of it
    included); ``skip/j``: the ``j``-th
    encoder skip before any residual; ``residual/j``: a ControlNet's residual for it (``mid`` for
    the middle block's); ``guidance``; ``output``; ``x0``; ``attention``.
    """
    names: set[str] = set()
    used = range(num_layers) if step.is_key else range(int(step.depth))
    if step.depth == 0:
        return frozenset({"output" if step.damping is None else "x0"})
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
    if step.damping is not None:
        names.add("x0")
    return frozenset(names)
