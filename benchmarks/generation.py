"""What `hgc generate` costs beside the pictures themselves.

    python benchmarks/generation.py loop       # pictures a second against the pipeline in a loop
    python benchmarks/generation.py many       # 100,000 items with a stub in place of the model
    python benchmarks/generation.py encode     # PNG of a 512 x 512 picture

`loop`: the testbed, the same pictures by turns with `hgc generate` and with nothing but pipeline
calls on the same batches; of each the process's CPU seconds too, which other processes do not sway.
`many`: memory, records and seconds as items grow.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import hgc
from hgc.generation.api import Progress, run
from hgc.generation.generator import Generator, Made
from hgc.generation.items import Item, Picture, noise_seed, opened
from hgc.generation.job import Job, Model, Settings
from hgc.generation.local import Local
from hgc.generation.tables import Scenes, Table, open_table

_SIDE = 64


def _settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "images": 1, "seed": 0, "steps": 20, "guidance": 3.5, "batch": 8, "size": (_SIDE, _SIDE),
        "resize": None, "shard": 16, "format": "webdataset", "keep_conditions": False,
        "check": 0.0, "strict": False, **changes,
    }  # fmt: skip
    return Settings(**given)


class _Shared(Model):
    """The testbed, loaded once and warm, for both ways."""

    def __init__(self, generator: Generator) -> None:
        from hgc import testbed

        super().__init__(testbed.path(), None, "fp32")
        object.__setattr__(self, "ready", generator)

    def generator(self, job: Job, device: str) -> Any:
        return self.__dict__["ready"]


def _on_disk(folder: Path, items: int) -> Table:
    """Scenes of the testbed as a user has conditions: PNGs, and a table of them."""
    with (folder / "metadata.jsonl").open("w") as file:
        for n, (_, row) in enumerate(Scenes("segmentation", items).rows()):
            (folder / f"{n}.png").write_bytes(row["condition"])
            file.write(json.dumps({**row, "condition": f"{n}.png"}) + "\n")
    return open_table(folder)


def loop(items: int, steps: int, rounds: int) -> None:
    """Pictures a second, by turns."""
    from hgc import testbed

    pipe = testbed.load_pipeline("segmentation")
    config = hgc.Config.of("balanced")
    generator = Generator(pipe, config, steps=steps, guidance=3.5)
    settings = _settings(steps=steps)
    shares, cpu_shares, waits = [], [], []
    with tempfile.TemporaryDirectory() as place:
        table = _on_disk(Path(place), items)
        pictures = [
            Picture(item, 0, opened(item.condition, settings.size, None), noise_seed(0, item, 0))
            for item in table.items(0, (0, 0), items)
            if isinstance(item, Item)
        ]
        batches = [pictures[i : i + settings.batch] for i in range(0, items, settings.batch)]
        generator(batches[0])
        for number in range(rounds):
            begun = time.perf_counter(), time.process_time()
            for batch in batches:
                generator(batch)
            plain = time.perf_counter() - begun[0], time.process_time() - begun[1]
            begun = time.perf_counter(), time.process_time()
            summary = run(
                table, _Shared(generator), config, settings, Path(place) / f"out-{number}",
                lambda job: Local(job, ["cpu"]), {},
            )  # fmt: skip
            whole = summary.seconds, time.process_time() - begun[1]
            shares.append(plain[0] / whole[0])
            cpu_shares.append(plain[1] / whole[1])
            waits.append(summary.waited)
            print(
                f"round {number}: loop {items / plain[0]:.2f} pictures/s ({plain[1]:.1f} CPU s), "
                f"generate {items / whole[0]:.2f} ({whole[1]:.1f} CPU s with the hashes of the "
                f"weights and the page), device waited {summary.waited:.1%}",
                flush=True,
            )
    print(
        f"generate over loop, median of {rounds}: {statistics.median(shares):.3f} of the pictures "
        f"a second, {statistics.median(cpu_shares):.3f} by CPU seconds; device waited "
        f"{statistics.median(waits):.1%}"
    )


class _Stub:
    def __call__(self, pictures: list[Picture]) -> Made:
        pixels = np.stack([np.asarray(one.condition) for one in pictures])
        return Made(pixels, np.ones(len(pictures), bool), 0.001, 1, 2, 20, 14, 1)


class _StubModel(Model):
    def __init__(self) -> None:
        super().__init__(Path("stub"), None, "fp32")

    def identity(self) -> dict[str, Any]:
        return {"model": "stub", "controlnet": None, "dtype": "fp32"}

    def generator(self, job: Job, device: str) -> Any:
        return _Stub()


def _bytes_of(folder: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return len(sizes), sum(sizes)


def many(items: int) -> None:
    """Memory of the process as the run goes, and what is written beside the pictures."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Image.fromarray(np.zeros((_SIDE, _SIDE, 3), np.uint8)).save(folder / "map.png")
        with (folder / "items.jsonl").open("w") as file:
            for n in range(items):
                row = {"id": f"item-{n:09d}", "text": f"a house, {n}", "condition": "map.png"}
                file.write(json.dumps(row) + "\n")
        marks = [items * k // 10 for k in range(1, 11)]

        def show(now: Progress) -> None:
            if marks and now.done >= marks[0]:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                print(f"{now.done:>9} pictures: {pages * resource.getpagesize() / 2**20:.0f} MiB "
                      f"resident, {now.a_second:.0f} pictures/s", flush=True)  # fmt: skip
                marks.pop(0)

        def engine(job: Job) -> Local:
            return Local(job, ["cpu"])

        table = open_table(folder / "items.jsonl")
        config, settings = hgc.Config.of("balanced"), _settings(shard=64)
        for what in ("run", "resume"):
            begun = time.perf_counter()
            summary = run(table, _StubModel(), config, settings, folder / "out", engine, {},
                          on_progress=show)  # fmt: skip
            print(f"{what}: {summary.made} pictures, {time.perf_counter() - begun:.1f} s")
        count, size = _bytes_of(folder / "out" / "records")
        manifest = (folder / "out" / "manifest.json").stat().st_size
        print(f"{count} records, {size / 2**20:.2f} MiB; manifest {manifest} bytes")


def encode() -> None:
    """A picture of the shipped model's kind, enlarged, with noise as photographs have."""
    from hgc import testbed
    from hgc.generation.job import _png

    noise = np.random.default_rng(0).normal(0, 4, (512, 512, 3))
    scenes = testbed.held_out(8)
    pixels = [
        np.clip(np.asarray(Image.fromarray(s.image).resize((512, 512))) + noise, 0, 255)
        for s in scenes
    ]
    begun = time.process_time()
    sizes = [len(_png(one.astype(np.uint8))) for one in pixels]
    each = (time.process_time() - begun) / len(sizes)
    begun = time.process_time()
    for one in pixels:
        file = io.BytesIO()
        Image.fromarray(one.astype(np.uint8)).save(file, "png")
    slow = (time.process_time() - begun) / len(sizes)
    print(f"PNG, 512 x 512: {each * 1000:.0f} ms of CPU, {statistics.mean(sizes) / 1024:.0f} KiB; "
          f"with Pillow's own level {slow * 1000:.0f} ms")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["loop", "many", "encode"])
    parser.add_argument("--items", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if asked.what == "loop":
        loop(asked.items or 32, asked.steps, asked.rounds)
    elif asked.what == "many":
        many(asked.items or 100_000)
    else:
        encode()


if __name__ == "__main__":
    main()
