"""Look for the rule that comes nearest to the uncached picture at a budget of MACs.

    python benchmarks/search_presets.py --budget 5.6 --minutes 4

Scenes are held out from training, and from the tables: they start at 10000. The budget is in T MACs
of SD1.5 + ControlNet at 512, in the paper's convention. Number of steps, key steps, depth and
damping are varied, one at a time, from the best so far; the score is the mean relative L2 distance
of the pictures to those of 20 uncached steps, plus a tenth of the worst scene's.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

import hgc
from hgc import Config, testbed

FIRST_SCENE = 10_000


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
        keys = rule.key_steps
        count = self.first + (len(keys) - 1 - len(rule.conditional_key_steps) / 2) * self.key
        for i in range(rule.num_evaluations):
            if i not in keys:
                count += self.shallow[rule.depth] * (2 if i == 1 else 1)
        return count


class Scorer:
    """Distances of a rule's pictures to the uncached ones."""

    def __init__(self, conditions: list[str], scenes: int) -> None:
        self.sets = []
        for condition in conditions:
            pipe = testbed.load_pipeline(condition)
            found = testbed.held_out(scenes, FIRST_SCENE)
            images = [testbed.condition_image(s, condition) for s in found]
            self.sets.append((pipe, found, images))
        self.references = [self._draw(*s, 20) for s in self.sets]

    def _draw(self, pipe, scenes, images, steps):
        return pipe(
            [s.caption for s in scenes],
            image=images,
            num_inference_steps=steps,
            guidance_scale=testbed.GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(s.seed) for s in scenes],
            output_type="pt",
        ).images

    def distances(self, rule: Config | None, steps: int) -> torch.Tensor:
        found = []
        for (pipe, scenes, images), reference in zip(self.sets, self.references, strict=True):
            if rule is None:
                out = self._draw(pipe, scenes, images, steps)
            else:
                with hgc.install(pipe.unet, pipe.controlnet, config=rule):
                    out = self._draw(pipe, scenes, images, steps)
            found.append(
                (out - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
            )
        return torch.cat(found)

    def score(self, rule: Config) -> tuple[float, float, float]:
        d = self.distances(rule, rule.num_evaluations)
        return float(d.mean() + 0.1 * d.max()), float(d.mean()), float(d.max())


def neighbours(rule: Config, fixed: bool):
    """Rules that differ in one thing; ``fixed`` keeps the number of steps."""
    keys, halves = rule.key_steps, rule.conditional_key_steps
    for key in keys[2:]:
        changed = set(halves) ^ {key}
        yield rule.replace(conditional_key_steps=tuple(sorted(changed)))
    for key in set(range(1, rule.num_evaluations)) - set(keys):
        yield rule.replace(key_steps=tuple(sorted({*keys, key})))
    for j in range(1, len(keys)):
        for move in (-1, 1):
            moved = sorted({*keys[:j], keys[j] + move, *keys[j + 1 :]})
            if len(moved) == len(keys) and moved[-1] < rule.num_evaluations:
                kept = [keys[j] + move if k == keys[j] else k for k in halves]
                yield rule.replace(key_steps=tuple(moved), conditional_key_steps=tuple(kept))
    for damping in (-0.15, 0.15):
        value = round(rule.forecast + damping, 2)
        yield rule.replace(forecast=value)
        yield rule.replace(guidance_forecast=round(rule.guidance_forecast + damping, 2))
    for depth in {1, 2, 3} - {rule.depth}:
        yield rule.replace(depth=depth)
    for steps in (rule.num_evaluations - 1, rule.num_evaluations + 1):
        if not fixed and not halves and steps > keys[-2] + 1 and steps <= 20:
            scale = (steps - 1) / (rule.num_evaluations - 1)
            scaled = sorted({round(k * scale) for k in keys})
            if len(scaled) == len(keys):
                yield rule.replace(num_evaluations=steps, key_steps=tuple(scaled))


def starts(limit: float, budget: Budget, fixed: int | None):
    """Rules with evenly spread keys that use up the budget."""
    lengths = (10, 12, 14, 17, 20) if fixed is None else (fixed,)
    for steps, depth, count in itertools.product(lengths, (1, 2, 3), range(3, 9)):
        if count >= steps:
            continue
        keys = tuple(round(j * (steps - 1) / (count - 1)) for j in range(count))
        rule = Config(
            name="found", num_evaluations=steps, key_steps=keys, depth=depth, guidance="reuse",
            forecast=0.8, guidance_forecast=0.8,
        )  # fmt: skip
        if limit - 0.9 < budget.of(rule) <= limit:
            yield rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, required=True, help="T MACs")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--conditions", nargs="+", default=["segmentation", "depth"])
    parser.add_argument("--steps", type=int, help="keep to this number of steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    budget, scorer = Budget(), Scorer(arguments.conditions, arguments.scenes)
    for steps in (8, 7, 6, 5, 4):
        d = scorer.distances(None, steps)
        print(f"{steps} uncached steps: {d.mean():.4f} worst {d.max():.4f}", flush=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    tried: dict[str, tuple[float, float, float]] = {}

    def score(rule: Config) -> tuple[float, float, float]:
        text = rule.to_json()
        if text not in tried:
            tried[text] = scorer.score(rule)
            found = tried[text]
            print(
                f"{budget.of(rule):.2f}T {found[1]:.4f} worst {found[2]:.4f} "
                f"steps {rule.num_evaluations} keys {rule.key_steps} depth {rule.depth} "
                f"halves {rule.conditional_key_steps} "
                f"forecast {rule.forecast} guidance {rule.guidance_forecast}",
                flush=True,
            )
        return tried[text]

    pool = sorted(starts(arguments.budget, budget, arguments.steps), key=lambda r: -budget.of(r))
    best = min(pool[:10], key=score)
    while time.monotonic() < deadline:
        around = [
            r
            for r in neighbours(best, arguments.steps is not None)
            if budget.of(r) <= arguments.budget
        ]
        rng.shuffle(around)
        for rule in around:
            if time.monotonic() > deadline:
                break
            if score(rule) < score(best):
                best = rule
                break
        else:
            break
    print(f"best at {budget.of(best):.2f}T: {score(best)}\n{best.to_json()}")


if __name__ == "__main__":
    main()
