"""``hgc demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hgc.cli.console import as_usage, console, needs, progress, quiet_libraries, split, writable
from hgc.cli.results import chosen_conditions, print_rows

if TYPE_CHECKING:
    from PIL import Image

    from hgc.evaluation import Batch, Candidate

__all__ = ["run"]


def run(
    out: Path, conditions: str, scenes: int, presets: str, seed: int, steps: int, show: int
) -> None:
    """Compare presets on the testbed; print the table and write the pictures."""
    needs("demo", "transformers", "PIL", "skimage", "torchmetrics")
    quiet_libraries()
    writable(out)
    names = chosen_conditions(conditions)

    from hgc import testbed
    from hgc.evaluation import Settings, candidates, evaluate

    settings = Settings(scenes=scenes, steps=steps, seed=seed)
    with as_usage(FileNotFoundError):
        testbed.path()
    pictures: dict[tuple[str, str], np.ndarray] = {}

    def keep(batch: Batch) -> None:
        if batch.start < show:
            place = (batch.condition, batch.candidate.name)
            old = pictures.get(place)
            images = batch.images if old is None else np.concatenate([old, batch.images])
            pictures[place] = images[:show]

    with progress() as bar:
        order = candidates([*split(presets), "fewer-steps"], steps)
        rows = evaluate(names, order, settings, on_images=keep, on_progress=bar)
    printer = console()
    print_rows(printer, rows, settings, statistics=False)
    with as_usage(OSError):
        _grid(names, order, pictures, min(show, scenes), settings.steps).save(out)
    printer.print(f"wrote {out.resolve()}", soft_wrap=True)


def _grid(
    conditions: Sequence[str],
    order: Sequence[Candidate],
    pictures: dict[tuple[str, str], np.ndarray],
    show: int,
    steps: int,
) -> Image.Image:
    from hgc import testbed
    from hgc.evaluation.models import sd15_macs
    from hgc.evaluation.pictures import AMPLIFIED, GridRow, grid

    cached = [one for one in order if one.config is not None]
    # A column of pictures equal to the uncached ones bit for bit shows nothing.
    same = {
        one.name
        for one in cached
        if all(np.array_equal(pictures[c, one.name], pictures[c, "uncached"]) for c in conditions)
    }
    shown = [one for one in cached if one.name not in same]
    rows = []
    for i, scene in enumerate(testbed.held_out(show)):
        for condition in conditions:
            rows.append(
                GridRow(
                    label=condition,
                    condition=np.asarray(testbed.condition_image(scene, condition)),
                    uncached=pictures[condition, "uncached"][i],
                    others=tuple(pictures[condition, one.name][i] for one in shown),
                )
            )
    full = sd15_macs(None, steps)
    heads = [
        f"{one.name}, {one.steps} steps\n"
        f"{sd15_macs(one.config, one.steps).paper / full.paper:.0%} of the MACs"
        for one in shown
    ]
    title = (
        f"hgc on the testbed, uncached: {steps} steps; MACs in SD1.5 terms; differences from the "
        f"uncached picture, x {AMPLIFIED}"
    )
    if same:
        title += f"; not shown, equal bit for bit: {', '.join(sorted(same))}"
    return grid(rows, heads, title)
