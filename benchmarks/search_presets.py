"""Look for the plan that comes nearest to the uncached picture at a budget of MACs.

    python benchmarks/search_presets.py --budget 6 --trials 60 --rounds 1 --out plan.json
    python benchmarks/search_presets.py --budget 5 --trials 0 --start rule.json --rounds 2 \\
        --scenes 16 --steps 9 --out hgc/testbed/plans/fast-calibrated.json

What `hgc.calibrate` does, on pictures instead of latents, for the testbed's four conditions at
once, and with a budget in uncached steps. Scenes are held out from training and from the tables:
they start at 10000, those that check the result at 11000. The score is the mean relative L2
distance of the pictures to those of uncached steps, plus a tenth of the worst one's. Then
`--rounds` refine the outputs' coefficients on whole runs. With `--trials 0` the first rule of
`--start` is taken.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch

import hgc
from hgc import Config, testbed
from hgc.evaluation.candidate import equal_steps
from hgc.evaluation.candidate import testbed as testbed_subject
from hgc.evaluation.models import load_shapes
from hgc.planning.config import Calibration, model_name
from hgc.tune.refine import coefficients, refine
from hgc.tune.search import Costs, Search
from hgc.tune.trial import Trial

SEARCHED, CHECKED = 10_000, 11_000


class Budget:
    """What a rule costs, in uncached steps: counted on SD1.5 at 512 and on the testbed, each with
    attention counted and without, and the largest of the four taken. So a plan that costs at most 6
    is compared with 6 uncached steps (see `hgc.evaluation.candidate.equal_steps`)."""

    def __init__(self) -> None:
        self.costs = []
        for name, size in (("sd15", 512), ("testbed", 64)):
            shapes = load_shapes(name)
            nets = list(shapes.controlnets)
            for kind in ("total", "paper"):

                def count(config, *, shapes=shapes, nets=nets, size=size, kind=kind):
                    done = hgc.count_macs(
                        shapes.unet, nets, config, num_evaluations=config.num_evaluations,
                        height=size, width=size,
                    )  # fmt: skip
                    return [getattr(e, kind) / getattr(done.full_evaluation, kind)
                            for e in done.evaluations]  # fmt: skip

                self.costs.append(Costs(count, guided=True))

    def of(self, rule: Config) -> float:
        return max(cost.of(rule) for cost in self.costs)


def items(conditions, scenes, first, load=testbed.load_pipeline, guidance=testbed.GUIDANCE_SCALE):
    """A pipeline, by ``load`` of its condition, and the arguments of one call, for each condition.
    Each has scenes of its own: one that is left out is not among the others under another
    condition."""
    made = []
    for i, condition in enumerate(conditions):
        found = testbed.held_out(scenes, first + i * scenes)
        pipe = load(condition)
        pipe.set_progress_bar_config(disable=True)
        made.append(
            (
                pipe,
                {
                    "prompt": [scene.caption for scene in found],
                    "image": [testbed.condition_image(scene, condition) for scene in found],
                    "guidance_scale": guidance,
                    "generator": [torch.Generator().manual_seed(scene.seed) for scene in found],
                },
            )
        )
    return made


class Reseeded(Trial):
    """Generators are used up by a call: each starts from its scene's seed again."""

    def _draw(self, index, steps):
        for generator in self.items[index][1]["generator"]:
            generator.manual_seed(generator.initial_seed())
        return super()._draw(index, steps)


def calibration_of(config, distances, check, uncached, subject):
    """The record of what was measured.

    distances: of ``config`` to the pictures of ``check``, which its pipelines made.
    """
    share = subject.macs(config, config.num_evaluations).total / subject.macs(None, uncached).total
    fewer = equal_steps(config, config.num_evaluations, subject)
    plain = check.distances(None, fewer, range(len(check.items)))
    pipe = check.items[0][0]
    check.distances(config, config.num_evaluations, [0])  # of its timesteps
    return Calibration(
        model=model_name(pipe.unet),
        scheduler=type(pipe.scheduler).__name__,
        steps=config.num_evaluations,
        uncached_steps=uncached,
        macs_share=round(share, 6),
        distance=round(sum(distances) / len(distances), 6),
        distance_worst=round(max(distances), 6),
        fewer_steps=fewer,
        fewer_steps_distance=round(sum(plain) / len(plain), 6),
        inputs=2 * len(distances),
        timesteps=tuple(float(t) for t in pipe.scheduler.timesteps),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=0, help="of refinement")
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--uncached-steps", type=int, default=20, help="of the pictures to be near")
    parser.add_argument("--conditions", nargs="+", default=list(testbed.CONDITIONS))
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--start", nargs="*", default=[], help="presets or files to start from too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    budget, since = Budget(), time.monotonic()
    uncached = options.uncached_steps
    trial = Reseeded(items(options.conditions, options.scenes, SEARCHED), uncached, output="pt")
    which = range(len(trial.items))
    search = Search(
        trial, budget.of, which, {n: n for n in options.steps}, random.Random(options.seed),
        lambda label: print(f"{time.monotonic() - since:5.0f}s {label}", flush=True),
    )  # fmt: skip
    start = [
        rule
        for rule in (
            Config.of(name).replace(steps=None, calibration=None) for name in options.start
        )
        if budget.of(rule) <= options.budget and rule.num_evaluations in options.steps
    ]
    best: Config | None
    if options.trials:
        best = search.best(options.budget, options.trials, start)
    else:
        best = search.settled(start[0]) if start else None
    if best is None:
        raise SystemExit(f"--budget {options.budget}: no plan is that cheap")
    rule = best.replace(steps=None)
    print(rule, f"{budget.of(rule):.3f} steps, {coefficients(best)} coefficients", flush=True)

    def errors(config):
        return trial.errors(config, config.num_evaluations, which)

    def say(distance):
        print(f"{time.monotonic() - since:5.0f}s refining {distance:.4f}", flush=True)

    refined = [best]
    for _ in range(options.rounds):
        refined.append(refine(refined[-1], errors, rounds=1, on_run=say))
        if options.out:  # in case it is interrupted
            refined[-1].to_json(options.out)
    check = Reseeded(items(options.conditions, options.scenes, CHECKED), uncached, output="pt")
    named = [(f"refined {n}", config) for n, config in enumerate(refined)]
    every = {}
    for name, config in (("rule", rule), *named):
        every[config] = []
        for i, condition in enumerate(options.conditions):
            found = check.distances(config, config.num_evaluations, [i])
            every[config] += found
            print(f"{name} {condition} {sum(found) / len(found):.4f} worst {max(found):.4f}")
    # the nearest where it was not refined
    best = min((config for _, config in named), key=lambda config: sum(every[config]))
    record = calibration_of(best, every[best], check, uncached, testbed_subject())
    print(record)
    if options.out:
        best.replace(name=options.out.stem, calibration=record).to_json(options.out)


if __name__ == "__main__":
    main()
