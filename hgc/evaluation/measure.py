"""The evaluation: pictures of the same inputs with each candidate, measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hgc.evaluation import metrics
from hgc.evaluation.candidate import Candidate, candidates, testbed
from hgc.evaluation.peers import deepcache, interval_of
from hgc.evaluation.record import Measured, Record, pack
from hgc.evaluation.rows import Row, summed_up
from hgc.evaluation.settings import Settings, environment, key
from hgc.evaluation.subject import Input, Judged, Subject, make_scheduler
from hgc.evaluation.timing import Timing, timed

__all__ = ["Batch", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures of one candidate, handed to ``on_images``.

    Attributes:
        condition: Name of the condition.
        candidate: What made them.
        start: Index of the first picture among those evaluated.
        images: float32 [B, H, W, 3] in [0, 1].
    """

    condition: str
    candidate: Candidate
    start: int
    images: np.ndarray


class _Studio:
    """The pipeline of one condition."""

    def __init__(self, subject: Subject, condition: str, settings: Settings) -> None:
        import torch

        self._settings = settings
        self._pipe = subject.load(condition, settings.device)
        self._guidance = subject.guidance if settings.guidance is None else settings.guidance
        self._own = self._pipe.scheduler
        self._torch = torch
        self._warm = False

    def make(self, one: Candidate, inputs: Sequence[Input]) -> tuple[np.ndarray, Timing, int]:
        """Pictures float32 [B, H, W, 3], timing of the call, bytes the cache held."""
        self._pipe.scheduler = self._scheduler(one.scheduler or self._settings.scheduler)
        if not self._warm:
            self._call(2, inputs)
            self._warm = True
        if one.package is not None:
            with deepcache(interval_of(one.package), self._pipe) as held:
                return *self._call(one.steps, inputs), held()
        if one.config is None:
            return *self._call(one.steps, inputs), 0
        import hgc

        with hgc.install(self._pipe, config=one.config) as cached:
            return *self._call(one.steps, inputs), cached.peak_bytes

    def _scheduler(self, name: str | None) -> Any:
        """A scheduler of the pipeline's own configuration; another class than its own by name."""
        if name is None:
            return self._own
        return make_scheduler(name, self._own.config, self._settings.steps)

    def _call(self, steps: int, inputs: Sequence[Input]) -> tuple[np.ndarray, Timing]:
        from PIL import Image

        conditions = [Image.fromarray(one.condition) for one in inputs]
        generators = [
            self._torch.Generator().manual_seed(one.seed + self._settings.seed) for one in inputs
        ]
        # "np" copies the pictures to the host, so the time of a GPU is all in it
        call = functools.partial(
            self._pipe,
            [one.prompt for one in inputs],
            image=conditions,
            num_inference_steps=steps,
            guidance_scale=self._guidance,
            generator=generators,
            output_type="np",
        )
        out, timing = timed(call)
        return np.asarray(out.images, dtype=np.float32), timing


def evaluate(
    conditions: Sequence[str] | None = None,
    rows: Iterable[Candidate] | None = None,
    settings: Settings | None = None,
    *,
    subject: Subject | None = None,
    folder: Path | None = None,
    on_images: Callable[[Batch], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Make pictures of the same inputs with each of ``rows`` and measure them.

    Every row starts a picture from the same noise. Rows are interleaved: each batch is made by the
    uncached pipeline, then by every row, before the next batch begins.

    Args:
        conditions: Of the subject; None: all it has.
        rows: What to compare; the first must be the uncached run. None: the presets and fewer
            steps.
        settings: See :class:`Settings`.
        subject: The model, its inputs and its judge; None: the testbed.
        folder: Where to keep what was measured. A run that was interrupted goes on from there:
            what the same settings, code and weights measured before is read, not made again; more
            scenes than before add to it. Only the uncached pictures of a batch with missing rows
            are made again, since distances and speeds of those rows are measured against them.
        on_images: Called with the pictures of each batch. ``folder`` does not keep them, so only
            one of the two can be given.
        on_progress: Called with a label, calls done and calls in all.

    Returns:
        A row a condition and candidate, in that order.

    Raises:
        ValueError: a condition is unknown, the first of ``rows`` is not the uncached run, or both
            ``folder`` and ``on_images`` are given.
    """
    settings = Settings() if settings is None else settings
    subject = testbed() if subject is None else subject
    conditions = subject.conditions if conditions is None else conditions
    for name in conditions:
        if name not in subject.conditions:
            raise ValueError(
                f"condition: expected one of {', '.join(subject.conditions)}; got {name!r}"
            )
    if subject.count is not None and settings.start + settings.scenes > subject.count:
        raise ValueError(
            f"{settings.scenes} scenes from {settings.start} on were asked for, and "
            f"{subject.title} has {subject.count}"
        )
    order = candidates(steps=settings.steps, subject=subject) if rows is None else list(rows)
    if not order or not order[0].is_plain or order[0].steps != settings.steps:
        raise ValueError(
            f"rows: the first must be the uncached run of {settings.steps} steps, which the others "
            "are compared with"
        )
    if folder is not None and on_images is not None:
        raise ValueError("folder and on_images: a record keeps no pictures; give one of the two")
    subject.check(settings.start, settings.scenes)
    around = environment(subject, settings)
    record = Record(folder)
    spans = settings.spans(subject.images)
    total = len(conditions) * len(spans) * len(order)
    done = 0
    found: list[Row] = []
    for condition in conditions:
        keys = [key(around, settings, condition, one) for one in order]
        studio: _Studio | None = None
        for span in spans:
            missing = [
                i
                for i, one in enumerate(order)
                if record.find(keys[i], condition, one.name, *span) is None
            ]
            if missing and studio is None:
                studio = _Studio(subject, condition, settings)
            inputs = subject.inputs(condition, *span) if missing else []
            for i, one in enumerate(order):
                if on_progress is not None:
                    on_progress(f"{condition}: {one.name}", done, total)
                done += 1
                # the uncached pictures are what the missing rows are measured against
                if not missing or (i != 0 and i not in missing):
                    continue
                assert studio is not None
                images, timing, held = studio.make(one, inputs)
                if i == 0:
                    reference, reference_timing = images, timing
                if on_images is not None:
                    on_images(Batch(condition, one, span[0] - spans[0][0], images))
                if i not in missing:
                    continue
                judged = subject.judge(condition, images, inputs)
                waits = [t.waited for t in (timing, reference_timing) if t.waited is not None]
                record.add(
                    Measured(
                        key=keys[i],
                        condition=condition,
                        candidate=one.name,
                        first=span[0],
                        values=_values(images, reference, judged, settings),
                        classes=None if judged.counts is None else _sparse(judged.counts),
                        features=pack(judged.features),
                        seconds=timing.seconds,
                        reference_seconds=reference_timing.seconds,
                        waited=max(waits, default=None),
                        held_bytes=held,
                    )
                )
        lines = [
            [record.get(own, condition, one.name, *span) for span in spans]
            for own, one in zip(keys, order, strict=True)
        ]
        found += summed_up(subject, condition, order, lines, settings)
    if on_progress is not None:
        on_progress("done", total, total)
    return found


def _values(
    images: np.ndarray, reference: np.ndarray, judged: Judged, settings: Settings
) -> dict[str, list[float]]:
    """What is measured of each picture, by the name of the measure."""
    values = {
        "fidelity": judged.scores,
        "distance": metrics.relative_l2(images, reference),
        "psnr": metrics.psnr(images, reference),
        "ssim": metrics.ssim(images, reference),
        "flip": metrics.flip(images, reference),
        "jod": metrics.jod(images, reference) if settings.jod else None,
        "agreement": judged.agreement,
    }
    return {name: those.tolist() for name, those in values.items() if those is not None}


def _sparse(counts: np.ndarray) -> list[list[list[int]]]:
    """Counts [B, K, 3] as [class, hit, true, judged] of the classes that occur in each picture."""
    return [
        [[int(k), *map(int, one[k])] for k in np.flatnonzero(one.any(axis=1))] for one in counts
    ]
