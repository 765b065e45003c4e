"""Captured evaluations: a kind of evaluation becomes one CUDA graph, with the eager one's bits.

The first use of a kind runs eagerly, the second is recorded, and from then on the recording is
replayed: what goes in is copied into buffers that belong to the graph, what comes out is copied
into new tensors, so that no buffer of a graph is ever handed out. A graph reads weights where they
were when it was recorded: they, the layers and their settings are looked at before each replay, and
whatever is not as it was runs eagerly, and may be recorded again.

How a function is recorded is left to a :class:`~hgc.models.recorder.Recorder`.
"""

from __future__ import annotations

import collections
import functools
import operator
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from hgc.models.attention import PLAIN_PROCESSORS, unwrapped
from hgc.models.graphs import Function, GraphKey, Networks
from hgc.models.recorder import CudaRecorder, Recorder, Recording, flatten, is_dense
from hgc.models.structure import UNetStructure, adapter_state
from hgc.models.supported import PACKAGES, has_compiled_parts
from hgc.models.unet import freeu_of
from hgc_kernels import get_backend

__all__ = ["LIMIT", "CapturedNetworks"]

Tensor = torch.Tensor

# Graphs held at once, unless another number is asked for.
LIMIT = 16
# Kinds that were seen once are remembered, and not more of them than this for each graph.
_SEEN = 4


# -- what a graph reads beside its inputs ------------------------------------------------------

_get, _is = dict.get, operator.is_
_pointer, _stride = Tensor.data_ptr, Tensor.stride
# What accelerate's and diffusers' hooks leave on a model.
_MOVED = ("_hf_hook", "_diffusers_hook")


class _Layers:
    """The layers of a network that an evaluation runs, as they were when they were looked at.

    Args:
        model: The network.
        runs: Whether a module, by its name, is run.

    Attributes:
        why: Why they cannot be recorded; "" where they can.
        device: Where their weights are.
    """

    def __init__(self, model: torch.nn.Module, runs: Callable[[str], bool]) -> None:
        inside = {name: part for name, part in model.named_modules() if name and runs(name)}
        parts = [*inside.values()]
        within = {"": model, **inside}
        # where modules, weights, processors and forwards lie, and what is there
        places: list[tuple[dict[str, Any], str]] = [
            (within[parent]._modules, child)
            for name in inside
            for parent, _, child in [name.rpartition(".")]
        ]
        for part in (model, *parts):
            places += [(part._parameters, key) for key in part._parameters]
            places += [(part._buffers, key) for key in part._buffers]
        for part in parts:
            if isinstance(part, Attention):  # one with weights is a module
                own = part._modules if "processor" in part._modules else part.__dict__
                places.append((own, "processor"))
        held = [place.get(key) for place, key in places]
        self._weights = [x for x in held if isinstance(x, Tensor)]
        self._parts = [*map(unwrapped, held)]
        places += [(model.__dict__, name) for name in _MOVED]
        places += [(part.__dict__, "forward") for part in parts]
        self._places = [place for place, _ in places]
        self._keys = [key for _, key in places]
        self._values = [*map(_get, self._places, self._keys)]
        self._hooks = [h for p in parts for h in (p._forward_hooks, p._forward_pre_hooks)]
        self._adapters = [
            part
            for part in parts
            if type(part).__module__.startswith("peft.") and hasattr(part, "active_adapters")
        ]
        self._fusers = [part for part in parts if isinstance(part, GatedSelfAttentionDense)]
        self._up_blocks = [
            p for name, p in inside.items() if name.rpartition(".")[0] == "up_blocks"
        ]
        devices = {x.device for x in self._weights}
        self.device = devices.pop() if len(devices) == 1 else None
        self.why = self._why_not(model, parts)
        if not self.why:
            self._addresses = [*map(_pointer, self._weights)]
            # a weight that comes back to its address may have another memory format
            self._wide = [x for x in self._weights if x.dim() == 4]
            self._strides = [*map(_stride, self._wide)]

    def _why_not(self, model: torch.nn.Module, parts: Iterable[torch.nn.Module]) -> str:
        if any(name in model.__dict__ for name in _MOVED):
            return "the model is moved or changed by hooks"
        if has_compiled_parts(model):
            return "blocks are compiled one by one"
        for part in parts:
            if _does_more(part):
                return f"code that a graph does not hold, in {type(part).__name__}"
        if not all(type(x) in (Tensor, torch.nn.Parameter) for x in self._weights):
            return "weights of a tensor class of their own"
        if self.device is None:
            return "weights on several devices"
        return "weights on the meta device" if self.device.type == "meta" else ""

    def as_they_were(self) -> bool:
        """Whether each layer is in its place, with its weights at their addresses, and can still be
        recorded."""
        return (
            all(map(_is, map(_get, self._places, self._keys), self._values))
            and not any(self._hooks)
            and [*map(_pointer, self._weights)] == self._addresses
            and [*map(_stride, self._wide)] == self._strides
        )

    def same(self, other: _Layers) -> bool:
        """Whether a recording made of ``other`` holds for these: its processors may have been
        wrapped by another installation meanwhile."""
        return (
            not self.why
            and not other.why
            and len(self._parts) == len(other._parts)
            and all(map(_is, self._parts, other._parts))
            and self._addresses == other._addresses
            and self._strides == other._strides
        )

    def settings(self) -> tuple[Any, ...]:
        """What layers do beside their weights that may be another at every evaluation."""
        return (
            *map(adapter_state, self._adapters),
            *(fuser.enabled for fuser in self._fusers),
            *map(freeu_of, self._up_blocks),
        )


def _does_more(part: torch.nn.Module) -> bool:
    """Whether a layer may do on the host what a graph does not repeat.

    That all code in a model is known is seen to before a run (:class:`hgc.watch.trust.Trust`).
    This is what is known and still no part of a graph: hooks that move weights, classes and
    processors that the caller vouched for, processors whose settings change, and a patch that
    came in the middle of the run.
    """
    own, cls = part.__dict__, type(part)
    processor = own.get("processor", part._modules.get("processor"))
    return (
        bool(own["_forward_hooks"] or own["_forward_pre_hooks"])
        # that of its class may have been put back
        or own.get("forward") not in (None, types.MethodType(cls.forward, part))
        or cls.__module__.partition(".")[0] not in PACKAGES
        or not (processor is None or type(unwrapped(processor)) in PLAIN_PROCESSORS)
    )


def _run_at(structure: UNetStructure, depth: int | None, encodes: bool) -> Callable[[str], bool]:
    """Whether a module of the UNet, by its name, is run at ``depth``."""
    if depth is None:
        return lambda name: True
    begin = tuple(
        f"{block}.{part}."
        for block, i in structure.layers(depth, encodes=encodes)
        for part in (f"resnets.{i}", f"attentions.{i}", "upsamplers", "downsamplers")
    )

    def runs(name: str) -> bool:
        name += "."
        if not name.startswith(("down_blocks", "mid_block", "up_blocks")):
            return True
        return name.startswith(begin) or any(inside.startswith(name) for inside in begin)

    return runs


# -- settings of torch and of hgc -----------------------------------------------------------

_OPS = ("gather_blocks", "attend_and_store", "apply_map", "group_norm")
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
        # of the networks at a depth, with the run that they were looked at in
        self._layers: dict[Any, tuple[_Layers, int]] = {}
        # of each kind with all else that a graph hangs on, the last used last; None: used once
        self._graphs: collections.OrderedDict[Any, Recording | None] = collections.OrderedDict()
        self._refused: set[GraphKey] = set()

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

    def _function(self, key: GraphKey, make: Callable[[], Function]) -> Function:
        return functools.partial(self._evaluate, key, make())

    def _evaluate(
        self, key: GraphKey, function: Function, sample: Tensor, timestep: Any, *args: Any
    ) -> Any:
        if isinstance(timestep, Tensor) and timestep.dim() == 0:
            timestep = timestep.to(sample.device)  # as the network itself would move it
        args = (sample, timestep, *args)
        how, result = "another thread", None
        if self._lock.acquire(blocking=False):
            try:
                how, result = self._by_graph(key, function, args)
            finally:
                self._lock.release()
        self.counts[how] += 1
        return function(*args) if result is None else result

    def _by_graph(
        self, key: GraphKey, function: Function, args: tuple[Any, ...]
    ) -> tuple[str, Any]:
        """What was done, and what ``function`` returns where a graph computed it; else None."""
        tensors: list[Tensor] = []
        layout: list[Any] = []
        device = args[0].device
        if device.type != self._recorder.device_type:
            return f"on {device.type}", None
        if _is_observed():
            return "gradients, autocast or a mode of torch", None
        if key in self._refused:
            return "could not be recorded", None
        if not flatten(args, tensors, layout):
            return "an argument that is no tensor or setting", None
        layers = self._look(key)
        if layers.why or layers.device != device:
            return layers.why or f"weights on {layers.device}", None
        case = (
            key, tuple(layout), tuple([(x.shape, x.stride(), x.dtype, x.device) for x in tensors]),
            layers.settings(), _of_process(),
        )  # fmt: skip
        if case not in self._graphs:
            self._graphs[case] = None
            self._trim()
            return "first use", None
        graph = self._graphs[case]
        self._graphs.move_to_end(case)
        if not self._recorder.begin(device):
            return "within another capture", None
        how = "replayed"
        if graph is None:
            if not all(x.device == device and is_dense(x) for x in tensors):
                return "a tensor on another device, or with gaps", None
            try:
                graph = Recording(self._recorder, function, tensors, tuple(layout))
            except Exception as error:
                self._refused.add(key)
                del self._graphs[case]
                reason = str(error).partition("\n")[0]
                self._say(
                    f"capture {key.name}",
                    f"{key.name} cannot be captured and runs eagerly: {type(error).__name__}: "
                    f"{reason}",
                )
                return "could not be recorded", None
            how = "recorded"
            self._graphs[case] = graph
            self._trim()
        try:
            return how, graph.run(tensors)
        except BaseException:
            self._drop([case])
            raise

    def _look(self, key: GraphKey) -> _Layers:
        """The layers that ``key`` runs. Where they are not what they were, graphs go."""
        place = key.network, key.depth, key.reuses_encoder
        known, begun = self._layers.get(place) or (None, 0)
        if known is not None and (begun == self._runs if known.why else known.as_they_were()):
            return known
        runs = _run_at(self._structure, key.depth, not key.reuses_encoder)
        found = _Layers(self._models[key.network], runs)
        if known is not None and not found.same(known):
            self._drop([
                case
                for case in self._graphs
                if (case[0].network, case[0].depth, case[0].reuses_encoder) == place
            ])  # fmt: skip
        self._layers[place] = found, self._runs
        return found

    def _trim(self) -> None:
        """Let the least recently used go: graphs, and kinds that were used once."""
        graphs = [case for case, graph in self._graphs.items() if graph is not None]
        old = {*graphs[: -self._limit], *list(self._graphs)[: -self._limit * _SEEN]}
        if old:
            self._drop(old)

    def _drop(self, cases: Iterable[Any]) -> None:
        found = [case for case in cases if case in self._graphs]
        if any(self._graphs[case] is not None for case in found):
            self._recorder.release()
        for case in found:
            del self._graphs[case]
