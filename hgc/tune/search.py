"""The search for a rule that comes near to the uncached runs within a budget of MACs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from hgc.planning.config import PRESETS, Config
from hgc.planning.rule import carried_over, scaled_key_steps
from hgc.tune.trial import Trial

__all__ = ["Costs", "Search", "hand_made"]

# Distance to the uncached latents: the mean counts in full, the worst input a tenth, so that of two
# plans that are equal on average the one without an outlier is taken.
_WORST = 0.1
# Layers between key evaluations that are tried.
_DEPTHS = (1, 2, 3)


class Costs:
    """MACs of rules, from the counts of one evaluation of each kind.

    Args:
        count: Gives the MACs of each evaluation of a configuration, which is for its own length.
        guided: Evaluations may compute the conditional half only.
    """

    def __init__(self, count: Callable[[Config], list[float]], guided: bool) -> None:
        self._second: dict[int, float] = {}
        self._shallow: dict[int, float] = {}
        keys = (0, 3, 4, 5, 6) if guided else (0, 3, 4)
        for depth in _DEPTHS:
            rule = Config(
                num_evaluations=7, key_steps=keys,
                control_key_steps=(0, 3, *keys[3:4]), conditional_key_steps=keys[3:],
            )  # fmt: skip
            rule = _of_depth(rule, depth, guided)
            each = count(rule)
            self._first, self._second[depth], self._shallow[depth] = each[:3]
            # by whether the conditional half, and whether the ControlNets are computed
            self._key = {(False, True): each[3], (False, False): each[4]}
            if guided:
                self._key.update({(True, True): each[5], (True, False): each[6]})

    def of(self, rule: Config) -> float:
        """MACs of a run of ``rule``."""
        keys = rule.key_steps or ()
        control = keys if rule.control_key_steps is None else rule.control_key_steps
        total = self._first
        for i in range(1, rule.num_evaluations):
            if i in keys:
                total += self._key[i in rule.conditional_key_steps, i in control]
            elif rule.depth:  # else nothing is computed
                total += self._second[rule.depth] if i == 1 else self._shallow[rule.depth]
        return total


def _starts(
    limit: float, cost: Callable[[Config], float], lengths: Sequence[int], guided: bool
) -> Iterator[Config]:
    """Rules with evenly spread keys that use up the budget, the one with most keys of each kind."""
    for count, depth in itertools.product(lengths, (0, *_DEPTHS)):
        for keys in range(count - 1, 1, -1):
            spread = sorted({round(j * (count - 1) / (keys - 1)) for j in range(keys)})
            rule = Config(name="calibrated", num_evaluations=count, key_steps=tuple(spread))
            rule = _of_depth(rule, depth, guided)
            if cost(rule) <= limit:
                yield rule
                break


def _of_depth(rule: Config, depth: int, guided: bool) -> Config:
    """``rule`` with so many layers between its keys, which correct the forecast of x0 as those of
    the preset "paper" do; 0: nothing is run there."""
    if depth == 0:
        return rule.replace(depth=0)
    paper = PRESETS["paper"]
    return rule.replace(
        depth=depth, guidance=paper.guidance if guided else "both", attention=paper.attention,
        feature_damping=paper.feature_damping, gain=paper.gain,
        difference_damping=paper.difference_damping if guided else 0.0,
    )  # fmt: skip


def hand_made(
    limit: float, cost: Callable[[Config], float], lengths: Sequence[int], guided: bool
) -> list[Config]:
    """The presets within ``limit``, for each length that may be taken, the dearest first."""
    found: list[Config] = []
    for preset, count in itertools.product(PRESETS.values(), lengths):
        if preset.key_steps is None:
            continue
        keys = scaled_key_steps(preset.key_steps, preset.num_evaluations, count)
        halves = carried_over(preset, preset.conditional_key_steps, keys, count)
        rule = preset.replace(
            num_evaluations=count, key_steps=keys, conditional_key_steps=tuple(sorted(halves))
        )
        if not guided:
            rule = rule.replace(guidance="both", conditional_key_steps=(), difference_damping=0.0)
        if cost(rule) <= limit and len(keys) < count:
            found.append(rule)
    return sorted(found, key=cost, reverse=True)


def _neighbours(rule: Config, guided: bool) -> Iterator[Config]:
    """Rules that differ from ``rule`` in one thing."""
    keys, halves = rule.key_steps or (), rule.conditional_key_steps
    control = keys if rule.control_key_steps is None else rule.control_key_steps

    def with_keys(those: Iterable[int], halves: Iterable[int], control: Iterable[int]) -> Config:
        those, control = tuple(sorted(those)), tuple(sorted(control))
        return rule.replace(
            key_steps=those, conditional_key_steps=tuple(sorted(halves)),
            control_key_steps=None if control == those else control,
        )  # fmt: skip

    if guided:
        for key in keys[2:]:
            yield with_keys(keys, {*halves} ^ {key}, control)
    for key in keys[1:] if rule.control == "reuse" else ():
        yield with_keys(keys, halves, {*control} ^ {key})
    for key in set(range(1, rule.num_evaluations)) - set(keys):
        yield with_keys({*keys, key}, halves, {*control, key})
        if len(keys) > 2:
            # another key gives up its ControlNet for it
            for given in keys[1:]:
                yield with_keys({*keys, key}, halves, {*control} - {given} | {key})
    for old, move in itertools.product(keys[1:], (-1, 1)):
        new = old + move
        if new not in keys and new < rule.num_evaluations:
            yield with_keys(
                *({new if k == old else k for k in of} for of in (keys, halves, control))
            )
    for old in keys[1:]:
        # one key less: what it frees may go to another depth or key
        yield with_keys(*({*of} - {old} for of in (keys, halves, control)))
    for depth in (0, *_DEPTHS):
        if 0 in (depth, rule.depth) and depth != rule.depth:
            yield _of_depth(rule, depth, guided)
        elif depth != rule.depth:
            yield rule.replace(depth=depth)


class Search:
    """Steepest of random neighbours, from the best of evenly spread rules.

    Args:
        trial: Of the pipelines.
        cost: MACs of a rule, in the unit of the limits given to :meth:`best`.
        which: The inputs that are searched on.
        lengths: Steps by the number of evaluations they make: those that may be taken.
        rng: Of the order in which neighbours are tried.
        step: Called with the best distance after each trial.
    """

    def __init__(
        self,
        trial: Trial,
        cost: Callable[[Config], float],
        which: Sequence[int],
        lengths: Mapping[int, int],
        rng: random.Random,
        step: Callable[[str], None] = lambda label: None,
    ) -> None:
        self._trial, self._cost, self._which = trial, cost, which
        self._lengths, self._rng, self._step = lengths, rng, step
        self._guided = trial.facts.guidance
        self._tried: dict[Config, float] = {}
        self.left = 0

    def score(self, rule: Config) -> float:
        """The distance to be made small."""
        if rule not in self._tried:
            self.left -= 1
            steps = self._lengths[rule.num_evaluations]
            found = self._trial.distances(rule, steps, self._which)
            self._tried[rule] = sum(found) / len(found) + _WORST * max(found)
            self._step(f"distance {min(self._tried.values()):.4f}")
        return self._tried[rule]

    def best(self, limit: float, trials: int, start: Sequence[Config] = ()) -> Config | None:
        """The best rule within ``limit`` that ``trials`` more runs find, from the rules ``start``
        too."""
        self.left = trials
        pool = sorted(
            _starts(limit, self._cost, list(self._lengths), self._guided),
            key=lambda rule: -self._cost(rule),
        )
        best: Config | None = None
        for rule in [*start, *pool][: max(1, trials // 2)]:
            if best is None or self.score(rule) < self.score(best):
                best = rule
        while best is not None and self.left > 0:
            around = [r for r in _neighbours(best, self._guided) if self._cost(r) <= limit]
            self._rng.shuffle(around)
            for rule in around:
                if self.left <= 0:
                    break
                if self.score(rule) < self.score(best):
                    best = rule
                    break
            else:
                break
        return best
