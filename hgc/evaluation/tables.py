"""Rows as tables: one list of columns for the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from hgc.evaluation.measure import Row

__all__ = ["COLUMNS", "Column", "caption", "to_csv", "to_json", "to_markdown", "units"]


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
    return "-" if row.name == "uncached" else _percent(row.loss)


def _interval(row: Row) -> str:
    if row.name == "uncached":
        return "-"
    return f"{_percent(row.loss_low)} to {_percent(row.loss_high)}"


def _distance(value: float) -> str:
    return "0" if value == 0.0 else f"{value:.4f}"


COLUMNS: tuple[Column, ...] = (
    Column("plan", lambda r: r.label, left=True),
    Column("steps", lambda r: str(r.steps)),
    Column(
        "SD1.5 TMACs\n(all)", lambda r: f"{r.sd15_macs_paper / 1e12:.2f} ({r.sd15_macs / 1e12:.2f})"
    ),
    Column("GMACs here\n(all)", lambda r: f"{r.macs_paper / 1e9:.2f} ({r.macs / 1e9:.2f})"),
    Column("share\n(all)", lambda r: f"{r.share_paper:.1%} ({r.share:.1%})"),
    Column("speedup", lambda r: f"{r.speedup:.2f}x"),
    Column("fidelity", lambda r: f"{r.fidelity:.4f}"),
    Column("its\nworst 5%", lambda r: f"{r.fidelity_worst:.4f}", statistics=True),
    Column("loss", _loss),
    Column("95% interval\nof the loss", _interval, statistics=True),
    Column("distance", lambda r: _distance(r.distance)),
    Column("its\nworst 5%", lambda r: _distance(r.distance_worst)),
    Column("KiB\nheld", lambda r: f"{r.held_bytes / 1024:.0f}"),
)


def units() -> str:
    """What the columns mean, for under a table."""
    return (
        "TMACs and GMACs: multiply-accumulates of one picture under guidance, the two attention "
        "matmuls left out (counted); share: of the uncached run. Speedup: of the whole pipeline "
        "call, against the pipeline without hgc in the same run. Fidelity: to the condition, "
        "higher is better; loss: relative to the uncached row, the interval by bootstrap over "
        "scenes. Distance: relative L2 to the uncached picture. Worst 5%: mean of the worst "
        "scenes. KiB: a picture. 'vs': nothing cached, and at least the MACs of those plans."
    )


def caption(row: Row) -> str:
    """What a condition's table is of."""
    return f"{row.condition} ({row.measure}), {row.scenes} held-out scenes"


def _by_condition(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.condition, []).append(row)
    return found


def to_markdown(rows: Sequence[Row], heading: str = "") -> str:
    """One table a condition, with ``heading`` above them."""
    lines = [heading, ""] if heading else []
    for part in _by_condition(rows).values():
        lines += [f"### {caption(part[0])}", ""]
        lines.append("| " + " | ".join(c.head.replace("\n", " ") for c in COLUMNS) + " |")
        lines.append("|" + "|".join(":--" if c.left else "--:" for c in COLUMNS) + "|")
        lines += ["| " + " | ".join(c.cell(row) for c in COLUMNS) + " |" for row in part]
        lines.append("")
    lines += [units(), ""]
    return "\n".join(lines)


def to_csv(rows: Sequence[Row]) -> str:
    """Every field of every row, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Row)]
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return out.getvalue()


def to_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Every field of every row, unrounded, with what they were measured with."""
    data = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(data, indent=1) + "\n"
