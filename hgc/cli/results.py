"""Rows of an evaluation, printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from hgc.cli.console import CliError, split

if TYPE_CHECKING:
    from hgc.evaluation import Row, Settings
    from hgc.evaluation.subject import Subject

__all__ = ["about", "chosen_conditions", "heading", "print_rows"]


def chosen_conditions(text: str, known: Sequence[str] | None = None) -> list[str]:
    """The conditions named in ``text``. known: those there are; None: the shipped testbed's."""
    from hgc.testbed import CONDITIONS

    known = CONDITIONS if known is None else known
    names = split(text)
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise CliError(f"no condition named {name!r}; conditions: all, {', '.join(known)}")
    if not names:
        raise CliError(f"no condition given; conditions: all, {', '.join(known)}")
    return list(dict.fromkeys(names))


def about(settings: Settings, subject: Subject | None = None) -> dict[str, Any]:
    """What rows were measured with, for files. subject: None: the testbed."""
    import dataclasses

    from hgc.bench.table import about_device
    from hgc.evaluation.candidate import testbed
    from hgc.evaluation.settings import own_scheduler

    subject = testbed() if subject is None else subject
    return {
        **about_device(settings.device),
        **dataclasses.asdict(settings),
        **subject.about(),
        "scheduler": own_scheduler(subject, settings),
        "guidance_scale": subject.guidance if settings.guidance is None else settings.guidance,
    }


def heading(settings: Settings, subject: Subject | None = None) -> str:
    """The same in a sentence."""
    said = about(settings, subject)
    return (
        f"{said['subject']}, {said['scheduler']}, guidance {said['guidance_scale']}, uncached run "
        f"of {settings.steps} steps, batches of {settings.batch}; {said['device_name']}, "
        f"{said['threads']} threads, torch {said['torch']}, diffusers {said['diffusers']}, "
        f"hgc {said['hgc']}."
    )


def print_rows(
    out: Console,
    rows: Sequence[Row],
    settings: Settings,
    subject: Subject | None = None,
    *,
    statistics: bool = True,
) -> None:
    """One table a condition; ``statistics``: with the columns that take many scenes."""
    from hgc.evaluation.tables import caption, units
    from hgc.evaluation.tables import columns as columns_of

    out.print(heading(settings, subject))
    for condition in dict.fromkeys(row.condition for row in rows):
        part = [row for row in rows if row.condition == condition and row.shown]
        columns = [column for column in columns_of(part) if statistics or not column.statistics]
        out.print()
        out.print(caption(part[0]), style="bold")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(column.head, justify="left" if column.left else "right")
        for row in part:
            style = "bold" if row.name == "uncached" else None if row.cached else "bright_black"
            table.add_row(*(column.cell(row) for column in columns), style=style)
        out.print(table)
    agreement = subject.agreement if subject is not None and statistics else ""
    out.print(units(rows, agreement), style="bright_black")
