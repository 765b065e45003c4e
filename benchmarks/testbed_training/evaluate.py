"""The table of docs/testbed.md: what the shipped model can do on held-out scenes."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hgc import testbed
from hgc.testbed import judges
from hgc.testbed.scenes import GROUNDS, LIGHTS, MATERIALS, Scene, caption_of

BATCH = 16


def generate(
    pipe: Any,
    scenes: list[Scene],
    images: list[Any],
    *,
    prompts: list[str] | None = None,
    steps: int = testbed.NUM_STEPS,
    guidance: float = testbed.GUIDANCE_SCALE,
    scale: float = 1.0,
) -> np.ndarray:
    """Pictures uint8 [N, 64, 64, 3]; sample i is seeded with its scene's seed, whatever the
    batch, so every row of a table starts from the same noise."""
    prompts = [s.caption for s in scenes] if prompts is None else prompts
    parts = []
    for start in range(0, len(scenes), BATCH):
        rows = slice(start, start + BATCH)
        seeds = [torch.Generator().manual_seed(s.seed) for s in scenes[rows]]
        out = pipe(
            prompts[rows],
            image=images[rows],
            num_inference_steps=steps,
            guidance_scale=guidance,
            controlnet_conditioning_scale=scale,
            generator=seeds,
            output_type="np",
        ).images
        parts.append((out * 255 + 0.5).astype(np.uint8))
    return np.concatenate(parts)


def _swap_grounds(scenes: list[Scene], pipe: Any, images: list[Any], guidance: float) -> str:
    """Share of the ground's pixels judged as the ground the prompt names, own and swapped."""
    swapped = [GROUNDS[(GROUNDS.index(s.ground) + 1) % len(GROUNDS)] for s in scenes]
    prompts = [caption_of(s.light, g, list(s.solids)) for s, g in zip(scenes, swapped, strict=True)]
    out = generate(pipe, scenes, images, prompts=prompts, guidance=guidance)
    seen = judges.read(out)[0]
    own = np.mean(
        [
            (
                seen[i][s.segmentation == testbed.CLASSES.index(s.ground)]
                == testbed.CLASSES.index(s.ground)
            ).mean()
            for i, s in enumerate(scenes)
        ]
    )
    new = np.mean(
        [
            (
                seen[i][s.segmentation == testbed.CLASSES.index(s.ground)]
                == testbed.CLASSES.index(swapped[i])
            ).mean()
            for i, s in enumerate(scenes)
        ]
    )
    return f"{new:.2f} of the ground's pixels are the new ground, {own:.2f} still the old one"


def _swap_materials(scenes: list[Scene], pipe: Any, images: list[Any], guidance: float) -> str:
    """The same for solids: every solid of a scene is asked for in one material, then another."""
    lines = []
    for material in MATERIALS:
        prompts = [
            caption_of(s.light, s.ground, [(material, f) for _, f in s.solids]) for s in scenes
        ]
        out = generate(pipe, scenes, images, prompts=prompts, guidance=guidance)
        seen = judges.read(out)[0]
        solid = np.stack([s.segmentation >= testbed.CLASSES.index(MATERIALS[0]) for s in scenes])
        share = (seen[solid] == testbed.CLASSES.index(material)).mean()
        lines.append(f"{material} {share:.2f}")
    return "share of the solids' pixels judged as the material asked for: " + ", ".join(lines)


def _swap_lights(scenes: list[Scene], pipe: Any, images: list[Any], guidance: float) -> str:
    """Mean RGB, and the share of pictures whose light is judged as the one asked for."""
    lines = []
    for light in LIGHTS:
        prompts = [caption_of(light, s.ground, list(s.solids)) for s in scenes]
        out = generate(pipe, scenes, images, prompts=prompts, guidance=guidance)
        red, green, blue = out.reshape(-1, 3).mean(0)
        right = (judges.read(out)[2] == LIGHTS.index(light)).mean()
        lines.append(f"{light} ({red:.0f}, {green:.0f}, {blue:.0f}) judged right {right:.2f}")
    return "mean RGB and share judged as asked: " + "; ".join(lines)


def _sheet(rows: list[np.ndarray], path: Path) -> None:
    from PIL import Image

    grid = np.concatenate([np.concatenate(list(row[:8]), axis=1) for row in rows])
    picture = Image.fromarray(grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def evaluate(
    folder: Path | None,
    count: int,
    guidance: float | None = None,
    quick: bool = False,
    sheet: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Measure and print; returns the main figures by name."""
    if folder is not None and (folder / "judge").is_dir():
        judges.set_judge(judges.load_judge(folder / "judge"))
    import diffusers

    guidance = testbed.GUIDANCE_SCALE if guidance is None else guidance
    scenes = testbed.held_out(count)
    steps = testbed.NUM_STEPS
    log(
        f"{count} held-out scenes, UniPC, guidance {guidance}, {platform.machine()} CPU, torch "
        f"{torch.__version__}, diffusers {diffusers.__version__}"
    )
    real = np.stack([s.image for s in scenes])
    figures = {"real": testbed.mean_iou(real, scenes)}
    log(
        f"judge on the renders themselves: mean IoU {figures['real']:.3f}, depth RMSE "
        f"{-testbed.fidelity('depth', real, scenes).mean():.3f}, light "
        f"{(judges.read(real)[2] == [LIGHTS.index(s.light) for s in scenes]).mean():.3f}"
    )
    rows = [real]
    none: np.ndarray | None = None
    conditions = testbed.CONDITIONS if folder is None else testbed.conditions_in(folder)
    for condition in conditions[:1] if quick else conditions:
        pipe = testbed.load_pipeline(condition, folder=folder)
        images = [testbed.condition_image(s, condition) for s in scenes]

        def score(pictures: np.ndarray, condition: str = condition) -> float:
            if condition == "segmentation":
                return testbed.mean_iou(pictures, scenes)
            return float(testbed.fidelity(condition, pictures, scenes).mean())

        start = time.perf_counter()
        full = generate(pipe, scenes, images, guidance=guidance)
        seconds = time.perf_counter() - start
        rows += [np.stack([np.asarray(image) for image in images]), full]
        figures[condition] = score(full)
        parts = [f"{steps} steps {figures[condition]:.4f} ({seconds:.0f} s)"]
        for fewer in (8, 6, 4) if condition == "segmentation" else (4,):
            out = generate(pipe, scenes, images, guidance=guidance, steps=fewer)
            figures[f"{condition}_{fewer}"] = score(out)
            parts.append(f"{fewer} steps {figures[f'{condition}_{fewer}']:.4f}")
        wrong = generate(pipe, scenes, images[1:] + images[:1], guidance=guidance)
        figures[f"{condition}_wrong"] = score(wrong)
        if none is None:
            # At scale 0 the ControlNet adds nothing, so the picture is the same for all four.
            none = generate(pipe, scenes, images, guidance=guidance, scale=0.0)
        figures[f"{condition}_none"] = score(none)
        parts.append(f"another scene's condition {figures[f'{condition}_wrong']:.4f}")
        parts.append(f"no condition {figures[f'{condition}_none']:.4f}")
        log(f"{condition} ({testbed.MEASURES[condition]}): " + ", ".join(parts))
        if condition != "segmentation":
            log(f"  its mean IoU: {testbed.mean_iou(full, scenes):.4f}")
        if quick:
            rows.append(none)
            break
        some, some_images = scenes[:16], images[:16]
        if condition in ("canny", "depth"):
            log(f"  ground swapped: {_swap_grounds(some, pipe, some_images, guidance)}")
        if condition == "depth":
            log(f"  {_swap_materials(some, pipe, some_images, guidance)}")
        if condition == "segmentation":
            log(f"  {_swap_lights(some, pipe, some_images, guidance)}")
    if sheet is not None:
        _sheet(rows, sheet)
    return figures
