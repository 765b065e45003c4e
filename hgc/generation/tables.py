"""The input: a table of items that is read in slices, never as a whole.

A row is a dict with `hgc.generation.items.FIELDS`; a position, (file, place in it), is where
reading can begin. JSON lines (and an ImageFolder's ``metadata.jsonl``), Parquet, webdataset's tar
files, and the testbed's scenes.
"""

from __future__ import annotations

import abc
import array
import dataclasses
import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hgc.generation.items import FIELDS, Bad, GenerateError, Item, id_of, item_of

__all__ = ["Position", "Scan", "Scenes", "Table", "open_table", "scan"]

Position = tuple[int, int]
Row = dict[str, Any]
_START: Position = (0, 0)
_PICTURES = ("png", "jpg", "jpeg", "webp", "bmp")


class Table(abc.ABC):
    """Where items come from. ``root``: conditions that are paths lie under it."""

    root: Path = Path()

    @abc.abstractmethod
    def rows(
        self, position: Position = _START, *, light: bool = False
    ) -> Iterator[tuple[Position, Row]]:
        """The rows from ``position`` on, each with its own.

        light: without the bytes of pictures, but with a few that tell one from another as far as
        that is cheap to know.
        """

    def items(self, number: int, position: Position, count: int) -> Iterator[Item | Bad]:
        """``count`` items, the first of them row ``number``, which is at ``position``."""
        rows = itertools.islice(self.rows(position), count)
        return (item_of(number + i, row, self.root) for i, (_, row) in enumerate(rows))


@dataclasses.dataclass(frozen=True)
class Scan:
    """What one reading of a table found.

    Attributes:
        count: Items.
        starts: Position of each shard's first item.
        digest: Of all rows; of the bytes of pictures their size, in a Parquet file the sum of each
            row group, and in a tar file the checksum of the member's header.
    """

    count: int
    starts: tuple[Position, ...]
    digest: str


def scan(table: Table, shard: int, limit: int | None = None) -> Scan:
    """Read the table once, without its pictures; nothing is kept but where the shards begin.

    shard: items of each. limit: items at most.

    Raises GenerateError where the table cannot be read, has no column that is needed, or an id
    twice.
    """
    digest, hashes, starts = hashlib.sha256(), array.array("Q"), []
    fields: set[str] = set()
    rows = itertools.islice(table.rows(light=True), limit)
    for number, (position, row) in enumerate(rows):
        if number % shard == 0:
            starts.append(position)
        fields.update(row)
        digest.update(json.dumps([row.get(name) for name in FIELDS], default=repr).encode())
        name = id_of(row)
        hashes.append(_hash(f"\0{number}" if name is None else name))
    if not starts:
        raise GenerateError("the data hold no item")
    for needed in ("text", "condition"):
        if needed not in fields:
            raise GenerateError(
                f"no item of the data has a field {needed!r}; their fields: "
                f"{', '.join(sorted(fields)) or 'none'}"
            )
    values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    if (counts > 1).any():
        _refuse_twice(table, set(values[counts > 1].tolist()), len(hashes))
    return Scan(len(hashes), tuple(starts), digest.hexdigest()[:16])


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _refuse_twice(table: Table, suspects: set[int], count: int) -> None:
    seen: dict[str, int] = {}
    for number, (_, row) in enumerate(itertools.islice(table.rows(light=True), count)):
        name = id_of(row)
        if name is None or _hash(name) not in suspects:
            continue
        if name in seen:
            raise GenerateError(
                f"the id {name!r} is there twice, as item {seen[name]} and {number} (counted from "
                "0); ids must be unique"
            )
        seen[name] = number


class _Files(Table):
    """Rows of several files, one file after the other. Paths are below ``root``, by default the
    folder of the first file."""

    def __init__(self, files: Sequence[Path], root: Path | None) -> None:
        self._files = files
        self.root = files[0].parent if root is None else root

    def _begin(self, position: Position) -> Iterator[tuple[int, Path, int]]:
        """Number and path of each file from ``position`` on, and where in it to begin."""
        for number, path in list(enumerate(self._files))[position[0] :]:
            yield number, path, position[1] if number == position[0] else 0


class JsonLines(_Files):
    """One object a line. ``condition`` may be called ``condition_file_name``, or, where the first
    line has neither, ``file_name``, as Hugging Face's ImageFolder names its pictures."""

    def __init__(self, files: Sequence[Path], root: Path | None) -> None:
        super().__init__(files, root)
        names = ("condition", "condition_file_name", "file_name")
        first = next((row for _, row in self._lines(_START)), {})
        self._condition = next((name for name in names if name in first), names[0])

    def _lines(self, position: Position) -> Iterator[tuple[Position, Row]]:
        for number, path, offset in self._begin(position):
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    for line in file:
                        if line.strip():
                            yield (number, offset), self._row(line, path, offset)
                        offset += len(line)
            except OSError as error:
                raise GenerateError(f"cannot read {path}: {error.strerror}") from None

    def _row(self, line: bytes, path: Path, offset: int) -> Row:
        at = f"{path}, the line at byte {offset},"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GenerateError(f"{at} is not JSON: {' '.join(str(error).split())}") from None
        if not isinstance(row, dict):
            raise GenerateError(f"{at} is not an object of fields")
        return row

    def rows(
        self, position: Position = _START, *, light: bool = False
    ) -> Iterator[tuple[Position, Row]]:
        for place, row in self._lines(position):
            if self._condition != "condition" and self._condition in row:
                row["condition"] = row[self._condition]
            yield place, row


class Parquet(_Files):
    """Columns as `FIELDS`; ``condition`` a path, bytes, or Hugging Face's struct of both. A slice
    is read from the beginning of its row group on, so row groups should not be much larger than
    shards."""

    def __init__(self, files: Sequence[Path], root: Path | None) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise GenerateError(
                "Parquet needs pyarrow, which the parquet extra installs: "
                'pip install "hybrid-grained-cache[parquet]"'
            ) from None
        super().__init__(files, root)

    def rows(
        self, position: Position = _START, *, light: bool = False
    ) -> Iterator[tuple[Position, Row]]:
        import pyarrow
        import pyarrow.parquet

        for number, path, skip in self._begin(position):
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    schema = file.schema_arrow
                    names = [name for name in FIELDS if name in schema.names]
                    if "text" not in names:
                        raise GenerateError(
                            f"{path} has no column 'text'; its columns: {', '.join(schema.names)}"
                        )
                    read, stand_in = list(names), None
                    if light and "condition" in names and not _is_text(schema):
                        read.remove("condition")
                        read += _path_column(schema)
                        stand_in = _sizes(file.metadata)
                    first = group = 0
                    while group < file.num_row_groups:
                        rows = file.metadata.row_group(group).num_rows
                        if first + rows > skip:
                            break
                        first, group = first + rows, group + 1
                    groups = list(range(group, file.num_row_groups))
                    for part in file.iter_batches(64, row_groups=groups, columns=read):
                        for row in part.to_pylist():
                            if first >= skip:
                                if stand_in is not None:
                                    path_of = (row.get("condition") or {}).get("path")
                                    row["condition"] = {"bytes": stand_in, "path": path_of}
                                yield (number, first), row
                            first += 1
            except GenerateError:
                raise
            except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
                said = " ".join(str(error).split())
                raise GenerateError(f"cannot read {path}: {said}") from None


def _is_text(schema: Any) -> bool:
    """Whether the conditions of a Parquet file are paths."""
    import pyarrow

    kind = schema.field("condition").type
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _path_column(schema: Any) -> list[str]:
    """The column of paths, where conditions are structs that have one."""
    import pyarrow

    kind = schema.field("condition").type
    has_path = pyarrow.types.is_struct(kind) and kind.get_field_index("path") >= 0
    return ["condition.path"] if has_path else []


def _sizes(metadata: Any) -> bytes:
    """Of the conditions in each row group of a Parquet file: how many bytes are stored, and how
    many they are without compression."""
    found = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] == "condition":
                found.append((column.total_compressed_size, column.total_uncompressed_size))
    return hashlib.sha256(repr(found).encode()).digest()


class Tars(_Files):
    """webdataset's shards: members of one name are a sample. ``x.json`` holds fields, ``x.txt`` the
    text, ``x.condition.png``, or else the one picture, the condition; the id is ``x`` unless the
    JSON has one. What members hold goes before the JSON's fields, and a null there is none."""

    def rows(
        self, position: Position = _START, *, light: bool = False
    ) -> Iterator[tuple[Position, Row]]:
        for number, path, start in self._begin(position):
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    with tarfile.open(fileobj=file, mode="r:") as tar:
                        samples = itertools.groupby(self._members(tar), lambda m: _key(m.name))
                        for key, members in samples:
                            fields: Row = {"id": key}
                            own: Row = {}
                            offset = None
                            for member in members:
                                offset = member.offset if offset is None else offset
                                self._add(fields, own, member, tar, light)
                            yield (number, offset or 0), {**fields, **own}
            except (OSError, tarfile.TarError) as error:
                raise GenerateError(f"cannot read {path}: {error}") from None

    @staticmethod
    def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        while (member := tar.next()) is not None:
            last = member.name.rpartition("/")[2]
            if member.isfile() and "." in last and last[0] != ".":
                yield member
            tar.members = []  # type: ignore[attr-defined]  # it keeps all that it has seen

    @staticmethod
    def _add(
        fields: Row, own: Row, member: tarfile.TarInfo, tar: tarfile.TarFile, light: bool
    ) -> None:
        """fields: takes those of the JSON. own: takes what another member holds."""
        ending = member.name[len(_key(member.name)) + 1 :].lower()
        is_condition = ending.removeprefix("condition.") in _PICTURES
        if not is_condition and ending not in ("json", "txt"):
            return
        if is_condition and ending in _PICTURES and "condition" in own:
            return
        if is_condition and light:
            own["condition"] = b"%d %d" % (member.size, member.chksum)
            return
        read = tar.extractfile(member)
        data = b"" if read is None else read.read()
        if len(data) < member.size:
            raise tarfile.ReadError(f"{member.name} is cut short")
        if is_condition:
            own["condition"] = data
        elif ending == "txt":
            own["text"] = data.decode("utf-8", "surrogateescape")
        else:
            try:
                given = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise tarfile.ReadError(f"{member.name} is not JSON: {error}") from None
            if not isinstance(given, dict):
                raise tarfile.ReadError(f"{member.name} is not an object of fields")
            fields.update((n, v) for n, v in given.items() if n in FIELDS and v is not None)


def _key(name: str) -> str:
    """Up to the first dot of the last part, as webdataset has it."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


class Scenes(Table):
    """The testbed's held-out scenes, with one of its conditions."""

    def __init__(self, condition: str, count: int) -> None:
        self._condition, self._count = condition, count

    def rows(
        self, position: Position = _START, *, light: bool = False
    ) -> Iterator[tuple[Position, Row]]:
        from hgc import testbed

        for number in range(position[1], self._count):
            (scene,) = testbed.held_out(1, number)
            file = io.BytesIO()
            if not light:
                testbed.condition_image(scene, self._condition).save(file, "png")
            row = {"id": f"scene-{number}", "text": scene.caption, "condition": file.getvalue()}
            yield (0, number), row


_KINDS = {".jsonl": JsonLines, ".parquet": Parquet, ".tar": Tars}


def _seen(folder: Path, *patterns: str) -> list[Path]:
    """Files in the order of names, without those that a system hides, such as ``._a.tar``."""
    found = (file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return sorted(file for file in found if file.name[0] != ".")


def open_table(data: str | Path, root: Path | None = None) -> Table:
    """The table in ``data``: a folder with a ``metadata.jsonl``, or with files of one kind (.jsonl,
    .parquet, .tar); one such file; or a pattern such as ``"data/*.tar"``.

    root: the folder that conditions which are paths lie under; None: that of the first file.

    Raises GenerateError where there is no such table.
    """
    path = Path(data)
    files: list[Path] = []
    if (path / "metadata.jsonl").is_file():
        files = [path / "metadata.jsonl"]
    elif path.is_dir():
        files = _seen(path, *(f"*{end}" for end in _KINDS))
    elif path.is_file():
        files = [path]
    elif set("*?[") & set(path.name):
        files = _seen(path.parent, path.name)
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= set(_KINDS):
        raise GenerateError(
            f"data: expected a folder with a metadata.jsonl, or {', '.join(_KINDS)} files; got "
            f"{data}, which " + (f"is {', '.join(sorted(kinds))}" if files else "holds none")
        )
    kind: Any = _KINDS[kinds.pop()]
    table: Table = kind(files, root)
    return table
