"""Find a plan for one pipeline and a budget, by measuring plans on a few of its own inputs."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hgc.models.supported import controlnets
from hgc.planning.config import Calibration, Config, model_name
from hgc.report.macs import MacCount, count_macs, pixels_a_latent
from hgc.tune.refine import Refined, coefficients, refine
from hgc.tune.search import Costs, Search, hand_made
from hgc.tune.trial import Trial
from hgc.warn import HgcWarning

__all__ = ["calibrate"]

_SHARES_OF_STEPS = (1.0, 0.85, 0.7, 0.6, 0.5)
# Inputs that are kept out of the search, to measure what it found.
_KEPT_OUT = 4
# Uncached steps that presets' budgets are shares of.
_PRESET_STEPS = 20
# Presets that are tried first, and that a plan must beat.
_HAND_MADE = 3


def _check(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise ValueError(f"{name}: expected a number between {low} and {high}, got {value!r}")


def calibrate(
    pipe: Any,
    inputs: Sequence[Mapping[str, Any]],
    *,
    max_macs: float | None = None,
    max_distance: float | None = None,
    preset: str | None = None,
    steps: int = 20,
    trials: int = 60,
    rounds: int = 1,
    seed: int = 0,
    name: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Config:
    """Find the number of steps and the plan that come nearest to the uncached latents.

    Plans are tried on the pipeline itself: evenly spread key steps at several numbers of steps and
    depths first, then changes of one thing at a time (a key step moved, added, or made conditional
    only; the depth) from the best so far. The dearest presets within ``max_macs`` are tried first.
    Then coefficients of the outputs of the plan that was found, and of the dearest preset's, are
    refined on whole runs (`hgc.tune.refine`), which takes one run for each of them. Of presets,
    plan and refined ones that is returned which is expected to be nearest on other inputs, with a
    warning where it is a preset. The distance is the relative L2 of the final latents to those of
    ``steps`` steps without hgc. Of four inputs or more the last quarter is kept out of search and
    refinement, and the distance that is reported is theirs. What is expected of a preset is its
    distance on all inputs; of a plan that was searched for, as much more or less as it is farther
    or nearer than the dearest preset on those kept out; and of a refined one, as much more or less
    than before as cross-validation says on the inputs it was refined on, and those kept out.

    Args:
        pipe: A pipeline with ``unet`` and, or not, ``controlnet``; hgc must not be installed on it.
        inputs: Arguments of its call, one mapping an input (``prompt``, ``image``, ...). Without a
            ``generator``, input ``i`` gets one seeded with ``seed + i``.
        max_macs: Budget: share of the uncached run's MACs, between 0 and 1.
        max_distance: Instead of it: the largest mean distance allowed; the plan with the fewest
            MACs that keeps to it is sought.
        preset: Instead of both: the name of a preset, whose share of the MACs of 20 uncached steps
            on this pipeline is the budget. Give one of the three.
        steps: Steps of the uncached run.
        trials: Plans to try. Each runs the pipeline once for every input of the search.
        rounds: Of the refinement; 0 leaves it out.
        seed: Of the search and of the generators.
        name: Name of the configuration; default: "calibrated", after the preset's where one is
            given ("fast-calibrated").
        on_progress: Called with (label, done, total) after each trial.

    Returns:
        A :class:`Config` whose ``calibration`` says what it was measured on. Installed on a model
        of another shape, or run for another number of evaluations, with another scheduler or at
        other timesteps, it warns and follows the rule it was refined from (``Config.rule``).

    Raises:
        TypeError: ``inputs`` is not a sequence of mappings.
        ValueError: ``inputs`` is empty, not one budget is given, a number is out of range, or no
            plan keeps to the budget.
    """
    if isinstance(inputs, Mapping | str) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs: expected a list of mappings, got {type(inputs).__name__}")
    if not inputs or not all(isinstance(one, Mapping) for one in inputs):
        raise ValueError("inputs: expected at least one mapping of arguments of the pipeline")
    if [max_macs, max_distance, preset].count(None) != 2:
        raise ValueError("give max_macs, max_distance or preset, one of the three")
    if max_macs is not None:
        _check("max_macs", max_macs, 0.0, 1.0)
    elif max_distance is not None:
        _check("max_distance", max_distance, 0.0, 10.0)
    chosen = None if preset is None else Config.preset(preset)
    if chosen is not None and chosen.is_exact:
        raise ValueError(f"preset: {preset!r} has nothing to calibrate; it computes every step")
    if name is None:
        name = "calibrated" if preset is None else f"{preset}-calibrated"
    for what, value, low in (("steps", steps, 3), ("trials", trials, 4), ("rounds", rounds, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{what}: expected an integer of at least {low}, got {value!r}")

    trial = Trial([(pipe, one) for one in inputs], steps, seed)
    facts = trial.facts
    if facts.evaluations != len(pipe.scheduler.timesteps):
        raise ValueError(
            f"inputs: a run makes {facts.evaluations} evaluations of its "
            f"{len(pipe.scheduler.timesteps)} timesteps (strength below 1, denoising_start or "
            "denoising_end), and a plan is for all of them: calibrate on whole runs"
        )
    factor = pixels_a_latent(controlnets(getattr(pipe, "controlnet", None)))

    def count(config: Config) -> MacCount:
        return count_macs(
            pipe.unet, getattr(pipe, "controlnet", None), config,
            num_evaluations=config.num_evaluations, images=facts.images,
            height=facts.height * factor, width=facts.width * factor, guidance=facts.guidance,
            tokens=facts.tokens,
        )  # fmt: skip

    costs = Costs(lambda config: [e.total for e in count(config).evaluations], facts.guidance)
    # Of another number of steps, how many evaluations it makes is known only where one step is one.
    shares = _SHARES_OF_STEPS if facts.evaluations == steps else (1.0,)
    lengths = {
        n if facts.evaluations == steps else facts.evaluations: n
        for n in sorted({max(3, round(steps * share)) for share in shares}, reverse=True)
    }
    kept = len(inputs) // _KEPT_OUT
    which = range(len(inputs) - kept)
    done = itertools.count(1)
    total = trials

    def step(label: str) -> None:
        if on_progress is not None:
            on_progress(label, min(next(done), total), total)

    search = Search(trial, costs.of, which, lengths, random.Random(seed), step)
    full = count(Config(name="exact", num_evaluations=1)).full_evaluation.total * facts.evaluations

    def measured(rule: Config) -> list[float]:
        held_out = range(len(inputs) - kept, len(inputs)) if kept else which
        return trial.distances(rule, lengths[rule.num_evaluations], held_out)

    if chosen is not None:
        counted = count(chosen)
        max_macs = counted.total / (counted.full_evaluation.total * _PRESET_STEPS)
    if max_macs is not None:
        presets = hand_made(max_macs * full, costs.of, list(lengths), facts.guidance)[:_HAND_MADE]
        best = search.best(max_macs * full, trials, presets)
        if best is None:
            raise ValueError(
                f"max_macs={max_macs}: no plan of {min(lengths)} or more evaluations is that cheap"
            )
    else:
        assert max_distance is not None
        presets = []
        best = _cheapest(search, full, max_distance, trials, measured)

    def refined(rule: Config) -> Refined:
        number = lengths[rule.num_evaluations]
        return refine(
            rule, lambda config: trial.errors(config, number, which), rounds=rounds,
            on_run=lambda distance: step(f"refining, distance {distance:.4f}"),
        )  # fmt: skip

    def seen(rule: Config) -> list[float]:
        """On the inputs of the search, and on those kept out where there are such."""
        found = trial.distances(rule, lengths[rule.num_evaluations], which)
        return [*found, *measured(rule)] if kept else found

    expected = {rule: _mean(seen(rule)) for rule in presets}
    if best not in expected:
        # the search chose it by its own inputs: what it is on the others is to be believed
        base = _mean(measured(presets[0])) if presets else 0.0
        share = expected[presets[0]] / base if base else 1.0
        expected[best] = share * _mean(measured(best))
    if rounds:
        # what the search found on few inputs may be farther on others than a preset
        started = list(dict.fromkeys([best, *presets[:1]]))
        tried = next(done) - 1
        total = tried + sum(rounds * (coefficients(one) + 1) + 1 for one in started)
        for rule in started:
            found = refined(rule)
            if found.config is not rule:
                others = measured(found.config) if kept else []
                ratio = _mean([*found.distances, *others]) / _mean(seen(rule))
                expected[found.config] = expected[rule] * ratio
    best = min(expected, key=expected.__getitem__)
    if best in presets:
        warnings.warn(
            f"the preset {best.name!r} is expected to be nearer on other inputs than any plan "
            "that was found: it is returned",
            HgcWarning,
            stacklevel=2,
        )
    distances = measured(best)
    timesteps = _timesteps(pipe, best)
    macs = count(best).total
    # What a sceptic asks for: the same pipeline with as many steps as these MACs pay for.
    fewer = max(1, -(-macs * steps // full))
    plain = trial.distances(
        None, fewer, which if not kept else range(len(inputs) - kept, len(inputs))
    )
    record = Calibration(
        model=model_name(pipe.unet),
        scheduler=type(pipe.scheduler).__name__,
        steps=lengths[best.num_evaluations],
        uncached_steps=steps,
        macs_share=round(macs / full, 6),
        distance=round(_mean(distances), 6),
        distance_worst=round(max(distances), 6),
        fewer_steps=fewer,
        fewer_steps_distance=round(_mean(plain), 6),
        inputs=len(inputs),
        timesteps=timesteps,
    )
    return best.replace(name=name, calibration=record)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _timesteps(pipe: Any, config: Config) -> tuple[float, ...]:
    """Of the last run, where each is one evaluation."""
    found = tuple(float(t) for t in pipe.scheduler.timesteps)
    return found if len(found) == config.num_evaluations else ()


def _cheapest(
    search: Search,
    full: int,
    max_distance: float,
    trials: int,
    measured: Callable[[Config], list[float]],
) -> Config:
    """The rule with the fewest MACs whose mean distance is allowed, by halving the budget."""
    low, high = 0.0, 1.0
    best: Config | None = None
    nearest = float("inf")
    rounds = max(2, min(5, trials // 8))
    share = 0.5
    for _ in range(rounds):
        rule = search.best(share * full, trials // rounds)
        distance = float("inf")
        if rule is not None:
            found = measured(rule)
            distance = sum(found) / len(found)
        nearest = min(nearest, distance)
        if rule is not None and distance <= max_distance:
            best, high = rule, share
        else:
            low = share
        share = (low + high) / 2
    if best is None:
        raise ValueError(
            f"max_distance={max_distance}: the nearest plan found is at {nearest:.4f}; allow more, "
            "or give more trials"
        )
    return best
