"""What pictures of an evaluation are made with, and the key of what is measured of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from hgc.evaluation import metrics
from hgc.evaluation.candidate import Candidate
from hgc.evaluation.record import fingerprint, settings_key
from hgc.evaluation.subject import Subject, check_scheduler

__all__ = ["COMPUTING", "MEASURING", "Settings", "environment", "key", "own_scheduler"]

# Files of `hgc` that recorded numbers depend on. Of all rows: the models and the inputs, the judges
# and the measures of a picture; not the command line, the tables or what is made of the measures.
MEASURING = (
    "testbed/*.py",
    *(
        f"evaluation/{name}.py"
        for name in (
            "folder", "judging", "measure", "metrics", "models", "peers", "settings", "subject",
            "timing",
        )
    ),
)  # fmt: skip
# Of rows with hgc besides: the others are kept when these change.
COMPUTING = tuple(f"{one}/*.py" for one in ("planning", "run", "models", "watch", "execute"))

# Settings that say how many pictures there are, and not how one is made.
_EXTENT = ("scenes", "start")


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

    def spans(self, images: int) -> list[tuple[int, int]]:
        """First index and number of the pictures of each batch, ``images`` of a scene.

        Batches begin at multiples of the batch from the first picture on, so that more scenes later
        on leave those of before as they were.
        """
        first, end = self.start * images, (self.start + self.scenes) * images
        return [(i, min(self.batch, end - i)) for i in range(first, end, self.batch)]


def own_scheduler(subject: Subject, settings: Settings) -> str:
    """The short name of the scheduler that rows without one of their own have."""
    return settings.scheduler or subject.scheduler()


def environment(subject: Subject, settings: Settings) -> dict[str, Any]:
    """What the numbers depend on apart from the settings: versions, code, weights, threads."""
    import diffusers
    import torch
    import transformers

    import hgc

    return {
        "versions": {
            "hgc": hgc.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "flip-evaluator": metrics.flip_version(),
            "cvvdp": metrics.jod_version() if settings.jod else None,
        },
        "threads": torch.get_num_threads(),
        "code": fingerprint(Path(hgc.__file__).parent, *MEASURING),
        **subject.identity(),
    }


@functools.cache
def _engine() -> dict[str, str]:
    import hgc
    import hgc_kernels

    return {
        "engine": fingerprint(Path(hgc.__file__).parent, *COMPUTING),
        "kernels": fingerprint(Path(hgc_kernels.__file__).parent, "**/*.py"),
    }


def key(around: dict[str, Any], settings: Settings, condition: str, one: Candidate) -> str:
    """The key of what is measured of a candidate; ``around``: its :func:`environment`."""
    made_with = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _EXTENT}
    return settings_key(
        {
            **around,
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
