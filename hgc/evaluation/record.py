"""What was measured, one line of JSON a picture batch, so that a run can be interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Measured", "Record", "fingerprint", "settings_key"]

NAME = "measured.jsonl"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate on one batch of scenes of one condition.

    Attributes:
        key: Of everything the numbers depend on (:func:`settings_key`).
        condition: Name of the condition.
        candidate: Name of the candidate.
        batch: Index of the batch.
        scores: Fidelity, one a scene.
        confusion: A 10 x 10 confusion matrix a scene; None but for segmentation.
        distances: Relative L2 to the uncached picture, one a scene.
        seconds: Of the pipeline call.
        reference_seconds: Of the uncached call on the same batch, made just before it in the same
            process.
        held_bytes: The most the cache held during the call.
    """

    key: str
    condition: str
    candidate: str
    batch: int
    scores: list[float]
    confusion: list[list[list[int]]] | None
    distances: list[float]
    seconds: float
    reference_seconds: float
    held_bytes: int


def settings_key(settings: dict[str, Any]) -> str:
    """A short hash of ``settings``, which must be JSON."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(folder: Path, *patterns: str) -> str:
    """A hash of the files in ``folder`` that match: other weights or code give other numbers."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


class Record:
    """The lines written so far, in a folder, or in memory only.

    A line is written whole and flushed to the disk before the next call begins. One that an
    interruption cut short is dropped when the file is opened again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = None if folder is None else folder / NAME
        self._lines: dict[tuple[str, str, str, int], Measured] = {}
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
        place = (measured.key, measured.condition, measured.candidate, measured.batch)
        self._lines[place] = measured

    def find(self, key: str, condition: str, candidate: str, batch: int) -> Measured | None:
        """The measurement, where it was made."""
        return self._lines.get((key, condition, candidate, batch))

    def get(self, key: str, condition: str, candidate: str, batch: int) -> Measured:
        """The measurement; KeyError where it was not made."""
        return self._lines[key, condition, candidate, batch]

    def add(self, measured: Measured) -> None:
        """Keep a measurement."""
        if self._path is not None:
            line = json.dumps(dataclasses.asdict(measured), allow_nan=False) + "\n"
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._remember(measured)
