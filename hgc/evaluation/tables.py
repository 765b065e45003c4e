"""Rows as tables: one list of columns for the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from hgc.evaluation.measure import Row
from hgc.evaluation.metrics import PIXELS_PER_DEGREE
from hgc.evaluation.timing import MOST_WAITED

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
    return "-" if row.name == "uncached" else _percent(row.loss)


def _interval(row: Row) -> str:
    if row.name == "uncached":
        return "-"
    return f"{_percent(row.loss_low)[:-1]} to {_percent(row.loss_high)[:-1]}"


def _with_worst(name: str, digits: int) -> Callable[[Row], str]:
    """The mean of a measure, and that of its worst 5% in brackets."""

    def cell(row: Row) -> str:
        mean, worst = getattr(row, name), getattr(row, f"{name}_worst")
        if mean is None:
            return "-"
        return "0" if mean == worst == 0.0 else f"{mean:.{digits}f} ({worst:.{digits}f})"

    return cell


def _sd15(row: Row) -> str:
    if row.sd15_macs is None or row.sd15_macs_paper is None:
        return "-"
    return f"{row.sd15_macs_paper / 1e12:.2f} ({row.sd15_macs / 1e12:.2f})"


def _macs(row: Row) -> str:
    if row.macs is None or row.macs_paper is None:
        return "-"
    unit = 1e12 if row.macs >= 1e11 else 1e9
    name = "T" if unit == 1e12 else "G"
    return f"{row.macs_paper / unit:.2f} ({row.macs / unit:.2f}) {name}"


def _ratio(row: Row) -> str:
    if row.rival_ratio is None:
        return "-"
    return f"{row.rival_ratio:.2f} ({row.rival_ratio_low:.2f}-{row.rival_ratio_high:.2f})"


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


COLUMNS: tuple[Column, ...] = (
    Column("plan", lambda r: r.label, left=True),
    Column("steps", lambda r: str(r.steps)),
    Column("SD1.5 TMACs\n(all)", _sd15),
    Column("MACs\n(all)", _macs),
    Column("share", lambda r: "-" if r.share_paper is None else f"{r.share_paper:.1%}"),
    Column("speedup", lambda r: "" if r.speedup is None else f"{r.speedup:.2f}x"),
    Column("fidelity\n(worst 5%)", _with_worst("fidelity", 4)),
    Column("loss", _loss),
    Column("95% interval\nof the loss", _interval, statistics=True),
    Column("distance\n(worst 5%)", _with_worst("distance", 4)),
    Column("FLIP\n(worst 5%)", _with_worst("flip", 4)),
    Column("JOD\n(worst 5%)", _with_worst("jod", 2)),
    Column("over fewer steps'\n(95% interval)", _ratio, statistics=True),
    Column("over their\nworst 5%", lambda r: _optional(r.rival_ratio_worst, ".2f"),
           statistics=True),
    Column("PSNR\n(worst 5%)", _with_worst("psnr", 1), statistics=True),
    Column("SSIM", lambda r: f"{r.ssim:.4f}", statistics=True),
    Column("Fréchet", lambda r: _optional(r.frechet, ".4f"), statistics=True),
    Column("prompt", lambda r: _optional(r.agreement, ".3f"), statistics=True),
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
    if any(row.flip is not None for row in rows):
        said += (
            " FLIP: how visible the difference is, 0 to 1, every picture seen as large as 512 "
            f"pixels at {PIXELS_PER_DEGREE:.0f} pixels a degree."
        )
    if any(row.jod is not None for row in rows):
        said += (
            " JOD: just-objectionable differences of ColorVideoVDP, 10 is equal, pictures as large "
            "as for FLIP."
        )
    if agreement:
        said += f" Prompt: {agreement}."
    if all(row.flip is None for row in rows):
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
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Row)]
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return out.getvalue()


def to_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Every field of every row, unrounded, with what they were measured with."""
    data = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(data, indent=1) + "\n"
