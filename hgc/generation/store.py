"""The folder of a run: its manifest, its shards, and a record of each shard that is finished.

A shard is finished once its record is there and the shard has the size that the record names. The
record is written after the shard, both under names of their own and then moved, so a process may
die between any two instructions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hgc.generation.items import GenerateError
from hgc.generation.sinks import Sink, aside, digest_of, remove, size_of, write_whole

__all__ = ["Record", "Store", "place", "to_try_again"]

MANIFEST, FAILED, LOCK = "manifest.json", "failed.jsonl", ".lock"
_NAMED = 3


@dataclasses.dataclass
class Record:
    """What was done for one shard.

    Attributes:
        shard: Its number.
        file: Its name under ``shards``; None: no picture could be made.
        bytes: Its size.
        sha256: Of its file, or of its files one after the other.
        pictures: In it.
        failed: Items and pictures that are not, each with a reason.
        batches: Pictures and seconds of each pipeline call.
        device_seconds: In which the device was in use for it.
        macs: MACs done for all its pictures.
        macs_uncached: Those of the same pictures without hgc.
        held_bytes: The most bytes that hgc held.
        uncached_pictures: Made without hgc too.
        uncached_seconds: Of the pipeline calls for those.
        distances: Relative L2 of each of them to the cached one.
        device: Where it was made.
    """

    shard: int
    file: str | None = None
    bytes: int = 0
    sha256: str | None = None
    pictures: int = 0
    failed: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    batches: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    device_seconds: float = 0.0
    macs: int = 0
    macs_uncached: int = 0
    held_bytes: int = 0
    uncached_pictures: int = 0
    uncached_seconds: float = 0.0
    distances: list[float] = dataclasses.field(default_factory=list)
    device: str = ""


def to_try_again(records: Iterable[Record]) -> str:
    """What makes the same command try again what failed in ``records``."""
    names = [f"records/{one.shard:06d}.json" for one in records if one.failed]
    said = ", ".join(names[:_NAMED])
    if len(names) > _NAMED:
        said += f" and the {len(names) - _NAMED} others in which something failed"
    return f"delete {said}, and the same command tries them again"


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "run": dict(found["run"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise GenerateError(f"cannot read {path}: {error}") from None


def _differences(there: Any, asked: Any, name: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in sorted({*there, *asked}):
            inner = f"{name}.{key}" if name else key
            yield from _differences(there.get(key), asked.get(key), inner)
    elif there != asked:
        yield f"{name} is {there!r} there and {asked!r} here"


def place(out: Path, run: dict[str, Any], force: bool) -> Path:
    """The folder for ``run``: ``out``, or with ``force`` the first of ``out``, ``out-2``, ... that
    is free or holds this run.

    Raises GenerateError where ``out`` holds another run, and says what differs.
    """
    if out.name in ("", ".."):  # of which no folder beside it can be named
        out = Path(os.path.abspath(out))
    for number in itertools.count(1):
        folder = out if number == 1 else out.with_name(f"{out.name}-{number}")
        there = _manifest(folder)
        if there is None:
            if not folder.exists() or not any(p.name[0] != "." for p in folder.iterdir()):
                return folder
            said = f"{folder} holds files, and no {MANIFEST}: give another --out"
        else:
            differing = list(_differences(there["run"], run))
            if not differing:
                return folder
            said = (
                f"{folder} holds another run: {'; '.join(differing)}. Give another --out, or "
                "--force, which starts beside it"
            )
        if not force:
            raise GenerateError(said)
    raise AssertionError("there is always a next number")


class Store:
    """The folder of a run."""

    def __init__(self, folder: Path, sink: Sink) -> None:
        self.folder, self.sink = folder, sink
        self._shards, self._records = folder / "shards", folder / "records"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The only process that writes here; the system gives a dead one's lock back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a") as file:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise GenerateError(
                        f"another process is writing to {self.folder}: wait for it, or end it"
                    ) from None
            yield

    def begin(self, manifest: dict[str, Any]) -> None:
        """Make what a run needs, and clear away what a dead one left."""
        # the manifest comes first: a folder without one is nobody's
        if not (self.folder / MANIFEST).exists():
            write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self._shards.mkdir(exist_ok=True)
        self._records.mkdir(exist_ok=True)
        self.clear()

    def clear(self) -> None:
        """Remove what workers that died left half written."""
        for folder in (self.folder, self._shards, self._records):
            for left in folder.glob(".*.tmp"):
                remove(left)

    def path(self, shard: int) -> Path:
        """Of a shard."""
        return self._shards / f"{shard:06d}{self.sink.ending}"

    def _record_path(self, shard: int) -> Path:
        return self._records / f"{shard:06d}.json"

    @contextlib.contextmanager
    def shard(self, record: Record) -> Iterator[Any]:
        """What to add the pictures of a shard to; it and its record are there at the end of the
        block, or neither."""
        path = self.path(record.shard)
        with aside(path) as place:
            with self.sink.write(place) as adding:
                yield adding
            if record.pictures == 0:
                remove(place)
            else:
                record.file, record.bytes = path.name, size_of(place)
                record.sha256 = digest_of(place)
        write_whole(self._record_path(record.shard), json.dumps(dataclasses.asdict(record)) + "\n")

    def record(self, shard: int) -> Record | None:
        """That of a shard; None where the shard is not finished, or is not as it was left."""
        try:
            found = Record(**json.loads(self._record_path(shard).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if found.file is not None and size_of(self.path(shard)) != found.bytes:
            return None
        return found

    def write_failed(self, records: Iterable[Record]) -> None:
        """``failed.jsonl`` anew, of all that is finished."""
        with aside(self.folder / FAILED) as place, place.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for record in records for one in record.failed)

    def add_failed(self, record: Record) -> None:
        """The failures of one more shard."""
        if record.failed:
            with (self.folder / FAILED).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(one) + "\n" for one in record.failed)
