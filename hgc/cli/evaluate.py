"""``hgc eval``."""

from __future__ import annotations

import os
from pathlib import Path

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
from hgc.cli.results import about, chosen_conditions, heading, print_rows

__all__ = ["run"]

QUICK_SCENES = 8


def run(
    conditions: str,
    scenes: int,
    rows: str,
    steps: int,
    out: Path,
    start: int,
    seed: int,
    batch: int,
    device: str,
    quick: bool,
) -> None:
    """Measure the rows on held-out scenes and write the tables and the plot to ``out``."""
    needs("eval", "transformers", "PIL", "skimage", "torchmetrics", "matplotlib")
    names = chosen_conditions(conditions)
    quiet_libraries()
    check_device(device)

    from hgc import testbed
    from hgc.evaluation import Settings, candidates, evaluate, to_csv, to_json, to_markdown
    from hgc.evaluation.pictures import pareto

    settings = Settings(
        scenes=min(scenes, QUICK_SCENES) if quick else scenes,
        start=start,
        steps=steps,
        seed=seed,
        batch=batch,
        device=device,
    )
    with as_usage(FileNotFoundError):
        testbed.path()
    writable(out, folder=True)
    with progress() as bar:
        order = candidates(split(rows), steps)
        with as_usage(ValueError, OSError):
            found = evaluate(names, order, settings, folder=out, on_progress=bar)
    printer = console()
    print_rows(printer, found, settings)
    written = {
        "table.md": to_markdown(found, heading(settings)),
        "table.csv": to_csv(found),
        "table.json": to_json(found, about(settings)),
    }
    with as_usage(OSError):
        for name, text in written.items():
            # Written aside and moved, so that an interruption leaves the old table or the new.
            aside = out / f".{name}"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, out / name)
        pareto(found, out / "pareto.png")
    printer.print(f"wrote {', '.join(written)} and pareto.png to {out.resolve()}", soft_wrap=True)


def check_device(device: str) -> None:
    """Raise CliError where torch cannot compute on ``device``."""
    import torch

    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise CliError(f"--device must be cpu or cuda; got {device!r}")
    if not torch.cuda.is_available():
        raise CliError(f"--device {device}: torch {torch.__version__} sees no GPU")
