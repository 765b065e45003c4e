"""``hgc generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgc.cli.console import (
    CliError,
    as_usage,
    console,
    needs,
    parse_size,
    progress,
    quiet_libraries,
    read_config,
    split,
)
from hgc.cli.evaluate import check_device

if TYPE_CHECKING:
    from hgc.generation import Progress

__all__ = ["run"]


def run(data: str | None, out: Path, size: str | None, device: str, **given: Any) -> None:
    """Generate, with a progress bar, and say what was done."""
    needs("generate", "transformers", "PIL")
    quiet_libraries()
    devices = split(device)
    if given["engine"] == "local":  # a cluster's devices are elsewhere
        for name in devices:
            check_device(name)
    config = read_config(given.pop("config"))
    height, width = parse_size(size)

    from hgc.generation import GenerateError, generate

    with progress() as bar, as_usage(GenerateError, FileNotFoundError, ValueError):

        def show(now: Progress) -> None:
            bar(str(now), now.done, now.total)

        bar(f"loading {given['model']}", 0, 1)
        summary = generate(
            data,
            out,
            config=config,
            size=None if height is None or width is None else (height, width),
            device=devices,
            on_progress=show,
            **given,
        )
    printer = console()
    printer.print(str(summary), soft_wrap=True)
    if summary.failed:
        printer.print(f"why they failed: {summary.folder / 'failed.jsonl'}", soft_wrap=True)
    page = summary.folder / "page.html"
    if page.exists():
        printer.print(f"the first pictures: {page.resolve()}", soft_wrap=True)
    if summary.failed and not summary.pictures:
        raise CliError("every item failed: there is no picture")
