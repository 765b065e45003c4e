"""The evaluation: pictures of the same inputs with each candidate, measured."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hgc.evaluation import metrics
from hgc.evaluation.candidate import Candidate, candidates, testbed
from hgc.evaluation.models import load_shapes, sd15_macs
from hgc.evaluation.peers import installed_package, package_macs
from hgc.evaluation.record import Measured, Record, fingerprint, pack, settings_key, unpack
from hgc.evaluation.subject import Input, Judged, Subject, check_scheduler, make_scheduler
from hgc.evaluation.timing import MOST_WAITED, Timing, timed
from hgc.evaluation.worst import Strips

if TYPE_CHECKING:
    from hgc.report.macs import Macs

__all__ = ["Batch", "Row", "Settings", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the pictures are made with.

    Attributes:
        scenes: Scenes, or pictures of a folder, a condition.
        start: The first of them.
        steps: Steps of the uncached run.
        seed: Added to a scene's own seed: other noise.
        batch: Pictures a pipeline call.
        device: "cpu" or "cuda".
        guidance: Guidance scale; None: the testbed's 3.5, or 7.5 with another checkpoint.
        scheduler: One of `hgc.evaluation.subject.SCHEDULERS`, made from the configuration of the
            pipeline's own, or one of them with "-trailing" or "-grid"; None: the pipeline's own.
        jod: Measure JOD too, which takes cvvdp and about a second a picture of 512 pixels.
    """

    scenes: int = 64
    start: int = 0
    steps: int = 20
    seed: int = 0
    batch: int = 8
    device: str = "cpu"
    guidance: float | None = None
    scheduler: str | None = None
    jod: bool = False

    def __post_init__(self) -> None:
        for name, low in (("scenes", 1), ("start", 0), ("steps", 1), ("seed", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}; got {value!r}")
        if self.guidance is not None and not 1.0 < self.guidance < 1000.0:
            raise ValueError(
                f"guidance must be above 1, where guidance begins; got {self.guidance!r}"
            )
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.jod and metrics.jod_version() is None:
            raise ValueError(
                "jod needs cvvdp, which the jod extra installs: "
                'pip install "hybrid-grained-cache[jod]"'
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate over all pictures of one condition. MACs are of one picture under guidance.

    A figure with ``_low``, ``_high`` and ``_worst`` is a mean over the pictures, with its 95%
    bootstrap interval and the mean of the worst 5% of pictures.

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
        macs: Of this model, all multiply-accumulates; None where they cannot be counted.
        macs_paper: The same without the two attention matmuls, the paper's convention.
        share: ``macs`` over those of the uncached run.
        share_paper: ``macs_paper`` over those of the uncached run.
        sd15_macs: What the plan costs on SD1.5 at 512 x 512, all multiply-accumulates; None where
            the model is no stand-in for SD1.5.
        sd15_macs_paper: The same in the paper's convention.
        seconds: Median time of a pipeline call, a picture; of the batches during which no other
            process had the cores (`hgc.evaluation.timing`), None where there are none.
        speedup: Median over those batches of the uncached call's time over this one's, both made
            one after the other in one process.
        measure: Name of the measure of fidelity.
        fidelity: Fidelity to the condition over the whole set, higher is better.
        loss: Share of the uncached run's fidelity that was lost, with its interval.
        distance: Relative L2 to the uncached picture.
        psnr: To the uncached picture in dB, 100 at most.
        ssim: Structural similarity to the uncached picture.
        flip: LDR-FLIP to the uncached picture, 0 where they are equal, at
            `hgc.evaluation.metrics.pixels_per_degree`; None without flip-evaluator.
        jod: ColorVideoVDP's JOD of the picture beside the uncached one, 10 where they are equal;
            None where it was not asked for.
        perceived: Relative L2 of the judge's features to those of the uncached picture; None
            without a judge.
        frechet: Frechet distance of the judge's features to those of the uncached pictures, with
            its interval: of the whole set, so without a worst 5%.
        frechet_truth: The same to the true pictures; None where there are none.
        agreement: With the prompt, higher is better; None where nothing reads it.
        rival: Name of the nearest run with fewer steps that costs at least as many MACs.
        rival_ratio: ``distance`` over the rival's, with its interval: 0.5 is half as far.
        rival_ratio_worst: The same of the two means of the worst 5%.
        held_bytes: Most bytes the cache held, a picture.
        worst_pictures: Indices of the pictures farthest from the uncached ones, farthest first.
        worst_distances: Theirs.
        key: Of the row's lines in the record.
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
    macs: int | None
    macs_paper: int | None
    share: float | None
    share_paper: float | None
    sd15_macs: int | None
    sd15_macs_paper: int | None
    seconds: float | None
    speedup: float | None
    measure: str
    fidelity: float
    fidelity_low: float
    fidelity_high: float
    fidelity_worst: float
    loss: float
    loss_low: float
    loss_high: float
    distance: float
    distance_low: float
    distance_high: float
    distance_worst: float
    psnr: float
    psnr_low: float
    psnr_high: float
    psnr_worst: float
    ssim: float
    ssim_low: float
    ssim_high: float
    ssim_worst: float
    flip: float | None
    flip_low: float | None
    flip_high: float | None
    flip_worst: float | None
    jod: float | None
    jod_low: float | None
    jod_high: float | None
    jod_worst: float | None
    perceived: float | None
    perceived_low: float | None
    perceived_high: float | None
    perceived_worst: float | None
    frechet: float | None
    frechet_low: float | None
    frechet_high: float | None
    frechet_truth: float | None
    agreement: float | None
    agreement_low: float | None
    agreement_high: float | None
    agreement_worst: float | None
    rival: str | None
    rival_ratio: float | None
    rival_ratio_low: float | None
    rival_ratio_high: float | None
    rival_ratio_worst: float | None
    held_bytes: int
    worst_pictures: list[int]
    worst_distances: list[float]
    key: str


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


def _versions(settings: Settings) -> dict[str, str | None]:
    import diffusers
    import torch
    import transformers

    import hgc

    return {
        "hgc": hgc.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "flip-evaluator": metrics.flip_version(),
        "cvvdp": metrics.jod_version() if settings.jod else None,
    }


def _environment(subject: Subject, settings: Settings) -> dict[str, Any]:
    """What the numbers depend on apart from the settings: versions, code, weights, threads."""
    import torch

    import hgc

    # The judges and the measures of a picture; not the command line, the tables or what is made of
    # the measures, which change no number that is recorded.
    package = Path(hgc.__file__).parent
    return {
        "versions": _versions(settings),
        "threads": torch.get_num_threads(),
        "code": fingerprint(
            package, "testbed/*.py", *(f"evaluation/{name}.py" for name in _MEASURING)
        ),
        **subject.identity(),
    }


@functools.cache
def _engine() -> dict[str, str]:
    """What rows with hgc depend on besides; the others are kept when it changes."""
    import hgc
    import hgc_kernels

    return {
        "engine": fingerprint(Path(hgc.__file__).parent, *(f"{one}/*.py" for one in _COMPUTING)),
        "kernels": fingerprint(Path(hgc_kernels.__file__).parent, "**/*.py"),
    }


_COMPUTING = ("planning", "run", "models", "watch", "execute")
_MEASURING = ("measure", "metrics", "subject", "folder", "judging", "peers", "timing")

# Settings that say how many pictures there are, and not how one is made.
_EXTENT = ("scenes", "start")


def _key(environment: dict[str, Any], settings: Settings, condition: str, one: Candidate) -> str:
    made_with = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _EXTENT}
    return settings_key(
        {
            **environment,
            **({} if one.config is None else _engine()),
            **made_with,
            "condition": condition,
            "steps": one.steps,
            "reference_steps": settings.steps,
            "config": None if one.config is None else json.loads(one.config.to_json()),
            "own_scheduler": one.scheduler,
            "package": one.package,
        }
    )


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
            with installed_package(one.package, self._pipe) as held:
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


def own_scheduler(subject: Subject, settings: Settings) -> str:
    """The short name of the scheduler that rows without one of their own have."""
    return settings.scheduler or subject.scheduler()


@dataclasses.dataclass(frozen=True)
class _Job:
    """One condition of one evaluation.

    Attributes:
        subject: What it is made on.
        condition: Name of the condition.
        order: The candidates, the uncached one first.
        keys: Of their lines in the record.
        settings: As given.
        spans: First index and number of the pictures of each batch.
    """

    subject: Subject
    condition: str
    order: Sequence[Candidate]
    keys: Sequence[str]
    settings: Settings
    spans: Sequence[tuple[int, int]]

    def inputs(self, span: tuple[int, int]) -> list[Input]:
        return self.subject.inputs(self.condition, *span)


def _spans(settings: Settings, images: int) -> list[tuple[int, int]]:
    """Batches of pictures. They begin at multiples of the batch from the first picture on, so that
    more scenes later on leave those of before as they were."""
    first, end = settings.start * images, (settings.start + settings.scenes) * images
    return [(i, min(settings.batch, end - i)) for i in range(first, end, settings.batch)]


def evaluate(
    conditions: Sequence[str] | None = None,
    rows: Iterable[Candidate] | None = None,
    settings: Settings | None = None,
    *,
    subject: Subject | None = None,
    folder: Path | None = None,
    worst: int = 0,
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
        worst: Keep so many of each row's pictures that are farthest from the uncached ones, in
            ``folder`` (see `hgc.evaluation.worst`).
        on_images: Called with the pictures of each batch. ``folder`` does not keep them, so only
            one of the two can be given.
        on_progress: Called with a label, calls done and calls in all.

    Returns:
        A row a condition and candidate, in that order.

    Raises:
        ValueError: a condition is unknown, the first of ``rows`` is not the uncached run, both
            ``folder`` and ``on_images`` are given, or ``worst`` without a folder.
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
    if worst and folder is None:
        raise ValueError("worst: the pictures are kept in a folder; give one")
    subject.check(settings.start, settings.scenes)
    environment = _environment(subject, settings)
    record = Record(folder)
    spans = _spans(settings, subject.images)
    total = len(conditions) * len(spans) * len(order)
    done = 0
    found: list[Row] = []
    for condition in conditions:
        keys = [_key(environment, settings, condition, one) for one in order]
        job = _Job(subject, condition, order, keys, settings, spans)
        strips = None if folder is None or not worst else Strips(folder, worst, spans)
        studio: _Studio | None = None
        for span in spans:
            missing = [
                i
                for i, (key, one) in enumerate(zip(keys, order, strict=True))
                if record.find(key, condition, one.name, *span) is None
            ]
            if missing and studio is None:
                studio = _Studio(subject, condition, settings)
            inputs = job.inputs(span) if missing else []
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
                    base = subject.judge(condition, images, inputs)
                if on_images is not None:
                    on_images(Batch(condition, one, span[0] - spans[0][0], images))
                if i not in missing:
                    continue
                measured = _measured(
                    job, i, span, images, reference,
                    base if i == 0 else subject.judge(condition, images, inputs),
                    (timing, reference_timing), held,
                )  # fmt: skip
                if strips is not None:
                    strips.keep(record, measured, images, reference)
                record.add(measured)
                if strips is not None:
                    strips.prune(record, measured)
        lines = [
            [record.get(key, condition, one.name, *span) for span in spans]
            for key, one in zip(keys, order, strict=True)
        ]
        if strips is not None:
            studio = _remake(job, lines, strips, studio)
        found += _rows(job, lines, worst)
    if on_progress is not None:
        on_progress("done", total, total)
    return found


def _measured(
    job: _Job,
    i: int,
    span: tuple[int, int],
    images: np.ndarray,
    reference: np.ndarray,
    judged: Judged,
    timings: tuple[Timing, Timing],
    held: int,
) -> Measured:
    counts = judged.counts
    flip = metrics.flip(images, reference)
    own, uncached = timings
    waits = [timing.waited for timing in timings if timing.waited is not None]
    return Measured(
        key=job.keys[i],
        condition=job.condition,
        candidate=job.order[i].name,
        first=span[0],
        scores=judged.scores.tolist(),
        classes=None if counts is None else [_sparse(one) for one in counts],
        distances=metrics.relative_l2(images, reference).tolist(),
        psnr=metrics.psnr(images, reference).tolist(),
        ssim=metrics.ssim(images, reference).tolist(),
        flip=None if flip is None else flip.tolist(),
        jod=metrics.jod(images, reference).tolist() if job.settings.jod else None,
        agreement=None if judged.agreement is None else judged.agreement.tolist(),
        features=pack(judged.features),
        seconds=own.seconds,
        reference_seconds=uncached.seconds,
        waited=max(waits, default=None),
        held_bytes=held,
    )


def _sparse(counts: np.ndarray) -> list[list[int]]:
    """Counts [K, 3] as [class, hit, true, judged] of the classes that occur."""
    return [[int(k), *map(int, counts[k])] for k in np.flatnonzero(counts.any(axis=1))]


def _remake(
    job: _Job, lines: Sequence[Sequence[Measured]], strips: Strips, studio: _Studio | None
) -> _Studio | None:
    """Make the strips again that are not in the folder: their calls were measured before more of
    them were asked for, or somebody deleted them."""
    for i, batches in enumerate(lines):
        for measured in strips.missing(batches):
            if studio is None:
                studio = _Studio(job.subject, job.condition, job.settings)
            inputs = job.inputs((measured.first, measured.count))
            reference, _, _ = studio.make(job.order[0], inputs)
            images, _, _ = studio.make(job.order[i], inputs)
            strips.write(measured, range(measured.count), images, reference)
        strips.prune_all(batches)
    return studio


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What was measured of one candidate, all batches together; one entry a picture."""

    scores: np.ndarray
    counts: np.ndarray | None
    distances: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    flip: np.ndarray | None
    jod: np.ndarray | None
    agreement: np.ndarray | None
    features: np.ndarray | None


def _sample(batches: Sequence[Measured], classes: int) -> _Sample:
    def joined(parts: Sequence[Any]) -> np.ndarray | None:
        if any(part is None for part in parts):
            return None
        return np.concatenate([np.asarray(part) for part in parts])

    counts = None
    if all(m.classes is not None for m in batches):
        listed = [one for m in batches for one in m.classes or ()]
        counts = np.zeros((len(listed), classes, 3), np.int64)
        for i, one in enumerate(listed):
            for k, *values in one:
                counts[i, k] = values
    return _Sample(
        scores=np.concatenate([m.scores for m in batches]),
        counts=counts,
        distances=np.concatenate([m.distances for m in batches]),
        psnr=np.concatenate([m.psnr for m in batches]),
        ssim=np.concatenate([m.ssim for m in batches]),
        flip=joined([m.flip for m in batches]),
        jod=joined([m.jod for m in batches]),
        agreement=joined([m.agreement for m in batches]),
        features=joined([unpack(m.features, m.count) for m in batches]),
    )


def _nearest(order: Sequence[Candidate], samples: Sequence[_Sample]) -> set[int]:
    """Of each group of runs that differ in the scheduler only, the nearest one."""
    best: dict[str, int] = {}
    for i, one in enumerate(order):
        if one.group:
            other = best.setdefault(one.group, i)
            if samples[i].distances.mean() < samples[other].distances.mean():
                best[one.group] = i
    return set(best.values())


def _flat(
    name: str, values: np.ndarray | None, images: int, *, higher_is_worse: bool
) -> dict[str, float | None]:
    """The four fields of a row that the summary of ``values`` fills."""
    if values is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high", f"{name}_worst"))
    summary = metrics.summary(values, higher_is_worse=higher_is_worse, images=images)
    return {
        name: summary.mean,
        f"{name}_low": summary.low,
        f"{name}_high": summary.high,
        f"{name}_worst": summary.worst,
    }


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _rows(job: _Job, lines: Sequence[Sequence[Measured]], worst: int) -> list[Row]:
    subject, images = job.subject, job.subject.images
    samples = [_sample(batches, subject.classes) for batches in lines]
    base = samples[0]
    truths = _truths(job) if base.features is not None else None
    nearest = _nearest(job.order, samples)
    full = subject.macs(None, job.order[0].steps)
    found = []
    for i, (one, batches, sample) in enumerate(zip(job.order, lines, samples, strict=True)):
        score, score_low, score_high = metrics.fidelity_interval(
            sample.scores, sample.counts, images
        )
        loss, loss_low, loss_high = metrics.loss_interval(
            sample.scores, base.scores,
            counts=sample.counts, reference_counts=base.counts, images=images,
        )  # fmt: skip
        own, of_sd15 = _macs(subject, one)
        perceived = interval = distance_truth = distance_features = None
        if sample.features is not None and base.features is not None:
            perceived = metrics.relative_l2(sample.features, base.features)
            distance_features = metrics.frechet(sample.features, base.features)
            interval = metrics.frechet_interval(sample.features, base.features, images)
            if truths is not None:
                distance_truth = metrics.frechet(sample.features, truths)
        alone = [m for m in batches if m.waited is None or m.waited <= MOST_WAITED]
        first = batches[0].first
        farthest = metrics.worst_indices(sample.distances, worst)
        figures: dict[str, Any] = {
            **_flat("distance", sample.distances, images, higher_is_worse=True),
            **_flat("psnr", sample.psnr, images, higher_is_worse=False),
            **_flat("ssim", sample.ssim, images, higher_is_worse=False),
            **_flat("flip", sample.flip, images, higher_is_worse=True),
            **_flat("jod", sample.jod, images, higher_is_worse=False),
            **_flat("perceived", perceived, images, higher_is_worse=True),
            **_flat("agreement", sample.agreement, images, higher_is_worse=False),
            **_against(job, i, samples, nearest),
        }
        found.append(
            Row(
                condition=job.condition,
                name=one.name,
                label=one.label,
                method=one.method,
                steps=one.steps,
                scheduler=one.scheduler or own_scheduler(subject, job.settings),
                cached=not one.is_plain,
                shown=not one.group or i in nearest,
                scenes=len(sample.scores) // images,
                images=images,
                macs=None if own is None else own.total,
                macs_paper=None if own is None else own.paper,
                share=None if own is None else own.total / full.total,
                share_paper=None if own is None else own.paper / full.paper,
                sd15_macs=None if of_sd15 is None else of_sd15.total,
                sd15_macs_paper=None if of_sd15 is None else of_sd15.paper,
                seconds=_median(m.seconds / m.count for m in alone),
                speedup=_median(m.reference_seconds / m.seconds for m in alone),
                measure=subject.measures[job.condition],
                fidelity=score,
                fidelity_low=score_low,
                fidelity_high=score_high,
                fidelity_worst=metrics.worst_share(sample.scores, higher_is_worse=False),
                loss=loss,
                loss_low=loss_low,
                loss_high=loss_high,
                frechet=distance_features,
                frechet_low=None if interval is None else interval[0],
                frechet_high=None if interval is None else interval[1],
                frechet_truth=distance_truth,
                held_bytes=max(m.held_bytes // m.count for m in batches),
                worst_pictures=[first + k for k in farthest],
                worst_distances=[float(sample.distances[k]) for k in farthest],
                key=batches[0].key,
                **figures,
            )
        )
    return found


def _macs(subject: Subject, one: Candidate) -> tuple[Macs | None, Macs | None]:
    """MACs on this model, and on SD1.5 where it stands for that."""
    if one.package is None:
        of_sd15 = sd15_macs(one.config, one.steps) if subject.stands_for_sd15 else None
        return subject.macs(one.config, one.steps), of_sd15
    own = package_macs(one.package, one.steps, subject.shapes(), subject.macs(None, 1))
    if not subject.stands_for_sd15:
        return own, None
    return own, package_macs(one.package, one.steps, load_shapes("sd15"), sd15_macs(None, 1))


def _against(job: _Job, i: int, samples: Sequence[_Sample], nearest: set[int]) -> dict[str, Any]:
    """How much nearer a plan comes than the nearest run with fewer steps at its MACs."""
    name = job.order[i].name
    rival = next((k for k in sorted(nearest) if name in job.order[k].equal_to), None)
    if rival is None:
        fields = ("rival", "rival_ratio", "rival_ratio_low", "rival_ratio_high")
        return dict.fromkeys((*fields, "rival_ratio_worst"))
    ours, theirs = samples[i].distances, samples[rival].distances
    ratio, low, high = metrics.ratio_interval(ours, theirs, job.subject.images)
    return {
        "rival": job.order[rival].name,
        "rival_ratio": ratio,
        "rival_ratio_low": low,
        "rival_ratio_high": high,
        "rival_ratio_worst": metrics.worst_share(ours, higher_is_worse=True)
        / metrics.worst_share(theirs, higher_is_worse=True),
    }


def _truths(job: _Job) -> np.ndarray | None:
    """The judge's features of the true pictures, one a scene."""
    first, each = job.settings.start, job.subject.images
    scenes = range(first, first + job.settings.scenes)
    inputs = [one for i in scenes for one in job.subject.inputs(job.condition, i * each, 1)]
    size = job.settings.batch
    parts = [
        job.subject.truths(job.condition, inputs[i : i + size]) for i in range(0, len(inputs), size)
    ]
    kept = [part for part in parts if part is not None]
    return np.concatenate(kept) if len(kept) == len(parts) else None
