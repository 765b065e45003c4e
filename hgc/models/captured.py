"""Captured evaluations: a kind of evaluation becomes one CUDA graph, with the eager one's bits.

The first use of a kind runs eagerly, the second is recorded, and from then on the recording is
replayed: what goes in is copied into buffers that belong to the graph, what comes out is copied
into new tensors, so that no buffer of a graph is ever handed out. A graph reads weights where they
were when it was recorded: they, the layers and their settings are looked at before each replay, and
whatever is not as it was runs eagerly, and may be recorded again.

How a function is recorded is left to a :class:`Recorder`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from hgc.models.attention import Text, unwrapped
from hgc.models.controlnet import control_function
from hgc.models.graphs import Kind, Networks
from hgc.models.structure import UNetStructure
from hgc.models.unet import freeu_of, run_unet
from hgc_kernels import get_backend

__all__ = ["CapturedNetworks", "CudaRecorder", "Recorder"]

Tensor = torch.Tensor

# Graphs held at once, unless another number is asked for.
LIMIT = 16
# Kinds that were seen once are remembered, and not more of them than this for each graph.
_SEEN = 4


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


def _flatten(value: Any, tensors: list[Tensor], layout: list[Any]) -> bool:
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
        return all(_flatten(v, tensors, layout) for v in value.values())
    elif kind is list or kind is tuple:
        layout.append((kind, len(value)))
        return all(_flatten(v, tensors, layout) for v in value)
    else:
        return False
    return True


def _unflatten(layout: Iterator[Any], tensors: Iterator[Tensor]) -> Any:
    """The inverse of :func:`_flatten`."""
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


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device


def _is_dense(x: Tensor) -> bool:
    """Whether each element has a place of its own, and there is none between them."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of those that can be copied in one launch."""
    found: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        found.setdefault(x.dtype, []).append(i)
    return list(found.values())


class _Graph:
    """A recording of one function, and the buffers that it reads and writes."""

    def __init__(
        self, recorder: Recorder, function: Callable[..., Any], tensors: Sequence[Tensor],
        layout: tuple[Any, ...],
    ) -> None:  # fmt: skip
        # normal tensors, whether or not inference mode is on, so that both modes can write to them
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                for x in tensors
            ]
            # what is recorded must see values that it can have
            for buffer, x in zip(self._inputs, tensors, strict=True):
                buffer.copy_(x)
            before = [*map(_version, self._inputs)]
            made: list[Any] = []

            def call() -> list[Tensor]:
                given = _unflatten(iter(layout), iter(self._inputs))
                outputs: list[Tensor] = []
                made.clear()
                if not _flatten(function(*given), outputs, made):
                    raise TypeError("a network returns something that is not a tensor")
                return outputs

            self._outputs, self._replay = recorder.record(call)
            self._made = tuple(made)
        # FreeU writes into its input: such a buffer has another value after a replay
        self._written = [v != _version(x) for v, x in zip(before, self._inputs, strict=True)]
        self._groups, self._out_groups = _by_dtype(self._inputs), _by_dtype(self._outputs)
        # what was copied in last: by weak references, since a run's tensors are to go with it
        self._sources: list[Any] = [_nothing] * len(tensors)
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


def _nothing() -> None:
    return None


# -- what a graph reads beside its inputs ------------------------------------------------------

# Processors that do the same at every call, and nothing on the host that depends on values.
_PROCESSORS = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.AttnAddedKVProcessor,
    processors.AttnAddedKVProcessor2_0,
    processors.FusedAttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
)
_PACKAGES = ("torch", "diffusers", "peft")
_OUTSIDE = ("down_blocks", "mid_block", "up_blocks")

_get, _is = dict.get, operator.is_
_pointer, _stride = Tensor.data_ptr, Tensor.stride


class _Layers:
    """The layers of a network that an evaluation runs, as they were when they were looked at.

    Attributes:
        why: Why they cannot be recorded; "" where they can.
        device: Where their weights are.
    """

    def __init__(self, model: torch.nn.Module, names: Callable[[str], bool]) -> None:
        self._model = model.__dict__
        self.why = ""
        self.device: torch.device | None = None
        inside = {name: part for name, part in model.named_modules() if name and names(name)}
        modules = [model, *inside.values()]
        places = [
            (modules[0] if not parent else inside[parent], child, inside[name])
            for name in inside
            for parent, _, child in [name.rpartition(".")]
        ]
        held = [
            (holder, key, x)
            for part in modules
            for holder in (part._parameters, part._buffers)
            for key, x in holder.items()
            if x is not None
        ]
        attentions = [part for part in inside.values() if isinstance(part, Attention)]
        placed = [
            (part._modules if "processor" in part._modules else part.__dict__)
            for part in attentions
        ]
        self._dicts = [p._modules for p, _, _ in places] + [h for h, _, _ in held]
        self._keys = [key for _, key, _ in places] + [key for _, key, _ in held]
        self._values = [part for _, _, part in places] + [x for _, _, x in held]
        self._weights = [x for _, _, x in held]
        self._own = [part.__dict__ for part in inside.values()]
        self._forwards = [own.get("forward") for own in self._own]
        self._hooks = [
            hooks for part in inside.values() for hooks in (part._forward_hooks,
                                                            part._forward_pre_hooks)
        ]  # fmt: skip
        self._placed, self._processors = placed, [own.get("processor") for own in placed]
        self._adapters = [
            p
            for p in inside.values()
            if type(p).__module__.startswith("peft.") and hasattr(p, "active_adapters")
        ]
        self._fusers = [p for p in inside.values() if isinstance(p, GatedSelfAttentionDense)]
        self._up_blocks = [p for n, p in inside.items() if n.rpartition(".")[0] == "up_blocks"]
        self.why = self._why_not(inside.values())
        if not self.why:
            self._addresses = [*map(_pointer, self._weights)]
            # a weight that comes back to its address may have another memory format
            self._wide = [x for x in self._weights if x.dim() == 4]
            self._strides = [*map(_stride, self._wide)]

    def _why_not(self, inside: Iterable[torch.nn.Module]) -> str:
        if any(name in self._model for name in ("_hf_hook", "_diffusers_hook")):
            return "the model is moved or changed by hooks"
        for part, forward in zip(inside, self._forwards, strict=True):
            kind = type(part)
            if kind.__module__.partition(".")[0] not in _PACKAGES:
                return f"a layer of another package: {kind.__name__}"
            back = getattr(forward, "__func__", None) is kind.forward
            if forward is not None and not (back and getattr(forward, "__self__", None) is part):
                return f"the forward of a {kind.__name__} was replaced"
            if "_compiled_call_impl" in part.__dict__ or kind.__name__ == "OptimizedModule":
                return "blocks are compiled one by one"
        for processor in map(unwrapped, self._processors):
            if type(processor) not in _PROCESSORS:
                return f"an attention processor: {type(processor).__name__}"
        if any(self._hooks):
            return "hooks on layers"
        if not all(type(x) in (Tensor, torch.nn.Parameter) for x in self._weights):
            return "weights of a tensor class of their own"
        devices = {x.device for x in self._weights}
        if len(devices) != 1:
            return "weights on several devices"
        self.device = devices.pop()
        return "weights on the meta device" if self.device.type == "meta" else ""

    def as_they_were(self) -> bool:
        """Whether each layer is in its place, with its weights at their addresses, and can still be
        recorded."""
        return (
            "_hf_hook" not in self._model
            and "_diffusers_hook" not in self._model
            and all(map(_is, map(_get, self._dicts, self._keys), self._values))
            and all(map(_is, map(_get, self._placed, itertools.repeat("processor")),
                        self._processors))
            and all(map(_is, map(_get, self._own, itertools.repeat("forward")), self._forwards))
            and not any(self._hooks)
            and [*map(_pointer, self._weights)] == self._addresses
            and [*map(_stride, self._wide)] == self._strides
        )  # fmt: skip

    def same(self, other: _Layers) -> bool:
        """Whether a recording made of ``other`` holds for these: its processors may have been
        wrapped by another installation meanwhile."""
        return (
            not self.why
            and not other.why
            and len(self._values) == len(other._values)
            and all(map(_is, self._values, other._values))
            and all(map(_is, map(unwrapped, self._processors), map(unwrapped, other._processors)))
            and self._addresses == other._addresses
            and self._strides == other._strides
        )

    def settings(self) -> tuple[Any, ...]:
        """What layers do beside their weights that may be another at every evaluation."""
        return (
            *(
                (
                    tuple(layer.active_adapters),
                    tuple(getattr(layer, "scaling", {}).items()),
                    bool(layer.merged),
                    bool(layer.disable_adapters),
                )
                for layer in self._adapters
            ),
            *(fuser.enabled for fuser in self._fusers),
            *map(freeu_of, self._up_blocks),
        )


def _run_at(structure: UNetStructure, depth: int | None, encodes: bool) -> Callable[[str], bool]:
    """Whether a module of the UNet, by its name, is run at ``depth``."""
    if depth is None:
        return lambda name: True
    layers = [("up_blocks", b, i) for b, i in structure.decoder[structure.num_layers - depth :]]
    if encodes:
        layers += [("down_blocks", b, i) for b, i in structure.encoder[:depth] if b >= 0]
    begin = {
        f"{blocks}.{b}.{part}."
        for blocks, b, i in layers
        for part in (f"resnets.{i}", f"attentions.{i}", "upsamplers", "downsamplers")
    }
    above = {name[: i + 1] for name in begin for i, c in enumerate(name) if c == "."}
    begin_with = tuple(begin)

    def runs(name: str) -> bool:
        name += "."
        return not name.startswith(_OUTSIDE) or name.startswith(begin_with) or name in above

    return runs


# -- settings of torch and of hgc -----------------------------------------------------------

_OPS = ("gather_blocks", "attend_and_store", "apply_map")
_FLAGS = tuple(
    getattr(torch._C, f"_get_{name}")
    for name in (
        "cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "deterministic_algorithms",
        "cublas_allow_fp16_reduced_precision_reduction",
        "cublas_allow_bf16_reduced_precision_reduction", "flash_sdp_enabled",
        "cublas_allow_fp16_accumulation", "blas_preferred_backend", "mem_efficient_sdp_enabled",
        "math_sdp_enabled", "cudnn_sdp_enabled",
    )
)  # fmt: skip
_PRECISION = torch._C._get_fp32_precision_getter


def _of_process() -> tuple[Any, ...]:
    """What decides which kernels run, beside shapes and dtypes."""
    return (
        *[flag() for flag in _FLAGS],
        _PRECISION("cuda", "matmul"),
        _PRECISION("cuda", "conv"),
        *torch._C._get_sdp_priority_order(),
        *map(get_backend, _OPS),
    )


def _is_observed() -> bool:
    """Whether somebody looks at each op, or changes what it does."""
    count = torch._C._len_torch_function_stack()
    return (
        torch.is_grad_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        # `torch.set_default_device` is one too
        or any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count))
        or bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    )


# -- networks ---------------------------------------------------------------------------------


class CapturedNetworks(Networks):
    """Networks whose functions are recorded at the second use of their kind, and then replayed.

    Args:
        unet: The UNet.
        nets: Its ControlNets.
        limit: Graphs held at once; where another is wanted, the least recently used one goes.
        say: Called with a key and a message, which is shown once for each key.
        recorder: What records.

    Attributes:
        counts: How often evaluations of networks were "replayed", "recorded", or ran eagerly,
            and why.
    """

    hands_over = True

    def __init__(
        self,
        unet: Any,
        nets: Iterable[Any],
        *,
        limit: int = LIMIT,
        say: Callable[[str, str], None],
        recorder: Recorder | None = None,
    ) -> None:
        nets = tuple(nets)
        super().__init__(unet, nets)
        self.counts: collections.Counter[str] = collections.Counter()
        self._models = {self._networks[id(model)]: model for model in (unet, *nets)}
        self._structure = UNetStructure.of(unet)
        self._limit, self._say = limit, say
        self._recorder: Recorder = CudaRecorder() if recorder is None else recorder
        self._lock = threading.Lock()
        self._runs = 0
        # of the networks at a depth, with the run that they were looked at in; and of all keys that
        # were seen, the last used last
        self._layers: dict[Any, tuple[_Layers, int]] = {}
        self._graphs: collections.OrderedDict[Any, _Graph | None] = collections.OrderedDict()
        self._refused: set[Kind] = set()

    @property
    def graphs(self) -> int:
        """How many graphs are held."""
        return sum(graph is not None for graph in self._graphs.values())

    def clear(self) -> None:
        """Free every graph."""
        with self._lock:
            self._drop(list(self._graphs))
            self._layers.clear()
            self._refused.clear()

    def begin_run(self) -> None:
        """See :class:`~hgc.models.graphs.Networks`."""
        self._runs += 1

    def run_unet(
        self, half: bool, unet: Any, structure: UNetStructure, sample: Tensor, timestep: Any,
        text: Any, wrap_text: Callable[[Any], Any] | None = None, **arguments: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """See :class:`~hgc.models.graphs.Networks`."""
        if self._is_eager(sample, text, wrap_text):
            return run_unet(unet, structure, sample, timestep, text, wrap_text, **arguments)
        timestep = _on(sample.device, timestep)
        return super().run_unet(
            half, unet, structure, sample, timestep, text, wrap_text, **arguments
        )

    def run_controlnet(
        self, half: bool, net: Any, sample: Tensor, timestep: Any, text: Any, hint: Any,
        wrap_text: Callable[[Any], Any] | None = None, **arguments: Any,
    ) -> list[Tensor]:  # fmt: skip
        """See :class:`~hgc.models.graphs.Networks`."""
        if self._is_eager(sample, text, wrap_text):
            run = control_function(net)
            return run(net, sample, timestep, text, hint, wrap_text, **arguments)
        timestep = _on(sample.device, timestep)
        return super().run_controlnet(
            half, net, sample, timestep, text, hint, wrap_text, **arguments
        )

    def _is_eager(self, sample: Tensor, text: Any, wrap_text: Callable[[Any], Any] | None) -> bool:
        """Whether an evaluation is not to be recorded, whatever its kind."""
        why = ""
        if sample.device.type != self._recorder.device_type:
            why = f"on {sample.device.type}"
        elif _is_observed():
            why = "gradients, autocast or a mode of torch"
        elif wrap_text is not None:
            spec = wrap_text(text)
            if isinstance(spec, Text) and spec.watch is not None:
                why = "attention maps are added up"  # by a run, on the host
        if why:
            self.counts[why] += 1
        return bool(why)

    def _function(self, kind: Kind, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        return functools.partial(self._evaluate, kind, make())

    def _evaluate(self, kind: Kind, function: Callable[..., Any], *args: Any) -> Any:
        if not self._lock.acquire(blocking=False):
            self.counts["another thread"] += 1
            return function(*args)
        try:
            how, result = self._by_graph(kind, function, args)
        finally:
            self._lock.release()
        self.counts[how] += 1
        return function(*args) if result is None else result

    def _by_graph(
        self, kind: Kind, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[str, Any]:
        """What was done, and what ``function`` returns where a graph computed it; else None."""
        tensors: list[Tensor] = []
        layout: list[Any] = []
        if kind in self._refused:
            return "could not be recorded", None
        if not _flatten(args, tensors, layout):
            return "an argument that is no tensor or setting", None
        layers, device = self._look(kind), tensors[0].device
        if layers.why or layers.device != device:
            return layers.why or f"weights on {layers.device}", None
        key = (
            kind, tuple(layout), tuple([_form(x) for x in tensors]), layers.settings(),
            _of_process(),
        )  # fmt: skip
        if key not in self._graphs:
            self._graphs[key] = None
            self._trim()
            return "first use", None
        graph = self._graphs[key]
        self._graphs.move_to_end(key)
        if not self._recorder.begin(device):
            return "within another capture", None
        how = "replayed"
        if graph is None:
            if not all(x.device == device and _is_dense(x) for x in tensors):
                return "a tensor on another device, or with gaps", None
            try:
                graph = _Graph(self._recorder, function, tensors, tuple(layout))
            except Exception as error:
                self._refused.add(kind)
                del self._graphs[key]
                reason = str(error).partition("\n")[0]
                self._say(
                    f"capture {kind.name}",
                    f"{kind.name} cannot be captured and runs eagerly: {type(error).__name__}: "
                    f"{reason}",
                )
                return "could not be recorded", None
            how = "recorded"
            self._graphs[key] = graph
            self._trim()
        try:
            return how, graph.run(tensors)
        except BaseException:
            self._drop([key])
            raise

    def _look(self, kind: Kind) -> _Layers:
        """The layers that ``kind`` runs. Where they are not what they were, graphs go."""
        place = kind.network, kind.depth, kind.reuses_encoder
        known, begun = self._layers.get(place) or (None, 0)
        if known is not None and (begun == self._runs if known.why else known.as_they_were()):
            return known
        runs = _run_at(self._structure, kind.depth, not kind.reuses_encoder)
        found = _Layers(self._models[kind.network], runs)
        if known is not None and not found.same(known):
            self._drop([
                key
                for key in self._graphs
                if (key[0].network, key[0].depth, key[0].reuses_encoder) == place
            ])  # fmt: skip
        self._layers[place] = found, self._runs
        return found

    def _trim(self) -> None:
        """Let the least recently used go: graphs, and keys that were seen once."""
        graphs = [key for key, graph in self._graphs.items() if graph is not None]
        keys = list(self._graphs)
        old = {*graphs[: -self._limit], *keys[: -self._limit * _SEEN]}
        if old:
            self._drop(old)

    def _drop(self, keys: Iterable[Any]) -> None:
        found = [key for key in keys if key in self._graphs]
        if any(self._graphs[key] is not None for key in found):
            self._recorder.release()
        for key in found:
            del self._graphs[key]


def _on(device: torch.device, timestep: Any) -> Any:
    """``timestep`` where it is to be copied from; as the network itself would move it."""
    is_one = isinstance(timestep, Tensor) and timestep.dim() == 0
    return timestep.to(device) if is_one and timestep.device != device else timestep
