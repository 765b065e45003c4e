"""What a run did, evaluation by evaluation."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from hgc.report.inputs import Shapes
from hgc.report.macs import Macs, Parts, count_performed

if TYPE_CHECKING:
    from hgc.planning.config import Config
    from hgc.run.evaluation import Evaluation
    from hgc.run.run import Run

__all__ = ["Report", "Row"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluation.

    Attributes:
        index: Position in the run's schedule.
        why: ``"plan"``, or why the plan was not followed; under ``Config.adaptive`` what it was
            decided by: the newest error that was known, and over how many evaluations it grew.
        control: What each ControlNet called did: ``"computed"``, ``"reused"`` or ``"off"``.
        depth: Decoder layers computed, ``"full"`` for everything.
        encoder: ``"needed"`` or ``"reuse"``.
        attention: ``"compute"`` or ``"reuse"``.
        guidance: ``"both"``, ``"reuse"`` or ``"off"``.
        macs: MACs done.
        milliseconds: Host time inside hgc and the models. On a GPU it is the time to launch.
        held_bytes: Bytes the run held at the end of the evaluation.
        batch: Rows of the batch.
    """

    index: int
    why: str
    control: tuple[str, ...]
    depth: int | str
    encoder: str
    attention: str
    guidance: str
    macs: Macs
    milliseconds: float
    held_bytes: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Report:
    """The last run of a thread. ``print(report)`` gives a table.

    Attributes:
        config: Name of the configuration.
        rows: One an evaluation.
        full_evaluation: MACs of one evaluation without hgc.
        peak_bytes: The most bytes the run held at once.
        meant_for: Evaluations that the configuration is meant for; None: any number.
    """

    config: str
    rows: tuple[Row, ...]
    full_evaluation: Macs
    peak_bytes: int
    meant_for: int | None = None

    @property
    def macs(self) -> Macs:
        """MACs done."""
        return sum((row.macs for row in self.rows), Macs())

    @property
    def full_macs(self) -> Macs:
        """MACs of the same run without hgc."""
        share = sum(row.batch for row in self.rows) / self.rows[0].batch
        return _scaled(self.full_evaluation, share)

    @property
    def milliseconds(self) -> float:
        """Host time of all evaluations."""
        return sum(row.milliseconds for row in self.rows)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{'':>3}  {'ControlNet':<18}{'depth':<7}{'attention':<11}{'guidance':<10}"
            f"{'GMACs':>9}{'(paper)':>9}{'ms':>9}  why"
        ]
        for row in self.rows:
            control = ",".join(row.control) or "-"
            lines.append(
                f"{row.index:>3}  {control:<18}{row.depth!s:<7}{row.attention:<11}"
                f"{row.guidance:<10}{row.macs.total / 1e9:>9.2f}{row.macs.paper / 1e9:>9.2f}"
                f"{row.milliseconds:>9.1f}  {row.why}"
            )
        done, full = self.macs, self.full_macs
        lines.append(
            f"{self.config}: {done.total / 1e12:.4g}T of {full.total / 1e12:.4g}T MACs "
            f"({done.total / max(full.total, 1):.1%}); paper's convention {done.paper / 1e12:.4g}T "
            f"of {full.paper / 1e12:.4g}T ({done.paper / max(full.paper, 1):.1%}); "
            f"at most {self.peak_bytes / 2**20:.1f} MiB held"
        )
        if self.meant_for not in (None, len(self.rows)):
            lines.append(
                f"{self.config} is meant for {self.meant_for} evaluations, and this run made "
                f"{len(self.rows)}: `hgc plan` shows what it costs at several numbers"
            )
        return "\n".join(lines)

    @classmethod
    def of(cls, unet: Any, config: Config, run: Run) -> Report:
        """The report on ``run``."""
        first = run.report[0]
        shapes = Shapes(
            first.batch, *run.latent_size, tokens=run.tokens, pixels_a_latent=run.pixels_a_latent
        )
        steps = [dataclasses.replace(row.plan, attention=row.attention) for row in run.report]
        off = [
            # by its scale; one that the plan leaves out is not called with another
            [
                row.plan.control != "off" and row.control.get(slot.index, "off") == "off"
                for slot in run.slots
            ]
            for row in run.report
        ]
        nets = [slot.net for slot in run.slots]
        keeps = [row.keeps for row in run.report]
        planned, full = count_performed(nets, unet, steps, shapes, off, keeps)
        macs = [
            # all work is done row by row of the batch, which may shrink within a run
            _scaled(_done(row, parts, full), row.batch / first.batch)
            for row, parts in zip(run.report, planned, strict=True)
        ]
        rows = tuple(
            Row(
                index=row.index,
                why=row.why,
                control=tuple(row.control[k] for k in sorted(row.control)),
                depth=row.plan.depth,
                encoder=row.plan.encoder,
                attention=row.attention,
                guidance=row.plan.guidance,
                macs=counted,
                milliseconds=row.milliseconds,
                held_bytes=row.held_bytes,
                batch=row.batch,
            )
            for row, counted in zip(run.report, macs, strict=True)
        )
        return cls(
            config.name, rows, sum(full, Macs()), run.cache.peak_bytes,
            meant_for=None if config.is_exact else config.num_evaluations,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Report(config={self.config!r}, evaluations={len(self.rows)})"


def _done(row: Evaluation, planned: Parts, full: Parts) -> Macs:
    """MACs of ``row``, of the whole batch.

    Args:
        row: What was done.
        planned: What its plan costs: each ControlNet, and the UNet last.
        full: The same without hgc.
    """
    done = full[-1] if row.by_diffusers else planned[-1]
    for j, (by_plan, in_full) in enumerate(zip(planned[:-1], full[:-1], strict=True)):
        if j in row.fresh:
            done += in_full
        if row.fresh.get(j, True):
            done += by_plan
    return done


def _scaled(macs: Macs, share: float) -> Macs:
    return Macs(round(macs.total * share), round(macs.paper * share))
