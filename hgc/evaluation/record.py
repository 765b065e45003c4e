"""What was measured, one line of JSON a picture batch, so that a run can be interrupted."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Measured", "Record", "fingerprint", "pack", "settings_key", "unpack"]

NAME = "measured.jsonl"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate on one batch of pictures of one condition.

    Attributes:
        key: Of everything the numbers depend on (:func:`settings_key`).
        condition: Name of the condition.
        candidate: Name of the candidate.
        first: Index of the batch's first picture among all there are.
        values: Of each measure one a picture, as `hgc.evaluation.rows.FIGURES` names them; those
            that could be measured.
        classes: For segmentation, of each picture [class, pixels hit, true, judged] of every class
            that occurs; None for other conditions.
        features: The judge's, one row a picture, as base64 of little-endian float32; None without
            a judge.
        seconds: Of the pipeline call.
        reference_seconds: Of the uncached call on the same batch, made just before it in the same
            process.
        waited: Share of the seconds in which our threads had no core, of the worse of the two
            calls (`hgc.evaluation.timing`); None where the system does not say.
        held_bytes: The most the cache held during the call.
    """

    key: str
    condition: str
    candidate: str
    first: int
    values: dict[str, list[float]]
    classes: list[list[list[int]]] | None
    features: str | None
    seconds: float
    reference_seconds: float
    waited: float | None
    held_bytes: int

    @property
    def count(self) -> int:
        """Pictures of the batch."""
        return len(self.values["distance"])


def pack(features: np.ndarray | None) -> str | None:
    """Features [B, F] as text."""
    if features is None:
        return None
    return base64.b64encode(features.astype("<f4").tobytes()).decode("ascii")


def unpack(text: str | None, count: int) -> np.ndarray | None:
    """The inverse of :func:`pack`: float32 [count, F]."""
    if text is None:
        return None
    return np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(count, -1)


def settings_key(settings: dict[str, Any]) -> str:
    """A short hash of ``settings``, which must be JSON."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(folder: Path, *patterns: str) -> str:
    """A hash of the files in ``folder`` that match: other weights or code give other numbers."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


_Place = tuple[str, str, str, int, int]


def _place(one: Measured) -> _Place:
    return one.key, one.condition, one.candidate, one.first, one.count


class Record:
    """The lines written so far, in a folder, or in memory only.

    A line is written whole and flushed to the disk before the next call begins. One that an
    interruption cut short is dropped when the file is opened again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = None if folder is None else folder / NAME
        self._lines: dict[_Place, Measured] = {}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._read()

    def _read(self) -> None:
        assert self._path is not None
        data = self._path.read_bytes()
        good = 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                measured = Measured(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(
                    f"{self._path} holds a line that is not a measurement ({error}); give "
                    "another folder"
                ) from None
            self._remember(measured)
            good += len(line)
        if good < len(data):
            os.truncate(self._path, good)

    def _remember(self, measured: Measured) -> None:
        self._lines[_place(measured)] = measured

    def find(
        self, key: str, condition: str, candidate: str, first: int, count: int
    ) -> Measured | None:
        """The measurement, where it was made."""
        return self._lines.get((key, condition, candidate, first, count))

    def get(self, key: str, condition: str, candidate: str, first: int, count: int) -> Measured:
        """The measurement; KeyError where it was not made."""
        return self._lines[key, condition, candidate, first, count]

    def add(self, measured: Measured) -> None:
        """Keep a measurement."""
        if self._path is not None:
            line = json.dumps(dataclasses.asdict(measured), allow_nan=False) + "\n"
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._remember(measured)
