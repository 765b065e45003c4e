"""``hgc eval``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hgc.cli.console import (
    CliError,
    as_usage,
    console,
    needs,
    parse_size,
    progress,
    quiet_libraries,
    split,
    writable,
)
from hgc.cli.results import about, chosen_conditions, heading, print_rows

if TYPE_CHECKING:
    from hgc.evaluation.subject import Subject

__all__ = ["Local", "run"]

SCENES = 64
QUICK_SCENES = 8


@dataclasses.dataclass(frozen=True)
class Local:
    """The options that only another model than the testbed has."""

    controlnet: Path | None
    data: Path | None
    judge: Path | None
    clip: Path | None
    size: str | None
    images: int | None
    dtype: str | None


def run(
    conditions: str,
    scenes: int | None,
    rows: str,
    steps: int,
    out: Path,
    start: int,
    seed: int,
    batch: int,
    device: str,
    quick: bool,
    scheduler: str | None,
    rival_schedulers: str,
    guidance: float | None,
    testbed: Path | None,
    model: str,
    local: Local,
    jod: bool,
) -> None:
    """Measure the rows and write the tables and the plot to ``out``."""
    needs("eval", "transformers", "PIL", "skimage", "torchmetrics", "matplotlib")
    quiet_libraries()
    check_device(device)

    from hgc.evaluation import Settings, candidates, evaluate, to_csv, to_json, to_markdown
    from hgc.evaluation.candidate import own_schedulers
    from hgc.evaluation.pictures import pareto
    from hgc.evaluation.settings import own_scheduler

    if not split(rows):
        raise CliError("--rows names nothing to measure")
    names, subject = _subject(conditions, testbed, model, local, device)
    writable(out, folder=True)
    if subject.count is None:
        count = SCENES if scenes is None else scenes
    else:
        count = max(1, subject.count - start) if scenes is None else scenes
    with as_usage(ValueError):
        settings = Settings(
            scenes=min(count, QUICK_SCENES) if quick else count,
            start=start,
            steps=steps,
            seed=seed,
            batch=batch,
            device=device,
            guidance=guidance,
            scheduler=scheduler,
            jod=jod,
        )
    order = candidates(
        split(rows),
        steps,
        subject=subject,
        schedulers=own_schedulers(split(rival_schedulers), own_scheduler(subject, settings)),
    )
    with progress() as bar, as_usage(ValueError, OSError):
        found = evaluate(names, order, settings, subject=subject, folder=out, on_progress=bar)
    printer = console()
    print_rows(printer, found, settings, subject)
    tables = {
        "table.md": to_markdown(found, heading(settings, subject), subject.agreement),
        "table.csv": to_csv(found),
        "table.json": to_json(found, about(settings, subject)),
    }
    with as_usage(OSError):
        for name, text in tables.items():
            # Written aside and moved, so that an interruption leaves the old table or the new.
            aside = out / f".{name}"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, out / name)
        pareto(found, out / ".pareto.png")
        os.replace(out / ".pareto.png", out / "pareto.png")
    printer.print(f"wrote {', '.join(tables)} and pareto.png to {out.resolve()}", soft_wrap=True)


def _subject(
    conditions: str, folder: Path | None, model: str, local: Local, device: str
) -> tuple[Sequence[str], Subject]:
    """The conditions and the subject that the options name."""
    if model == "testbed":
        for field in dataclasses.fields(Local):
            if getattr(local, field.name) is not None:
                raise CliError(f"--{field.name} goes with --model, the folder of a pipeline")
        from hgc import testbed
        from hgc.evaluation.candidate import testbed as shipped
        from hgc.evaluation.subject import Testbed

        with as_usage(FileNotFoundError):
            testbed.path()
            subject = shipped() if folder is None else Testbed(folder)
        names = chosen_conditions(conditions, subject.conditions)
        return names, subject
    if folder is not None:
        raise CliError("--testbed is a model of its own; it does not go with --model")
    if local.data is None:
        raise CliError("--model needs --data, a folder of pictures with a metadata.jsonl")
    names = split(conditions)
    if len(names) != 1 or names == ["all"]:
        raise CliError("--model needs --conditions with the one condition of its ControlNet")
    (name,) = chosen_conditions(conditions)
    from hgc.evaluation.folder import Folder

    height, width = parse_size(local.size)
    with as_usage(ValueError):
        return [name], Folder(
            Path(model),
            local.data,
            name,
            controlnet=local.controlnet,
            judge=local.judge,
            clip=local.clip,
            size=None if height is None or width is None else (height, width),
            images=4 if local.images is None else local.images,
            dtype=local.dtype or ("fp32" if device == "cpu" else "fp16"),
            device=device,
        )


def check_device(device: str) -> None:
    """Raise CliError where torch cannot compute on ``device``."""
    import torch

    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise CliError(f"--device must be cpu or cuda; got {device!r}")
    if not torch.cuda.is_available():
        raise CliError(f"--device {device}: torch {torch.__version__} sees no GPU")
