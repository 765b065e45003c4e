"""The grid of pictures, the contact sheet of the worst, and the plot of work against loss."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from hgc.evaluation.measure import Row

__all__ = [
    "AMPLIFIED",
    "GridRow",
    "SheetRow",
    "contact_sheet",
    "difference",
    "grid",
    "pareto",
]

# Differences of a few percent of the brightness range are what there is to see.
AMPLIFIED = 8
_SCALE = 4
_GAP = 6
_FONT = 22
# Pixels of a picture on the contact sheet, at least; small ones grow by a whole number.
_SHEET = 128


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


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """The worst pictures of one row of a table.

    Attributes:
        label: Above them.
        cells: For each picture what stands above it, its condition (uint8 [H, W, 3]), and its
            strip: the uncached picture, the row's and the difference beside each other.
    """

    label: str
    cells: tuple[tuple[str, np.ndarray, np.ndarray], ...]


def contact_sheet(rows: Sequence[SheetRow], title: str) -> Image.Image:
    """The worst pictures of each row, worst first: condition, uncached, the row's, difference."""
    from PIL import Image, ImageDraw

    font, small = _font(_FONT - 4), _font(_FONT - 8)
    height = max((strip.shape[0] for row in rows for _, _, strip in row.cells), default=64)
    height *= math.ceil(_SHEET / height)

    def fitted(pixels: np.ndarray) -> Image.Image:
        picture = Image.fromarray(pixels)
        size = (max(1, round(picture.width * height / picture.height)), height)
        return picture.resize(size, Image.Resampling.NEAREST)

    drawn = [[(text, fitted(c), fitted(s)) for text, c, s in row.cells] for row in rows]
    cell = max((c.width + s.width for row in drawn for _, c, s in row), default=4 * height)
    most = max((len(row) for row in drawn), default=1)
    width = _GAP + max(1, most) * (cell + 3 * _GAP)
    line = 2 * _FONT + height + 2 * _GAP
    lines = _wrapped(title, small, width - 2 * _GAP)
    head = (len(lines) + 1) * _FONT
    canvas = Image.new("RGB", (width, head + len(rows) * line), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(lines):
        draw.text((_GAP, (i + 1) * _FONT), text, fill="black", font=small, anchor="lm")
    for y, (row, pictures) in enumerate(zip(rows, drawn, strict=True)):
        top = head + y * line
        draw.text((_GAP, top + _FONT // 2), row.label, fill="black", font=font, anchor="lm")
        for x, (text, condition, strip) in enumerate(pictures):
            left = _GAP + x * (cell + 3 * _GAP)
            at = (left, top + _FONT + _FONT // 2)
            draw.text(at, text, fill="black", font=small, anchor="lm")
            canvas.paste(condition, (left, top + 2 * _FONT))
            canvas.paste(strip, (left + condition.width, top + 2 * _FONT))
    return canvas


_COLOURS = ("tab:blue", "0.45", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def pareto(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of MACs against distance, and below it against the loss of fidelity, to
    ``path``: a column of panels a condition, a line a method.

    A method below the line of fewer steps is closer to the uncached picture at equal work. Bars of
    the distance reach up to the worst 5%, those of the loss over the 95% interval.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    conditions = list(dict.fromkeys(row.condition for row in rows))
    figure, axes = pyplot.subplots(
        2,
        len(conditions),
        figsize=(5.2 * len(conditions), 8.0),
        squeeze=False,
        layout="constrained",
    )
    for column, condition in enumerate(conditions):
        part = [row for row in rows if row.condition == condition]
        points = [(row, work) for row in part if (work := _work(row)) is not None]
        methods = list(dict.fromkeys(row.method for row, _ in points if row.distance > 0))
        for method, colour in zip(methods, itertools.cycle(_COLOURS), strict=False):
            line = sorted(
                ((row, work) for row, work in points if row.method == method and row.distance > 0),
                key=lambda point: point[1],
            )
            own, works = [row for row, _ in line], [work for _, work in line]
            for axis, values, bars in (
                (axes[0][column], [row.distance for row in own], _worst_bars(own)),
                (axes[1][column], [100 * row.loss for row in own], _loss_bars(own)),
            ):
                axis.errorbar(
                    works, values, yerr=bars, fmt="o-", color=colour, capsize=3, label=method,
                    alpha=0.8,
                )  # fmt: skip
                for row, x, y in zip(own, works, values, strict=True):
                    if not row.shown:
                        continue
                    # the line's colour names the scheduler
                    axis.annotate(
                        row.name.partition("@")[0], (x, y), textcoords="offset points",
                        xytext=(6, 4), fontsize=8,
                    )  # fmt: skip
        unit = "SD1.5 TMACs" if part[0].sd15_macs is not None else "TMACs a picture"
        for axis in axes[:, column]:
            axis.set_xlabel(f"{unit} (attention matmuls left out)")
            axis.grid(alpha=0.3)
            axis.margins(x=0.15)
        axes[0][column].set_title(f"{condition}, {part[0].scenes} scenes")
        axes[0][column].set_ylabel("relative L2 to the uncached picture")
        axes[0][column].set_ylim(bottom=0)
        axes[1][column].set_ylabel(f"loss of fidelity ({part[0].measure}), %")
        axes[1][column].axhline(0, color="0.7", linewidth=1)
        if methods:
            axes[0][column].legend(fontsize=8, framealpha=0.5)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _work(row: Row) -> float | None:
    macs = row.macs_paper if row.sd15_macs_paper is None else row.sd15_macs_paper
    return None if macs is None else macs / 1e12


def _worst_bars(rows: Sequence[Row]) -> list[list[float]]:
    return [[0.0] * len(rows), [max(0.0, row.distance_worst - row.distance) for row in rows]]


def _loss_bars(rows: Sequence[Row]) -> list[list[float]]:
    return [
        [max(0.0, 100 * (row.loss - row.loss_low)) for row in rows],
        [max(0.0, 100 * (row.loss_high - row.loss)) for row in rows],
    ]
