"""``hgc plan``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hgc.cli.console import as_usage, console, parse_size, read_config, tera
from hgc.planning.config import PRESETS, Config, ConfigError, StepPlan
from hgc.planning.rule import bounds, longest_gap

if TYPE_CHECKING:
    from hgc.evaluation.models import ModelShapes
    from hgc.report.macs import MacCount, Macs

__all__ = ["run"]

_COLOURS = {
    "compute": "green", "full": "green", "both": "green", "needed": "green",
    "reuse": "cyan", "off": "bright_black", "-": "bright_black",
}  # fmt: skip
_HEIGHTS = "▁▂▃▄▅▆▇"
_UNCACHED_STEPS = 20
# Numbers of steps a plan's costs are shown at.
_OTHER_STEPS = (10, 20, 30, 50)


def run(
    model: str,
    controlnet: Sequence[Path],
    config: str | None,
    steps: int | None,
    size: str | None,
    guidance: bool,
    draw_all: bool,
) -> None:
    """Print the plan of ``config``, or compare all presets."""
    height, width = parse_size(size)
    chosen = None if config is None else read_config(config)

    import hgc
    from hgc.evaluation.models import load_shapes

    out = console()
    with as_usage(FileNotFoundError):
        shapes = load_shapes(model, controlnet)

    def count(config: Config, steps: int | None = steps) -> MacCount:
        with as_usage(ValueError, TypeError):
            return hgc.count_macs(
                shapes.unet, list(shapes.controlnets), config, num_evaluations=steps,
                height=height, width=width, guidance=guidance,
            )  # fmt: skip

    def at(config: Config, steps: int) -> MacCount | None:
        """None where it is for another number of steps only."""
        try:
            hgc.plan(config, steps)
        except ConfigError:
            return None
        return count(config, steps)

    adaptive = chosen if chosen is not None and chosen.adaptive else None
    if adaptive is not None:
        label = f"{adaptive.name} (the rule without adaptive)"
        chosen = adaptive.replace(name=label, adaptive=None, max_gap=None)
    configs = {one.name: one for one in ([chosen] if chosen is not None else PRESETS.values())}
    with out.status("counting"):
        counts = {name: count(one) for name, one in configs.items()}
        others = {
            name: {n: at(one, n) for n in _OTHER_STEPS} for name, one in configs.items()
        }  # fmt: skip
    where = _where(shapes, height, width, guidance)
    first = next(iter(counts.values()))
    reference = steps or _UNCACHED_STEPS
    if chosen is None:
        _compare(out, counts, where, reference)
    for one in counts.values():
        if chosen is not None or draw_all:
            if chosen is None:
                out.print()
            _draw(out, one, where, first, reference)
    _elsewhere(out, configs, others, first.full_evaluation)
    if adaptive is not None:
        total = first.num_evaluations
        least, most = map(count, bounds(adaptive, total))
        out.print(
            f"{adaptive.name}: each run places its key evaluations, at most "
            f"{longest_gap(adaptive, total)} apart, so that the cache errs by {adaptive.adaptive:g}"
            f": {tera(least.paper)} to {tera(most.paper)} in the paper's convention"
        )


def _where(shapes: ModelShapes, height: int | None, width: int | None, guidance: bool) -> str:
    height = shapes.size if height is None else height
    width = height if width is None else width
    nets = len(shapes.controlnets)
    return (
        f"{shapes.name}, {nets} ControlNet{'s' * (nets != 1)}, {height} x {width}, "
        f"{'with' if guidance else 'no'} classifier-free guidance"
    )


def _compare(out: Console, counts: dict[str, MacCount], where: str, reference: int) -> None:
    full = next(iter(counts.values())).full_evaluation * reference
    out.print(f"MACs of one picture: {where}", style="bold")
    table = Table()
    table.add_column("plan")
    for head in ("steps", "paper's convention", "share", "all MACs", "share"):
        table.add_column(head, justify="right")
    table.add_row(
        f"uncached, {reference} steps",
        str(reference), tera(full.paper), "100.0%", tera(full.total), "100.0%",
    )  # fmt: skip
    for name, count in counts.items():
        table.add_row(
            name,
            str(count.num_evaluations),
            tera(count.paper),
            f"{count.paper / full.paper:.1%}",
            tera(count.total),
            f"{count.total / full.total:.1%}",
        )
    out.print(table)
    out.print(
        f"Share: of the uncached {reference}-step run. The paper's convention leaves out the two "
        "matmuls of attention.",
        style="bright_black",
    )


def _elsewhere(
    out: Console,
    configs: dict[str, Config],
    others: dict[str, dict[int, MacCount | None]],
    full: Macs,
) -> None:
    """A row a plan: the number of steps it is meant for, and what it costs at others."""
    table = Table(title="At another number of steps, in the paper's convention")
    table.add_column("plan")
    table.add_column("meant for", justify="right")
    for steps in _OTHER_STEPS:
        table.add_column(f"{steps} steps", justify="right")
    table.add_row("uncached", "", *(tera(full.paper * steps) for steps in _OTHER_STEPS))
    for name, at in others.items():
        config = configs[name]
        meant = "any" if config.is_exact else str(config.num_evaluations)
        table.add_row(name, meant, *(_cost(done, full, n) for n, done in at.items()))
    out.print(table)
    out.print(
        "Share: of the uncached run of that number of steps. A longer run keeps the share of key "
        "steps, a shorter one their number.",
        style="bright_black",
    )


def _cost(done: MacCount | None, full: Macs, steps: int) -> str:
    return "-" if done is None else f"{tera(done.paper)} ({done.paper / (full.paper * steps):.1%})"


def _glyph(step: StepPlan, layers: int) -> tuple[str, str]:
    if step.is_key:
        return "█", "green"
    depth = int(step.depth)
    if depth == 0:
        return "·", "bright_black"
    return _HEIGHTS[min(len(_HEIGHTS) * depth // (layers + 1), len(_HEIGHTS) - 1)], "cyan"


def _bars(count: MacCount, layers: int) -> Text:
    marks = {"compute": "●", "both": "●", "reuse": "○", "off": "·", "-": "·"}
    text = Text()
    for name in ("depth", "control", "attention", "guidance"):
        text.append(f"{name:<10}", style="bold")
        for step in count.plan:
            if name == "depth":
                text.append(*_glyph(step, layers))
            else:
                value = _cell(step, name)
                text.append(marks[value], style=_COLOURS[value])
        text.append("\n")
    text.append("█ everything  ▁..▇ that many of the decoder's layers  ", style="bright_black")
    text.append("● computed  ○ reused  · not run", style="bright_black")
    return text


def _cell(step: StepPlan, name: str) -> str:
    if step.depth == 0:
        return "-"
    if name == "encoder" and step.is_key:
        return "full"
    return str(getattr(step, name))


def _forecast(step: StepPlan) -> str:
    parts = []
    for label, values in (
        ("", step.forecast),
        ("control ", step.control_forecast),
        ("guidance ", step.guidance_forecast),
        ("output ", step.output_forecast),
    ):
        if values is not None and values != (1.0,):
            parts.append(label + ", ".join(f"{v:+.3g}" for v in values))
    if step.damping is not None:
        # coefficients of the output stand in where the scheduler is not known
        parts = [f"x0 {step.damping:g}"] if step.depth == 0 else [*parts, f"x0 {step.damping:g}"]
        if step.guidance_damping is not None:
            parts.append(f"guidance {step.guidance_damping:g}")
        if step.x0_correction:
            parts.append("corrected " + ", ".join(f"{v:+.3g}" for v in step.x0_correction))
    if step.gain != 1.0:
        parts.append(f"gain {step.gain:g}")
    return "; ".join(parts) or "-"


def _draw(out: Console, count: MacCount, where: str, first: MacCount, reference: int) -> None:
    layers = max((int(s.depth) for s in count.plan if not s.is_key), default=0)
    out.print(f"{count.config}: {count.num_evaluations} steps, {where}", style="bold")
    out.print(_bars(count, max(layers, 11)))
    table = Table()
    heads = ("", "control", "depth", "encoder", "attention", "guidance", "forecast")
    for head in heads:
        table.add_column(head, justify="right" if head in ("", "depth") else "left")
    for head in ("GMACs, paper's", "all", "of a full one"):
        table.add_column(head, justify="right")
    one = count.full_evaluation
    for i, (step, done) in enumerate(zip(count.plan, count.evaluations, strict=True)):
        cells = [Text(str(i), style="bright_black")]
        for name in ("control", "depth", "encoder", "attention", "guidance"):
            value = str(step.depth) if name == "depth" else _cell(step, name)
            cells.append(Text(value, style=_COLOURS.get(value, "cyan")))
        cells.append(Text(_forecast(step)))
        cells += [
            Text(f"{done.paper / 1e9:.2f}"),
            Text(f"{done.total / 1e9:.2f}"),
            Text(f"{done.total / one.total:.1%}"),
        ]
        table.add_row(*cells)
    out.print(table)
    out.print(
        f"{count.config}: {tera(count.paper)} in the paper's convention, "
        f"{tera(count.total)} with the attention matmuls"
    )
    for steps in dict.fromkeys((reference, count.num_evaluations)):
        full = first.full_evaluation * steps
        out.print(
            f"uncached, {steps} steps: {tera(full.paper)} and {tera(full.total)}; this plan is "
            f"{count.paper / full.paper:.1%} and {count.total / full.total:.1%} of them"
        )
