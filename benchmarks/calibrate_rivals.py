"""Refine the coefficients of the rivals that cache nothing, as those of the calibrated plans are.

    python benchmarks/calibrate_rivals.py
    python benchmarks/calibrate_rivals.py --testbed benchmarks/other_model --guidance 5

Writes the rows "skip-x0-calibrated" and "fewer-steps-calibrated" of `hgc eval`: a file a row, into
hgc/testbed/plans, or beside the other model's folder into FOLDER-plans. One that is there is kept,
so an interrupted run goes on with the next. Scenes are those of search_presets.py: no table uses
them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from search_presets import CHECKED, SEARCHED, Reseeded, calibration_of, items

from hgc.evaluation.peers import refined_rows, unrefined
from hgc.evaluation.subject import Testbed, make_scheduler
from hgc.testbed import GUIDANCE_SCALE
from hgc.tune.refine import coefficients, refine

ROWS = ("skip-x0-calibrated", "fewer-steps-calibrated")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="or skip-x0-8-calibrated")
    parser.add_argument("--testbed", type=Path, help="another model's folder")
    parser.add_argument("--steps", type=int, default=20, help="of the uncached run")
    parser.add_argument("--scenes", type=int, default=16, help="a condition")
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE, help="scale")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    subject, since = Testbed(options.testbed), time.monotonic()
    assert subject.plans is not None
    subject.plans.mkdir(exist_ok=True)
    rows = [row for name in options.rows for row in refined_rows(name, options.steps)]
    rows = [(row, name) for row, name in rows if not (subject.plans / f"{row}.json").exists()]
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
    for row, name in rows:
        for pipe, _ in (*trials[0].items, *trials[1].items):
            pipe.scheduler = (
                own if name is None else make_scheduler(name, own.config, options.steps)
            )
        rule = unrefined(row, options.steps)
        steps = rule.num_evaluations
        print(
            f"{time.monotonic() - since:5.0f}s {row}: {coefficients(rule)} coefficients", flush=True
        )

        def errors(config, steps=steps):
            return trials[0].errors(config, steps, which)

        def say(distance):
            print(f"{time.monotonic() - since:5.0f}s {distance:.4f}", flush=True)

        refined = refine(rule, errors, on_run=say)
        found = {config: trials[1].distances(config, steps, which) for config in (rule, refined)}
        best = min(found, key=lambda config: sum(found[config]))
        record = calibration_of(best, found[best], trials[1], options.steps, subject)
        best.replace(name=row, calibration=record).to_json(subject.plans / f"{row}.json")
        means = [sum(distances) / len(distances) for distances in found.values()]
        print(f"{row}: {means[0]:.4f} before, {means[-1]:.4f} after, on other scenes", flush=True)


if __name__ == "__main__":
    main()
