"""Small runs of `hgc.generation`: tables, and a stand-in for the model where it is not the subject.

The stand-in draws noise from a picture's seed and tints it with the condition, so that a picture
tells which item, index and condition it was made of, and is made in no time.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from hgc import Config
from hgc.generation.api import run
from hgc.generation.generator import Made
from hgc.generation.job import Model, Settings
from hgc.generation.local import Local
from hgc.generation.sinks import SINKS
from hgc.generation.tables import open_table

SIZE = 16


class Stub:
    def __init__(self, model: StubModel) -> None:
        self._model, self._made = model, 0

    def __call__(self, pictures) -> Made:
        time.sleep(self._model.seconds * len(pictures))
        if self._model.waits_for is not None and self._made == 0:
            end = time.monotonic() + 60
            while len(list(self._model.waits_for.glob("shards/.*.tmp"))) < 2:
                assert time.monotonic() < end, "no other shard was begun meanwhile"
                time.sleep(0.01)
        self._made += 1
        if self._model.dies_at is not None and self._made > self._model.dies_at:
            raise RuntimeError("the device fell off the bus")
        pixels = np.stack([self._draw(one) for one in pictures])
        finite = np.array([one.item.text != "nan" for one in pictures])
        return Made(pixels, finite, 0.001 * len(pictures), 6, 20, 20, 14, 1 << 20)

    def uncached(self, pictures) -> Made:
        made = self(pictures)
        pixels = made.pixels.astype(int) + self._model.off
        return dataclasses.replace(made, pixels=np.clip(pixels, 0, 255).astype(np.uint8))

    @staticmethod
    def _draw(one) -> np.ndarray:
        noise = np.random.default_rng(one.seed).integers(0, 128, (SIZE, SIZE, 3))
        return (noise + np.asarray(one.condition) // 2).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class StubModel(Model):
    folder: Path = Path("stub")
    controlnet: Path | None = None
    dtype: str = "fp32"
    seconds: float = 0.0
    dies_at: int | None = None
    off: int = 0
    waits_for: Path | None = None

    def size(self) -> int:
        return SIZE

    def identity(self) -> dict:
        return {"model": "stub", "controlnet": None, "dtype": self.dtype}

    def generator(self, job, device) -> Stub:
        return Stub(self)


def settings(**changes) -> Settings:
    given = {
        "images": 2, "seed": 0, "steps": 2, "guidance": 3.5, "batch": 3, "size": (SIZE, SIZE),
        "resize": None, "shard": 4, "format": "webdataset", "keep_conditions": False, "check": 0.0,
        "strict": False, **changes,
    }  # fmt: skip
    return Settings(**given)


def make(data, out, *, model=None, devices=("cpu",), engine=None, root=None, **changes):
    """A run with the stand-in."""
    more = {k: changes.pop(k) for k in ("limit", "force", "max_distance") if k in changes}
    return run(
        open_table(data, root), model or StubModel(), Config.preset("balanced"),
        settings(**changes), Path(out), engine or (lambda job: Local(job, devices)), {}, **more,
    )  # fmt: skip


def picture(value: int, size: int = SIZE) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value % 256, np.uint8))


def lines(count: int) -> list[dict]:
    return [
        {"id": f"item {n}", "text": f"a house, {n}", "condition": f"maps/{n % 7}.png"}
        for n in range(count)
    ]


def table(folder: Path, rows, name: str = "items.jsonl") -> Path:
    """A table of JSON lines with seven conditions in ``folder``."""
    (folder / "maps").mkdir(parents=True, exist_ok=True)
    for n in range(7):
        picture(30 * n).save(folder / "maps" / f"{n}.png")
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def drawn(folder: Path, format: str = "webdataset") -> list:
    """All pictures of a run, by shard."""
    sink = SINKS[format]
    return [one for path in sorted((folder / "shards").iterdir()) for one in sink.read(path)]


def files(folder: Path) -> dict[str, bytes]:
    """The shards' bytes, by name."""
    shards = folder / "shards"
    return {
        p.relative_to(shards).as_posix(): p.read_bytes() for p in shards.rglob("*") if p.is_file()
    }


def failed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
