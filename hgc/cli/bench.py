"""``hgc bench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from hgc.cli.console import (
    CliError,
    as_usage,
    console,
    parse_size,
    progress,
    quiet_libraries,
    split,
    tera,
    writable,
)
from hgc.cli.evaluate import check_device
from hgc.planning.config import Config, ConfigError

if TYPE_CHECKING:
    from hgc.bench.runner import Bench, Timing

__all__ = ["run"]

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


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
) -> None:
    """Time the pipeline and print what arrived of the promised speedup."""
    configs = [_read(name) for name in split(presets)]
    if not configs:
        raise CliError("--presets names nothing to compare with the pipeline")
    if dtype not in _DTYPES:
        raise CliError(f"--dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    height, width = parse_size(size)
    for path in (json_file, markdown, chart):
        if path is not None:
            writable(path)
    quiet_libraries()
    check_device(device)

    import torch

    from hgc.bench.runner import bench, load_pipeline
    from hgc.evaluation.models import load_shapes

    if threads is not None:
        torch.set_num_threads(threads)
    with as_usage(FileNotFoundError):
        default = load_shapes(model, controlnet).size
    height = height or default
    width = width or height
    with progress() as bar:
        bar(f"loading {model}", 0, 1)
        pipe = load_pipeline(model, controlnet, device=device, dtype=getattr(torch, _DTYPES[dtype]))
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
            )
    with as_usage(OSError, ValueError):
        if json_file is not None:
            json_file.write_text(measured.to_json(), encoding="utf-8")
        if markdown is not None:
            markdown.write_text(measured.to_markdown(), encoding="utf-8")
        if chart is not None:
            measured.save_chart(chart)
    out = console()
    _print(out, measured, model)
    for path in (json_file, markdown, chart):
        if path is not None:
            out.print(f"wrote {path.resolve()}", soft_wrap=True)


def _read(name: str) -> Config:
    try:
        return Config.of(name)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None


def _time(timing: Timing) -> str:
    low, high = timing.percentile(0.2), timing.percentile(0.8)
    digits = 2 if timing.median >= 10 else 3
    return f"{timing.median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _print(out: Console, measured: Bench, model: str) -> None:
    about = measured.about
    out.print(
        f"{model}, {about['pipeline']}, {about['height']} x {about['width']}, {about['dtype']}, "
        f"{about['device_name']} ({about['device']}, {about['threads']} threads), torch "
        f"{about['torch']}, diffusers {about['diffusers']}, hgc {about['hgc']}, "
        f"{about['repeats']} interleaved repeats"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for head in ("all MACs", "paper's", "loop s [p20, p80]", "pipeline s [p20, p80]", "MiB held"):
        table.add_column(head, justify="right")
    for row in measured.rows:
        table.add_row(
            row.label,
            "" if row.macs is None else tera(row.macs),
            "" if row.macs_paper is None else tera(row.macs_paper),
            _time(row.loop),
            _time(row.whole),
            f"{row.held_bytes / 2**20:.1f}",
        )
    out.print(table)
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("speedup of", "over"):
        table.add_column(head)
    for head in ("promised", "loop", "arrived", "pipeline"):
        table.add_column(head, justify="right")
    for row in measured.rows:
        found = (row.against, row.against_equal, row.against_eager)
        pairs = {(c.mode, c.steps): c for c in found if c is not None}
        for comparison in pairs.values():
            promised, arrived = comparison.promised, comparison.arrived
            mode = "" if comparison.mode == "eager" else f", {comparison.mode}"
            table.add_row(
                row.label,
                f"uncached, {comparison.steps} steps{mode}",
                "" if promised is None else f"{promised:.2f}x",
                f"{comparison.loop:.2f}x",
                "" if arrived is None else f"{arrived:.0%}",
                f"{comparison.whole:.2f}x",
            )
    out.print(table)
    text = "text encoder and " if about["text_encoder_timed"] else ""
    out.print(
        "Loop: from the first ControlNet call to the last UNet call. Pipeline: the whole call, "
        f"{text}VAE decoder included. Promised: MACs of the uncached run over the row's, attention "
        "counted. Arrived: the loop's speedup over the promised one. Speedups are medians of "
        "ratios within a repeat.",
        style="bright_black",
    )
