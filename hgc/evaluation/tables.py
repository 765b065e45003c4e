"""Rows as tables: one list of columns for the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hgc.evaluation.metrics import PIXELS_PER_DEGREE
from hgc.evaluation.rows import Row
from hgc.evaluation.timing import MOST_WAITED

if TYPE_CHECKING:
    from hgc.report.macs import Macs

__all__ = ["COLUMNS", "Column", "caption", "columns", "to_csv", "to_json", "to_markdown", "units"]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table of one condition.

    Attributes:
        head: What stands above it; a line break where it may be split.
        cell: The text of a row.
        left: Aligned to the left.
        statistics: Says something over many scenes only.
    """

    head: str
    cell: Callable[[Row], str]
    left: bool = False
    statistics: bool = False


def _percent(value: float) -> str:
    # minus zero is not worth a minus
    return f"{round(100 * value, 2) + 0.0:.2f}%"


def _loss(row: Row) -> str:
    return "-" if row.name == "uncached" else _percent(row["loss"].mean)


def _interval(row: Row) -> str:
    if row.name == "uncached":
        return "-"
    loss = row["loss"]
    return f"{_percent(loss.low)[:-1]} to {_percent(loss.high)[:-1]}"


def _figure(name: str, form: str) -> Callable[[Row], str]:
    """A figure of a row in ``form``, the format of a summary; "-" where there is none."""

    def cell(row: Row) -> str:
        one = row.figures.get(name)
        if one is None:
            return "-"
        return "0" if one.mean == one.worst == 0.0 else form.format(one)

    return cell


def _with_worst(name: str, digits: int) -> Callable[[Row], str]:
    """The mean of a measure, and that of its worst 5% in brackets."""
    return _figure(name, f"{{0.mean:.{digits}f}} ({{0.worst:.{digits}f}})")


def _work(macs: Macs | None) -> str:
    """In T or in G: the paper's convention, and all in brackets."""
    if macs is None:
        return "-"
    unit, name = (1e12, "T") if macs.total >= 1e11 else (1e9, "G")
    return f"{macs.paper / unit:.2f} ({macs.total / unit:.2f}) {name}"


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


COLUMNS: tuple[Column, ...] = (
    Column("plan", lambda r: r.label, left=True),
    Column("steps", lambda r: str(r.steps)),
    Column("SD1.5 TMACs\n(all)", lambda r: _work(r.sd15_macs).removesuffix(" T")),
    Column("MACs\n(all)", lambda r: _work(r.macs)),
    Column("share", lambda r: "-" if r.macs is None else f"{r.macs.paper / r.full_macs.paper:.1%}"),
    Column("speedup", lambda r: "" if r.speedup is None else f"{r.speedup:.2f}x"),
    Column("fidelity\n(worst 5%)", _with_worst("fidelity", 4)),
    Column("loss", _loss),
    Column("95% interval\nof the loss", _interval, statistics=True),
    Column("distance\n(worst 5%)", _with_worst("distance", 4)),
    Column("FLIP\n(worst 5%)", _with_worst("flip", 4)),
    Column("JOD\n(worst 5%)", _with_worst("jod", 2)),
    Column("over fewer steps'\n(95% interval)",
           _figure("rival_ratio", "{0.mean:.2f} ({0.low:.2f}-{0.high:.2f})"), statistics=True),
    Column("over their\nworst 5%", _figure("rival_ratio", "{0.worst:.2f}"), statistics=True),
    Column("PSNR\n(worst 5%)", _with_worst("psnr", 1), statistics=True),
    Column("SSIM", _figure("ssim", "{0.mean:.4f}"), statistics=True),
    Column("Fréchet", lambda r: _optional(r.frechet, ".4f"), statistics=True),
    Column("prompt", _figure("agreement", "{0.mean:.3f}"), statistics=True),
    Column("KiB\nheld", lambda r: f"{r.held_bytes / 1024:.0f}"),
)  # fmt: skip


def columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Those of `COLUMNS` that say something of ``rows``.

    MACs stand there once: on SD1.5 where the model stands for it.
    """
    for_sd15 = any(row.sd15_macs is not None for row in rows)
    hidden = {"MACs\n(all)" if for_sd15 else "SD1.5 TMACs\n(all)"}
    kept = [column for column in COLUMNS if column.head not in hidden]
    return tuple(c for c in kept if any(c.cell(row) not in ("", "-") for row in rows))


def units(rows: Sequence[Row], agreement: str = "") -> str:
    """What the columns mean, for under the tables of ``rows``, and what they leave out.

    agreement: what the column "prompt" is.
    """
    said = (
        "MACs: multiply-accumulates of one picture under guidance, the two attention "
        "matmuls left out (counted); share: of the uncached run. Speedup: of the whole pipeline "
        "call, against the pipeline without hgc in the same run. Fidelity: to the condition, "
        "higher is better; loss: relative to the uncached row. Distance: relative L2 to the "
        "uncached picture; over fewer steps': that over the distance of the 'vs' row, 0.5 is half "
        "as far. PSNR (dB, 100 at most) and SSIM: to the uncached picture. Fréchet: distance of "
        "the judge's features to those of the uncached pictures. Intervals by bootstrap over "
        "scenes. Worst 5%: mean of the worst pictures. KiB: a picture. 'vs': nothing cached, at "
        "least the MACs of those plans, and the nearest of the schedulers tried."
    )
    if any("flip" in row.figures for row in rows):
        said += (
            " FLIP: how visible the difference is, 0 to 1, every picture seen as large as 512 "
            f"pixels at {PIXELS_PER_DEGREE:.0f} pixels a degree."
        )
    if any("jod" in row.figures for row in rows):
        said += (
            " JOD: just-objectionable differences of ColorVideoVDP, 10 is equal, pictures as large "
            "as for FLIP."
        )
    if agreement:
        said += f" Prompt: {agreement}."
    if not any("flip" in row.figures for row in rows):
        said += " FLIP is left out: flip-evaluator, which the demo extra installs, is not there."
    if any(row.speedup is None for row in rows):
        said += (
            " No speedup: during every call of that row, or of the uncached one beside it, another "
            f"process had the cores for more than {MOST_WAITED:.0%} of the time."
        )
    return said


def caption(row: Row) -> str:
    """What a condition's table is of."""
    many = f" of {row.images} pictures" if row.images > 1 else ""
    return f"{row.condition} ({row.measure}), {row.scenes} held-out scenes{many}"


def _by_condition(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.condition, []).append(row)
    return found


def to_markdown(rows: Sequence[Row], heading: str = "", agreement: str = "") -> str:
    """One table a condition, with ``heading`` above them; agreement: as for :func:`units`."""
    lines = [heading, ""] if heading else []
    for part in _by_condition(rows).values():
        shown = columns(part)
        lines += [f"### {caption(part[0])}", ""]
        lines.append("| " + " | ".join(c.head.replace("\n", " ") for c in shown) + " |")
        lines.append("|" + "|".join(":--" if c.left else "--:" for c in shown) + "|")
        lines += ["| " + " | ".join(c.cell(r) for c in shown) + " |" for r in part if r.shown]
        lines.append("")
    lines += [units(rows, agreement), ""]
    return "\n".join(lines)


def to_csv(rows: Sequence[Row]) -> str:
    """Every field of every row, unrounded; those that tables do not show too."""
    out = io.StringIO()
    flat = [row.flat() for row in rows]
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def to_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Every field of every row, unrounded, with what they were measured with."""
    return json.dumps({"about": about, "rows": [row.flat() for row in rows]}, indent=1) + "\n"
