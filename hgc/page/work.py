"""One thread that draws for everybody, one request after the other, and how one is stopped."""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from html import escape
from typing import Any, Protocol

from hgc import ConfigError
from hgc.page.given import Refused

__all__ = ["Say", "Stopped", "Worker"]

_log = logging.getLogger("hgc.page")


class Stopped(Exception):
    """The request was stopped."""


class Say(Protocol):
    """How a request tells how far it is. Raises :class:`Stopped` once it was stopped."""

    def __call__(self, label: str, done: int, total: int, result: str | None = None) -> None: ...


class Worker:
    """Draws in one thread, whose requests cannot meet in a pipeline."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "hgc-page")
        self._stops: dict[str, threading.Event] = {}

    def stop(self, who: str) -> None:
        """End the request of ``who`` after the step that it is in."""
        event = self._stops.get(who)
        if event is not None:
            event.set()

    def run(self, who: str, job: Callable[[Say], Any]) -> Iterator[tuple[str, str | None]]:
        """Do ``job`` for ``who``: (status, result) pairs as it goes on, both HTML, the result None
        while there is no new one. A closed iterator stops the job."""
        stop = self._stops[who] = threading.Event()
        said: queue.SimpleQueue[tuple[str, str | None] | None] = queue.SimpleQueue()

        def say(label: str, done: int, total: int, result: str | None = None) -> None:
            if stop.is_set():
                raise Stopped
            said.put((_progress(label, done, total), result))

        future = self._thread.submit(job, say)
        future.add_done_callback(lambda _: said.put(None))
        try:
            while (one := said.get()) is not None:
                yield one
            yield _status("done"), future.result()
        except Stopped:
            yield _status("stopped"), None
        except (Refused, ConfigError, ValueError, TypeError) as error:
            yield _failed(str(error)), None
        except Exception as error:
            # the message may name files of this machine
            _log.exception("a request failed")
            yield _failed(f"{type(error).__name__}; the log of `hgc page` has all of it"), None
        finally:
            stop.set()
            if self._stops.get(who) is stop:
                del self._stops[who]


def _status(text: str) -> str:
    return f'<p class="hgc-status" role="status">{escape(text)}</p>'


def _failed(text: str) -> str:
    return f'<p class="hgc-status hgc-warned" role="alert">This did not work: {escape(text)}</p>'


def _progress(label: str, done: int, total: int) -> str:
    text = escape(f"{label}: step {done} of {total}")
    return (
        f'<p class="hgc-status" role="status"><progress value="{done}" max="{total}" '
        f'aria-label="{text}"></progress> {text}</p>'
    )
