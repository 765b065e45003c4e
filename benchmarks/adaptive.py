"""Whether key steps that each run places itself come nearer than a fixed rule at equal MACs.

    python benchmarks/adaptive.py --write

For the budgets of the presets `paper` and `balanced`: the preset; `Config.adaptive` with one
picture a call, so that each has key steps of its own; with eight a call, which share them; and the
key steps that the first of the two made most often, as fixed rules for all: those with as many as
its mean number rounded down, and up. The threshold of each is found by bisection on 8 scenes a
condition (13000 on) so that the mean MACs of SD1.5 at 512 are those of the preset; the table is of
16 other scenes a condition (12000 on). Distance: relative L2 of a picture to that of 20 uncached
steps, mean and worst. Below it, what hindsight would give: of 36 placements of seven key steps near
those of `paper` the best one for all pictures, for each batch of eight, and for each picture, on
the 8 scenes. `--write` puts both into docs/measured.md.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import random
import statistics
import sys
from pathlib import Path

import torch

import hgc
from hgc import Config, StepPlan, testbed
from hgc.evaluation.models import load_shapes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from measured import table, write_section

CONDITIONS = ("segmentation", "depth")
TUNED, MEASURED = 13_000, 12_000
STEPS, TOGETHER, ROUNDS = 20, 8, 7
COMMAND = "python benchmarks/adaptive.py --write"


@functools.cache
def pipeline(condition):
    pipe = testbed.load_pipeline(condition)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, scenes, condition):
    return pipe(
        prompt=[scene.caption for scene in scenes],
        image=[testbed.condition_image(scene, condition) for scene in scenes],
        guidance_scale=testbed.GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(scene.seed) for scene in scenes],
        num_inference_steps=STEPS,
        output_type="pt",
    ).images.flatten(1)


@functools.cache
def sets(first, count, together):
    """Of each call its pipeline, scenes, condition and uncached pictures."""
    made = []
    for condition in CONDITIONS:
        found = testbed.held_out(count, first)
        for i in range(0, count, together):
            call = (pipeline(condition), found[i : i + together], condition)
            made.append((*call, draw(*call)))
    return made


@functools.cache
def of_sd15(steps):
    shapes = load_shapes("sd15")
    config = Config(num_evaluations=STEPS, steps=steps)
    return hgc.count_macs(shapes.unet, list(shapes.controlnets), config).paper / 1e12


def performed(report):
    """What the evaluations of a run did, without coefficients, which cost nothing."""
    return tuple(
        StepPlan(
            control=(
                "off" if row.depth == 0 else "compute" if "computed" in row.control else "reuse"
            ),
            depth=row.depth,
            guidance=row.guidance,
        )
        for row in report.rows
    )


def run(config, first, count, together):
    """By picture: condition, distance, TMACs, key steps."""
    rows = []
    for pipe, scenes, condition, reference in sets(first, count, together):
        with hgc.install(pipe, config=config) as installed:
            pictures = draw(pipe, scenes, condition)
            steps = performed(installed.report())
        keys = tuple(i for i, step in enumerate(steps) if step.is_key)
        distances = (pictures - reference).norm(dim=1) / reference.norm(dim=1)
        rows += [(condition, float(d), of_sd15(steps), keys) for d in distances]
    return rows


def tuned(rule, macs, together):
    """``rule`` with the threshold at which its mean MACs are nearest to ``macs``, and the key steps
    that it then makes most often, of the numbers next to its mean."""
    low, high, found = 0.02, 0.6, []
    for _ in range(ROUNDS):
        threshold = round((low * high) ** 0.5, 4)
        config = rule.replace(adaptive=threshold)
        rows = run(config, TUNED, TOGETHER, together)
        mean = statistics.fmean(row[2] for row in rows)
        placed = collections.Counter(row[3] for row in rows).most_common()
        number = statistics.fmean(len(row[3]) for row in rows)
        keys = [
            next(keys for keys, _ in placed if len(keys) == count)
            for count in sorted({math.floor(number), math.ceil(number)})
            if any(len(keys) == count for keys, _ in placed)
        ]
        found.append((abs(mean - macs), config, keys))
        low, high = (low, threshold) if mean < macs else (threshold, high)
    return min(found, key=lambda one: one[0])[1:]


def row(name, config, together):
    rows = run(config, MEASURED, 16, together)
    cells = [name, "" if config.adaptive is None else f"{config.adaptive:.3f}"]
    placed = collections.Counter(row[3] for row in rows)
    cells.append(f"{statistics.fmean(row[2] for row in rows):.2f}T")
    cells.append(f"{statistics.fmean(len(row[3]) for row in rows):.2f} ({len(placed)})")
    for condition in CONDITIONS:
        some = [row[1] for row in rows if row[0] == condition]
        cells.append(f"{statistics.fmean(some):.4f} ({max(some):.4f})")
    cells.append(f"{statistics.fmean(row[1] for row in rows):.4f}")
    print(*cells, sep=" | ", flush=True)
    return cells


def rows_of_all():
    heads = ("key steps", "threshold", "MACs, SD1.5 512", "key evaluations (placements)")
    lines = []
    for budget, rules in (("paper", ["paper"]), ("balanced", ["balanced", "paper"])):
        preset = Config.preset(budget)
        lines.append(row(f"`{budget}`", preset, TOGETHER))
        macs = run(preset, TUNED, 8, TOGETHER)[0][2]
        for rule in map(Config.preset, rules):
            of = f"rule of `{rule.name}`" if rule.name != budget else "its rule"
            config, keys = tuned(rule, macs, 1)
            lines.append(row(f"adaptive, {of}, each picture", config, 1))
            shared, _ = tuned(rule, macs, TOGETHER)
            lines.append(row(f"adaptive, {of}, {TOGETHER} together", shared, TOGETHER))
            for placed in keys:
                # of `balanced`, the last one's nearest key steps compute the conditional half
                half = tuple(k for k in placed if k >= 18) if rule.conditional_key_steps else ()
                fixed = rule.replace(key_steps=placed, conditional_key_steps=half)
                lines.append(row(f"fixed: {' '.join(map(str, placed))}", fixed, TOGETHER))
    return table([*heads, *CONDITIONS, "both"], lines)


def hindsight():
    rule, draws = Config.preset("paper"), random.Random(0)
    keys = rule.key_steps
    placements = [keys]
    while len(placements) < 36:
        moved = [0, *(min(k + draws.choice((-1, 0, 0, 1)), STEPS - 1) for k in keys[1:])]
        if moved == sorted(set(moved)) and moved[1] > 1 and tuple(moved) not in placements:
            placements.append(tuple(moved))
    found = []
    for placed in placements:
        rows = run(rule.replace(key_steps=placed), TUNED, TOGETHER, TOGETHER)
        found.append([row[1] for row in rows])
    distances = torch.tensor(found)  # [placements, pictures]
    for_all = distances.mean(1).min()
    for_batches = distances.unflatten(1, (-1, TOGETHER)).mean(2).amin(0).mean()
    for_each = distances.amin(0).mean()
    line = (
        f"In hindsight, of {len(placements)} placements of seven key steps: `paper`'s "
        f"{distances[0].mean():.4f}, the best one for all {for_all:.4f}, for each batch of "
        f"{TOGETHER} {for_batches:.4f}, for each picture {for_each:.4f}."
    )
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/measured.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = f"{rows_of_all()}\n\n{hindsight()}"
    if options.write:
        write_section("adaptive", COMMAND, found)


if __name__ == "__main__":
    main()
