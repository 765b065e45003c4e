"""Shards: one file or folder each, which is there whole or not at all."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hgc.generation.items import GenerateError

__all__ = ["SINKS", "Drawn", "Sink", "digest_of", "remove", "size_of", "sync", "write_whole"]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """One picture of a shard: its name, PNGs of it and of its condition, and what is said of it."""

    key: str
    png: bytes
    condition: bytes | None
    about: dict[str, Any]


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file or a folder, where it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place to write beside ``path``, which becomes ``path`` at the end of the block; where
    nothing was written nothing is there then."""
    place = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield place
        if place.is_dir() or not place.exists():
            remove(path)  # a folder takes the place of none but an empty one
        if place.exists():
            for written in (*_files(place), place):
                sync(written)
            os.replace(place, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(place)
        raise


def write_whole(path: Path, text: str) -> None:
    """A text file that holds the old text or the new, whenever the process dies."""
    with aside(path) as place:
        place.write_text(text, encoding="utf-8")


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def size_of(path: Path) -> int:
    """Bytes of a shard; -1 where it is not there."""
    return sum(file.stat().st_size for file in _files(path)) if path.exists() else -1


def digest_of(path: Path) -> str:
    """SHA-256 of a shard's file; of a folder's files one after the other, by name."""
    digest = hashlib.sha256()
    for each in _files(path):
        with each.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class Sink(abc.ABC):
    """A format of shards. ``ending``: of their names."""

    ending: str

    def check(self) -> None:
        """Raise GenerateError where the format cannot be written here."""
        return None

    @abc.abstractmethod
    def write(self, path: Path) -> contextlib.AbstractContextManager[Any]:
        """Something with an ``add(Drawn)``; the shard is complete at the end of the block."""

    @abc.abstractmethod
    def read(self, path: Path) -> Iterator[Drawn]:
        """The pictures of a shard in order."""


class _Tar:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def add(self, one: Drawn) -> None:
        self._member(f"{one.key}.png", one.png)
        if one.condition is not None:
            self._member(f"{one.key}.condition.png", one.condition)
        self._member(f"{one.key}.json", json.dumps(one.about).encode())

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # no time, no owner: equal runs write equal bytes
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


class WebDataset(Sink):
    """Tar files: ``KEY.png``, ``KEY.json``, and ``KEY.condition.png`` where conditions are kept."""

    ending = ".tar"

    @contextlib.contextmanager
    def write(self, path: Path) -> Iterator[_Tar]:
        with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
            yield _Tar(tar)

    def read(self, path: Path) -> Iterator[Drawn]:
        held: dict[str, bytes] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                held[ending] = file.read()
                if ending == "json":
                    about = json.loads(held["json"])
                    yield Drawn(key, held["png"], held.get("condition.png"), about)
                    held = {}


class _Folder:
    def __init__(self, folder: Path, lines: IO[str]) -> None:
        self._folder, self._lines = folder, lines

    def add(self, one: Drawn) -> None:
        names = {"file_name": f"{one.key}.png"}
        (self._folder / names["file_name"]).write_bytes(one.png)
        if one.condition is not None:
            names["condition_file_name"] = f"{one.key}.condition.png"
            (self._folder / names["condition_file_name"]).write_bytes(one.condition)
        self._lines.write(json.dumps({**names, **one.about}) + "\n")


class Folder(Sink):
    """Folders of PNGs with a ``metadata.jsonl``, as ImageFolder reads them."""

    ending = ""

    @contextlib.contextmanager
    def write(self, path: Path) -> Iterator[_Folder]:
        path.mkdir()
        with (path / "metadata.jsonl").open("w", encoding="utf-8") as lines:
            yield _Folder(path, lines)

    def read(self, path: Path) -> Iterator[Drawn]:
        with (path / "metadata.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                about = json.loads(line)
                name = about.pop("file_name")
                shown = about.pop("condition_file_name", None)
                condition = None if shown is None else (path / shown).read_bytes()
                yield Drawn(name[: -len(".png")], (path / name).read_bytes(), condition, about)


# As the library `datasets` says in a file that a column holds pictures.
_IMAGE = {"_type": "Image"}
_ROWS = 64


class _Rows:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def add(self, one: Drawn) -> None:
        row: dict[str, Any] = {"image": {"bytes": one.png, "path": f"{one.key}.png"}}
        if one.condition is not None:
            path = f"{one.key}.condition.png"
            row["condition"] = {"bytes": one.condition, "path": path}
        self._rows.append({**row, **one.about})
        if len(self._rows) == _ROWS:
            self.flush()

    def flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if not self._rows:
            return
        if self._writer is None:
            fields = [_field(name, value) for name, value in self._rows[0].items()]
            shown = {f.name: _IMAGE for f in fields if f.name in ("image", "condition")}
            features = {f.name: shown.get(f.name) or _FEATURES[str(f.type)] for f in fields}
            about = json.dumps({"info": {"features": features}})
            schema = pyarrow.schema(fields, metadata={"huggingface": about})
            self._writer = pyarrow.parquet.ParquetWriter(self._path, schema)
        rows = pyarrow.Table.from_pylist(self._rows, schema=self._writer.schema)
        self._writer.write_table(rows)
        self._rows = []

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


_FEATURES: dict[str, Any] = {
    name: {"dtype": kind, "_type": "Value"}
    for name, kind in (("string", "string"), ("int64", "int64"), ("double", "float64"))
}


def _field(name: str, value: Any) -> Any:
    import pyarrow

    if isinstance(value, dict):
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    elif isinstance(value, int):
        kind = pyarrow.int64()
    else:
        kind = pyarrow.float64() if isinstance(value, float) else pyarrow.string()
    return pyarrow.field(name, kind)


class Parquet(Sink):
    """Parquet files with a column ``image`` of PNG bytes, which `datasets` decodes."""

    ending = ".parquet"

    def check(self) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise GenerateError(
                "--format parquet needs pyarrow, which the parquet extra installs: "
                'pip install "hybrid-grained-cache[parquet]"'
            ) from None

    @contextlib.contextmanager
    def write(self, path: Path) -> Iterator[_Rows]:
        rows = _Rows(path)
        try:
            yield rows
            rows.flush()
        finally:
            rows.close()

    def read(self, path: Path) -> Iterator[Drawn]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            for part in file.iter_batches(_ROWS):
                for about in part.to_pylist():
                    image, shown = about.pop("image"), about.pop("condition", None)
                    condition = None if shown is None else shown["bytes"]
                    yield Drawn(image["path"][: -len(".png")], image["bytes"], condition, about)


SINKS: dict[str, Sink] = {"webdataset": WebDataset(), "parquet": Parquet(), "folder": Folder()}
