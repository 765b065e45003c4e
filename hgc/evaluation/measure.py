"""The evaluation: pictures of held-out scenes with each candidate, measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hgc.evaluation.candidate import Candidate, candidates, macs_here
from hgc.evaluation.metrics import corpus_iou, loss_interval, relative_l2, worst_share
from hgc.evaluation.models import sd15_macs
from hgc.evaluation.record import Measured, Record, fingerprint, settings_key

if TYPE_CHECKING:
    from hgc.testbed import Scene

__all__ = ["Batch", "Row", "Settings", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the pictures are made with.

    Attributes:
        scenes: Held-out scenes a condition.
        start: The first of them.
        steps: Steps of the uncached run.
        seed: Added to a scene's own seed: other noise.
        batch: Scenes a pipeline call.
        device: "cpu" or "cuda".
    """

    scenes: int = 64
    start: int = 0
    steps: int = 20
    seed: int = 0
    batch: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, low in (("scenes", 1), ("start", 0), ("steps", 1), ("seed", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}; got {value!r}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate over all scenes of one condition. MACs are of one picture under guidance.

    Attributes:
        condition: Name of the condition.
        name: Of the candidate.
        label: The name, with the plans whose MACs this run with fewer steps equals.
        steps: Steps of the run.
        cached: Whether hgc was installed.
        scenes: Number of scenes.
        macs: Of this model, all multiply-accumulates.
        macs_paper: The same without the two attention matmuls, the paper's convention.
        share: ``macs`` over those of the uncached run.
        share_paper: ``macs_paper`` over those of the uncached run.
        sd15_macs: What the plan costs on SD1.5 at 512 x 512, all multiply-accumulates.
        sd15_macs_paper: The same in the paper's convention.
        seconds: Median time of a pipeline call, a picture.
        speedup: Median over batches of the uncached call's time over this one's, both made one
            after the other in one process.
        measure: Name of the measure of fidelity.
        fidelity: Fidelity to the condition over the whole set, higher is better.
        fidelity_worst: Mean of the worst 5% of scenes.
        loss: Share of the uncached run's fidelity that was lost.
        loss_low: Lower end of its 95% bootstrap interval.
        loss_high: Upper end.
        distance: Relative L2 to the uncached picture, mean.
        distance_worst: Mean of the worst 5% of scenes.
        held_bytes: Most bytes the cache held, a picture.
    """

    condition: str
    name: str
    label: str
    steps: int
    cached: bool
    scenes: int
    macs: int
    macs_paper: int
    share: float
    share_paper: float
    sd15_macs: int
    sd15_macs_paper: int
    seconds: float
    speedup: float
    measure: str
    fidelity: float
    fidelity_worst: float
    loss: float
    loss_low: float
    loss_high: float
    distance: float
    distance_worst: float
    held_bytes: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures of one candidate, handed to ``on_images``.

    Attributes:
        condition: Name of the condition.
        candidate: What made them.
        start: Index of the first scene among those evaluated.
        images: float32 [B, 64, 64, 3] in [0, 1].
    """

    condition: str
    candidate: Candidate
    start: int
    images: np.ndarray


def _versions() -> dict[str, str]:
    import diffusers
    import torch
    import transformers

    import hgc

    return {
        "hgc": hgc.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def _environment() -> dict[str, Any]:
    """What the numbers depend on apart from the settings: versions, code, weights, threads."""
    import torch

    import hgc
    import hgc_kernels
    from hgc import testbed

    # The engine, the judges and the measures; not the command line or the tables, which change no
    # number that is recorded.
    package = Path(hgc.__file__).parent
    return {
        "versions": _versions(),
        "threads": torch.get_num_threads(),
        "code": fingerprint(
            package, "*.py", "testbed/*.py", "evaluation/measure.py", "evaluation/metrics.py"
        ),
        "kernels": fingerprint(Path(hgc_kernels.__file__).parent, "**/*.py"),
        "model": fingerprint(testbed.path(), "**/*"),
    }


def _key(environment: dict[str, Any], settings: Settings, condition: str, one: Candidate) -> str:
    return settings_key(
        {
            **environment,
            **dataclasses.asdict(settings),
            "condition": condition,
            "steps": one.steps,
            "reference_steps": settings.steps,
            "config": None if one.config is None else json.loads(one.config.to_json()),
        }
    )


class _Studio:
    """The testbed's pipeline of one condition."""

    def __init__(self, condition: str, settings: Settings) -> None:
        from hgc import testbed

        self._settings = settings
        pipe: Any = testbed.load_pipeline(condition)
        self._pipe = pipe.to(settings.device)
        self._guidance = testbed.GUIDANCE_SCALE
        self._condition = condition
        self._warm = False

    def make(self, one: Candidate, scenes: Sequence[Scene]) -> tuple[np.ndarray, float, int]:
        """Pictures float32 [B, 64, 64, 3], seconds of the call, bytes the cache held."""
        if not self._warm:
            self._call(2, scenes)
            self._warm = True
        if one.config is None:
            return *self._call(one.steps, scenes), 0
        import hgc

        with hgc.install(self._pipe.unet, self._pipe.controlnet, config=one.config) as cached:
            images, seconds = self._call(one.steps, scenes)
            return images, seconds, cached.peak_bytes

    def _call(self, steps: int, scenes: Sequence[Scene]) -> tuple[np.ndarray, float]:
        import torch

        from hgc import testbed

        conditions = [testbed.condition_image(scene, self._condition) for scene in scenes]
        generators = [
            torch.Generator().manual_seed(scene.seed + self._settings.seed) for scene in scenes
        ]
        start = time.perf_counter()
        # "np" copies the pictures to the host, so the time of a GPU is all in it
        images = self._pipe(
            [scene.caption for scene in scenes],
            image=conditions,
            num_inference_steps=steps,
            guidance_scale=self._guidance,
            generator=generators,
            output_type="np",
        ).images
        return np.asarray(images, dtype=np.float32), time.perf_counter() - start


def _measure(
    condition: str, images: np.ndarray, scenes: Sequence[Scene]
) -> tuple[np.ndarray, list[list[list[int]]] | None]:
    """Fidelity of each picture, and for segmentation each picture's confusion matrix."""
    from hgc import testbed
    from hgc.testbed import judges

    if condition != "segmentation":
        return testbed.fidelity(condition, images, scenes), None
    matrices = np.stack(
        [judges.confusion(images[i : i + 1], [scene]) for i, scene in enumerate(scenes)]
    )
    return corpus_iou(matrices), matrices.tolist()


def evaluate(
    conditions: Sequence[str] | None = None,
    rows: Iterable[Candidate] | None = None,
    settings: Settings | None = None,
    *,
    folder: Path | None = None,
    on_images: Callable[[Batch], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Make pictures of held-out scenes with each of ``rows`` and measure them.

    Every row starts a scene from the same noise. Rows are interleaved: each batch of scenes is
    made by the uncached pipeline, then by every row, before the next batch begins.

    Args:
        conditions: Of the testbed; None: all four.
        rows: What to compare; the first must be the uncached run. None: the presets and fewer
            steps.
        settings: See :class:`Settings`.
        folder: Where to keep what was measured. A run that was interrupted goes on from there:
            what the same settings, code and weights measured before is read, not made again. Only
            the uncached pictures of a batch with missing rows are, since distances and speeds of
            those rows are measured against them.
        on_images: Called with the pictures of each batch. ``folder`` does not keep them, so only
            one of the two can be given.
        on_progress: Called with a label, calls done and calls in all.

    Returns:
        A row a condition and candidate, in that order.

    Raises:
        ValueError: a condition is unknown, the first of ``rows`` is not the uncached run, or both
            ``folder`` and ``on_images`` are given.
    """
    from hgc import testbed
    from hgc.testbed.conditions import check_condition

    settings = Settings() if settings is None else settings
    conditions = testbed.CONDITIONS if conditions is None else conditions
    for name in conditions:
        check_condition(name)
    order = candidates(steps=settings.steps) if rows is None else list(rows)
    if not order or order[0].config is not None or order[0].steps != settings.steps:
        raise ValueError(
            f"rows: the first must be the uncached run of {settings.steps} steps, which the others "
            "are compared with"
        )
    if folder is not None and on_images is not None:
        raise ValueError("folder and on_images: a record keeps no pictures; give one of the two")
    environment = _environment()
    record = Record(folder)
    scenes = testbed.held_out(settings.scenes, settings.start)
    parts = [scenes[i : i + settings.batch] for i in range(0, len(scenes), settings.batch)]
    total = len(conditions) * len(parts) * len(order)
    done = 0
    found: list[Row] = []
    for condition in conditions:
        keys = [_key(environment, settings, condition, one) for one in order]
        studio: _Studio | None = None
        for b, part in enumerate(parts):
            missing = [
                i
                for i, (key, one) in enumerate(zip(keys, order, strict=True))
                if record.find(key, condition, one.name, b) is None
            ]
            if missing and studio is None:
                studio = _Studio(condition, settings)
            for i, one in enumerate(order):
                if on_progress is not None:
                    on_progress(f"{condition}: {one.name}", done, total)
                done += 1
                # the uncached pictures are what the missing rows are measured against
                if not missing or (i != 0 and i not in missing):
                    continue
                assert studio is not None
                images, seconds, held = studio.make(one, part)
                if i == 0:
                    reference, reference_seconds = images, seconds
                if on_images is not None:
                    on_images(Batch(condition, one, b * settings.batch, images))
                if i not in missing:
                    continue
                scores, confusion = _measure(condition, images, part)
                record.add(
                    Measured(
                        key=keys[i],
                        condition=condition,
                        candidate=one.name,
                        batch=b,
                        scores=scores.tolist(),
                        confusion=confusion,
                        distances=relative_l2(images, reference).tolist(),
                        seconds=seconds,
                        reference_seconds=reference_seconds,
                        held_bytes=held,
                    )
                )
        measured = [
            [record.get(key, condition, one.name, b) for b in range(len(parts))]
            for key, one in zip(keys, order, strict=True)
        ]
        found += _rows(condition, order, measured, parts)
    if on_progress is not None:
        on_progress("done", total, total)
    return found


def _rows(
    condition: str,
    order: Sequence[Candidate],
    measured: Sequence[Sequence[Measured]],
    parts: Sequence[Sequence[Scene]],
) -> list[Row]:
    from hgc import testbed

    full = macs_here(None, order[0].steps)
    base = measured[0]
    base_scores = np.concatenate([m.scores for m in base])
    base_confusion = _joined(base)
    found = []
    for one, batches in zip(order, measured, strict=True):
        scores = np.concatenate([m.scores for m in batches])
        distances = np.concatenate([m.distances for m in batches])
        confusion = _joined(batches)
        fidelity = float(scores.mean())
        if confusion is not None:
            fidelity = float(corpus_iou(confusion.sum(0)))
        loss, low, high = loss_interval(
            scores, base_scores, confusion=confusion, reference_confusion=base_confusion
        )
        own, sd15 = macs_here(one.config, one.steps), sd15_macs(one.config, one.steps)
        found.append(
            Row(
                condition=condition,
                name=one.name,
                label=one.label,
                steps=one.steps,
                cached=one.config is not None,
                scenes=len(scores),
                macs=own.total,
                macs_paper=own.paper,
                share=own.total / full.total,
                share_paper=own.paper / full.paper,
                sd15_macs=sd15.total,
                sd15_macs_paper=sd15.paper,
                seconds=statistics.median(
                    m.seconds / len(part) for m, part in zip(batches, parts, strict=True)
                ),
                speedup=statistics.median(m.reference_seconds / m.seconds for m in batches),
                measure=testbed.MEASURES[condition],
                fidelity=fidelity,
                fidelity_worst=worst_share(scores, higher_is_worse=False),
                loss=loss,
                loss_low=low,
                loss_high=high,
                distance=float(distances.mean()),
                distance_worst=worst_share(distances, higher_is_worse=True),
                held_bytes=max(
                    m.held_bytes // len(part) for m, part in zip(batches, parts, strict=True)
                ),
            )
        )
    return found


def _joined(batches: Sequence[Measured]) -> np.ndarray | None:
    """Confusion matrices [N, 10, 10] of all scenes, where there are any."""
    if any(m.confusion is None for m in batches):
        return None
    return np.concatenate([np.asarray(m.confusion) for m in batches])
