"""Refine the coefficients of the presets' outputs, and of the rival that caches nothing.

    python benchmarks/refine_plans.py
    python benchmarks/refine_plans.py --testbed benchmarks/other_model --guidance 5

Writes the rows "calibrated" and "fewer-steps-calibrated" of `hgc eval`: a file a row, into
hgc/testbed/plans, or beside the other model's folder into FOLDER-plans. One that is there is kept,
so an interrupted run goes on with the next.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from hgc import testbed
from hgc.evaluation.candidate import equal_steps
from hgc.evaluation.peers import refined_rows
from hgc.evaluation.subject import Testbed, make_scheduler
from hgc.planning.config import Calibration, model_name
from hgc.tune.refine import coefficients, refine
from hgc.tune.trial import Trial

ROWS = ("calibrated", "fewer-steps-calibrated")
# The first scenes that are refined on, and that check the result: no table uses them.
SEARCHED, CHECKED = 10_000, 11_000


def items(conditions, scenes, first, load, guidance):
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
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="or fast-calibrated")
    parser.add_argument("--testbed", type=Path, help="another model's folder")
    parser.add_argument("--steps", type=int, default=20, help="of the uncached run")
    parser.add_argument("--scenes", type=int, default=12, help="a condition")
    parser.add_argument("--guidance", type=float, default=testbed.GUIDANCE_SCALE, help="scale")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    subject, since = Testbed(options.testbed), time.monotonic()
    assert subject.plans is not None
    subject.plans.mkdir(exist_ok=True)
    rows = {}
    for name in options.rows:
        rows |= refined_rows(name, options.steps)
    rows = {row: one for row, one in rows.items() if not (subject.plans / f"{row}.json").exists()}
    if not rows:
        raise SystemExit(f"--rows {' '.join(options.rows)}: none is missing in {subject.plans}")

    def trial(first):
        made = items(
            subject.conditions, options.scenes, first,
            lambda c: subject.load(c, options.device), options.guidance,
        )  # fmt: skip
        return Reseeded(made, options.steps, output="pt")

    trials = [trial(SEARCHED), trial(CHECKED)]
    own = trials[0].items[0][0].scheduler
    which = range(len(subject.conditions))
    for row, (rule, name) in rows.items():
        for pipe, _ in (*trials[0].items, *trials[1].items):
            pipe.scheduler = (
                own if name is None else make_scheduler(name, own.config, options.steps)
            )
        steps = rule.num_evaluations
        print(
            f"{time.monotonic() - since:5.0f}s {row}: {coefficients(rule)} coefficients", flush=True
        )

        def errors(config, steps=steps):
            return trials[0].errors(config, steps, which)

        def say(distance):
            print(f"{time.monotonic() - since:5.0f}s {distance:.4f}", flush=True)

        refined = refine(rule, errors, on_run=say).config
        found = {config: trials[1].distances(config, steps, which) for config in (rule, refined)}
        best = min(found, key=lambda config: sum(found[config]))
        record = calibration_of(best, found[best], trials[1], options.steps, subject)
        best.replace(name=row, calibration=record).to_json(subject.plans / f"{row}.json")
        means = [sum(distances) / len(distances) for distances in found.values()]
        print(f"{row}: {means[0]:.4f} before, {means[-1]:.4f} after, on other scenes", flush=True)


if __name__ == "__main__":
    main()
