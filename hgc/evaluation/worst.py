"""The pictures farthest from the uncached ones, kept while an evaluation goes on.

A strip is one file: the uncached picture, the row's, and their difference eight times as bright,
beside each other. An evaluation makes too many pictures to keep all, so a strip that is no longer
among the worst is deleted. What is kept depends on the record alone, and therefore not on how often
the evaluation was interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hgc.evaluation.metrics import worst_indices
from hgc.evaluation.pictures import difference
from hgc.evaluation.record import Measured, Record

__all__ = ["Strips", "strip_path"]

FOLDER = "worst"
# A picture of 512 pixels a side is shown at half of that.
_LARGEST = 256


def strip_path(folder: Path, key: str, picture: int) -> Path:
    """Where the strip of a row's picture is."""
    return folder / FOLDER / key / f"{picture:06d}.png"


class Strips:
    """The strips of the rows of one condition.

    folder: Of the evaluation. count: Strips of a row. spans: First index and number of pictures of
    each batch of this evaluation; batches of others that the record holds are left alone.
    """

    def __init__(self, folder: Path, count: int, spans: Sequence[tuple[int, int]]) -> None:
        self._folder, self._count, self._spans = folder, count, spans

    def _worst(self, batches: Iterable[Measured]) -> list[int]:
        """Indices of the worst pictures of ``batches``, worst first."""
        places = [(m.first + i, d) for m in batches for i, d in enumerate(m.distances)]
        distances = np.array([d for _, d in places])
        return [places[i][0] for i in worst_indices(distances, self._count)]

    def _recorded(self, record: Record, like: Measured) -> list[Measured]:
        found = (record.find(like.key, like.condition, like.candidate, *s) for s in self._spans)
        return [m for m in found if m is not None]

    def keep(
        self, record: Record, measured: Measured, images: np.ndarray, reference: np.ndarray
    ) -> None:
        """Write those of a batch that are among the worst so far, before it is recorded."""
        worst = self._worst([*self._recorded(record, measured), measured])
        inside = [i - measured.first for i in worst if 0 <= i - measured.first < measured.count]
        self.write(measured, inside, images, reference)

    def write(
        self, measured: Measured, which: Iterable[int], images: np.ndarray, reference: np.ndarray
    ) -> None:
        """Write the strips of the pictures ``which`` of a batch."""
        from PIL import Image

        for i in which:
            parts = (reference[i], images[i], difference(images[i], reference[i]))
            pixels = (np.concatenate(parts, axis=1) * 255 + 0.5).astype(np.uint8)
            picture = Image.fromarray(pixels)
            if picture.height > _LARGEST:
                width = 3 * round(picture.width / 3 * _LARGEST / picture.height)
                picture = picture.resize((width, _LARGEST), Image.Resampling.BOX)
            path = strip_path(self._folder, measured.key, measured.first + i)
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".part")
            picture.save(aside, format="PNG")
            os.replace(aside, path)

    def prune(self, record: Record, measured: Measured) -> None:
        """Delete the strips of a row that are no longer among its worst."""
        self.prune_all(self._recorded(record, measured))

    def prune_all(self, batches: Sequence[Measured]) -> None:
        """The same, of a row's batches."""
        worst = set(self._worst(batches))
        for measured in batches:
            for i in range(measured.count):
                if measured.first + i not in worst:
                    strip_path(self._folder, measured.key, measured.first + i).unlink(
                        missing_ok=True
                    )

    def missing(self, batches: Sequence[Measured]) -> list[Measured]:
        """Of a row's batches those that hold one of its worst pictures without a strip."""
        lacking = {
            i for i in self._worst(batches)
            if not strip_path(self._folder, batches[0].key, i).exists()
        }  # fmt: skip
        return [
            m for m in batches if any(m.first + i in lacking for i in range(m.count))
        ]  # fmt: skip
