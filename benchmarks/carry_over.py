"""Calibrated plans with schedulers they were not calibrated with.

    python benchmarks/carry_over.py                  # the table
    python benchmarks/carry_over.py --write          # and docs/measured.md

Each plan is run at its own number of steps, beside the hand-made rule that it was fitted from,
which has the same key steps and nearly the same MACs. The distance is the relative L2 of the
picture to that of the same scheduler's uncached run of 20 steps. Where hgc sees that a plan does
not apply (other timesteps; another number of steps always) it follows the rule, and warns: the
column "followed" says which of the two a run was. Scenes are held out from training, calibration
and the tables.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from search_presets import Reseeded, items

from hgc import Config, testbed
from hgc.engine import HgcWarning
from hgc.evaluation.subject import make_scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from measured import commit, table, write_section

_FIRST = 14_000  # of the scenes
_UNCACHED_STEPS = 20


def compare(trial, config, which):
    """Whether the plan was followed, and the distances of the plan and of its rule."""
    steps = config.num_evaluations
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = trial.distances(config, steps, which)
    fell_back = any("instead of steps" in str(w.message) for w in said
                    if issubclass(w.category, HgcWarning))  # fmt: skip
    return "rule" if fell_back else "plan", ours, trial.distances(config.rule, steps, which)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=16, help="a condition")
    parser.add_argument("--conditions", nargs="+", default=list(testbed.CONDITIONS))
    parser.add_argument("--schedulers", nargs="+", default=["dpm++2m", "deis", "ddim"])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = []
    made = items(options.conditions, options.scenes, _FIRST)
    own = [pipe.scheduler for pipe, _ in made]
    which = range(len(made))
    for scheduler in options.schedulers:
        for (pipe, _), one in zip(made, own, strict=True):
            pipe.scheduler = make_scheduler(scheduler, one.config)
        trial = Reseeded(made, _UNCACHED_STEPS, output="pt")
        for name, path in testbed.plans().items():
            config = Config.of(str(path))
            followed, *both = compare(trial, config, which)
            found = [f"{sum(d) / len(d):.4f} ({max(d):.3f})" for d in both]
            rows.append([scheduler, f"`{name}`", config.num_evaluations, followed, *found])
            print(*rows[-1], flush=True)
    if options.write:
        heads = ["scheduler", "plan", "steps", "followed", "distance (worst)", "its rule's"]
        write_section(
            "carry-over",
            "python benchmarks/carry_over.py --write",
            "## Calibrated plans with other schedulers\n\n"
            f"The testbed, {options.scenes} scenes of each of {len(made)} conditions, guidance "
            f"{testbed.GUIDANCE_SCALE}, commit {commit()}. Mean distance (worst) to the same "
            f"scheduler's uncached picture of {_UNCACHED_STEPS} steps. Calibrated with UniPC. At "
            "another number of steps a calibrated plan always follows its rule.\n\n"
            + table(heads, rows),
        )


if __name__ == "__main__":
    main()
