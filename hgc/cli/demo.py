"""``hgc demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hgc.cli.console import (
    CliError,
    as_usage,
    console,
    needs,
    progress,
    quiet_libraries,
    split,
    writable,
)
from hgc.cli.results import chosen_conditions, print_rows

if TYPE_CHECKING:
    from PIL import Image

    from hgc.evaluation import Batch, Candidate

__all__ = ["run"]


def run(
    out: Path,
    conditions: str,
    scenes: int,
    presets: str,
    seed: int,
    steps: int,
    show: int,
    html: Path | None,
) -> None:
    """Compare presets on the testbed; print the table and write the pictures, and the page."""
    needs("demo", "transformers", "PIL", "skimage", "torchmetrics", "matplotlib")
    quiet_libraries()
    from PIL import Image

    if out.suffix.lower() not in Image.registered_extensions():
        raise CliError(f"--out {out}: expected a picture's name, as demo.png")
    if html is not None and html.resolve() == out.resolve():
        raise CliError(f"--html {html} is the file of --out")
    for path in (out, html):
        if path is not None:
            writable(path)
    if not split(presets):
        raise CliError("--presets names nothing to compare with the uncached run")
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
        if html is not None:
            from hgc.page.static import write

            with as_usage(OSError):
                write(html, names, order, rows, settings, bar)
    printer = console()
    print_rows(printer, rows, settings, statistics=False)
    with as_usage(OSError):
        _grid(names, order, pictures, min(show, scenes), settings.steps).save(out)
    for path in (out, html):
        if path is not None:
            printer.print(f"wrote {path.resolve()}", soft_wrap=True)


def _grid(
    conditions: Sequence[str],
    order: Sequence[Candidate],
    pictures: dict[tuple[str, str], np.ndarray],
    show: int,
    steps: int,
) -> Image.Image:
    from hgc import testbed
    from hgc.evaluation import metrics
    from hgc.evaluation.models import sd15_macs
    from hgc.evaluation.pictures import AMPLIFIED, FLIP_LIGHTEST, GridRow, grid

    cached = [one for one in order if one.config is not None]
    # A column of pictures equal to the uncached ones bit for bit shows nothing.
    same = {
        one.name
        for one in cached
        if all(np.array_equal(pictures[c, one.name], pictures[c, "uncached"]) for c in conditions)
    }
    shown = [one for one in cached if one.name not in same]
    full = sd15_macs(None, steps).paper
    shares = {one.name: sd15_macs(one.config, one.steps).paper / full for one in shown}
    # Few and large: what costs most and what costs least. The table has them all.
    by_work = sorted(shown, key=lambda one: shares[one.name], reverse=True)
    drawn = by_work if len(by_work) <= 2 else [by_work[0], by_work[-1]]
    left_out = [one.name for one in shown if one not in drawn]
    rows = []
    for i, scene in enumerate(testbed.held_out(show)):
        for condition in conditions:
            rows.append(
                GridRow(
                    label=condition,
                    condition=np.asarray(testbed.condition_image(scene, condition)),
                    uncached=pictures[condition, "uncached"][i],
                    others=tuple(pictures[condition, one.name][i] for one in drawn),
                )
            )
    heads = [f"{one.name}, {one.steps} steps\n{shares[one.name]:.0%} of the MACs" for one in drawn]
    title = f"hgc on the testbed, uncached: {steps} steps; MACs in SD1.5 terms"
    if metrics.flip_version() is None:
        title += f"; differences from the uncached picture, x {AMPLIFIED}"
    else:
        title += (
            f"; FLIP: how visible the difference is, black 0, light yellow {FLIP_LIGHTEST} or more"
        )
    if left_out:
        title += f"; not drawn: {', '.join(left_out)}"
    if same:
        title += f"; equal bit for bit: {', '.join(sorted(same))}"
    return grid(rows, heads, title)
