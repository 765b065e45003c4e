"""Look for the plan that comes nearest to the uncached picture at a budget of MACs.

    python benchmarks/search_presets.py --budget 5.46 --trials 60 --out plan.json

What `hgc.calibrate` does, on pictures instead of latents, for the testbed's four conditions at
once, and with a budget in T MACs of SD1.5 + ControlNet at 512, in the paper's convention. Scenes
are held out from training and from the tables: they start at 10000, those that check the result at
11000. The score is the mean relative L2 distance of the pictures to those of 20 uncached steps,
plus a tenth of the worst one's.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

import hgc
from hgc import Config, testbed
from hgc.calibration import Search, Trial
from hgc.presets import PRESETS

SEARCHED, CHECKED = 10_000, 11_000


class Budget:
    """MACs of a rule on SD1.5, from the count of a few evaluations."""

    def __init__(self) -> None:
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                cross_attention_dim=768, attention_head_dim=8, sample_size=64
            )
            net = ControlNetModel(cross_attention_dim=768, attention_head_dim=8)
        self.shallow = {}
        for depth in (1, 2, 3):
            rule = Config(num_evaluations=4, key_steps=(0, 3), depth=depth, guidance="reuse")
            counted = [e.paper / 1e12 for e in hgc.count_macs(unet, net, rule).evaluations]
            self.first, self.shallow[depth], self.key = counted[0], counted[2], counted[3]

    def of(self, rule: Config) -> float:
        keys = rule.key_steps or ()
        count = self.first + (len(keys) - 1 - len(rule.conditional_key_steps) / 2) * self.key
        for i in range(rule.num_evaluations):
            if i not in keys:
                count += self.shallow[rule.depth] * (2 if i == 1 else 1)
        return count


def items(conditions, scenes, first):
    """A pipeline and the arguments of one call, for each condition."""
    found = testbed.held_out(scenes, first)
    made = []
    for condition in conditions:
        pipe = testbed.load_pipeline(condition)
        pipe.set_progress_bar_config(disable=True)
        made.append(
            (
                pipe,
                {
                    "prompt": [scene.caption for scene in found],
                    "image": [testbed.condition_image(scene, condition) for scene in found],
                    "guidance_scale": testbed.GUIDANCE_SCALE,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--conditions", nargs="+", default=list(testbed.CONDITIONS))
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--start", nargs="*", default=[], help="presets to start from too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    budget, since = Budget(), time.monotonic()
    trial = Reseeded(items(options.conditions, options.scenes, SEARCHED), 20, output="pt")
    which = range(len(trial.items))
    search = Search(
        trial, budget.of, which, {n: n for n in options.steps}, random.Random(options.seed),
        lambda label: print(f"{time.monotonic() - since:5.0f}s {label}", flush=True),
    )  # fmt: skip
    start = [
        rule
        for rule in (PRESETS[name].replace(steps=None, calibration=None) for name in options.start)
        if budget.of(rule) <= options.budget and rule.num_evaluations in options.steps
    ]
    best = search.best(options.budget, options.trials, start)
    if best is None:
        raise SystemExit(f"--budget {options.budget}: no plan is that cheap")
    print(best.replace(steps=None), f"{budget.of(best):.3f} T")
    check = Reseeded(items(options.conditions, options.scenes, CHECKED), 20, output="pt")
    rule = best.replace(steps=None)
    for name, config in (("fitted", best), ("rule", rule)):
        for i, condition in enumerate(options.conditions):
            found = check.distances(config, config.num_evaluations, [i])
            print(f"{name} {condition} {sum(found) / len(found):.4f} worst {max(found):.4f}")
    if options.out:
        best.to_json(options.out)


if __name__ == "__main__":
    main()
