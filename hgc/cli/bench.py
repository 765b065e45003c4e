"""``hgc bench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from hgc.cli.console import (
    CliError,
    as_usage,
    console,
    parse_size,
    progress,
    quiet_libraries,
    read_config,
    split,
    writable,
)
from hgc.cli.evaluate import check_device
from hgc.evaluation.models import DTYPES
from hgc.evaluation.subject import check_scheduler, make_scheduler
from hgc.planning.fields import ConfigError

if TYPE_CHECKING:
    from hgc.bench.table import Bench

__all__ = ["run"]


def run(
    model: str,
    controlnet: Sequence[Path],
    device: str,
    size: str | None,
    steps: int,
    presets: str,
    repeats: int,
    dtype: str,
    threads: int | None,
    json_file: Path | None,
    batch: int = 1,
    modes: str = "eager",
    fewer_steps: bool = False,
    peers: str = "",
    markdown: Path | None = None,
    chart: Path | None = None,
    scheduler: str | None = None,
    channels_last: bool = False,
) -> None:
    """Time the pipeline and print what arrived of the promised speedup."""
    configs = [read_config(name) for name in split(presets)]
    if not configs:
        raise CliError("--presets names nothing to compare with the pipeline")
    if dtype not in DTYPES:
        raise CliError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if scheduler is not None:
        with as_usage(ConfigError):
            check_scheduler(scheduler)
    height, width = parse_size(size)
    for path in (json_file, markdown, chart):
        if path is not None:
            writable(path)
    quiet_libraries()
    check_device(device)

    import torch

    from hgc.bench.pipelines import load_pipeline
    from hgc.bench.runner import bench
    from hgc.evaluation.models import load_shapes
    from hgc.models.supported import controlnets

    if threads is not None:
        torch.set_num_threads(threads)
    with as_usage(FileNotFoundError):
        default = load_shapes(model, controlnet).size
    height = height or default
    width = width or height

    def write(found: Bench) -> None:
        if json_file is not None:
            json_file.write_text(found.to_json(), encoding="utf-8")
        if markdown is not None:
            markdown.write_text(found.to_markdown(), encoding="utf-8")

    with progress() as bar:
        bar(f"loading {model}", 0, 1)
        pipe = load_pipeline(model, controlnet, device=device, dtype=getattr(torch, DTYPES[dtype]))
        if channels_last:
            for network in (pipe.unet, *controlnets(getattr(pipe, "controlnet", None))):
                network.to(memory_format=torch.channels_last)
        if scheduler is not None:
            pipe.scheduler = make_scheduler(scheduler, pipe.scheduler.config, steps)
        with as_usage(ValueError, TypeError):
            measured = bench(
                pipe,
                configs,
                height=height,
                width=width,
                steps=steps,
                repeats=repeats,
                images=batch,
                modes=split(modes),
                fewer_steps=fewer_steps,
                peers=split(peers),
                device=device,
                on_progress=bar,
                on_round=write,
            )
    with as_usage(OSError, ValueError):
        write(measured)
        if chart is not None:
            measured.save_chart(chart)
    out = console()
    heads, *rows = measured.cells()
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print(f"{model}: {measured.caption()}", style="bright_black")
    for path in (json_file, markdown, chart):
        if path is not None:
            out.print(f"wrote {path.resolve()}", soft_wrap=True)
