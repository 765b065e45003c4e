"""What a run makes, and how one worker makes a shard of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hgc.generation.arguments import number, size_in_pixels, whole
from hgc.generation.generator import Generator, Made
from hgc.generation.items import (
    GO_ON,
    RESIZE,
    Bad,
    BadItem,
    GenerateError,
    Item,
    Picture,
    noise_seed,
    opened,
)
from hgc.generation.sinks import SINKS, Drawn
from hgc.generation.store import Record, Store
from hgc.generation.tables import Scan, Table

if TYPE_CHECKING:
    from hgc.planning.config import Config

__all__ = ["THREADS", "Job", "Model", "Settings", "ShardMaker", "Stopped"]

# Shards that a device works on at once: while it makes the pictures of one, the others are read,
# encoded and written.
THREADS = 3
# zlib's: three times as fast as Pillow's own 6, for files a few percent larger.
_COMPRESSION = 1


class Stopped(Exception):
    """A shard was left, since the run ends."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the pictures are made and kept.

    Attributes:
        images: Pictures of each item.
        seed: Of the noise.
        steps: Denoising steps.
        guidance: Guidance scale.
        batch: Pictures a pipeline call.
        size: Height and width in pixels.
        resize: ``"nearest"`` or ``"bicubic"`` for conditions of another size; None: they fail.
        shard: Items of each shard.
        format: One of `hgc.generation.sinks.SINKS`.
        keep_conditions: Write each picture's condition beside it.
        check: Share of the batches that is made without hgc too.
        strict: Stop at the first item that fails.
    """

    images: int
    seed: int
    steps: int
    guidance: float
    batch: int
    size: tuple[int, int]
    resize: str | None
    shard: int
    format: str
    keep_conditions: bool
    check: float
    strict: bool

    def __post_init__(self) -> None:
        lowest = {"images": 1, "seed": 0, "steps": 1, "batch": 1, "shard": 1}
        for name, low in lowest.items():
            whole(name, getattr(self, name), low)
        if not 0.0 <= number("guidance", self.guidance) < 1000.0:
            raise GenerateError(f"guidance must be 0 to 1000; got {self.guidance!r}")
        if not 0.0 <= number("check", self.check) <= 1.0:
            raise GenerateError(f"check must be a share, 0 to 1; got {self.check!r}")
        if self.resize is not None and self.resize not in RESIZE:
            raise GenerateError(f"resize must be one of {', '.join(RESIZE)}; got {self.resize!r}")
        if self.format not in SINKS:
            raise GenerateError(f"format must be one of {', '.join(SINKS)}; got {self.format!r}")
        size_in_pixels(self.size)

    def pictures(self) -> dict[str, Any]:
        """What the shards' bytes depend on, as JSON."""
        found = dataclasses.asdict(self)
        del found["check"], found["strict"]
        return {**found, "size": list(self.size)}


@dataclasses.dataclass(frozen=True)
class Model:
    """A diffusers pipeline in a folder, with its ControlNet.

    Attributes:
        folder: The pipeline's.
        controlnet: The ControlNet's; None: the pipeline's own.
        dtype: One of `hgc.evaluation.models.DTYPES`.
    """

    folder: Path
    controlnet: Path | None
    dtype: str

    def size(self) -> int:
        """Pixels along a side of the pictures it was made for.

        Raises ModelError where there is no such model, or it has no ControlNet or several.
        """
        from hgc.evaluation.models import ModelError, load_shapes

        nets = [] if self.controlnet is None else [self.controlnet]
        shapes = load_shapes(str(self.folder), nets)
        if len(shapes.controlnets) != 1:
            raise ModelError(
                f"{self.folder}: expected one ControlNet, the pipeline's own or --controlnet; got "
                f"{len(shapes.controlnets)}"
            )
        return shapes.size

    def identity(self) -> dict[str, Any]:
        """Hashes of the files that are loaded, as JSON: pictures may lie beside them.

        Raises ModelError where the folder holds no pipeline.
        """
        from hgc.evaluation.models import ModelError
        from hgc.evaluation.record import fingerprint

        index, net = self.folder / "model_index.json", self.controlnet
        try:
            parts = dict(json.loads(index.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"cannot read {index}: {error}") from None
        folders = [f"{name}/**/*" for name, kind in parts.items() if isinstance(kind, list)]
        return {
            "model": fingerprint(self.folder, index.name, *folders),
            "controlnet": None if net is None else fingerprint(net, "*"),
            "dtype": self.dtype,
        }

    def generator(self, job: Job, device: str) -> Any:
        """A `Generator` of the job's pictures on ``device``."""
        import torch

        from hgc.evaluation.models import DTYPES, ModelError, load_folder

        nets = [] if self.controlnet is None else [self.controlnet]
        pipe = load_folder(self.folder, nets, getattr(torch, DTYPES[self.dtype]))
        if not type(pipe).__name__.endswith("ControlNetPipeline"):
            raise ModelError(
                f"{self.folder} is a {type(pipe).__name__}; expected a pipeline from text with a "
                "ControlNet, such as StableDiffusionControlNetPipeline"
            )
        if device == "cpu":
            torch.set_num_threads(job.threads)
        steps, guidance = job.settings.steps, job.settings.guidance
        return Generator(pipe.to(device), job.config, steps=steps, guidance=guidance)


@dataclasses.dataclass(frozen=True)
class Job:
    """A whole run. It travels to workers, so it holds names of files and no open ones.

    Attributes:
        threads: Of torch, on the CPU: a worker uses as many as the process that started it.
    """

    table: Table
    scan: Scan
    model: Model
    config: Config
    settings: Settings
    folder: Path
    threads: int

    @property
    def shards(self) -> int:
        """How many there are."""
        return len(self.scan.starts)

    @property
    def pictures(self) -> int:
        """How many are to be made."""
        return self.scan.count * self.settings.images

    def slots(self, shard: int) -> int:
        """How many of them a shard has."""
        return self._items(shard) * self.settings.images

    def _items(self, shard: int) -> int:
        return min(self.settings.shard, self.scan.count - shard * self.settings.shard)

    def store(self) -> Store:
        """Where they go."""
        return Store(self.folder, SINKS[self.settings.format])

    def items(self, shard: int) -> Iterator[Item | Bad]:
        """Those of a shard."""
        first = shard * self.settings.shard
        return self.table.items(first, self.scan.starts[shard], self._items(shard))

    def batches(self, items: Sequence[Item]) -> list[list[tuple[Item, int]]]:
        """The pictures of a shard's items as they are made together: in order, of one scale.

        They follow from the table alone. An item that fails later leaves a gap, so the others keep
        their company, and their bits.
        """
        found = []
        for scale in dict.fromkeys(item.scale for item in items):
            slots = [
                (item, i)
                for item in items
                if item.scale == scale
                for i in range(self.settings.images)
            ]
            size = self.settings.batch
            found += [slots[i : i + size] for i in range(0, len(slots), size)]
        return found

    def is_checked(self, shard: int, batch: int) -> bool:
        """Whether a batch is made without hgc too: the first one, and of the others so many that
        the share is what was asked for."""
        share = Fraction(str(self.settings.check))  # 3/10 for 0.3
        a_shard = math.ceil(self.settings.shard * self.settings.images / self.settings.batch)
        before = shard * a_shard + batch
        return math.ceil((before + 1) * share) > math.ceil(before * share)


def _png(pixels: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(file, "png", compress_level=_COMPRESSION)
    return file.getvalue()


class ShardMaker:
    """Makes shards on one device; several threads may call it.

    The pipeline is used by one thread of its own. In Ray Data it is what ``map_batches`` calls.
    """

    def __init__(self, job: Job, device: str) -> None:
        self._job, self._device = job, device
        self._store = job.store()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"hgc-{device}")
        self._generator = job.model.generator(job, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """For ``map_batches``, a shard a batch: its record as JSON, or the error, whose cause would
        be lost on the way."""
        (shard,) = batch["shard"]
        try:
            made = json.dumps(dataclasses.asdict(self.make(int(shard))))
            return {"record": [made], "error": [""]}
        except GenerateError as error:
            return {"record": [""], "error": [str(error)]}
        except Exception as error:
            return {"record": [""], "error": [f"a worker failed: {error!r}. {GO_ON}"]}

    def make(
        self,
        shard: int,
        stop: threading.Event | None = None,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> Record:
        """Make a shard and its record.

        stop: once set, Stopped is raised before the next batch. on_batch: called with the pictures
        of each batch that is made or failed, and the seconds that the device was in use for it.

        Raises GenerateError where an item fails and the run is strict.
        """
        job = self._job
        record = Record(shard, device=self._device)
        good: list[Item] = []
        for item in job.items(shard):
            if isinstance(item, Bad):
                self._fail(record, item.number, item.id, None, item.reason)
                if on_batch is not None:
                    on_batch(job.settings.images, 0.0)
            else:
                good.append(item)
        broken: dict[int, str] = {}
        with self._store.shard(record) as adding:
            for number, slots in enumerate(job.batches(good)):
                if stop is not None and stop.is_set():
                    raise Stopped
                ready = list(self._read(slots, broken, record))
                busy = record.device_seconds
                if ready:
                    checked = job.is_checked(shard, number)
                    made = self._thread.submit(self._on_device, ready, checked, record).result()
                    self._keep(ready, made, number, adding, record)
                if on_batch is not None:
                    on_batch(len(slots), record.device_seconds - busy)
            record.failed.sort(key=lambda one: one["item"])
        return record

    def _fail(
        self, record: Record, number: int, name: str | None, index: int | None, reason: str
    ) -> None:
        if self._job.settings.strict:
            at = f"item {number}, {name!r}" + ("" if index is None else f", picture {index}")
            raise GenerateError(f"{at}: {reason} (--strict stops at the first one)")
        record.failed.append({"item": number, "id": name, "index": index, "reason": reason})

    def _read(
        self, slots: Sequence[tuple[Item, int]], broken: dict[int, str], record: Record
    ) -> Iterator[Picture]:
        settings = self._job.settings
        last: tuple[int, Any] = (-1, None)
        for item, index in slots:
            if item.number in broken:
                continue
            if last[0] != item.number:
                try:
                    last = item.number, opened(item.condition, settings.size, settings.resize)
                except BadItem as error:
                    broken[item.number] = str(error)
                    self._fail(record, item.number, item.id, None, str(error))
                    continue
            yield Picture(item, index, last[1], noise_seed(settings.seed, item, index))

    def _on_device(self, ready: Sequence[Picture], checked: bool, record: Record) -> Made:
        begun = time.perf_counter()
        made: Made = self._generator(ready)
        if checked:
            from hgc.evaluation.metrics import relative_l2

            plain = self._generator.uncached(ready)
            pair = (made.pixels.astype(np.float32), plain.pixels.astype(np.float32))
            found = zip(relative_l2(*pair), made.is_finite & plain.is_finite, strict=True)
            record.distances += [float(distance) for distance, is_finite in found if is_finite]
            record.uncached_pictures += len(ready)
            record.uncached_seconds += plain.seconds
        record.device_seconds += time.perf_counter() - begun
        return made

    def _keep(
        self, ready: Sequence[Picture], made: Made, batch: int, adding: Any, record: Record
    ) -> None:
        job, settings = self._job, self._job.settings
        record.batches.append({"pictures": len(ready), "seconds": round(made.seconds, 6)})
        record.macs += made.macs * len(ready)
        record.macs_uncached += made.macs_uncached * len(ready)
        record.held_bytes = max(record.held_bytes, made.held_bytes)
        for one, pixels, is_finite in zip(ready, made.pixels, made.is_finite, strict=True):
            item = one.item
            if not is_finite:
                self._fail(
                    record, item.number, item.id, one.index, "the picture holds values that are "
                    "no numbers (NaN or infinite)"
                )  # fmt: skip
                continue
            about = {
                "key": one.key, "id": item.id, "index": one.index, "text": item.text,
                "negative_prompt": item.negative_prompt, "scale": item.scale, "seed": one.seed,
                "plan": job.config.name, "steps": settings.steps, "guidance": settings.guidance,
                "macs": made.macs, "macs_uncached": made.macs_uncached,
                "evaluations": made.evaluations, "reused": made.reused, "batch": batch,
            }  # fmt: skip
            shown = _png(one.condition) if settings.keep_conditions else None
            adding.add(Drawn(one.key, _png(pixels), shown, about))
            record.pictures += 1

    def close(self) -> None:
        """End its thread."""
        with contextlib.suppress(RuntimeError):
            self._thread.shutdown(wait=True)
