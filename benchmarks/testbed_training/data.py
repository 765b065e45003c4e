"""The training set: scenes rendered once, kept in memory and on disk."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hgc.testbed.conditions import CONDITIONS, condition_map
from hgc.testbed.scenes import LIGHTS, render


@dataclasses.dataclass
class Scenes:
    """N scenes as arrays.

    image: uint8 [N, 64, 64, 3]. maps: condition -> uint8 [N, 64, 64], of the conditions asked for.
    light: int64 [N]. caption: N strings.
    """

    image: np.ndarray
    maps: dict[str, np.ndarray]
    light: np.ndarray
    caption: list[str]

    def __len__(self) -> int:
        return len(self.image)


def _rows(
    seeds: range, conditions: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, list[str]]:
    scenes = [render(seed) for seed in seeds]
    maps = {c: np.stack([condition_map(s, c) for s in scenes]) for c in conditions}
    light = np.array([LIGHTS.index(s.light) for s in scenes], dtype=np.int64)
    return np.stack([s.image for s in scenes]), maps, light, [s.caption for s in scenes]


def load_scenes(
    count: int, work: Path, conditions: Sequence[str] = CONDITIONS, workers: int | None = None
) -> Scenes:
    """Scenes of seeds 0 to `count` - 1; rendered on the first call, read from `work` afterwards.

    workers: processes that render; None: one a core.
    """
    some = "" if tuple(conditions) == CONDITIONS else "_" + "_".join(conditions)
    cached = work / f"scenes_{count}{some}.npz"
    if cached.exists():
        with np.load(cached) as file:
            maps = {c: file[c] for c in conditions}
            return Scenes(file["image"], maps, file["light"], file["caption"].tolist())
    rows = functools.partial(_rows, conditions=conditions)
    chunks = [range(i, min(i + 250, count)) for i in range(0, count, 250)]
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if len(chunks) > 1 and workers > 1:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            parts = pool.map(rows, chunks, chunksize=1)
    else:
        parts = [rows(chunk) for chunk in chunks]
    scenes = Scenes(
        np.concatenate([p[0] for p in parts]),
        {c: np.concatenate([p[1][c] for p in parts]) for c in conditions},
        np.concatenate([p[2] for p in parts]),
        [caption for p in parts for caption in p[3]],
    )
    work.mkdir(parents=True, exist_ok=True)
    part = cached.with_name("part_" + cached.name)
    np.savez(
        part,
        image=scenes.image,
        light=scenes.light,
        caption=np.array(scenes.caption),
        **scenes.maps,
    )
    part.rename(cached)
    return scenes
