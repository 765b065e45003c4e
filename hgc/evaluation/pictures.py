"""The grid of pictures and the plot of work against distance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from hgc.evaluation.measure import Row

__all__ = ["AMPLIFIED", "GridRow", "difference", "grid", "pareto"]

# Differences of a few percent of the brightness range are what there is to see.
AMPLIFIED = 8
_SCALE = 4
_GAP = 6
_FONT = 22


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One row of the grid.

    Attributes:
        label: At its left.
        condition: uint8 [H, W, 3].
        uncached: float [H, W, 3] in [0, 1].
        others: The same for each column of the grid.
    """

    label: str
    condition: np.ndarray
    uncached: np.ndarray
    others: tuple[np.ndarray, ...]


def difference(image: np.ndarray, reference: np.ndarray, times: float = AMPLIFIED) -> np.ndarray:
    """|image - reference| times ``times``, float in [0, 1]."""
    return np.clip(np.abs(image - reference) * times, 0.0, 1.0)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrapped(text: str, font: Any, width: float) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _enlarged(image: np.ndarray) -> Image.Image:
    from PIL import Image

    pixels = image if image.dtype == np.uint8 else (image * 255 + 0.5).astype(np.uint8)
    picture = Image.fromarray(pixels)
    size = (picture.width * _SCALE, picture.height * _SCALE)
    return picture.resize(size, Image.Resampling.NEAREST)


def grid(rows: Sequence[GridRow], names: Sequence[str], title: str) -> Image.Image:
    """Condition, uncached, then each of ``names`` with its amplified difference beside it.

    names: one a column of ``GridRow.others``; a line break splits a label.
    """
    from PIL import Image, ImageDraw

    heads = ["condition", "uncached"]
    for name in names:
        heads += [name, f"|difference|\nx {AMPLIFIED}"]
    cells = []
    for row in rows:
        line = [row.condition, row.uncached]
        for other in row.others:
            line += [other, difference(other, row.uncached)]
        cells.append([_enlarged(image) for image in line])
    side_w, side_h = cells[0][0].size
    font, small = _font(_FONT), _font(_FONT - 4)
    head = 3 * _FONT + 2 * _GAP + 8
    left = 2 * _FONT
    width = left + len(heads) * (side_w + _GAP) + _GAP
    lines = _wrapped(title, small, width - left - 2 * _GAP)
    foot = (len(lines) + 1) * _FONT
    canvas = Image.new("RGB", (width, head + len(rows) * (side_h + _GAP) + foot), "white")
    draw = ImageDraw.Draw(canvas)
    for x, name in enumerate(heads):
        middle = left + _GAP + x * (side_w + _GAP) + side_w // 2
        draw.multiline_text(
            (middle, head - _GAP), name, fill="black", font=font, anchor="md", align="center"
        )
    for y, (row, pictures) in enumerate(zip(rows, cells, strict=True)):
        top = head + y * (side_h + _GAP)
        label = Image.new("RGB", (side_h, left), "white")
        ImageDraw.Draw(label).text(
            (side_h // 2, left // 2), row.label, fill="black", font=font, anchor="mm"
        )
        canvas.paste(label.rotate(90, expand=True), (0, top))
        for x, picture in enumerate(pictures):
            canvas.paste(picture, (left + _GAP + x * (side_w + _GAP), top))
    for i, text in enumerate(lines):
        at = (left + _GAP, canvas.height - foot + (i + 1) * _FONT)
        draw.text(at, text, fill="black", font=small, anchor="lm")
    return canvas


def pareto(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of SD1.5 MACs against distance, one panel a condition, to ``path``.

    The line is the uncached pipeline with fewer steps: a plan below it is closer to the uncached
    picture than fewer steps at equal work. Bars reach up to the worst 5%.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.condition for row in rows))
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(5.2 * len(names), 4.4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        part = [row for row in rows if row.condition == name]
        fewer = sorted(
            (row for row in part if not row.cached and row.distance > 0),
            key=lambda row: row.sd15_macs_paper,
        )
        axis.errorbar(
            [row.sd15_macs_paper / 1e12 for row in fewer],
            [row.distance for row in fewer],
            yerr=_bars(fewer),
            fmt="o-",
            color="0.55",
            capsize=3,
            label="fewer steps, nothing cached",
        )
        for row in fewer:
            _note(axis, row, row.name)
        plans = [row for row in part if row.cached and row.distance > 0]
        axis.errorbar(
            [row.sd15_macs_paper / 1e12 for row in plans],
            [row.distance for row in plans],
            yerr=_bars(plans),
            fmt="s",
            color="tab:blue",
            capsize=3,
            label="hgc",
        )
        for row in plans:
            _note(axis, row, row.name)
        axis.set_title(f"{name}, {part[0].scenes} scenes")
        axis.set_xlabel("SD1.5 TMACs (attention matmuls left out)")
        axis.set_ylabel("relative L2 to the uncached picture")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(rows: Sequence[Row]) -> list[list[float]]:
    return [[0.0] * len(rows), [max(0.0, row.distance_worst - row.distance) for row in rows]]


def _note(axis: Any, row: Row, text: str) -> None:
    axis.annotate(
        text,
        (row.sd15_macs_paper / 1e12, row.distance),
        textcoords="offset points",
        xytext=(6, 4),
        fontsize=8,
    )
