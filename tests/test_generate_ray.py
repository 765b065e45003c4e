"""`hgc generate --engine ray` on a local cluster with two actors.

pip install -c constraints.txt ".[test,ray]" && pytest -m ray tests/test_generate_ray.py
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray.data", reason="needs the extra ray")
pytest.importorskip("transformers")

import ray
from generation import StubModel, failed, files, lines, make, table

import hgc
from hgc import GenerateError
from hgc.generation.cluster import Cluster

pytestmark = pytest.mark.ray

WORKERS = 2


@pytest.fixture(scope="module")
def cluster():
    """A local cluster whose workers find this folder's modules."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    patch.undo()
    yield
    ray.shutdown()


def _on_ray(job) -> Cluster:
    return Cluster(job, "cpu", WORKERS, None)


def test_ray_writes_the_bytes_that_the_local_engine_writes(cluster, tmp_path):
    given = {"limit": 6, "images": 2, "steps": 2, "batch": 4, "shard": 2}
    local = hgc.generate(out=tmp_path / "local", **given)
    spread = hgc.generate(out=tmp_path / "ray", engine="ray", workers=WORKERS, **given)
    assert files(tmp_path / "local") == files(tmp_path / "ray")
    assert (spread.pictures, spread.macs) == (local.pictures, local.macs) == (12, local.macs)


def test_failures_are_the_same_and_either_engine_goes_on_where_the_other_ended(cluster, tmp_path):
    rows = lines(60)
    for row in rows[::7]:
        row["text"] = ""
    data = table(tmp_path, rows)
    make(data, tmp_path / "whole")
    with pytest.raises(GenerateError, match=r"fell off the bus.*same command goes on"):
        make(data, tmp_path / "out", model=StubModel(dies_at=9))
    summary = make(data, tmp_path / "out", engine=_on_ray)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert failed(tmp_path / "out") == failed(tmp_path / "whole")
    assert 0 < summary.made < summary.pictures
    with pytest.raises(GenerateError, match=r"a worker failed: RuntimeError.*fell off the bus"):
        make(data, tmp_path / "2", model=StubModel(dies_at=9), engine=_on_ray)
    make(data, tmp_path / "2")
    assert files(tmp_path / "2") == files(tmp_path / "whole")
    with pytest.raises(GenerateError, match="item 0, 'item 0': text is empty"):
        make(data, tmp_path / "strict", engine=_on_ray, strict=True)


def test_an_actor_that_is_killed_is_started_again(cluster, tmp_path):
    data = table(tmp_path, lines(80))
    make(data, tmp_path / "whole")
    killed = []

    def engine(job):
        made = _on_ray(job)

        def run(shards, inner=made.run):
            for event in inner(shards):
                if len(killed) < 2 and not isinstance(event, tuple) and _kill_one(tmp_path):
                    killed.append(event.shard)
                yield event

        made.run = run
        return made

    make(data, tmp_path / "out", engine=engine, model=StubModel(seconds=0.05))
    assert len(killed) == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def _kill_one(folder: Path) -> bool:
    """SIGKILL a worker that has a shard of ours open."""
    import psutil

    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(
                str(folder) in file.path for file in process.open_files()
            ):
                os.kill(process.pid, signal.SIGKILL)
                return True
        except psutil.Error:
            continue
    time.sleep(0.05)
    return False


def test_without_a_gpu_it_says_so(cluster, tmp_path):
    with pytest.raises(GenerateError, match="the cluster has no GPU"):
        hgc.generate(out=tmp_path / "out", engine="ray", device="cuda", limit=1)
