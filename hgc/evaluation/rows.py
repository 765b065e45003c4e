"""Rows of an evaluation: what was measured, summed up over all pictures of a condition."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hgc.evaluation import metrics
from hgc.evaluation.candidate import Candidate
from hgc.evaluation.metrics import Summary
from hgc.evaluation.models import load_shapes, sd15_macs
from hgc.evaluation.peers import package_macs
from hgc.evaluation.record import Measured, unpack
from hgc.evaluation.settings import Settings, own_scheduler
from hgc.evaluation.subject import Subject
from hgc.evaluation.timing import MOST_WAITED

if TYPE_CHECKING:
    from hgc.report.macs import Macs

__all__ = ["FIGURES", "Row", "summed_up"]

# The figures that a row may have, in the order of its files.
FIGURES = (
    "fidelity", "loss", "distance", "psnr", "ssim", "flip", "jod", "perceived", "agreement",
    "rival_ratio",
)  # fmt: skip
_HIGHER_IS_WORSE = ("distance", "flip", "perceived")


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate over all pictures of one condition. MACs are of one picture under guidance.

    ``figures`` holds, each with its 95% bootstrap interval and the mean of the worst 5% of
    pictures, those of `FIGURES` that could be measured: ``fidelity`` to the condition, higher is
    better, and ``loss``, the share of the uncached run's fidelity that was lost; relative L2
    (``distance``), ``psnr`` in dB (100 at most), ``ssim`` and ``flip`` to the uncached picture
    (FLIP at `hgc.evaluation.metrics.pixels_per_degree`); ``jod``, ColorVideoVDP's JOD of the
    picture beside the uncached one, 10 where they are equal; ``perceived``, relative L2 of the
    judge's features to those of the uncached picture; ``agreement`` with the prompt, higher is
    better; ``rival_ratio``, the distance over the rival's: 0.5 is half as far.

    Attributes:
        condition: Name of the condition.
        name: Of the candidate.
        label: The name, with the plans whose MACs this run with fewer steps equals.
        method: A line of the plot.
        steps: Steps of the run.
        scheduler: Its scheduler.
        cached: Whether hgc was installed, or another package.
        shown: Whether tables show it: of runs with fewer steps that differ in the scheduler only,
            the nearest one to the uncached pictures.
        scenes: Number of scenes, or of pictures of a folder.
        images: Pictures made of each.
        macs: Of this model; None where they cannot be counted.
        full_macs: Those of the uncached run.
        sd15_macs: What the plan costs on SD1.5 at 512 x 512; None where the model is no stand-in
            for SD1.5.
        seconds: Median time of a pipeline call, a picture; of the batches during which no other
            process had the cores (`hgc.evaluation.timing`), None where there are none.
        speedup: Median over those batches of the uncached call's time over this one's, both made
            one after the other in one process.
        measure: Name of the measure of fidelity.
        figures: See above.
        frechet: Frechet distance of the judge's features to those of the uncached pictures; None
            without a judge.
        frechet_truth: The same to the true pictures; None where there are none.
        rival: Name of the nearest run with fewer steps that costs at least as many MACs.
        held_bytes: Most bytes the cache held, a picture.
    """

    condition: str
    name: str
    label: str
    method: str
    steps: int
    scheduler: str
    cached: bool
    shown: bool
    scenes: int
    images: int
    macs: Macs | None
    full_macs: Macs
    sd15_macs: Macs | None
    seconds: float | None
    speedup: float | None
    measure: str
    figures: Mapping[str, Summary]
    frechet: float | None
    frechet_truth: float | None
    rival: str | None
    held_bytes: int

    def __getitem__(self, name: str) -> Summary:
        """One of ``figures``."""
        return self.figures[name]

    def flat(self) -> dict[str, Any]:
        """Everything by a name of its own, for files: ``macs`` and ``macs_paper``, ``distance``,
        ``distance_low``, ``distance_high`` and ``distance_worst``."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        full, figures = found.pop("full_macs"), found.pop("figures")
        for name in ("macs", "sd15_macs"):
            macs = found.pop(name)
            found[name] = None if macs is None else macs.total
            found[f"{name}_paper"] = None if macs is None else macs.paper
        macs = self.macs
        found["share"] = None if macs is None else macs.total / full.total
        found["share_paper"] = None if macs is None else macs.paper / full.paper
        for name in FIGURES:
            for field in ("mean", "low", "high", "worst"):
                end = "" if field == "mean" else f"_{field}"
                found[f"{name}{end}"] = getattr(figures.get(name), field, None)
        return found


class _Sample:
    """What was measured of one candidate, all batches together; one entry a picture.

    Attributes:
        values: By measure.
        counts: For segmentation, int64 [N, K, 3]; else None.
        features: The judge's, [N, F]; None without a judge.
    """

    def __init__(self, batches: Sequence[Measured], classes: int) -> None:
        names = [name for name in batches[0].values if all(name in m.values for m in batches)]
        self.values = {n: np.concatenate([m.values[n] for m in batches]) for n in names}
        self.counts: np.ndarray | None = None
        if all(m.classes is not None for m in batches):
            listed = [one for m in batches for one in m.classes or ()]
            self.counts = np.zeros((len(listed), classes, 3), np.int64)
            for i, one in enumerate(listed):
                for k, *values in one:
                    self.counts[i, k] = values
        features = [unpack(m.features, m.count) for m in batches]
        known = [part for part in features if part is not None]
        self.features = np.concatenate(known) if len(known) == len(features) else None


def _nearest(order: Sequence[Candidate], samples: Sequence[_Sample]) -> set[int]:
    """Of each group of runs that differ in the scheduler only, the nearest one."""
    best: dict[str, int] = {}
    for i, one in enumerate(order):
        if one.group:
            other = best.setdefault(one.group, i)
            if samples[i].values["distance"].mean() < samples[other].values["distance"].mean():
                best[one.group] = i
    return set(best.values())


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def summed_up(
    subject: Subject,
    condition: str,
    order: Sequence[Candidate],
    lines: Sequence[Sequence[Measured]],
    settings: Settings,
) -> list[Row]:
    """A row a candidate of ``order``, the uncached one first, from its batches in ``lines``."""
    images = subject.images
    samples = [_Sample(batches, subject.classes) for batches in lines]
    base = samples[0]
    truths = None if base.features is None else _truths(subject, condition, settings)
    nearest = _nearest(order, samples)
    found = []
    for i, (one, batches, sample) in enumerate(zip(order, lines, samples, strict=True)):
        rival = next((k for k in sorted(nearest) if one.name in order[k].equal_to), None)
        own, of_sd15 = _macs(subject, one)
        alone = [m for m in batches if m.waited is None or m.waited <= MOST_WAITED]
        found.append(
            Row(
                condition=condition,
                name=one.name,
                label=one.label,
                method=one.method,
                steps=one.steps,
                scheduler=one.scheduler or own_scheduler(subject, settings),
                cached=not one.is_plain,
                shown=not one.group or i in nearest,
                scenes=len(sample.values["fidelity"]) // images,
                images=images,
                macs=own,
                full_macs=subject.macs(None, order[0].steps),
                sd15_macs=of_sd15,
                seconds=_median(m.seconds / m.count for m in alone),
                speedup=_median(m.reference_seconds / m.seconds for m in alone),
                measure=subject.measures[condition],
                figures=_figures(sample, base, None if rival is None else samples[rival], images),
                frechet=_frechet(sample.features, base.features),
                frechet_truth=_frechet(sample.features, truths),
                rival=None if rival is None else order[rival].name,
                held_bytes=max(m.held_bytes // m.count for m in batches),
            )
        )
    return found


def _frechet(features: np.ndarray | None, others: np.ndarray | None) -> float | None:
    return None if features is None or others is None else metrics.frechet(features, others)


def _figures(
    sample: _Sample, base: _Sample, rival: _Sample | None, images: int
) -> dict[str, Summary]:
    values = dict(sample.values)
    if sample.features is not None and base.features is not None:
        values["perceived"] = metrics.relative_l2(sample.features, base.features)
    scores = values.pop("fidelity")
    figures = {
        name: metrics.summary(those, higher_is_worse=name in _HIGHER_IS_WORSE, images=images)
        for name, those in values.items()
    }
    figures["fidelity"] = Summary(
        *metrics.fidelity_interval(scores, sample.counts, images),
        metrics.worst_share(scores, higher_is_worse=False),
    )
    figures["loss"] = Summary(
        *metrics.loss_interval(
            scores, base.values["fidelity"],
            counts=sample.counts, reference_counts=base.counts, images=images,
        )
    )  # fmt: skip
    if rival is not None:
        ours, theirs = values["distance"], rival.values["distance"]
        worst = [metrics.worst_share(those, higher_is_worse=True) for those in (ours, theirs)]
        figures["rival_ratio"] = Summary(
            *metrics.ratio_interval(ours, theirs, images), worst[0] / worst[1]
        )
    return figures


def _macs(subject: Subject, one: Candidate) -> tuple[Macs | None, Macs | None]:
    """MACs on this model, and on SD1.5 where it stands for that."""
    if one.package is None:
        of_sd15 = sd15_macs(one.config, one.steps) if subject.stands_for_sd15 else None
        return subject.macs(one.config, one.steps), of_sd15
    own = package_macs(one.package, one.steps, subject.shapes(), subject.macs(None, 1))
    if not subject.stands_for_sd15:
        return own, None
    return own, package_macs(one.package, one.steps, load_shapes("sd15"), sd15_macs(None, 1))


def _truths(subject: Subject, condition: str, settings: Settings) -> np.ndarray | None:
    """The judge's features of the true pictures, one a scene."""
    scenes = range(settings.start, settings.start + settings.scenes)
    inputs = [one for i in scenes for one in subject.inputs(condition, i * subject.images, 1)]
    size = settings.batch
    parts = [subject.truths(condition, inputs[i : i + size]) for i in range(0, len(inputs), size)]
    kept = [part for part in parts if part is not None]
    return np.concatenate(kept) if len(kept) == len(parts) else None
