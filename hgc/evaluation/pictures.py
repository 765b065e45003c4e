"""The grid of pictures, and the plot of work against distance and loss."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hgc.evaluation import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

    from hgc.evaluation.rows import Row

__all__ = [
    "AMPLIFIED",
    "FLIP_LIGHTEST",
    "GridRow",
    "difference",
    "grid",
    "pareto",
    "visible",
]

# Differences of a few percent of the brightness range are what there is to see.
AMPLIFIED = 8
# FLIP from which on a pixel of its map is of the lightest colour.
FLIP_LIGHTEST = 0.5
_SCALE = 6
_GAP = 6
_FONT = 34


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


def visible(image: np.ndarray, reference: np.ndarray) -> np.ndarray | None:
    """FLIP of each pixel as a colour: black where there is nothing to see, yellow from
    `FLIP_LIGHTEST` on. float [H, W, 3] in [0, 1]; None where flip-evaluator is not installed."""
    from matplotlib import colormaps

    maps = metrics.flip_maps(image[None], reference[None])
    return None if maps is None else colormaps["magma"](maps[0] / FLIP_LIGHTEST)[..., :3]


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
    """Condition, uncached, then each of ``names`` with its difference beside it: the map of FLIP,
    or the amplified difference where flip-evaluator is not installed.

    names: one a column of ``GridRow.others``; a line break splits a label.
    """
    from PIL import Image, ImageDraw

    heads = ["condition", "uncached"]
    seen = metrics.flip_version() is not None
    for name in names:
        heads += [name, "FLIP" if seen else f"|difference|\nx {AMPLIFIED}"]
    cells = []
    for row in rows:
        line = [row.condition, row.uncached]
        for other in row.others:
            of_flip = visible(other, row.uncached)
            line += [other, difference(other, row.uncached) if of_flip is None else of_flip]
        cells.append([_enlarged(image) for image in line])
    side_w, side_h = cells[0][0].size
    font, small = _font(_FONT), _font(_FONT - 4)
    head = 3 * _FONT + 2 * _GAP
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


_DPI = 110
# Pixels between a point and its label, and the directions it may lie in, the best first.
_RADII = (4, 10, 18, 28, 40, 55, 75, 100)
_ANGLES = tuple(math.radians(a) for a in (45, -45, 135, -135, 0, 180, 90, -90, 20, -20, 160, -160))
_BESIDE = 10
_COLOURS = (
    "tab:blue", "0.45", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink",
    "tab:olive", "tab:cyan", "black",
)  # fmt: skip


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
        figsize=(5.2 * len(conditions), 9.0),
        squeeze=False,
        layout="constrained",
        dpi=_DPI,
    )
    drawn = [row for row in rows if row.macs is not None and row["distance"].mean > 0]
    colours = dict(zip(dict.fromkeys(r.method for r in drawn), itertools.cycle(_COLOURS)))
    labels: list[tuple[Axes, list[_Label]]] = []
    legend = {}
    for column, condition in enumerate(conditions):
        part = [row for row in rows if row.condition == condition]
        of_panels: tuple[list[_Label], list[_Label]] = ([], [])
        for method, colour in colours.items():
            own = [row for row in drawn if row.condition == condition and row.method == method]
            own.sort(key=_work)
            if not own:
                continue
            works = [_work(row) for row in own]
            for axis, texts, values, bars in (
                (axes[0][column], of_panels[0], *_of(own, "distance")),
                (axes[1][column], of_panels[1], *_of(own, "loss", 100)),
            ):
                legend[method] = axis.errorbar(
                    works, values, yerr=bars, fmt="o-", color=colour, capsize=3, label=method,
                    alpha=0.8,
                )  # fmt: skip
                # the line's colour names the scheduler
                texts += [
                    _Label(row.name.partition("@")[0], x, y, colour)
                    for row, x, y in zip(own, works, values, strict=True)
                    if row.shown
                ]
        unit = "SD1.5 TMACs" if part[0].sd15_macs is not None else "TMACs a picture"
        for axis, texts in zip(axes[:, column], of_panels, strict=True):
            axis.set_xlabel(f"{unit} (attention matmuls left out)")
            axis.grid(alpha=0.3)
            axis.margins(x=0.15)
            labels.append((axis, texts))
        axes[0][column].set_title(f"{condition}, {part[0].scenes} scenes")
        axes[0][column].set_ylabel("relative L2 to the uncached picture")
        axes[0][column].set_ylim(bottom=0)
        axes[1][column].set_ylabel(f"loss of fidelity ({part[0].measure}), %")
        axes[1][column].axhline(0, color="0.7", linewidth=1)
    if legend:
        figure.legend(
            [*legend.values()], [*legend], loc="outside lower center",
            ncols=min(len(legend), 2 * len(conditions)), fontsize=9, frameon=False,
        )  # fmt: skip
    # labels are placed in pixels, which the layout has to settle first
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis, texts in labels:
        _place(axis, texts)
    figure.savefig(path, format="png")
    pyplot.close(figure)


@dataclasses.dataclass(frozen=True)
class _Label:
    """The name of a point of the plot."""

    text: str
    x: float
    y: float
    colour: str


def _place(axis: Axes, labels: Sequence[_Label]) -> None:
    """Write each label near its point: on no other label, and on as few points, lines and bars as
    can be; a thin line leads to the point of a label that had to go farther."""
    from matplotlib import patheffects

    obstacles = _drawn_pixels(axis)
    frame = axis.get_window_extent()
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    for label in labels:
        at = axis.transData.transform((label.x, label.y))
        probe = axis.text(label.x, label.y, label.text, fontsize=8)
        box = probe.get_window_extent()
        probe.remove()
        half = np.array([box.width / 2 + 2, box.height / 2 + 1])
        best = None
        for radius, angle in itertools.product(_RADII, _ANGLES):
            way = np.array([math.cos(angle), math.sin(angle)])
            offset = way * (half + radius)
            low, high = at + offset - half, at + offset + half
            covered = int(((obstacles > low) & (obstacles < high)).all(axis=1).sum())
            others = sum(_shared(low, high, other) for other in taken)
            outside = bool((low < frame.min).any() or (high > frame.max).any())
            cost = (others + 1e6 * outside, covered + 0.2 * radius)
            if best is None or cost < best[0]:
                best = cost, offset, radius, (low, high)
        assert best is not None
        _, offset, radius, place = best
        line = {"arrowstyle": "-", "color": label.colour, "lw": 0.6, "shrinkB": 3}
        axis.annotate(
            label.text, (label.x, label.y), xytext=tuple(offset), textcoords="offset pixels",
            ha="center", va="center", fontsize=8, color=label.colour, path_effects=halo,
            arrowprops=line if radius > _BESIDE else None,
        )  # fmt: skip
        taken.append(place)


def _shared(low: np.ndarray, high: np.ndarray, other: tuple[np.ndarray, np.ndarray]) -> float:
    """Pixels that two boxes have in common."""
    sides = np.minimum(high, other[1]) - np.maximum(low, other[0])
    return float(np.clip(sides, 0.0, None).prod())


def _drawn_pixels(axis: Axes) -> np.ndarray:
    """Where the lines, points and bars of a panel are, every few pixels: float [N, 2]."""
    from matplotlib.collections import LineCollection

    found = []
    # each with its own transform: the x of a horizontal line is in shares of the panel
    paths = [(line.get_transform(), line.get_xydata()) for line in axis.lines]
    bars = [one for one in axis.collections if isinstance(one, LineCollection)]
    paths += [(one.get_transform(), part) for one in bars for part in one.get_segments()]
    for transform, path in paths:
        corners = transform.transform(path)
        found.append(np.repeat(corners, 15, axis=0))  # a point is worse to cover than a line
        for one, other in itertools.pairwise(corners):
            count = 2 + int(np.hypot(*(other - one)) / 4)
            found.append(np.linspace(one, other, count))
    return np.concatenate(found) if found else np.empty((0, 2))


def _work(row: Row) -> float:
    macs = row.sd15_macs or row.macs
    assert macs is not None
    return macs.paper / 1e12


def _of(rows: Sequence[Row], name: str, times: float = 1.0) -> tuple[list[float], np.ndarray]:
    """A figure of each row, and how far the bar reaches below and above it."""
    found = [row[name] for row in rows]
    ends = [(s.mean, s.worst) if s.worst is not None else (s.low, s.high) for s in found]
    bars = [(s.mean - low, high - s.mean) for s, (low, high) in zip(found, ends, strict=True)]
    return [times * s.mean for s in found], times * np.array(bars).T.clip(min=0.0)
