"""Find a plan for one pipeline and a budget, by measuring plans on a few of its own inputs."""

from __future__ import annotations

import dataclasses
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hgc.installation import install
from hgc.models.supported import controlnets
from hgc.planning.config import PRESETS, Calibration, Config, model_name
from hgc.planning.rule import carried_over, scaled_key_steps
from hgc.report.macs import MacCount, count_macs
from hgc.tune.fit import Products, fit
from hgc.tune.refine import coefficients, refine
from hgc.warn import HgcWarning

__all__ = ["calibrate"]

# Distance to the uncached latents: the mean counts in full, the worst input a tenth, so that of two
# plans that are equal on average the one without an outlier is taken.
_WORST = 0.1
_DEPTHS = (1, 2, 3)
_DAMPING, _GUIDANCE_DAMPING = 0.8, 0.35  # of the rule, for runs of other lengths
_ORDERS = (2, 3, 1)
_SHARES_OF_STEPS = (1.0, 0.85, 0.7, 0.6, 0.5)
# Inputs that are kept out of the search, to measure what it found.
_KEPT_OUT = 4
# Uncached steps that presets' budgets are shares of.
_PRESET_STEPS = 20
# Presets that are tried first, and that a plan must beat.
_HAND_MADE = 3


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the uncached run showed: everything a count of MACs needs."""

    evaluations: int
    guidance: bool
    images: int
    height: int
    width: int
    tokens: int

    @property
    def pair_rows(self) -> int | None:
        """Rows of the batch of a guidance pair."""
        return 2 * self.images if self.guidance else None


class Trial:
    """Runs pipelines on inputs, and measures latents against those of the uncached runs.

    Args:
        items: Each a pipeline and the arguments of one call of it.
        steps: Steps of the uncached runs.
        seed: Input ``i`` gets a generator with ``seed + i`` where it has none.
        output: ``output_type`` of the calls: what is measured.
    """

    def __init__(
        self,
        items: Sequence[tuple[Any, Mapping[str, Any]]],
        steps: int,
        seed: int = 0,
        output: str = "latent",
    ) -> None:
        self.items, self.steps, self.seed, self.output = items, steps, seed, output
        self.facts = self._facts()
        self._products: dict[int, Products] = {}
        self.references = [self._draw(i, steps) for i in range(len(items))]

    def _facts(self) -> _Facts:
        calls: list[tuple[torch.Size, torch.Size]] = []

        def count(module: Any, args: Any, kwargs: Any) -> None:
            sample = args[0] if args else kwargs["sample"]
            calls.append((sample.shape, kwargs["encoder_hidden_states"].shape))

        hook = self.items[0][0].unet.register_forward_pre_hook(count, with_kwargs=True)
        try:
            images = len(self._draw(0, self.steps))
        finally:
            hook.remove()
        (rows, _, height, width), text = calls[0]
        return _Facts(len(calls), rows == 2 * images, images, height, width, text[1])

    def _draw(self, index: int, steps: int) -> torch.Tensor:
        pipe, arguments = self.items[index]
        several = [torch.Generator().manual_seed(self.seed + index)]
        prompts = arguments.get("prompt")
        if isinstance(prompts, list):
            several = [
                torch.Generator().manual_seed(1000 * (self.seed + index) + i)
                for i in range(len(prompts) * arguments.get("num_images_per_prompt", 1))
            ]
        latents = pipe(
            **{
                "generator": several if len(several) > 1 else several[0],
                **arguments,
                "num_inference_steps": steps,
                "output_type": self.output,
            }
        ).images
        return latents.detach().float()

    def errors(self, config: Config | None, steps: int, which: Sequence[int]) -> list[torch.Tensor]:
        """The error of each picture's latents, flat, over the norm of the uncached ones: with
        ``config``, or without hgc at ``steps``."""
        found: list[torch.Tensor] = []
        for i in which:
            pipe = self.items[i][0]
            if config is None:
                latents = self._draw(i, steps)
            else:
                with install(pipe, config=config):
                    latents = self._draw(i, steps)
            reference = self.references[i].flatten(1)
            found += ((latents.flatten(1) - reference) / reference.norm(dim=1, keepdim=True)).cpu()
        return found

    def distances(self, config: Config | None, steps: int, which: Sequence[int]) -> list[float]:
        """Relative L2 of each picture's latents: norms of :meth:`errors`."""
        return [float(error.norm()) for error in self.errors(config, steps, which)]

    def products(self, steps: int, which: Sequence[int]) -> Products:
        """Of uncached runs of ``steps`` steps on the inputs ``which``."""
        if steps not in self._products:
            products = self._products[steps] = Products(_DEPTHS)
            for i in which:
                pipe = self.items[i][0]
                nets = getattr(pipe, "controlnet", None)
                rows = self.facts.pair_rows
                with products.recording(pipe.unet, nets, pair_rows=rows):
                    self._draw(i, steps)
        return self._products[steps]


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
                num_evaluations=7, key_steps=keys, depth=depth,
                control_key_steps=(0, 3, *keys[3:4]), conditional_key_steps=keys[3:],
                guidance="reuse" if guided else "both",
            )  # fmt: skip
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


def _pixels_a_latent(pipe: Any) -> int:
    nets = controlnets(getattr(pipe, "controlnet", None))
    if not nets:
        return 8
    return 2 ** (len(nets[0].config.conditioning_embedding_out_channels) - 1)


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
    """``rule`` with so many layers between its keys, and what these forecast by default."""
    if depth == 0:
        return rule.replace(depth=0)
    return rule.replace(
        depth=depth, guidance="reuse" if guided else "both", forecast=_DAMPING,
        guidance_forecast=_GUIDANCE_DAMPING if guided else 0.0,
    )  # fmt: skip


def _hand_made(
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
            rule = rule.replace(guidance="both", conditional_key_steps=(), guidance_forecast=0.0)
        if cost(rule) <= limit and len(keys) < count:
            found.append(rule)
    return sorted(found, key=cost, reverse=True)


def _neighbours(rule: Config, guided: bool) -> Iterator[Config]:
    """Rules that differ from ``rule`` in one thing."""
    keys, halves = rule.key_steps or (), rule.conditional_key_steps
    if guided:
        for key in keys[2:]:
            yield rule.replace(conditional_key_steps=tuple(sorted({*halves} ^ {key})))
    control = keys if rule.control_key_steps is None else rule.control_key_steps
    for key in keys[1:] if rule.control == "reuse" else ():
        toggled = sorted({*control} ^ {key})
        yield rule.replace(control_key_steps=tuple(toggled) if len(toggled) < len(keys) else None)
    for key in set(range(1, rule.num_evaluations)) - set(keys):
        more = None if control == keys else tuple(sorted({*control, key}))
        yield rule.replace(key_steps=tuple(sorted({*keys, key})), control_key_steps=more)
        if len(keys) > 2:
            # another key gives up its ControlNet for it
            for given in keys[1:]:
                less = tuple(sorted(({*control} - {given}) | {key}))
                yield rule.replace(key_steps=tuple(sorted({*keys, key})), control_key_steps=less)
    for j, move in itertools.product(range(1, len(keys)), (-1, 1)):
        moved = sorted({*keys[:j], keys[j] + move, *keys[j + 1 :]})
        if len(moved) == len(keys) and moved[-1] < rule.num_evaluations:
            kept = [keys[j] + move if k == keys[j] else k for k in halves]
            computed = tuple(keys[j] + move if k == keys[j] else k for k in control)
            yield rule.replace(
                key_steps=tuple(moved),
                conditional_key_steps=tuple(kept),
                control_key_steps=None if control == keys else computed,
            )
    for j in range(1, len(keys)):
        # one key less: what it frees may go to another depth or key
        kept_keys = keys[:j] + keys[j + 1 :]
        yield rule.replace(
            key_steps=kept_keys,
            conditional_key_steps=tuple(k for k in halves if k != keys[j]),
            control_key_steps=(
                None if control == keys else tuple(k for k in control if k != keys[j])
            ),
        )
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
        self._tried: dict[Config, tuple[float, Config]] = {}
        self.left = 0

    def _fitted(self, rule: Config) -> Iterator[Config]:
        """What stands for ``rule`` in a trial: its plan with fitted coefficients."""
        products = self._trial.products(self._lengths[rule.num_evaluations], self._which)
        for order in _ORDERS:
            yield fit(rule, products, order=order)

    def measure(self, config: Config) -> float:
        """The distance to be made small."""
        steps = self._lengths[config.num_evaluations]
        found = self._trial.distances(config, steps, self._which)
        return sum(found) / len(found) + _WORST * max(found)

    def score(self, rule: Config) -> float:
        """:meth:`measure` of the fitted plan of ``rule``."""
        if rule not in self._tried:
            self.left -= 1
            config = next(self._fitted(rule))
            self._tried[rule] = (self.measure(config), config)
            self._step(f"distance {min(d for d, _ in self._tried.values()):.4f}")
        return self._tried[rule][0]

    def best(self, limit: float, trials: int, start: Sequence[Config] = ()) -> Config | None:
        """The best plan within ``limit`` that ``trials`` more runs find, from the rules ``start``
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
        return None if best is None else self.settled(best)

    def settled(self, rule: Config) -> Config:
        """``rule`` itself, by damping, or with fitted coefficients of one of several orders: the
        nearest."""
        self.score(rule)
        tried = [self._tried[rule], (self.measure(rule), rule)]
        tried += [(self.measure(config), config) for config in self._fitted(rule)][1:]
        return min(tried, key=lambda pair: pair[0])[1]


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
    only; the depth) from the best so far. The coefficients of each evaluation's forecasts are
    fitted by least squares to uncached runs on the same inputs; first, second and third order and
    a damped extrapolation are tried, and the nearest is kept. Then coefficients of its outputs are
    refined on whole runs (`hgc.tune.refine`), which takes one run for each of them. The
    dearest presets within ``max_macs`` are tried first; of them, the plan that was found and the
    refined one, the nearest on inputs the search did not see is returned, with a warning where it
    is a preset. The distance is the relative
    L2 of the final latents to those of ``steps`` steps without hgc. Of four inputs or more the last
    quarter is kept out of the search, and the distance that is reported is theirs.

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
        other timesteps, it warns and follows the rule it was fitted from (``Config.rule``).

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
    factor = _pixels_a_latent(pipe)

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

    def mean(rule: Config) -> float:
        distances = measured(rule)
        return sum(distances) / len(distances)

    if chosen is not None:
        counted = count(chosen)
        max_macs = counted.total / (counted.full_evaluation.total * _PRESET_STEPS)
    if max_macs is not None:
        hand_made = _hand_made(max_macs * full, costs.of, list(lengths), facts.guidance)[
            :_HAND_MADE
        ]
        best = search.best(max_macs * full, trials, hand_made)
        if best is None:
            raise ValueError(
                f"max_macs={max_macs}: no plan of {min(lengths)} or more evaluations is that cheap"
            )
    else:
        assert max_distance is not None
        hand_made = []
        best = _cheapest(search, full, max_distance, trials, measured)
    candidates = [best, *hand_made]
    if rounds:
        number = lengths[best.num_evaluations]
        tried = next(done) - 1
        total = tried + rounds * (coefficients(best) + 1) + 1
        refined = refine(
            best, lambda config: trial.errors(config, number, which), rounds=rounds,
            on_run=lambda distance: step(f"refining, distance {distance:.4f}"),
        )  # fmt: skip
        candidates.append(refined)
    means = {candidate: mean(candidate) for candidate in candidates}
    best = min(means, key=means.__getitem__)
    if best in hand_made:
        warnings.warn(
            f"on the inputs kept out of the search the preset {best.name!r} is nearer than "
            "any plan that was found: it is returned",
            HgcWarning,
            stacklevel=2,
        )
    found = measured(best)
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
        distance=round(sum(found) / len(found), 6),
        distance_worst=round(max(found), 6),
        fewer_steps=fewer,
        fewer_steps_distance=round(sum(plain) / len(plain), 6),
        inputs=len(inputs),
        timesteps=timesteps,
    )
    return best.replace(name=name, calibration=record)


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
