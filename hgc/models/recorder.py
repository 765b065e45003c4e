"""Functions of tensors that are recorded once on a device, and then replayed: CUDA graphs.

A :class:`Recorder` records a function that reads and writes at fixed addresses; a
:class:`Recording` is one of any function of tensors, with the buffers that belong to it.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

__all__ = ["CudaRecorder", "Recorder", "Recording", "flatten", "is_dense"]

Tensor = torch.Tensor


class Recorder(Protocol):
    """Records a function of no arguments, which reads and writes tensors at fixed addresses."""

    device_type: str

    def begin(self, device: torch.device) -> bool:
        """Whether a recording can be made or replayed now. What is launched after this call comes
        after what was launched before it, from whatever stream."""

    def record(self, call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """The tensors that ``call`` returns, and what computes their values anew.

        Nothing need have been computed before the first replay. Raises what the recording raises,
        and leaves the device as it was."""

    def release(self) -> None:
        """Recordings are about to be let go of: wait until none of them runs."""


# Recordings that failed half-way: the allocator may hold on to them.
_FAILED: list[Any] = []
# Of all devices and installations: the allocator is not to be emptied while somebody records.
_RECORDING = threading.Lock()


class CudaRecorder:
    """Records CUDA graphs. They share one pool of memory, so no two may run at once, and what one
    returned is gone when another runs."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._stream: Any = None
        self._last: Any = None
        self._pool: Any = None
        self._held: weakref.WeakSet[Any] = weakref.WeakSet()

    def begin(self, device: torch.device) -> bool:
        """See :class:`Recorder`."""
        if torch.cuda.is_current_stream_capturing():
            return False
        stream = torch.cuda.current_stream(device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        self._last, self._device = stream, device
        return True

    def record(self, call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """See :class:`Recorder`."""
        assert self._device is not None
        with _RECORDING, torch.cuda.device(self._device), _without_collector():
            if self._stream is None or self._stream.device != self._device:
                self._stream = torch.cuda.Stream(self._device)
                self._pool = None
            if self._pool is None or not self._held:  # a pool ends with its last graph
                self._pool = torch.cuda.graph_pool_handle()
            self._stream.wait_stream(self._last)
            with torch.cuda.stream(self._stream):
                # what libraries choose, load and measure at a thread's first use
                call()
            # not the device, on which another thread may be capturing
            self._stream.synchronize()
            torch.cuda.empty_cache()
            # cuBLAS's workspaces: those of this graph are to lie in its own pool, and to be used by
            # nobody else
            torch._C._cuda_clearCublasWorkspaces()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(self._stream):
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        outputs = call()
                    except BaseException:
                        with contextlib.suppress(RuntimeError):
                            graph.capture_end()
                        raise
                    graph.capture_end()
            except BaseException:
                if not _has_ended(graph):
                    self._abandon(graph)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        self._held.add(graph)
        return outputs, graph.replay

    def _abandon(self, graph: Any) -> None:
        """Undo what a recording that failed left behind: an allocator that still allocates for it,
        and generators of random numbers that wait for its end."""
        assert self._device is not None
        _FAILED.append(graph)  # the allocator may call back into it
        index, pool, self._pool = self._device.index, self._pool, None
        for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with contextlib.suppress(RuntimeError):
                undo(index, pool)
        with contextlib.suppress(RuntimeError), torch.cuda.stream(self._stream):
            again = torch.cuda.CUDAGraph()
            again.capture_begin(capture_error_mode="thread_local")
            try:
                torch.zeros(1, device=self._device)
            finally:
                again.capture_end()

    def release(self) -> None:
        """See :class:`Recorder`."""
        if self._last is not None:
            self._last.synchronize()


def _has_ended(graph: Any) -> bool:
    """Whether a capture came to its end: the graph then gives its memory back itself."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Nothing is collected meanwhile: freeing somebody's graph or event would end a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# -- arguments --------------------------------------------------------------------------------

_SETTINGS = frozenset((bool, int, str, type(None), torch.dtype, torch.device, torch.Size))
_SLOT = "tensor"


def flatten(value: Any, tensors: list[Tensor], layout: list[Any]) -> bool:
    """Append the tensors in ``value`` to ``tensors``, and all else that it consists of to
    ``layout``. Whether it consists of tensors, settings and plain containers alone."""
    kind = type(value)
    if kind is Tensor:
        tensors.append(value)
        layout.append(_SLOT)
    elif kind in _SETTINGS:
        layout.append((kind, value))
    elif kind is float:
        layout.append((kind, value.hex()))  # 0.0 equals -0.0
    elif kind is dict:
        layout.append((kind, (*value,)))
        return all(flatten(v, tensors, layout) for v in value.values())
    elif kind is list or kind is tuple:
        layout.append((kind, len(value)))
        return all(flatten(v, tensors, layout) for v in value)
    else:
        return False
    return True


def _unflatten(layout: Iterator[Any], tensors: Iterator[Tensor]) -> Any:
    """The inverse of :func:`flatten`."""
    part = next(layout)
    if part is _SLOT:
        return next(tensors)
    kind, value = part
    if kind is float:
        return float.fromhex(value)
    if kind is dict:
        return {key: _unflatten(layout, tensors) for key in value}
    if kind is list or kind is tuple:
        return kind([_unflatten(layout, tensors) for _ in range(value)])
    return value


def is_dense(x: Tensor) -> bool:
    """Whether each element has a place of its own, and there is none between them."""
    return torch.empty_like(x, device="meta").stride() == x.stride()


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of those that can be copied in one launch."""
    found: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        found.setdefault(x.dtype, []).append(i)
    return list(found.values())


class Recording:
    """A recording of one function, and the buffers that it reads and writes."""

    def __init__(
        self, recorder: Recorder, function: Callable[..., Any], tensors: Sequence[Tensor],
        layout: tuple[Any, ...],
    ) -> None:  # fmt: skip
        # normal tensors, whether or not inference mode is on, so that both modes can write to them
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [*map(torch.empty_like, tensors)]
            # what is recorded must see values that it can have
            for buffer, x in zip(self._inputs, tensors, strict=True):
                buffer.copy_(x)
            before = [*map(_version, self._inputs)]
            made: list[Any] = []

            def call() -> list[Tensor]:
                given = _unflatten(iter(layout), iter(self._inputs))
                outputs: list[Tensor] = []
                made.clear()
                if not flatten(function(*given), outputs, made):
                    raise TypeError("a network returns something that is not a tensor")
                return outputs

            self._outputs, self._replay = recorder.record(call)
            self._made = tuple(made)
        # FreeU writes into its input: such a buffer has another value after a replay
        self._written = [v != _version(x) for v, x in zip(before, self._inputs, strict=True)]
        self._groups, self._out_groups = _by_dtype(self._inputs), _by_dtype(self._outputs)
        # what was copied in last: by weak references, since a run's tensors are to go with it
        self._sources: list[Any] = [lambda: None] * len(tensors)
        self._states: list[Any] = [None] * len(tensors)

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """What the function returns for ``tensors``, in new memory."""
        sources, states = self._sources, self._states
        for group in self._groups:
            to, come = [], []
            for i in group:
                x = tensors[i]
                version = _version(x)
                state = (version, x.data_ptr())
                if version >= 0 and sources[i]() is x and states[i] == state:
                    continue
                if not self._written[i]:
                    sources[i], states[i] = weakref.ref(x), state
                to.append(self._inputs[i])
                come.append(x)
            if to:
                torch._foreach_copy_(to, come)
        self._replay()
        outputs = [torch.empty_like(x) for x in self._outputs]
        for group in self._out_groups:
            torch._foreach_copy_([outputs[i] for i in group], [self._outputs[i] for i in group])
        return _unflatten(iter(self._made), iter(outputs))
