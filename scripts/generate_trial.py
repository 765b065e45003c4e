"""Kill `hgc generate` at random moments until it is done, and compare with a run that was not.

    python scripts/generate_trial.py --runs 30 --items 200
    python scripts/generate_trial.py --runs 5 --items 200 --engine ray

Every run is the command itself in a process of its own, on the testbed at few steps. It is killed
with SIGKILL after a random time, with --engine ray as often an actor or the node's process in its
place, and started again until it ends by itself. Then every id must be there once and every shard
have the bytes of the undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hgc.generation.sinks import SINKS

_COMMAND = [sys.executable, "-c", "from hgc.cli import main; main()", "generate"]


def _shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


def _victim(process: subprocess.Popen[Any], engine: str, chance: random.Random) -> tuple[str, int]:
    """The driver; with Ray as often one of its actors, or its node's process."""
    if engine == "ray":
        import psutil

        children = psutil.Process(process.pid).children(recursive=True)
        wanted = chance.choice(["driver", "ShardMaker", "raylet"])
        for child in children:
            try:
                if wanted in child.name() or wanted in " ".join(child.cmdline()[:1]):
                    return wanted, int(child.pid)
            except psutil.Error:
                continue
    return "driver", process.pid


# How a run ends that lost so much: by the signal; with an error that says how to go on; and where
# the node is gone, Ray ends the driver itself, without a word of Python's.
_ENDS = {"driver": {-signal.SIGKILL}, "ShardMaker": {2}, "raylet": {1, 2}}


def _run(
    out: Path, given: list[str], engine: str, longest: float, chance: random.Random
) -> Counter[str]:
    """Start, kill, start again, until it ends by itself; how often what was killed."""
    kills: Counter[str] = Counter()
    while True:
        command = [*_COMMAND, "--out", str(out), *given]
        # of its own session, so that nothing that it started outlives the trial
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        end = time.monotonic() + chance.uniform(0.1, longest)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        expected: set[int] = set()
        if process.poll() is None:
            name, pid = _victim(process, engine, chance)
            os.kill(pid, signal.SIGKILL)
            kills[name] += 1
            expected = _ENDS[name]
            longest *= 1.1  # so that a slow machine comes to an end
        _, said = process.communicate()
        if process.returncode == 0:
            return kills
        if process.returncode not in expected:
            raise SystemExit(f"exit code {process.returncode}: {said.decode()[-2000:]}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--longest", type=float, default=30.0, help="seconds to the first kill")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    given = [
        "--limit",
        str(asked.items),
        "--images",
        "1",
        "--steps",
        str(asked.steps),
        "--shard",
        "10",
    ]
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        subprocess.run([*_COMMAND, "--out", str(whole), *given], check=True)
        expected = _shards(whole)
        if asked.engine == "ray":
            given += ["--engine", "ray", "--workers", "2"]
        for number in range(asked.runs):
            out = Path(place) / f"{number}"
            begun = time.monotonic()
            kills = _run(out, given, asked.engine, asked.longest, chance)
            ids = [
                one.about["id"]
                for path in sorted((out / "shards").iterdir())
                for one in SINKS["webdataset"].read(path)
            ]
            if sorted(ids) != sorted(f"scene-{n}" for n in range(asked.items)):
                raise SystemExit(f"run {number}: {len(ids)} pictures, {len(set(ids))} ids")
            if _shards(out) != expected:
                raise SystemExit(f"run {number}: other bytes than the undisturbed run")
            seconds = time.monotonic() - begun
            killed = ", ".join(f"{name} {count}" for name, count in kills.items()) or "nothing"
            print(f"run {number}: killed {killed}; {len(ids)} ids once, bytes equal, "
                  f"{seconds:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
