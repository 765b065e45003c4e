"""What was timed, as JSON, as Markdown and as a chart."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hgc
from hgc.evaluation.models import ModelError

__all__ = ["Bench", "BenchRow", "Comparison", "Timing", "Way", "about_device"]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of several repeats.

    Attributes:
        samples: In the order they were taken.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """p50."""
        return statistics.median(self.samples)

    def percentile(self, share: float) -> float:
        """By linear interpolation between the samples."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A candidate against one uncached run.

    Attributes:
        steps: Of the uncached run.
        mode: Of the uncached run.
        promised: MACs of the uncached run over the candidate's, attention counted; None where the
            candidate's are not counted (another package).
        loop: Speedup of the denoising loop: the median over repeats of the uncached time over
            the candidate's in the same repeat.
        whole: The same of the whole pipeline call.
    """

    steps: int
    mode: str
    promised: float | None
    loop: float
    whole: float

    @property
    def arrived(self) -> float | None:
        """The loop's speedup over the promised one."""
        return None if self.promised is None else self.loop / self.promised


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run the pipeline.

    Attributes:
        name: "uncached", the configuration's, or the other package's.
        steps: Denoising steps.
        mode: "eager", "captured", "compiled" or "graphs".
    """

    name: str
    steps: int
    mode: str

    @property
    def label(self) -> str:
        """Name, steps and mode."""
        mode = "" if self.mode == "eager" else f", {self.mode}"
        return f"{self.name}, {self.steps} steps{mode}"


@dataclasses.dataclass(frozen=True)
class BenchRow(Way):
    """What was measured of one way to run the pipeline.

    Attributes:
        loop: From the start of the first ControlNet or UNet call to the end of the last UNet call.
        whole: The pipeline call, with the picture decoded.
        macs: Of one call's loop, all multiply-accumulates; None where they are not counted.
        macs_paper: The same without the two attention matmuls.
        held_bytes: The most the cache held.
        peak_bytes: The most the device's allocator held during a call; None on a CPU.
        launches: Kernels and graphs launched an evaluation, in a call of its own; None on a CPU.
        against: The uncached run of the reference steps in the same mode; eager where it is
            "captured".
        against_equal: The same at the candidate's own steps.
        against_eager: The uncached eager run of the reference steps.
    """

    loop: Timing
    whole: Timing
    macs: int | None
    macs_paper: int | None
    held_bytes: int
    peak_bytes: int | None
    launches: float | None
    against: Comparison | None
    against_equal: Comparison | None
    against_eager: Comparison | None


_COMPARISONS = ("against", "against_equal", "against_eager")


def _spread(timing: Timing) -> str:
    low, high = timing.percentile(0.2), timing.percentile(0.8)
    return f"{timing.median:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)


def _against(name: str, field: str, form: str = "{:.2f}x") -> Callable[[BenchRow], str]:
    """A figure of one of the comparisons, where it is not that of ``against``."""

    def cell(row: BenchRow) -> str:
        one = getattr(row, name)
        if one is None or (name != "against" and one == row.against):
            return ""
        return _number(getattr(one, field), form)

    return cell


_COLUMNS: tuple[tuple[str, Callable[[BenchRow], str]], ...] = (
    ("", lambda r: r.label),
    ("TMACs", lambda r: _number(r.macs, "{:.4g}", 1e12)),
    ("paper's", lambda r: _number(r.macs_paper, "{:.4g}", 1e12)),
    ("loop s, p50 [p20, p80]", lambda r: _spread(r.loop)),
    ("pipeline s", lambda r: f"{r.whole.median:.3f}"),
    ("promised", _against("against", "promised")),
    ("loop", _against("against", "loop")),
    ("arrived", _against("against", "arrived", "{:.0%}")),
    ("pipeline", _against("against", "whole")),
    ("at its own steps", _against("against_equal", "loop")),
    ("over eager", _against("against_eager", "loop")),
    ("MiB held", lambda r: _number(r.held_bytes or None, "{:.1f}", 2**20)),
    ("peak MiB", lambda r: _number(r.peak_bytes, "{:.0f}", 2**20)),
    ("launches", lambda r: _number(r.launches, "{:.0f}")),
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What :func:`hgc.bench.runner.bench` measured.

    Attributes:
        about: Device, versions and settings.
        rows: One a way to run the pipeline, the uncached ones first.
    """

    about: dict[str, Any]
    rows: tuple[BenchRow, ...]

    def to_json(self) -> str:
        """Everything, with each sample."""
        rows = []
        for row in self.rows:
            data = dataclasses.asdict(row)
            for name in ("loop", "whole"):
                timing = getattr(row, name)
                data[name] = {
                    "samples": list(timing.samples),
                    "p20": timing.percentile(0.2),
                    "p50": timing.median,
                    "p80": timing.percentile(0.8),
                }
            for name in _COMPARISONS:
                comparison = getattr(row, name)
                if comparison is not None:
                    data[name]["arrived"] = comparison.arrived
            rows.append(data)
        return json.dumps({"about": self.about, "rows": rows}, indent=1) + "\n"

    def caption(self) -> str:
        """What it was measured on, and what the columns mean."""
        about = self.about
        text = "text encoder and " if about["text_encoder_timed"] else ""
        return (
            f"{about['pipeline']}, {about['scheduler']}, {about['height']} x {about['width']}, "
            f"batch {about['images']}, {about['dtype']}, {about['device_name']} "
            f"({about['device']}, {about['threads']} threads), torch {about['torch']}, "
            f"diffusers {about['diffusers']}, hgc "
            f"{about['hgc']}, {about['repeats']} interleaved repeats. Loop: from the first "
            f"ControlNet call to the last UNet call; pipeline: the whole call, {text}VAE decoder "
            "included. Speedups are medians of ratios within a repeat: over the uncached run in "
            "the same mode, of the loop and of the whole pipeline; over that at the row's own "
            "steps; over the eager one. Promised: MACs of the first of these over the row's, "
            "attention counted; arrived: the loop's speedup over it."
        )

    def cells(self) -> list[list[str]]:
        """The heads of the table, then a row a way to run the pipeline; columns that would be empty
        are left out."""
        lines = [[head for head, _ in _COLUMNS]]
        lines += [[cell(row) for _, cell in _COLUMNS] for row in self.rows]
        kept = [i for i in range(len(_COLUMNS)) if any(line[i] for line in lines[1:])]
        return [[line[i] for i in kept] for line in lines]

    def to_markdown(self) -> str:
        """The table under its caption."""
        head, *rows = (f"| {' | '.join(line)} |" for line in self.cells())
        return (
            "\n".join([self.caption(), "", head, "|---|" + "---:|" * (head.count("|") - 2), *rows])
            + "\n"
        )

    def save_chart(self, path: Path) -> None:
        """A bar a row: the loop's median time, with the 20th and 80th percentile, to ``path``.

        Raises ModelError where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ModelError(
                'a chart needs matplotlib: pip install "hybrid-grained-cache[demo]"'
            ) from None
        rows = self.rows[::-1]
        middle = [row.loop.median for row in rows]
        spread = [
            [m - row.loop.percentile(0.2) for m, row in zip(middle, rows, strict=True)],
            [row.loop.percentile(0.8) - m for m, row in zip(middle, rows, strict=True)],
        ]
        colours = {
            "eager": "#8da0cb", "captured": "#e78ac3", "compiled": "#66c2a5", "graphs": "#fc8d62"
        }  # fmt: skip
        figure = Figure(figsize=(8, 0.8 + 0.32 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(
            [row.label for row in rows], middle, xerr=spread,
            color=[colours[row.mode] for row in rows],
        )  # fmt: skip
        axes.set_xlabel("denoising loop, seconds")
        about = self.about
        axes.set_title(
            f"{about['device_name']}, {about['height']} x {about['width']}, batch "
            f"{about['images']}, {about['dtype']}", fontsize=9,
        )  # fmt: skip
        figure.savefig(path, dpi=150)


def about_device(device: str) -> dict[str, Any]:
    """Device, threads and versions: what a figure must be quoted with."""
    import diffusers

    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            lines = cpuinfo.read_text(errors="replace").splitlines()
            found = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
            name = found[0] if found else name
    return {
        "device": device,
        "device_name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "hgc": hgc.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
