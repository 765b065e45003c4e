"""``hgc.generate``: from arguments to a run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgc.generation import arguments
from hgc.generation.cluster import Cluster
from hgc.generation.items import GO_ON, BadItem, GenerateError, Item, opened
from hgc.generation.job import Job, Model, Settings
from hgc.generation.local import Local
from hgc.generation.page import page
from hgc.generation.sinks import SINKS, write_whole
from hgc.generation.store import Record, Store, place, to_try_again
from hgc.generation.tables import Scenes, Table, open_table, scan

if TYPE_CHECKING:
    from hgc.planning.config import Config

__all__ = ["Progress", "Summary", "generate", "run"]

ENGINES = ("local", "ray")
_TESTBED_SCENES = 16
PAGE = "page.html"
_ON_PAGE = 16
_WORST = 0.05


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: Pictures that are finished, failed, or made and not yet in a finished shard.
        total: Pictures in all.
        a_second: Pictures a second of this run.
        seconds_left: At that speed; None: unknown.
        held_bytes: The most bytes that hgc held.
        waited: Share of the time in which the devices waited.
    """

    done: int
    total: int
    a_second: float
    seconds_left: float | None
    held_bytes: int
    waited: float

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {self.seconds_left:.0f} s left"
        return (
            f"{self.a_second:.2f} pictures/s{left}, {self.held_bytes / 2**20:.1f} MiB held, "
            f"device waited {self.waited:.1%}"
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did. All but ``made``, ``seconds`` and ``waited`` is of the whole folder, with
    what earlier runs of the same command had finished. ``print(summary)`` says it.

    Attributes:
        folder: Where the pictures are.
        pictures: In it.
        failed: Lines of ``failed.jsonl``: items, and pictures of items that did not fail whole.
        made: Pictures of this run.
        seconds: Of this run, without loading.
        waited: Share of those in which the devices waited.
        call_seconds: Seconds of pipeline calls, of all pictures.
        macs: MACs done for all pictures; 0 where hgc left the runs to diffusers.
        macs_uncached: Those of the same pictures without hgc.
        uncached_pictures: Made without hgc too, for ``check``.
        uncached_seconds: Seconds of the pipeline calls for those.
        distances: Relative L2 of each of them to the cached one.
        failed_before: Those of ``failed`` that failed in earlier runs and were not tried again.
        to_try_again: What makes the same command try them again; empty where there are none.
    """

    folder: Path
    pictures: int
    failed: int
    made: int
    seconds: float
    waited: float
    call_seconds: float
    macs: int
    macs_uncached: int
    uncached_pictures: int
    uncached_seconds: float
    distances: tuple[float, ...]
    failed_before: int = 0
    to_try_again: str = ""

    @classmethod
    def of(
        cls,
        folder: Path,
        records: Sequence[Record],
        made: int,
        seconds: float,
        waited: float,
        before: Sequence[Record] = (),
    ) -> Summary:
        """Of all records; ``before``: those of earlier runs."""
        failed_before = sum(len(one.failed) for one in before)
        return cls(
            folder=folder,
            pictures=sum(one.pictures for one in records),
            failed=sum(len(one.failed) for one in records),
            made=made,
            seconds=seconds,
            waited=waited,
            call_seconds=sum(b["seconds"] for one in records for b in one.batches),
            macs=sum(one.macs for one in records),
            macs_uncached=sum(one.macs_uncached for one in records),
            uncached_pictures=sum(one.uncached_pictures for one in records),
            uncached_seconds=sum(one.uncached_seconds for one in records),
            distances=tuple(d for one in records for d in one.distances),
            failed_before=failed_before,
            to_try_again=to_try_again(before) if failed_before else "",
        )

    @property
    def distance(self) -> float | None:
        """Mean of ``distances``; None where nothing was checked."""
        return sum(self.distances) / len(self.distances) if self.distances else None

    def __str__(self) -> str:
        lines = [f"{self.pictures} pictures in {self.folder}, {self.failed} failed"]
        if self.failed_before:
            lines.append(
                f"{self.failed_before} of those failed in earlier runs and were not tried again: "
                f"{self.to_try_again}"
            )
        if self.made and self.seconds:
            lines.append(
                f"this run: {self.made} pictures in {self.seconds:.1f} s, "
                f"{self.made / self.seconds:.2f} a second; the device waited {self.waited:.1%} of "
                "the time"
            )
        if self.pictures:
            a_thousand = 1000 / self.pictures
            cost = f"1,000 pictures: {self.call_seconds * a_thousand:.0f} s of pipeline calls"
            if self.macs:
                cost += (
                    f", {self.macs * a_thousand / 1e12:.4g}T MACs; without hgc "
                    f"{self.macs_uncached * a_thousand / 1e12:.4g}T MACs"
                )
            if self.uncached_pictures:
                each = self.uncached_seconds / self.uncached_pictures
                cost += f", {each * 1000:.0f} s as {self.uncached_pictures} checked ones took"
            lines.append(cost)
        if self.distances:
            worst = sorted(self.distances)[-max(1, round(_WORST * len(self.distances))) :]
            lines.append(
                f"distance to {len(self.distances)} uncached pictures: mean {self.distance:.4f}, "
                f"worst 5% {sum(worst) / len(worst):.4f}"
            )
        return "\n".join(lines)


def generate(
    data: str | Path | None = None,
    out: str | Path = "hgc-pictures",
    *,
    model: str | Path = "testbed",
    controlnet: str | Path | None = None,
    config: Config | str = "balanced",
    images: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    resize: str | None = None,
    dtype: str | None = None,
    device: str | Sequence[str] = "cpu",
    format: str = "webdataset",
    shard: int = 64,
    keep_conditions: bool = False,
    root: str | Path | None = None,
    limit: int | None = None,
    condition: str = "segmentation",
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    check: float = 0.0,
    max_distance: float | None = None,
    strict: bool = False,
    force: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Make pictures of a table of conditions and texts, and go on where an earlier run ended.

    Args:
        data: A folder with a ``metadata.jsonl`` (as ``hgc eval --data`` takes it), or with .jsonl,
            .parquet or .tar files (webdataset); one such file; a pattern. Columns ``text``,
            ``condition`` (a path, or bytes), and where they are there ``id``, ``negative_prompt``,
            ``scale`` and ``seed``. None: held-out scenes of the testbed.
        out: Folder of the pictures.
        model: "testbed", or the folder of a diffusers pipeline.
        controlnet: Folder of a ControlNet; None: the pipeline's own.
        config: What hgc is installed with.
        images: Pictures of each item.
        seed: Of the noise. That of a picture follows from it, the item's id, and the picture's
            index.
        steps: Denoising steps; None: what ``config`` is meant for.
        guidance: Guidance scale; None: 7.5, or 3.5 for the testbed.
        batch: Pictures a pipeline call.
        size: Height and width; None: the model's.
        resize: ``"nearest"`` or ``"bicubic"``: conditions of another size are resized; None: they
            fail.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``; None: fp32 on the CPU, else fp16.
        device: As torch names it; several for one worker each.
        format: ``"webdataset"``, ``"parquet"`` or ``"folder"``.
        shard: Items of each file. It is what is lost of a device's work where the process dies.
        keep_conditions: Write each picture's condition beside it.
        root: Folder that conditions which are paths lie under; None: the data's.
        limit: Items at most, the first ones.
        condition: Of the testbed's model.
        engine: ``"local"``: this process. ``"ray"``: actors of Ray Data.
        workers: Actors of Ray; None: one a GPU.
        address: Of a Ray cluster that runs; None: one is started here.
        check: Share of the batches that is made without hgc too, to know the distance.
        max_distance: Stop once the mean of those distances is above it.
        strict: Stop at the first item that fails, in place of a line in ``failed.jsonl``; a folder
            in which some failed in earlier runs is refused.
        force: Where ``out`` holds another run, start beside it, in ``out-2``.
        on_progress: Called after each batch.

    Returns:
        What was done, the pictures of earlier runs with it.

    Raises:
        GenerateError: the run cannot begin or go on; what is finished is kept.
        ConfigError, ModelError: ``config`` or ``model`` cannot be used.
    """
    from hgc.evaluation.models import DTYPES
    from hgc.planning.config import Config

    config = Config.of(config)
    devices = arguments.device_names(device)
    paths = {"data": data, "out": out, "model": model, "controlnet": controlnet, "root": root}
    for name, given in paths.items():
        arguments.path(name, given)
    for name, count in {"limit": limit, "workers": workers}.items():
        if count is not None:
            arguments.whole(name, count, 1)
    check = arguments.number("check", check)
    if engine not in ENGINES:
        raise GenerateError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if engine == "ray" and len(devices) != 1:
        raise GenerateError(f"device must be cpu or cuda for Ray; got {devices}")
    if engine == "local" and not (workers is None and address is None):
        raise GenerateError("workers and address are for engine='ray'")
    if max_distance is not None:
        max_distance = arguments.number("max_distance", max_distance)
        if max_distance < 0.0:
            raise GenerateError(f"max_distance must be at least 0; got {max_distance!r}")
    if max_distance is not None and not check:
        raise GenerateError("max_distance needs check, the share of pictures to measure it on")
    dtype = dtype or ("fp32" if devices[0] == "cpu" else "fp16")
    if dtype not in DTYPES:
        raise GenerateError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    own: dict[str, Any] = {}
    if root is not None:  # left out, a folder of data that has moved is the same data
        own["root"] = os.path.abspath(root)
    net = None if controlnet is None else Path(controlnet)
    is_testbed = str(model) == "testbed"
    table: Table
    if is_testbed:
        from hgc import testbed

        folder = testbed.path()
        own["condition"] = testbed.conditions.check_condition(condition)
        net = net or folder / f"controlnet_{condition}"
        guidance = testbed.GUIDANCE_SCALE if guidance is None else guidance
    else:
        folder = Path(model)
    if data is not None:
        table = open_table(data, None if root is None else Path(root))
    elif is_testbed:
        table = Scenes(condition, limit or _TESTBED_SCENES)
    else:
        raise GenerateError("data must be given: only model='testbed' has items of its own")
    found = Model(folder, net, dtype)
    side = found.size() if size is None else 0
    settings = Settings(
        images=images,
        seed=seed,
        steps=config.num_evaluations if steps is None else steps,
        guidance=7.5 if guidance is None else arguments.number("guidance", guidance),
        batch=batch,
        size=(side, side) if size is None else arguments.size_in_pixels(size),
        resize=resize,
        shard=shard,
        format=format,
        keep_conditions=keep_conditions,
        check=check,
        strict=strict,
    )
    about = {
        "data": None if data is None else str(data), "model": str(model),
        "controlnet": None if controlnet is None else str(controlnet), "device": devices,
        "root": None if root is None else str(root), "condition": condition, "limit": limit,
        "engine": engine, "check": check, "max_distance": max_distance, "strict": strict,
    }  # fmt: skip
    engines: dict[str, Callable[[Job], Local | Cluster]] = {
        "local": lambda job: Local(job, devices),
        "ray": lambda job: Cluster(job, devices[0], workers, address),
    }
    return run(
        table, found, config, settings, Path(out), engines[engine], about,
        own=own, limit=limit, force=force, max_distance=max_distance, on_progress=on_progress,
    )  # fmt: skip


def _versions() -> dict[str, str]:
    """Those that pictures and files depend on."""
    import diffusers
    import numpy
    import PIL
    import torch
    import transformers

    import hgc

    found = {"hgc": hgc.__version__}
    for module in (torch, diffusers, transformers, numpy, PIL):
        found[module.__name__] = str(module.__version__)
    return found


def run(
    table: Table,
    model: Model,
    config: Config,
    settings: Settings,
    out: Path,
    engine: Callable[[Job], Local | Cluster],
    about: dict[str, Any],
    *,
    own: dict[str, Any] | None = None,
    limit: int | None = None,
    force: bool = False,
    max_distance: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """:func:`generate`, with its arguments made into objects. own: what else, as JSON, makes it
    another run where it differs."""
    import torch

    sink = SINKS[settings.format]
    sink.check()
    found = scan(table, settings.shard, limit)
    identity = {
        "data": found.digest,
        "items": found.count,
        **(own or {}),
        **model.identity(),
        "config": json.loads(config.to_json()),
        **settings.pictures(),
        "versions": _versions(),
    }
    try:
        folder = place(out, identity, force)
        job = Job(table, found, model, config, settings, folder, torch.get_num_threads())
        store = Store(folder, sink)
        with store.locked():
            place(folder, identity, False)  # another process may have begun meanwhile
            return _run(job, store, engine, identity, about, max_distance, on_progress)
    except OSError as error:
        raise GenerateError(f"{out}: {error}. {GO_ON} once that is put right") from error


def _run(
    job: Job,
    store: Store,
    engine: Callable[[Job], Local | Cluster],
    identity: dict[str, Any],
    about: dict[str, Any],
    max_distance: float | None,
    on_progress: Callable[[Progress], None] | None,
) -> Summary:
    records = {n: one for n in range(job.shards) if (one := store.record(n)) is not None}
    todo = [n for n in range(job.shards) if n not in records]
    _check_distance(list(records.values()), max_distance)
    before = list(records.values())
    if job.settings.strict and (count := sum(len(one.failed) for one in before)):
        raise GenerateError(
            f"{store.folder}: {count} failed in earlier runs, and --strict stops at the first one: "
            f"{to_try_again(before)}"
        )
    seconds = busy = 0.0
    workers = engine(job) if todo else None
    store.begin(
        {
            "run": identity,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in about.items()},
            "made_with": {
                "python": platform.python_version(),
                "machine": platform.platform(),
                "threads": job.threads,
            },
        }
    )
    if workers is not None:
        store.write_failed(records.values())
        done = sum(job.slots(shard) for shard in records)
        held, made = 0, 0
        begun = time.perf_counter()
        with contextlib.closing(workers.run(todo)) as events:
            for event in events:
                seconds = time.perf_counter() - begun
                if isinstance(event, Record):
                    records[event.shard] = event
                    held = max(held, event.held_bytes)
                    store.add_failed(event)
                    _check_distance(list(records.values()), max_distance)
                    continue
                made += event[0]
                busy += event[1]
                if on_progress is not None:
                    speed = made / seconds
                    left = job.pictures - done - made
                    on_progress(
                        Progress(
                            min(done + made, job.pictures),
                            job.pictures,
                            speed,
                            max(0, left) / speed if speed else None,
                            held,
                            max(0.0, 1 - busy / (seconds * workers.workers)),
                        )
                    )
        seconds = time.perf_counter() - begun
        busy /= workers.workers
        store.clear()
    ordered = [records[n] for n in sorted(records)]
    store.write_failed(ordered)
    pictures = sum(one.pictures for one in ordered)
    waited = max(0.0, 1 - busy / seconds) if seconds else 0.0
    made = pictures - sum(one.pictures for one in before)
    summary = Summary.of(store.folder, ordered, made, seconds, waited, before)
    if todo or not (store.folder / PAGE).exists():
        _write_page(job, store, records, summary)
    return summary


def _check_distance(records: Sequence[Record], max_distance: float | None) -> None:
    if max_distance is None:
        return
    distances = [d for one in records for d in one.distances]
    if distances and (mean := sum(distances) / len(distances)) > max_distance:
        raise GenerateError(
            f"the plan's pictures are at {mean:.4f} from {len(distances)} uncached ones in the "
            f"mean, and max_distance is {max_distance}: take a plan that computes more, or a "
            "larger --max-distance. What is finished is kept"
        )


def _write_page(job: Job, store: Store, records: dict[int, Record], summary: Summary) -> None:
    """Of the first items of the first shard that has pictures."""
    first = next((n for n in sorted(records) if records[n].pictures), None)
    if first is None:
        return
    drawn: dict[int, list[Any]] = {}
    for one in store.sink.read(store.path(first)):
        number = int(one.key.partition("_")[0])
        if number not in drawn and len(drawn) == _ON_PAGE:
            break
        drawn.setdefault(number, []).append(one)
    rows = []
    for item in job.items(first):
        if isinstance(item, Item) and item.number in drawn:
            try:
                settings = job.settings
                shown = opened(item.condition, settings.size, settings.resize)
            except BadItem:
                continue  # it has gone since
            rows.append((shown, drawn[item.number]))
    title = f"{summary.pictures} pictures, {job.config.name}"
    write_whole(store.folder / PAGE, page(title, str(summary), rows))
