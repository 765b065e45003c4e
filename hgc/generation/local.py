"""The engine in one process: a worker a device, threads of one process."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import sys
import threading
from collections.abc import Generator, Sequence

from hgc.generation.items import GO_ON, GenerateError
from hgc.generation.job import THREADS, Job, ShardMaker, Stopped
from hgc.generation.store import Record

__all__ = ["Local"]

# of glibc's malloc.h: how many heaps, and how many free bytes are kept at the end of one
_M_ARENA_MAX, _M_TRIM_THRESHOLD = -8, -1
_KEPT_BYTES = 2**30


def _keep_freed_memory() -> None:
    """Let glibc keep what was freed, in the whole process. In a thread beside the main one it gives
    the end of its heap back to the system again and again, and gets it anew page by page: a tenth
    of the time of a small pipeline on a CPU."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another libc
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_ARENA_MAX, 1)
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class Local:
    """devices: as torch names them; one may be named twice."""

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        if "cpu" in devices:
            _keep_freed_memory()
        self._makers = [ShardMaker(job, device) for device in devices]
        self.workers = len(devices)

    def run(self, shards: Sequence[int]) -> Generator[Record | tuple[int, float], None, None]:
        """Make ``shards``: the record of each as it is finished, and between them the pictures and
        the device's seconds of each batch."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for shard in shards:
            todo.put(shard)
        # a worker that is ahead of who takes the records waits for them
        done: queue.Queue[Record | tuple[int, float] | BaseException | None] = queue.Queue(64)
        stop = threading.Event()

        def work(maker: ShardMaker) -> None:
            try:
                while not stop.is_set():
                    done.put(maker.make(todo.get_nowait(), stop, lambda *batch: done.put(batch)))
            except (queue.Empty, Stopped):
                pass
            except BaseException as error:
                done.put(error)
            done.put(None)

        threads = [
            threading.Thread(target=work, args=(maker,), daemon=True)
            for maker in self._makers
            for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        left = len(threads)
        try:
            while left:
                found = done.get()
                if isinstance(found, Exception) and not isinstance(found, GenerateError | OSError):
                    raise GenerateError(f"a worker failed: {found!r}. {GO_ON}") from found
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            stop.set()
            while left:
                left -= done.get() is None
            for maker in self._makers:
                maker.close()
