"""The engine on a cluster: Ray Data, an actor a GPU.

What Ray is handed are numbers of shards, and what comes back are their records: pictures go from
the actor to the shared folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Sequence
from typing import Any

from hgc.generation.items import GO_ON, GenerateError
from hgc.generation.job import THREADS, Job, ShardMaker
from hgc.generation.store import Record

__all__ = ["Cluster"]


def _ray() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise GenerateError(
            f"--engine ray needs Ray Data ({error}), which the ray extra installs: "
            'pip install "hybrid-grained-cache[ray]"'
        ) from None
    return ray


class Cluster:
    """device: ``"cuda"``, of which each worker gets one, or ``"cpu"``. workers: None: as many as
    the cluster has GPUs. address: of a cluster that runs; None: one is started, or that of
    ``ray.init`` used."""

    def __init__(self, job: Job, device: str, workers: int | None, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray = _ray()
        self._job, self._device, self._ours = job, device, not ray.is_initialized()
        if self._ours:
            try:
                ray.init(address=address, include_dashboard=None if address else False,
                         log_to_driver=False)  # fmt: skip
            except Exception as error:  # of no class of its own, where a node is too slow
                where = "could be started" if address is None else f"at {address!r}"
                raise GenerateError(f"no Ray cluster {where}: {error}") from error
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if device != "cpu" and gpus == 0:
            self._end()
            raise GenerateError("--engine ray: the cluster has no GPU; for the CPU give --device "
                                "cpu and --workers")  # fmt: skip
        self.workers = workers or (1 if device == "cpu" else gpus)

    def run(self, shards: Sequence[int]) -> Generator[Record | tuple[int, float], None, None]:
        """Make ``shards``: the record of each as it is finished, after its batches."""
        ray = _ray()
        ray.data.DataContext.get_current().enable_progress_bars = False
        records = ray.data.from_items(
            [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
        ).map_batches(
            ShardMaker,
            batch_size=1,
            fn_constructor_kwargs={"job": self._job, "device": self._device},
            compute=ray.data.ActorPoolStrategy(
                size=self.workers,
                max_tasks_in_flight_per_actor=2 * THREADS,
                max_concurrent_calls_per_actor=THREADS,
                enable_true_multi_threading=True,
            ),
            num_cpus=0,
            num_gpus=0 if self._device == "cpu" else 1,
        )
        try:
            for row in records.iter_rows():
                if row["error"]:
                    raise GenerateError(row["error"])
                record = Record(**json.loads(row["record"]))
                yield self._job.slots(record.shard), record.device_seconds
                yield record
        except ray.exceptions.RayError as error:
            said = " ".join(str(error).split())
            raise GenerateError(f"Ray lost a worker: {said[:500]}. {GO_ON}") from error
        finally:
            self._end()

    def _end(self) -> None:
        if self._ours:
            _ray().shutdown()
