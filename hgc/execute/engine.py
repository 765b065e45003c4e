"""Installing the cache on a UNet and its ControlNets, and running evaluations by the plan."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import operator
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

from hgc.models import attention as prompt_grain
from hgc.models.captured import LIMIT, CapturedNetworks
from hgc.models.compiled import CompiledNetworks
from hgc.models.controlnet import control_function, embed_condition, scale_residuals
from hgc.models.graphs import Networks
from hgc.models.structure import UNetStructure
from hgc.models.supported import check_unet, controlnets, has_compiled_parts, untested
from hgc.models.unet import UP_BLOCKS, Residuals, freeu_of, run_unet
from hgc.planning.config import Config, StepPlan, model_name
from hgc.run.adaptive import AdaptiveSchedule
from hgc.run.cache import Cache, conditional_half
from hgc.run.noise import NoiseLevels, to_host
from hgc.run.residuals import Promise, PromiseSet, Terms, Zeros, fresh
from hgc.run.run import (
    ControlSlot,
    Evaluation,
    Held,
    Position,
    Run,
    Runs,
    Schedules,
    Signature,
    _is_part,
    position_of,
    scheduler_of,
)
from hgc.watch.trust import Trust

__all__ = ["HgcWarning", "Installation", "install", "uninstall"]

Tensor = torch.Tensor
logger = logging.getLogger(__name__)


class HgcWarning(UserWarning):
    """hgc computes something in full that its plan would have reused, or a calibrated plan is used
    on something it was not measured on; the message says why."""


_MARK = "_hgc_installation"

# torch's own namespaces are large: a look-up in one misses the processor's caches
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_exporting = torch.compiler.is_exporting
_grad_enabled = torch.is_grad_enabled


class _Forward:
    """Stands in a module's ``forward`` slot while hgc is installed."""

    def __init__(self, module: torch.nn.Module, slot: str, run: Callable[..., Any]) -> None:
        self.module = module
        self.slot = slot
        self.had_own = slot in module.__dict__
        self._replaced = getattr(module, slot)
        self._run = run
        functools.update_wrapper(self, self._replaced)

    @property
    def original(self) -> Callable[..., Any]:
        """What this stands in the place of: where that is the class's, what it is now."""
        return self._replaced if self.had_own else _class_forward(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_dynamo_compiling():
            _refuse_tracing(type(self.module).__name__)
        if _is_exporting():
            raise TypeError(
                f"{type(self.module).__name__}: hgc is installed on it, and an export would trace "
                "its bookkeeping: uninstall hgc first"
            )
        return self._run(self.module, *args, **kwargs)

    @property
    def __code__(self) -> Any:
        # torch.export reads it before it calls
        return self.original.__code__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a copied model is an uninstalled one
        return _class_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        return (_class_forward, (self.module,))

    def restore(self) -> None:
        """Put back what was there, in whichever slot now holds this object."""
        for slot in dict.fromkeys((self.slot, "forward", "_old_forward")):
            if self.module.__dict__.get(slot) is self:
                if slot == self.slot and self.had_own:
                    setattr(self.module, slot, self.original)
                elif slot == "forward" and self.slot == "_old_forward":
                    # the hook was removed meanwhile and moved us here: the class has the original
                    delattr(self.module, slot)
                elif slot == "_old_forward":
                    setattr(self.module, slot, self.original)
                else:
                    delattr(self.module, slot)
                return
        raise RuntimeError(
            f"{type(self.module).__name__}.forward was replaced by something else after hgc was "
            "installed: undo that first, then uninstall hgc"
        )


_TRACED = (
    "hgc is installed on a model that was compiled afterwards, which would trace its bookkeeping: "
    "call .compile() of the Installation that hgc.install returned instead"
)


@functools.partial(torch.compiler.disable, reason=_TRACED)  # called from the graph: not traced
def _refuse_tracing(name: str) -> None:
    raise TypeError(f"{name}: {_TRACED}")


def _class_forward(module: torch.nn.Module) -> Any:
    return types.MethodType(type(module).forward, module)


class _EndOfCall:
    """``_reset_stateful_cache``: diffusers calls it at the end of a pipeline call."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    def __call__(self) -> None:
        last = self._installation._runs.last
        if last is not None:
            last.finished = True
            last.free()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return (_do_nothing, ())


class _Noticed:
    """Stands for a method of a model that writes to its weights where no tensor's version shows
    it: peft fuses a LoRA, and swaps one for another (``hotswap=True``), through ``.data``; and it
    may be unloaded before the next evaluation. And for ``set_attn_processor``: an evaluation looks
    at the processors of the layers that it computes, and after this at all."""

    METHODS = ("fuse_lora", "unfuse_lora", "load_lora_adapter", "set_attn_processor")

    def __init__(self, installation: Installation, module: torch.nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self._installation = installation
        functools.update_wrapper(self, getattr(module, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _class_method(self.module, self.name)
        if self.name != "set_attn_processor":
            self._installation._rewritten += 1
            return call(*args, **kwargs)
        try:
            return call(*args, **kwargs)
        finally:
            self._installation._processors_set = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _class_method(memo.get(id(self.module), self.module), self.name)

    def __reduce__(self) -> Any:
        return (_class_method, (self.module, self.name))


def _class_method(module: torch.nn.Module, name: str) -> Any:
    return types.MethodType(getattr(type(module), name), module)


def _nothing() -> None:
    """Stands for :class:`_EndOfCall` in a copied model."""


def _do_nothing() -> Callable[[], None]:
    return _nothing


class _Mark:
    """Says on a module which installation holds it; not copied with it."""

    def __init__(self, installation: Installation) -> None:
        self.installation: Installation | None = installation

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return (type(None), ())


def _lora_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    if model.__dict__.get("peft_config") is None:
        return []
    # every kind of peft's adapters, not LoRA alone; the model has a method of that name
    return [m for m in model.modules() if m is not model and hasattr(m, "active_adapters")]


def _lora_state(model: torch.nn.Module, layers: list[Any]) -> tuple[Any, ...]:
    """What LoRA adds to ``model`` now: adapters, which are active, their scales."""
    config: Any = model.__dict__.get("peft_config")
    if config is None:
        return ()
    return (
        # the configs themselves: another adapter may come under the same name
        tuple(config),
        tuple(config.values()),
        tuple(
            (
                tuple(layer.active_adapters),
                tuple(getattr(layer, "scaling", {}).items()),
                bool(layer.merged),
                bool(layer.disable_adapters),
            )
            for layer in layers
        ),
    )


# Looked up in every evaluation, without a step of the interpreter for each.
_to_k, _to_v, _weight = map(operator.methodcaller, ("get",) * 3, ("to_k", "to_v", "weight"))
_processor = operator.itemgetter("processor")
_version = torch.Tensor._version.__get__  # type: ignore[attr-defined]
_is, _get = operator.is_, dict.get


def _all_are(found: Iterable[Any], known: list[Any]) -> bool:
    return all(map(operator.is_, found, known))


class _Weights:
    """The weights that make keys and values in a model, as they were when they were last looked at.

    They are looked at in every evaluation, and modules are slow to look things up in, so where the
    weights are is kept too. ``to_k`` and ``to_v`` of a cross-attention are neighbours in all lists.

    Attributes:
        generation: Goes up where other weights are found.
        total: Sum of how often each was written to.
    """

    def __init__(
        self,
        attentions: list[tuple[Any, str]],
        computed: Callable[[Any], Sequence[int]],
        before: _Weights | None,
    ) -> None:
        self._computed = computed
        self._modules = [attn._modules for attn, _ in attentions]
        self._layers = [get(parts) for parts in self._modules for get in (_to_k, _to_v)]
        # `_parameters` of the layers, or of the layer inside where PEFT wrapped it
        self._holders: list[dict[str, Any]] = []
        for layer in self._layers:
            while layer is not None and "base_layer" in layer._modules:
                layer = layer._modules["base_layer"]
            self._holders.append({} if layer is None else layer._parameters)
        self._found = [*map(_weight, self._holders)]
        # -1: of one whose writes are not counted
        self._versions = [
            -1 if w is None or w.is_meta or w.is_inference() else w._version for w in self._found
        ]
        self.total = sum(version for version in self._versions if version >= 0)
        self.generation = 0
        # offloaded layer by layer, a weight is another object at every evaluation
        self._here = [w for w in self._found if w is not None and not w.is_meta]
        if before is not None:
            same = len(self._here) == len(before._here) and _all_are(self._here, before._here)
            self.generation = before.generation + (not same)
        self._parts: dict[Any, tuple[list[Any], ...]] = {}

    def same(self, depth: Any) -> bool:
        """Whether those in the layers that are computed at ``depth`` are what they were."""
        modules, holders, known, counted, versions = self._at(depth)
        found = itertools.chain(map(_to_k, modules), map(_to_v, modules), map(_weight, holders))
        return _all_are(found, known) and [*map(_version, counted)] == versions

    def places(self, depth: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Where they are: a dictionary and a key in it each, and what is there."""
        modules, holders, known, _, _ = self._at(depth)
        kinds = ["to_k"] * len(modules) + ["to_v"] * len(modules) + ["weight"] * len(holders)
        return zip([*modules, *modules, *holders], kinds, known, strict=True)

    def versions(self, depth: Any) -> tuple[list[Any], list[int]]:
        """Those whose writes are counted, and how often each was written to."""
        return self._at(depth)[3:]  # type: ignore[return-value]

    def _at(self, depth: Any) -> tuple[list[Any], ...]:
        if depth not in self._parts:
            self._parts[depth] = self._part(self._computed(depth))
        return self._parts[depth]

    def _part(self, which: Sequence[int]) -> tuple[list[Any], ...]:
        at = [j for i in which for j in (2 * i, 2 * i + 1)]
        counted = [j for j in at if self._versions[j] >= 0]
        return (
            [self._modules[i] for i in which],
            [self._holders[j] for j in at],
            [
                *(self._layers[2 * i] for i in which),
                *(self._layers[2 * i + 1] for i in which),
                *(self._found[j] for j in at),
            ],
            [self._found[j] for j in counted],
            [self._versions[j] for j in counted],
        )


class _Seen:
    """What an evaluation that computes certain layers finds in them, to be compared in one pass.

    Attributes:
        epoch: Of the installation, when it was seen.
    """

    __slots__ = ("_counted", "_dicts", "_keys", "_values", "_versions", "epoch")

    def __init__(
        self,
        epoch: int,
        places: list[tuple[dict[str, Any], str, Any]],
        counted: list[Any],
        versions: list[int],
    ) -> None:
        self.epoch = epoch
        self._dicts = [each for each, _, _ in places]
        self._keys = [key for _, key, _ in places]
        self._values = [value for _, _, value in places]
        self._counted, self._versions = counted, versions

    def is_same(self) -> bool:
        """Whether everything is where it was, none of the weights written to."""
        return (
            all(map(_is, map(_get, self._dicts, self._keys), self._values))
            and [*map(_version, self._counted)] == self._versions
        )


_MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))


def _settings(processor: Any) -> dict[str, Any]:
    """What is set on an attention processor, as it is now."""
    return {
        name: [*value] if isinstance(value, list) else value
        for name, value in getattr(processor, "__dict__", {}).items()
        if name not in _MODULE_ATTRIBUTES
    }


def _state(module: torch.nn.Module) -> tuple[Any, ...]:
    """What the output of ``module`` depends on beside its input: weights and settings. A weight
    that is offloaded is another object at every evaluation, and stands for none."""
    found: list[Any] = []
    for each in module.modules():
        weights = each._parameters.values()
        found += [None if w is None or w.is_meta else w for w in weights]
        found += [value for name, value in vars(each).items() if name[0] != "_"]
    return tuple(found)


_any_autocast = torch._C._is_any_autocast_enabled


def _autocast(device: torch.device) -> torch.dtype | None:
    """What ``torch.autocast`` computes in now."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _may_be_kept(source: Tensor) -> bool:
    """Whether what is computed from ``source`` may stand for the run: a write to it would be seen,
    and no graph of autograd hangs on it."""
    return not source.is_inference() and not _grad_enabled()


def _take_lora_scale(arguments: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """``arguments`` without the LoRA scale, which diffusers' forwards take out of
    ``cross_attention_kwargs``."""
    cross = arguments["cross_attention_kwargs"]
    if cross is None:
        return arguments, 1.0
    rest = dict(cross)
    scale = rest.pop("scale", 1.0)
    return {**arguments, "cross_attention_kwargs": rest}, scale


def _scales_lora(net: torch.nn.Module) -> bool:
    """Whether the forward of a ControlNet scales its LoRA layers: it is then in a decorator. Those
    of ControlNet-Union, and of diffusers before 0.37, hand the scale on to the attentions."""
    return hasattr(type(net).forward, "__wrapped__")


def _lora_scaled(model: torch.nn.Module, scale: float) -> contextlib.AbstractContextManager[None]:
    """What diffusers' ``apply_lora_scale`` does around a forward."""
    if not USE_PEFT_BACKEND or scale == 1.0:
        return _NO_SCALE
    return _scaled_lora(model, scale)


_NO_SCALE = contextlib.nullcontext()


@contextlib.contextmanager
def _scaled_lora(model: torch.nn.Module, scale: float) -> Iterator[None]:
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)


def _cut(value: Any, batch: int) -> Any:
    """The conditional half of ``value``, where it has the rows of the batch."""
    if value is None:
        return None
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
        return conditional_half(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(v, batch) for v in value)
    if isinstance(value, dict):
        return {k: None if v is None else _cut(v, batch) for k, v in value.items()}
    return value


# Arguments of the networks of which none was given; not to be written to.
_NOTHING_GIVEN: dict[str, Any] = dict.fromkeys(
    (
        "class_labels", "timestep_cond", "attention_mask", "cross_attention_kwargs",
        "added_cond_kwargs", "encoder_attention_mask",
    )
)  # fmt: skip
_NOTHING_GIVEN_TO_CONTROL: dict[str, Any] = dict.fromkeys(
    (
        "class_labels", "timestep_cond", "attention_mask", "added_cond_kwargs",
        "cross_attention_kwargs",
    )
)  # fmt: skip
_THE_ONE = [0]  # the only slot of a run

_KNOWN_BATCHED = {"text_embeds", "time_ids", "image_embeds"}
_SETTINGS = (bool, int, float, str, type(None))


def _can_be_halved(arguments: dict[str, Any], text: Any, batch: int) -> bool:
    """Whether every batched argument is one whose rows are known to be samples."""
    added, cross = arguments["added_cond_kwargs"], arguments["cross_attention_kwargs"]
    if added and set(added) - _KNOWN_BATCHED:
        return False
    if cross and not all(isinstance(v, _SETTINGS) for v in cross.values()):
        return False
    return isinstance(text, Tensor) and text.shape[0] == batch


@dataclasses.dataclass(slots=True)
class _ControlCall:
    """One call of a ControlNet.

    Attributes:
        cond: ``controlnet_cond`` as it was given.
        scale: That of the residuals.
        arguments: The others that the network's function takes, batched ones among them.
    """

    net: ControlNetModel | ControlNetUnionModel
    sample: Tensor
    timestep: Tensor | float | int
    text: Tensor
    cond: Any
    scale: float | Tensor
    guess_mode: bool
    arguments: dict[str, Any]

    @property
    def asked(self) -> dict[str, Any]:
        """All that diffusers' forward was given beside the first four and ``arguments``."""
        return {"conditioning_scale": self.scale, "guess_mode": self.guess_mode}

    @property
    def conditions(self) -> Sequence[Tensor]:
        """The condition images, [B, C, H, W] each."""
        return (self.cond,)

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments of the network's function that have no row a sample."""
        return {}

    def settings(self) -> tuple[Any, ...]:
        """All that residuals depend on beside the sample, the timestep, text and condition."""
        if self.arguments is _NOTHING_GIVEN_TO_CONTROL:
            return self.scale, self.guess_mode
        return (*self.asked.values(), *self.arguments.values())

    def by(self, forward: Callable[..., Any], return_dict: bool) -> Any:
        """What diffusers' ``forward`` makes of it."""
        return forward(
            self.sample, self.timestep, encoder_hidden_states=self.text, controlnet_cond=self.cond,
            return_dict=return_dict, **self.arguments, **self.asked,
        )  # fmt: skip


@dataclasses.dataclass(slots=True)
class _UnionCall(_ControlCall):
    """One call of a ControlNet-Union: several conditions, and of which kind each is."""

    given: dict[str, Any]
    weights: list[float] | None

    @property
    def asked(self) -> dict[str, Any]:
        return self.given

    @property
    def conditions(self) -> Sequence[Tensor]:
        return list(self.cond)

    @property
    def constants(self) -> dict[str, Any]:
        return {"control_type_idx": self.given["control_type_idx"], "weights": self.weights}


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.runs = Runs()


class Installation:
    """The cache on one UNet and its ControlNets. Made by :func:`install`.

    A context manager: leaving the block uninstalls. One installation serves any number of threads,
    each with pipelines of its own on the shared models.
    """

    # more attributes than Python looks up quickly in a dictionary
    __slots__ = (
        "__weakref__", "_active", "_assume_pair", "_at_depth", "_attentions", "_blocks_compiled",
        "_by_rule", "_carries_text", "_compiled", "_config", "_cross_attentions", "_epoch",
        "_epochs", "_forwards", "_fusers", "_layers", "_lora", "_of_thread", "_placed", "_placing",
        "_processors", "_processors_set", "_prompt_grain", "_rewritten", "_rows_are_samples",
        "_said", "_scheduler", "_schedules", "_seen", "_set_processors", "_structure", "_trust",
        "_untested", "_up_blocks", "_weights", "_without_lora", "controlnets", "unet",
    )  # fmt: skip

    def __init__(
        self,
        unet: UNet2DConditionModel,
        nets: tuple[ControlNetModel | ControlNetUnionModel, ...],
        config: Config,
        *,
        scheduler: Callable[[], Any] = lambda: None,
        assume_pair: bool | None = None,
        trust: tuple[Any, ...] = (),
    ) -> None:
        self.unet = unet
        self.controlnets = nets
        self._config = config
        self._structure = UNetStructure.of(unet)
        deepest = max(self._config.depths, default=0)
        if deepest > self._structure.num_layers:
            raise ValueError(
                f"config.depth must be at most {self._structure.num_layers}, the number of decoder "
                f"layers of this UNet; got {deepest}"
            )
        self._trust = Trust((unet, *nets), self._in_part(), trust)
        self._schedules = Schedules(config, self._structure.num_layers)
        # of the rule, where the plan is one of fitted steps with a rule
        rule = None if config.steps is None else config.rule
        self._by_rule = None if rule is None else Schedules(rule, self._structure.num_layers)
        self._scheduler = scheduler  # of the pipeline, as it is now
        self._assume_pair = assume_pair
        self._of_thread = _OfThread()
        self._forwards: list[_Forward] = []
        self._processors: list[tuple[torch.nn.Module, str, Any, Any]] = []
        self._said: set[str] = set()
        self._lora: dict[int, tuple[Any, list[torch.nn.Module]]] = {}
        self._without_lora = False  # as far as known, nor processors with settings
        self._rewritten = 0  # how often a LoRA was fused or unfused
        self._set_processors: list[Any] = []  # those that have settings
        self._weights: dict[int, _Weights] = {}
        self._cross_attentions = {
            id(model): [(attn, name) for name, attn in prompt_grain.cross_attentions(model).items()]
            for model in (unet, *nets)
        }
        self._attentions = {
            id(model): [(n, m) for n, m in model.named_modules() if isinstance(m, Attention)]
            for model in (unet, *nets)
        }
        # of all attentions of a model, and of those computed at a depth, where their processors are
        # and what they must be
        self._placed: dict[int, dict[Any, tuple[list[dict[str, Any]], list[Any]]]] = {}
        self._processors_set = False  # some were, by diffusers' method
        self._placing = 0  # goes up where others are in place
        # what `_look` saw of a model at a depth, and which state that was of all it looks at
        self._seen: dict[tuple[int, Any], _Seen] = {}
        self._epochs = itertools.count(1)
        self._epoch = 0
        self._blocks_compiled = False
        self._fusers = [m for m in unet.modules() if isinstance(m, GatedSelfAttentionDense)]
        self._carries_text = all(prompt_grain.carries_text(model) for model in (unet, *nets))
        self._untested = untested()
        self._active = "diffusers" not in self._untested
        self._prompt_grain = True
        self._rows_are_samples = True
        self._compiled: Networks | None = None  # or captured
        self._layers: dict[int, frozenset[str]] = {}
        self._at_depth: dict[int, list[int]] = {}
        self._up_blocks: dict[Any, list[str]] = {}

    @property
    def _runs(self) -> Runs:
        """Those of the calling thread."""
        return self._of_thread.runs

    # -- public -----------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The configuration installed."""
        return self._config

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._forwards:
            self.uninstall()

    def reset(self) -> None:
        """Forget the calling thread's runs, and all captured graphs; the next evaluation starts a
        new run."""
        self._runs.clear()
        if self._compiled is not None:
            self._compiled.clear()

    def uninstall(self) -> None:
        """Give the models back exactly as they were found."""
        if not self._forwards:
            raise RuntimeError("hgc is not installed on these models")
        for forward in self._forwards:
            forward.restore()
        self._forwards.clear()
        self._restore_processors()
        for module in (self.unet, *self.controlnets):
            module.__dict__.pop(_MARK, None)
            for name in _Noticed.METHODS:
                if isinstance(module.__dict__.get(name), _Noticed):
                    delattr(module, name)
        self.unet.__dict__.pop("_reset_stateful_cache", None)
        last = self._runs.last
        self.reset()
        self._runs.last = last  # freed; its report stays
        self._compiled = None

    def compile(self, **options: Any) -> Installation:
        """Compile what the evaluations compute, of the UNet and of each ControlNet.

        Each kind of evaluation (a network at a depth, with the whole batch or its conditional half)
        is compiled at its first use, as one graph for each size; what decides and caches stays
        outside. ``dynamic=True`` makes one graph serve all sizes. Calling it again starts anew,
        with the new options.

        Args:
            options: For ``torch.compile``: ``mode``, ``dynamic``, ``backend``, ``options``.
                ``fullgraph`` is True unless given. ``mode="reduce-overhead"`` makes CUDA graphs.

        Returns:
            The installation itself.

        Raises:
            RuntimeError: hgc is not installed any more, or blocks of a model are compiled one by
                one already.
            TypeError: ``options`` names something that ``torch.compile`` does not take.
        """
        self._check_stand_in("compile")
        self._stand_in(CompiledNetworks(self.unet, self.controlnets, options))
        return self

    def capture(self, *, graphs: int = LIMIT) -> Installation:
        """Make each kind of evaluation one CUDA graph, with the bits of the eager evaluation.

        A kind is a network at a depth, with the whole batch or its conditional half, at one size,
        with one set of arguments that are no tensors (a LoRA's scale). Its first use runs eagerly,
        its second is captured, and the graph replayed from then on. What is not of a captured kind
        runs eagerly. Graphs share their memory: one thread at a time replays, others run eagerly.
        They go where a weight or a layer is replaced, with :meth:`reset` and with
        :meth:`uninstall`. Calling it again starts anew.

        Args:
            graphs: Held at most; where another is wanted, the least recently used one goes.

        Returns:
            The installation itself.

        Raises:
            RuntimeError: hgc is not installed any more, torch sees no CUDA device, or blocks of a
                model are compiled one by one already.
            ValueError: ``graphs`` is less than 1.
        """
        self._check_stand_in("capture")
        if graphs < 1:
            raise ValueError(f"graphs must be at least 1; got {graphs}")
        if not torch.cuda.is_available():
            raise RuntimeError("Installation.capture makes CUDA graphs, and torch sees no device")
        self._stand_in(CapturedNetworks(self.unet, self.controlnets, limit=graphs, say=self._say))
        return self

    def _check_stand_in(self, verb: str) -> None:
        """Raise where :meth:`compile` or :meth:`capture` cannot do what it says."""
        if not self._forwards:
            raise RuntimeError("hgc is not installed on these models")
        for model in self._networks():
            if has_compiled_parts(model):
                raise RuntimeError(
                    f"blocks of the {type(model).__name__} are compiled one by one already "
                    f"(compile_repeated_blocks): use that or Installation.{verb}, not both"
                )
        if not self._active:
            self._say(
                verb,
                f"Installation.{verb} does nothing with this release of diffusers, since hgc runs "
                f"no evaluation itself: uninstall hgc and {verb} the models",
            )

    def _stand_in(self, networks: Networks) -> None:
        if self._compiled is not None:
            self._compiled.clear()
        self._compiled = networks

    @property
    def peak_bytes(self) -> int:
        """The most bytes the calling thread's last run held at once; 0 before its first run."""
        run = self._runs.last
        return 0 if run is None else run.cache.peak_bytes

    def maps(self) -> Tensor:
        """Where each token of the prompt looked in the calling thread's last run.

        The cross-attention maps of the UNet, averaged over heads, layers and key evaluations: what
        the first prompt of the run asked for, where it was changed later. Held until the thread's
        next run ends.

        Returns:
            [images, tokens, h, w], float32, on the run's device, at the finest resolution with
            cross-attention; the tokens of a position sum to 1. Under classifier-free guidance the
            conditional half; of any other batch all rows. See :func:`hgc.plot_maps`.

        Raises:
            RuntimeError: this thread has made no run yet, or none that kept maps.
        """
        run = self._runs.last
        if run is None:
            raise RuntimeError("no run whose maps to show: call the pipeline first, in this thread")
        if not self._config.fresh_values:
            raise RuntimeError(
                "no maps were kept: install with Config(fresh_values=True), for example "
                'config=hgc.Config.preset("balanced").replace(fresh_values=True)'
            )
        maps = run.attention_maps()
        if maps is None:
            raise RuntimeError(
                "no maps were kept: the run failed, max_cache_bytes left no room for them, or its "
                "cross-attention has processors, masks or options that hgc leaves to diffusers"
            )
        return maps

    def report(self) -> Any:
        """What the calling thread's last run did: a :class:`hgc.Report`.

        Raises RuntimeError where this thread has made no run yet.
        """
        from hgc.report.report import Report

        run = self._runs.last
        if run is None or not run.report:
            if "timestep" in self._said or "text" in self._said:
                raise RuntimeError(
                    "no run to report on: evaluations of no run were computed by diffusers, as a "
                    "warning said"
                )
            raise RuntimeError("no run to report on: call the pipeline first, in this thread")
        return Report.of(self, run)

    # -- installing -------------------------------------------------------------------------

    def _install(self) -> None:
        for name, what in self._untested.items():
            self._say(name, what)
        for module in (self.unet, *self.controlnets):
            setattr(module, _MARK, _Mark(self))
            slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
            run = self._call_of(module)
            forward = _Forward(module, slot, run)
            self._forwards.append(forward)
            setattr(module, slot, forward)
            for name in _Noticed.METHODS:
                if hasattr(type(module), name) and name not in module.__dict__:
                    setattr(module, name, _Noticed(self, module, name))
        self.unet._reset_stateful_cache = _EndOfCall(self)
        self._adopt_processors()

    def _function(self, module: Any, half: bool) -> Callable[..., Any]:
        """What computes an evaluation of ``module``: the pure function or its compiled stand-in."""
        if self._compiled is not None:
            name = "run_unet" if module is self.unet else "run_controlnet"
            return functools.partial(getattr(self._compiled, name), half)
        return run_unet if module is self.unet else control_function(module)

    def _call_of(self, module: torch.nn.Module) -> Callable[..., Any]:
        if module is self.unet:
            return self._unet_call
        if isinstance(module, ControlNetUnionModel):
            return self._union_call
        return self._control_call

    def _networks(self) -> list[Any]:
        return [self.unet, *self.controlnets]

    def _adopt_processors(self) -> None:
        """Wrap the processors of all cross-attentions, as they are now, and look at all."""
        # A block compiled by itself gets the text as it is: one graph serves all such blocks.
        compiled = any(has_compiled_parts(model) for model in self._networks())
        known = self._placed and compiled == self._blocks_compiled
        self._processors_set = False
        if not known or not all(map(self._processors_in_place, self._networks())):
            self._blocks_compiled = compiled
            self._wrap_processors()
            for model, attentions in self._attentions.items():
                # a processor with weights is a submodule
                holders = [
                    attn._modules if "processor" in attn._modules else attn.__dict__
                    for _, attn in attentions
                ]
                self._placed[model] = {"full": (holders, [*map(_processor, holders)])}
            self._placing += 1
            self._epoch = next(self._epochs)
        processors = [each for placed in self._placed.values() for each in placed["full"][1]]
        self._rows_are_samples = all(map(self._trust.treats_rows_alike, processors))
        inner = map(prompt_grain.unwrapped, processors)
        self._set_processors = [processor for processor in inner if _settings(processor)]
        if self._set_processors:
            self._without_lora = False

    def _wrap_processors(self) -> None:
        found = [pair for model in self._networks() for pair in self._cross_attentions[id(model)]]
        compiled = self._blocks_compiled
        current = {id(attn): wrapped for attn, _, _, wrapped in self._processors}
        if (
            not compiled
            and len(found) == len(self._processors)
            and all(current.get(id(attn)) is attn.processor for attn, _ in found)
        ):
            return
        self._restore_processors()
        # A processor with weights is a submodule; wrapping it would take them out of the model.
        weighty = any(isinstance(attn.processor, torch.nn.Module) for attn, _ in found)
        self._prompt_grain = (
            self._carries_text
            and not weighty
            and not compiled
            and not self._trust.vouches_around_attention()
        )
        if not self._prompt_grain and not weighty:
            return
        if not all(self._trust.knows(attn.processor) for attn, _ in found):
            return  # runs are left to diffusers
        if weighty:
            self._say(
                "processors",
                "cross-attention processors with weights of their own (an IP-Adapter) are in "
                "place: cross-attention is computed, everything else follows the plan",
            )
            return
        for attn, name in found:
            original = attn.processor
            wrapped = prompt_grain.wrap(name, original)
            self._processors.append((attn, name, original, wrapped))
            attn.processor = wrapped

    def _restore_processors(self) -> None:
        # a user may have saved a wrapped processor and put it back: unwrap whatever is there
        for model in self._networks():
            for module in model.modules():
                processor = getattr(module, "processor", None)
                original = prompt_grain.unwrapped(processor)
                if original is not processor:
                    module.processor = original
        self._processors.clear()
        self._placed = {}

    def _say(self, key: str, message: str) -> None:
        """Warn once an installation."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(message, HgcWarning, stacklevel=2)

    def _check_calibration(self) -> None:
        """Warn where the configuration was calibrated on another model, and follow its rule."""
        known = self._config.calibration
        if known is not None and model_name(self.unet) != known.model:
            self._say(
                "calibration of the model",
                f"{self._config.name!r} was calibrated on {known.model}; this model is "
                f"{model_name(self.unet)}. {self._instead()}",
            )
            if self._by_rule is not None:
                self._schedules = self._by_rule

    def _instead(self) -> str:
        """What is done where fitted steps do not apply."""
        if self._by_rule is None:
            return "Its distance is not measured here: run hgc.calibrate"
        return "It follows key_steps and the fields after it instead of steps: run hgc.calibrate"

    def _check_length(self, run: Run) -> None:
        """Warn where a run is not the one that the configuration was made for."""
        config, total = self._config, run.position.total
        known = config.calibration
        if total == config.num_evaluations:
            if known is not None and self._by_another_scheduler(run, known.scheduler):
                return
            if known is not None and len(known.timesteps) == total:
                timesteps = run.position.timestep
                assert timesteps is not None
                run.timesteps = to_host(timesteps.as_strided((total,), (1,), 0))
                self._check_timesteps(run)
            return
        made = "is"
        if known is not None:
            made = f"was calibrated at {known.steps} steps of {known.scheduler}, which is"
        rule = ""
        if config.steps is not None and config.key_steps is not None:
            rule = ", and follows key_steps and the fields after it instead of steps"
        if rule or known is not None:
            self._say(
                "length",
                f"{config.name!r} {made} for {config.num_evaluations} evaluations; this run has "
                f"{total}{rule}",
            )

    def _by_another_scheduler(self, run: Run, known: str) -> bool:
        """Whether the run's scheduler is of another class than ``known``: says so, and follows the
        rule. Schedulers may share their timesteps and still need other coefficients."""
        scheduler = scheduler_of(run.position)
        if scheduler is None or type(scheduler).__name__ == known:
            return False
        self._say(
            "scheduler",
            f"{self._config.name!r} was calibrated with {known}; this run's scheduler is "
            f"{type(scheduler).__name__}. {self._instead()}",
        )
        if self._by_rule is not None:
            run.follow(self._by_rule)
        return True

    def _check_timesteps(self, run: Run) -> None:
        """Warn where a run's timesteps are not those that the configuration was calibrated at,
        another scheduler's or spaced otherwise, and follow its rule.

        On a GPU this is found at the second evaluation: the copy was asked for before the first
        one, most of which the device has still to do, so that waiting for the copy does not leave
        it idle."""
        assert run.timesteps is not None
        values, event = run.timesteps
        if event is not None:
            if not run.report:
                return
            event.synchronize()
        run.timesteps = None
        known = self._config.calibration
        assert known is not None
        if any(abs(a - b) > 0.5 for a, b in zip(values.tolist(), known.timesteps, strict=True)):
            self._say(
                "timesteps",
                f"{self._config.name!r} was calibrated at other timesteps, those of "
                f"{known.scheduler}: from {known.timesteps[0]:g} to {known.timesteps[-1]:g}; this "
                f"run's are from {float(values[0]):g} to {float(values[-1]):g}. {self._instead()}",
            )
            if self._by_rule is not None:
                run.follow(self._by_rule)

    # -- runs -------------------------------------------------------------------------------

    def _run_of(
        self, runs: Runs, text: Tensor, position: Position, batch: int, cond: Any = None
    ) -> tuple[Run, Evaluation]:
        """The run that a call of a model belongs to, with its evaluation begun."""
        run = runs.last
        known = run is not None and run.text.value is text and run.text.is_(text)
        begun = known and run is not None and run.now is not None and run.position is position
        if not begun and (run is None or not known or runs.short or not run.advance(position)):
            if run is None or not known or not run.is_next(position):
                run, known = runs.find(text, position, batch, cond), False
            run = self._begin(runs, run, text, position)
            # the run that was found may be one with another text
            known = known or run.text.is_(text) or _is_part(text, run.text)
        assert run is not None and run.now is not None
        if self._processors_set:
            self._adopt_processors()
        if run.placing != self._placing or run.broken is not None:
            self._obey_processors(run)
        if not known:
            # a ControlNet may have a text of its own
            slots = [] if cond is None else [slot for slot in run.slots if slot.cond.is_(cond)]
            if not any(slot.text is not None and slot.text.is_(text) for slot in slots):
                if not _is_part(run.text.value, Held(text)):
                    self._text_changed(run, run.now, text)
                run.text = Held(text)
        return run, run.now

    def _obey_processors(self, run: Run) -> None:
        """Go on with the processors that are in place, and say where a run was given up."""
        if run.placing != self._placing:
            # by this run or by another on the same models
            run.placing = self._placing
            run.change("the attention processors changed")
            self._check_trust(run, self._trust.stranger())
        if run.broken is not None and not run.warned:
            run.warned = True
            self._say(run.broken, f"{run.broken}: the rest of this run is computed in full")

    def _check_trust(self, run: Run, stranger: str) -> None:
        """Leave ``run`` to diffusers where code inside of the models is not known."""
        if stranger and not run.by_diffusers:
            run.leave(stranger)
            self._say(
                "trust",
                f"{stranger}. hgc does not know what it does and leaves runs to diffusers, as if "
                "it were not installed. Classes that may be skipped and treat each row of a batch "
                "by itself can be named: hgc.install(..., trust=(TheClass,))",
            )

    def _begin(self, runs: Runs, run: Run | None, text: Tensor, position: Position) -> Run:
        """Begin an evaluation of ``run``, or of a new one."""
        if run is None:
            run = self._new_run(runs, text, position)
        else:
            runs.use(run)
            if run.now is None and run.completed == position.index and run.broken is None:
                run.give_up("one timestep was evaluated more than once")
            if run.changes_in_a_row > 2 and run.broken is None and not self._config.is_exact:
                self._say(
                    "changing",
                    f"{run.report[-1].why} at every evaluation, so nothing is reused: build what "
                    "is constant once, before the loop, and call each ControlNet at every "
                    "evaluation or at none",
                )
        if run.timesteps is not None:
            self._check_timesteps(run)
        run.begin(position)
        return run

    def _new_run(self, runs: Runs, text: Tensor, position: Position) -> Run:
        self._adopt_processors()
        self._collect_lora()
        if self._compiled is not None:
            self._compiled.begin_run()
        stranger = self._trust.stranger()
        noise = None if stranger else self._noise_of(position)
        run = runs.add(Run(self._schedules, text, position, self._assume_pair, noise))
        run.placing = self._placing
        try:
            self._check_trust(run, stranger)
            if run.by_diffusers:
                return run
            self._check_length(run)
            if runs.short >= Runs.LIMIT and not self._config.is_exact:
                self._say(
                    "short",
                    "runs end at once, so nothing is reused: the text or the timesteps "
                    "are built anew for each. Build them once, before the loop",
                )
            if runs.crowded and not self._config.is_exact:
                self._say(
                    "crowded",
                    f"more than {Runs.LIMIT} runs are under way in this thread at once, and of the "
                    "others what was cached is dropped: make fewer at once, or batches",
                )
        except BaseException:  # a warning that is an error: nobody goes on with half a look
            self._fail(run)
            raise
        return run

    def _noise_of(self, position: Position) -> NoiseLevels | None:
        """The levels of noise of a run whose plan forecasts x0; None where they are not known."""
        if not self._config.forecasts_x0:
            return None
        scheduler = self._scheduler()
        if not NoiseLevels.fits(scheduler):
            unknown = (
                "the scheduler is not known: install on the pipeline, hgc.install(pipe), or pass "
                "scheduler=pipe.scheduler"
                if scheduler is None
                else f"what {type(scheduler).__name__} hands a model is not known to be "
                "alpha x0 + sigma noise with epsilon, v or x0 predicted"
            )
            self._say(
                "noise",
                f"{unknown}. Outputs are forecast as the model gives them instead of in x0, and "
                "images are much farther from the uncached ones",
            )
            return None
        assert position.timestep is not None
        timesteps = position.timestep.as_strided((position.total,), (1,), 0)
        own = getattr(scheduler, "timesteps", None)
        is_own = isinstance(own, Tensor) and own.untyped_storage()._cdata == position.storage
        return NoiseLevels(scheduler, timesteps, is_own=is_own)

    def _text_changed(self, run: Run, now: Evaluation, text: Tensor) -> None:
        planned = run.schedule.plan[now.index]
        same_length = text.shape == run.text.value.shape
        if run.maps is not None:
            run.maps.close()
        run.change("the text changed", keep_maps=self._config.fresh_values and same_length)
        if planned.attention == "reuse":
            if self._config.fresh_values and self._prompt_grain:
                now.plan = dataclasses.replace(now.plan, attention="reuse")
            else:
                self._say(
                    "fresh_values",
                    "the text changed within a run: its cross-attention is computed; "
                    "Config(fresh_values=True) keeps the maps and applies them to the new values",
                )

    def _in_part(self) -> list[torch.nn.Module]:
        """The blocks that a plan of the configuration runs in part."""
        structure, found = self._structure, []
        for depth in self._config.depths:
            if depth == 0:
                continue
            up, layer = structure.boundary(depth)
            if layer > 0:
                found.append(self.unet.up_blocks[up])
            down, _ = structure.encoder[depth - 1]
            whole = depth == len(structure.encoder) or structure.encoder[depth][0] != down
            if down >= 0 and not whole:
                found.append(self.unet.down_blocks[down])
        return found

    def _look(self, run: Run, model: torch.nn.Module, depth: Any = "full") -> None:
        """See whether the layers to be computed are what they were: the processors of attentions,
        the weights that make keys and values, which change when a LoRA is fused or swapped, and
        FreeU. What an evaluation does not compute is looked at when one does."""
        key, epoch = (id(model), depth), self._epoch
        seen = self._seen.get(key)
        if seen is not None and seen.epoch == epoch == run.looked.get(key) and seen.is_same():
            return
        if seen is not None and seen.epoch == epoch and not seen.is_same():
            # what other runs looked at by this epoch does not hold for them any more
            self._epoch = epoch = next(self._epochs)
        # read before it is compared: what changes in between is seen the next time
        freeu = self._freeu_places(depth) if model is self.unet else ()
        if not self._processors_in_place(model, depth):
            self._adopt_processors()
            self._obey_processors(run)
        if model is self.unet:
            self._look_for_freeu(run, depth)
        known = self._weights.get(id(model))
        if known is None or not known.same(depth):
            computed = functools.partial(self._computed, model)
            known = _Weights(self._cross_attentions[id(model)], computed, known)
            self._weights[id(model)] = known
            self._epoch = next(self._epochs)
        value = (known.generation, known.total)
        if run.weights.setdefault(id(model), value) != value:
            run.weights[id(model)] = value
            run.change("the weights changed")
        placed = self._placed.get(id(model), {}).get(depth)
        if freeu is not None and placed is not None and epoch == self._epoch:
            places = [
                *((holder, "processor", p) for holder, p in zip(*placed, strict=True)),
                *known.places(depth),
                *freeu,
            ]
            self._seen[key] = _Seen(epoch, places, *known.versions(depth))
            run.looked[key] = epoch

    def _freeu_places(self, depth: Any) -> list[tuple[dict[str, Any], str, Any]] | None:
        """Where FreeU is enabled in the up blocks that an evaluation of ``depth`` runs, and what
        is there; None where a block may have it elsewhere."""
        blocks: dict[str, Any] = self.unet._modules["up_blocks"]._modules
        places = []
        for key in self._blocks_at(depth):
            block = blocks[key]
            if type(block) not in UP_BLOCKS:
                return None
            own = block.__dict__
            names = ("s1",) if own.get("s1") is None else ("s1", "s2", "b1", "b2")
            places += [(blocks, key, block), *((own, name, own.get(name)) for name in names)]
        return places

    def _look_for_freeu(self, run: Run, depth: Any) -> None:
        blocks: dict[str, Any] = self.unet._modules["up_blocks"]._modules
        known, changed = run.freeu, False
        for key in self._blocks_at(depth):
            block = blocks[key]
            plain = type(block) in UP_BLOCKS and "s1" not in block.__dict__
            found = None if plain else freeu_of(block)
            changed = known.setdefault(key, found) != found or changed
            known[key] = found
        if changed:
            self._epoch = next(self._epochs)
            run.change("the UNet's arguments changed")

    def _blocks_at(self, depth: Any) -> Sequence[str]:
        """The up blocks, by their names in the list, that an evaluation of ``depth`` runs."""
        if depth not in self._up_blocks:
            decoder = self._structure.decoder
            layers = decoder if depth == "full" else decoder[len(decoder) - depth :]
            self._up_blocks[depth] = [*dict.fromkeys(str(block) for block, _ in layers)]
        return self._up_blocks[depth]

    def _processors_in_place(self, model: torch.nn.Module, depth: Any = "full") -> bool:
        placed = self._placed.get(id(model))
        if placed is None:
            return False
        found = placed.get(depth)
        if found is None:
            begin = self._structure.attention_blocks(depth)
            names = [name for name, _ in self._attentions[id(model)]]
            both = [*zip(*placed["full"], strict=True)]
            part = [each for name, each in zip(names, both, strict=True) if name.startswith(begin)]
            found = placed[depth] = ([holder for holder, _ in part], [p for _, p in part])
        try:
            return _all_are(map(_processor, found[0]), found[1])
        except KeyError:  # one with weights took the place of one without, or the reverse
            return False

    def _look_for_gradients(self, run: Run, *inputs: Any) -> None:
        """Compute in full where gradients are recorded: those of a cached value are lost."""
        if not _grad_enabled() or self._config.is_exact or run.broken is not None:
            return
        if run.trains is None:
            run.trains = any(p.requires_grad for m in self._networks() for p in m.parameters())
        if run.trains or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            run.give_up("gradients are recorded (use torch.no_grad() where none are wanted)")

    def _computed(self, model: torch.nn.Module, depth: Any) -> Sequence[int]:
        """Which of the cross-attentions of ``model`` an evaluation of ``depth`` computes."""
        attentions = self._cross_attentions[id(model)]
        if depth == "full":
            return range(len(attentions))
        if depth not in self._at_depth:
            names = self._structure.attention_blocks(depth)
            self._at_depth[depth] = [
                i for i, (_, name) in enumerate(attentions) if name.startswith(names)
            ]
        return self._at_depth[depth]

    def _collect_lora(self) -> None:
        for model in self._networks():
            config = model.__dict__.get("peft_config")
            self._lora[id(model)] = (config and tuple(config.values()), _lora_layers(model))
        found = any(config is not None for config, _ in self._lora.values())
        self._without_lora = not found and not self._set_processors

    def _lora_now(self, model: torch.nn.Module) -> Any:
        """What adapters add to ``model`` now, and the settings of processors that have some."""
        config = model.__dict__.get("peft_config")
        collected = self._lora.get(id(model))
        known, layers = (None, []) if collected is None else collected
        if config is None and known is None and not self._set_processors:
            return self._rewritten
        now = config and tuple(config.values())
        if (now is None) != (known is None) or any(
            a is not b for a, b in itertools.zip_longest(now or (), known or ())
        ):
            self._collect_lora()
            _, layers = self._lora[id(model)]
        settings = [_settings(processor) for processor in self._set_processors]
        return (*_lora_state(model, layers), self._rewritten, settings)

    def _fail(self, run: Run) -> None:
        """An exception left the evaluation unfinished: keep nothing of the run."""
        self._runs.forget(run)

    # -- ControlNet -------------------------------------------------------------------------

    def _original(self, module: torch.nn.Module) -> Callable[..., Any]:
        return next(f.original for f in self._forwards if f.module is module)

    def _control_call(
        self,
        net: ControlNetModel,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float | Tensor = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        if (
            class_labels is timestep_cond is attention_mask is added_cond_kwargs
            is cross_attention_kwargs is None
        ):  # fmt: skip
            arguments = _NOTHING_GIVEN_TO_CONTROL
        else:
            arguments = {
                "class_labels": class_labels,
                "timestep_cond": timestep_cond,
                "attention_mask": attention_mask,
                "added_cond_kwargs": added_cond_kwargs,
                "cross_attention_kwargs": cross_attention_kwargs,
            }
        call = _ControlCall(
            net, sample, timestep, encoder_hidden_states, controlnet_cond, conditioning_scale,
            guess_mode, arguments,
        )  # fmt: skip
        return self._evaluate_control(call, return_dict)

    def _union_call(
        self,
        net: ControlNetUnionModel,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: list[Tensor],
        control_type: Tensor,
        control_type_idx: list[int],
        conditioning_scale: float | list[float] = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        from_multi: bool = False,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        scales: list[float] = (
            [conditioning_scale] * len(controlnet_cond)
            if isinstance(conditioning_scale, (int, float))
            else list(conditioning_scale)
        )
        # one condition: the scale is that of the residuals; several are weighed before the encoder
        single = from_multi or len(control_type_idx) == 1
        arguments = {
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "added_cond_kwargs": added_cond_kwargs,
            "cross_attention_kwargs": cross_attention_kwargs,
            "control_type": control_type,
        }
        call = _UnionCall(
            net, sample, timestep, encoder_hidden_states, controlnet_cond,
            scales[0] if single else 1.0, guess_mode, arguments,
            given={
                "control_type_idx": control_type_idx, "from_multi": from_multi,
                "conditioning_scale": conditioning_scale, "guess_mode": guess_mode,
            },
            weights=None if single else scales,
        )  # fmt: skip
        return self._evaluate_control(call, return_dict)

    def _evaluate_control(self, call: _ControlCall, return_dict: bool) -> Any:
        """One call of a ControlNet of either kind."""
        runs, net, sample, text = self._of_thread.runs, call.net, call.sample, call.text
        position = None if runs.forced else self._position(runs, call.timestep, text)
        if position is None:
            return call.by(self._original(net), return_dict)
        start = runs.clock()
        shape, device = sample.shape, sample.device
        run, now = self._run_of(runs, text, position, shape[0], call.cond)
        try:
            if _grad_enabled():
                self._look_for_gradients(run, sample, text, *call.conditions)
            slot = run.slot(net, call.cond)
            if run.by_diffusers:
                run.factor = call.conditions[0].shape[-1] // shape[-1]
                slot.called_at, now.control[slot.index] = position.index, "computed"
                out = call.by(self._original(net), return_dict)
                now.milliseconds += (runs.clock() - start) * 1e3
                return out
            if slot.called_at == position.index:
                run.give_up("a ControlNet was called twice in one evaluation")
            slot.called_at = position.index
            # which was looked at a moment ago
            slot.text = run.text if run.text.value is text else Held(text)
            found = (
                *call.settings(), shape, sample.dtype, device,
                self._rewritten if self._without_lora and "peft_config" not in net.__dict__
                else self._lora_now(net),
                _autocast(device) if _any_autocast() else None,
            )  # fmt: skip
            if slot.signature is None or not slot.signature.same(found):
                if slot.signature is not None:
                    run.change("a ControlNet's scale or arguments changed")
                elif now.plan != StepPlan():
                    run.change("a ControlNet joined the run")
                slot.signature = Signature(found)
                slot.shapes = self._residual_shapes(net, sample)
                slot.names = _residual_names(len(slot.shapes))
                slot.entries = tuple([slot.prefix + name for name in slot.names])
                slot.zeros, slot.promises = None, []
                slot.pooled = bool(net.config.global_pool_conditions)
                run.factor = call.conditions[0].shape[-1] // shape[-1]
            residuals = self._control_residuals(run, now, slot, call)
        except BaseException:
            self._fail(run)
            raise
        now.milliseconds += (runs.clock() - start) * 1e3
        if not return_dict:
            return residuals[:-1], residuals[-1]
        return ControlNetOutput(
            down_block_res_samples=tuple(residuals[:-1]), mid_block_res_sample=residuals[-1]
        )

    def _compute_fresh(self, call: _ControlCall) -> list[Tensor]:
        """The residuals of the whole batch, by diffusers, with the hooks that stand before its
        forward."""
        runs = self._runs
        runs.forced += 1
        try:
            down, mid = call.by(call.net, return_dict=False)
        finally:
            runs.forced -= 1
        return [*down, mid]

    def _position(self, runs: Runs, timestep: Any, text: Any) -> Position | None:
        if not self._active:
            return None
        last = runs.last
        if last is not None and timestep is not None and last.position.timestep is timestep:
            return last.position
        position = position_of(timestep, None if last is None else last.position)
        if position is None and not runs.is_one_step(timestep, text):
            self._say(
                "timestep",
                "the timestep is not an element of a tensor of timesteps, so where an evaluation "
                "stands in its run is not known: evaluations are computed in full",
            )
        return position

    def _residual_shapes(self, net: ControlNetModel, sample: Tensor) -> list[tuple[int, ...]]:
        """Shapes of the residuals of ``net``, the middle block's last."""
        batch, _, height, width = sample.shape
        shapes: list[tuple[int, ...]] = [(batch, net.config.block_out_channels[0], height, width)]
        for block, channels in zip(net.down_blocks, net.config.block_out_channels, strict=True):
            shapes += [(batch, channels, height, width)] * len(block.resnets)
            if block.downsamplers is not None:
                height, width = (height + 1) // 2, (width + 1) // 2
                shapes.append((batch, channels, height, width))
        shapes.append((batch, net.config.block_out_channels[-1], height, width))
        if net.config.global_pool_conditions:
            shapes = [(*shape[:2], 1, 1) for shape in shapes]
        return shapes

    def _control_residuals(
        self, run: Run, now: Evaluation, slot: ControlSlot, call: _ControlCall
    ) -> Sequence[Tensor]:
        net, sample, text, scale = slot.net, call.sample, call.text, call.scale
        if isinstance(scale, (int, float)) and scale == 0.0:
            now.control[slot.index] = "off"
            # constants, which may be handed out until somebody adds something to them
            if slot.zeros is None or slot.zeros.is_touched:
                made = slot.shapes, sample.dtype, sample.device
                slot.zeros = PromiseSet(*made, Zeros(*made))
            return slot.zeros.hand_out()

        if now.plan.control == "off":
            now.control[slot.index] = "off"
            return self._promises(run, now, slot, call)
        # guess_mode hands over the conditional half itself: there is nothing to cut
        half = now.half and (text is run.text.value or not _is_part(text, run.text))
        if now.plan.control == "reuse":
            for name in run.schedule.residuals[now.index]:
                if not run.cache.has(slot.prefix + name, half=half):
                    run.promote("residuals are not cached")
                    half = False
                    break
        if now.plan.control == "reuse":
            now.control[slot.index] = "reused"
            return self._promises(run, now, slot, call)
        self._look(run, net)
        half = half and now.half
        outputs = self._compute_control(run, slot, call, half)
        self._write_residuals(
            run, slot, dict(zip(slot.names, outputs, strict=True)), now.index, half
        )
        now.control[slot.index] = "computed"
        owned = self._compiled is None or self._compiled.hands_over
        scaled = scale_residuals(net, outputs, scale, call.guess_mode, owned=owned)
        if not half:
            return scaled
        turn = _Turn(self._compute_fresh, run, slot, now, call)
        turn.values = dict(zip(slot.names, scaled, strict=True))
        return PromiseSet(slot.shapes, sample.dtype, sample.device, turn).promises

    def _promises(
        self, run: Run, now: Evaluation, slot: ControlSlot, call: _ControlCall
    ) -> Sequence[Tensor]:
        """Promises of residuals that are reused: those of an earlier evaluation where nobody holds
        them any more."""
        for found in slot.promises:
            if not found.is_held:
                found.turn.now, found.turn.call = now, call
                break
        else:
            turn = _Turn(self._compute_fresh, run, slot, now, call)
            found = PromiseSet(slot.shapes, call.sample.dtype, call.sample.device, turn)
            # a pipeline holds those of one evaluation until it has those of the next
            slot.promises = [*slot.promises[-1:], found]
        return found.hand_out()

    def _compute_control(
        self, run: Run, slot: ControlSlot, call: _ControlCall, half: bool
    ) -> list[Tensor]:
        net, sample, text, arguments = call.net, call.sample, call.text, call.arguments
        made_by = _state(net.controlnet_cond_embedding)
        if slot.embedding is None or not slot.embedding.same(made_by):
            run.cache.drop_kept(f"{slot.prefix}hint")
            slot.embedding = Signature(made_by)
        hints = []
        for i, cond in enumerate(call.conditions):
            hint = run.cache.kept(f"{slot.prefix}hint{i}")
            if hint is None:
                hint = embed_condition(net, cond)
                if _may_be_kept(cond):
                    hint = run.cache.keep(f"{slot.prefix}hint{i}", hint)
            hints.append(hint)
        if half:
            batch = sample.shape[0]
            sample, text = conditional_half(sample), conditional_half(text)
            hints = [conditional_half(hint) for hint in hints]
            arguments = _cut(arguments, batch)
        lora_scale = 1.0
        if _scales_lora(net):
            arguments, lora_scale = _take_lora_scale(arguments)
        wrap = self._text_wrapper(run, slot.prefix, half, run.now)
        with _lora_scaled(net, lora_scale):
            return self._function(net, half)(
                net, sample, call.timestep, text,
                hints if isinstance(net, ControlNetUnionModel) else hints[0], wrap,
                **call.constants, **arguments,
            )  # fmt: skip

    def _write_residuals(
        self, run: Run, slot: ControlSlot, values: dict[str, Tensor], index: int, half: bool
    ) -> None:
        wanted, half_only = run.schedule.will_read(after=index)
        cond = slot.cond.value
        rows = cond.shape[0] if isinstance(cond, Tensor) else cond[0].shape[0]
        is_whole_condition = rows != run.text.value.shape[0]
        cut = half_only and not half and not is_whole_condition and run.pair.confirmed()
        for name, value in values.items():
            if name in wanted:
                run.cache.write(
                    slot.prefix + name,
                    conditional_half(value) if cut else value,
                    evaluation=index,
                    history=run.schedule.history,
                    half=half or cut,
                )
            else:
                run.cache.drop([slot.prefix + name])

    def _text_wrapper(
        self, run: Run, prefix: str, half: bool, now: Evaluation | None
    ) -> Callable[[Any], Any] | None:
        """What makes the text of a network carry what its cross-attentions reuse."""
        if not self._prompt_grain or now is None:
            return None
        step = now.plan
        if half and not step.is_key and step.attention == "compute":
            plain = run.plain_text.get(prefix)
            if plain is None:
                plain = run.plain_text[prefix] = _PlainText(run.cache, prefix)
            return plain
        mode, store, map_format = "compute", None, None
        if step.attention == "reuse":
            held = run.cache.names()
            outputs = any(n.startswith(f"{prefix}attention/") for n in held)
            maps = any(n.startswith(f"{prefix}map/") for n in held)
            mode = "output" if outputs else "map" if maps else "compute"
        schedule = run.schedule
        reads_attention = step.is_key and "attention" in schedule.will_read(after=now.index)[0]
        if mode != "output" and reads_attention:
            layers = self._layers_read(run, now.index) if prefix == "unet/" else None
            store = (lambda name: True) if layers is None else layers.__contains__
        keeps_maps = step.is_key and mode == "compute" and self._config.fresh_values
        if keeps_maps and schedule.keeps_attention[now.index]:
            map_format = self._config.map_format
        watch = run.maps.add if run.maps and step.is_key and prefix == "unet/" else None

        def wrap(text: Any) -> Any:
            if not isinstance(text, Tensor):
                return text
            return prompt_grain.Text(
                hidden=text,
                cache=run.cache,
                prefix=prefix,
                evaluation=now.index,
                half=half,
                keep_projections=_may_be_kept(text),
                mode=mode,
                store=store,
                map_format=map_format,
                watch=watch,
            )

        return wrap

    def _layers_read(self, run: Run, index: int) -> frozenset[str] | None:
        """UNet cross-attentions whose output an evaluation after ``index`` reads; None: all."""
        depths: set[int] = set()
        for step in run.schedule.plan[index + 1 :]:
            if step.attention == "reuse":
                if not isinstance(step.depth, int):
                    return None
                depths.add(step.depth)
            if step.is_key and step.attention == "compute":
                break
        depth = max(depths, default=0)
        if depth not in self._layers:
            names = prompt_grain.cross_attentions(self.unet)
            blocks = self._structure.attention_blocks(depth)
            self._layers[depth] = frozenset(name for name in names if name.startswith(blocks))
        return self._layers[depth]

    # -- UNet -------------------------------------------------------------------------------

    def _unet_call(
        self,
        unet: UNet2DConditionModel,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        runs = self._of_thread.runs
        position = self._position(runs, timestep, encoder_hidden_states)
        if not isinstance(encoder_hidden_states, Tensor) and position is not None:
            position = None
            self._say(
                "text",
                "the UNet is called without encoder_hidden_states, by which runs are told apart: "
                "evaluations are computed in full",
            )
        legacy = down_block_additional_residuals is not None and (
            mid_block_additional_residual is None
        )
        if (
            class_labels is timestep_cond is attention_mask is cross_attention_kwargs
            is added_cond_kwargs is encoder_attention_mask is None
        ):  # fmt: skip
            arguments = _NOTHING_GIVEN
        else:
            arguments = {
                "class_labels": class_labels,
                "timestep_cond": timestep_cond,
                "attention_mask": attention_mask,
                "cross_attention_kwargs": cross_attention_kwargs,
                "added_cond_kwargs": added_cond_kwargs,
                "encoder_attention_mask": encoder_attention_mask,
            }

        def by_diffusers() -> Any:
            return self._original(unet)(
                sample, timestep, encoder_hidden_states, **arguments,
                down_block_additional_residuals=fresh(down_block_additional_residuals),
                mid_block_additional_residual=fresh(mid_block_additional_residual),
                down_intrablock_additional_residuals=down_intrablock_additional_residuals,
                return_dict=return_dict,
            )  # fmt: skip

        if position is None or legacy or runs.is_past_end(encoder_hidden_states, position):
            return by_diffusers()
        start = runs.clock()
        shape = sample.shape
        run, now = self._run_of(runs, encoder_hidden_states, position, shape[0])
        # the ControlNets that were called
        slots = run.slots
        if len(slots) == 1 and slots[0].called_at == now.index:
            called = _THE_ONE
        else:
            called = [slot.index for slot in slots if slot.called_at == now.index]
        with_residuals = down_block_additional_residuals is not None
        now.batch = shape[0]
        if run.by_diffusers:
            run.latent_size = (shape[-2], shape[-1])
            try:
                out = by_diffusers()
            except BaseException:
                self._fail(run)
                raise
            run.end((runs.clock() - start) * 1e3)
            return out
        if with_residuals and not slots and not self._config.is_exact:
            self._say(
                "foreign",
                "the UNet gets residuals of a ControlNet that this installation does not know: it "
                "runs at every step, and changes of its scale show at key steps only. Pass it too: "
                "hgc.install(pipe.unet, pipe.controlnet). Where two UNets share it, give each a "
                "copy of its own (copy.deepcopy)",
            )
        try:
            if _grad_enabled():
                self._look_for_gradients(run, sample, encoder_hidden_states)
            found = (
                shape, sample.dtype, sample.device,
                *(() if arguments is _NOTHING_GIVEN else arguments.values()),
                with_residuals, down_intrablock_additional_residuals is not None,
                self._rewritten if self._without_lora and "peft_config" not in unet.__dict__
                else self._lora_now(unet),
                len(called), *called,
                _autocast(sample.device) if _any_autocast() else None,
                *([fuser.enabled for fuser in self._fusers] if self._fusers else ()),
            )  # fmt: skip
            if run.unet_signature is None or not run.unet_signature.same(found):
                if run.unet_signature is not None:
                    run.change("the UNet's arguments changed")
                run.unet_signature = Signature(found)
                run.latent_size = (shape[-2], shape[-1])
            looked, halves = now.plan.depth, None
            self._look(run, unet, looked)
            # an evaluation that computes nothing does not compare either
            if (run.schedule.halves or run.maps is not None) and looked != 0:
                halves = self._look_for_pair(run, now, sample, encoder_hidden_states, arguments)
            if now.plan.depth != looked:
                self._look(run, unet, now.plan.depth)
            if now.plan.depth == 0:
                out = self._forecast(run, now, sample)
            else:
                out = self._compute_unet(
                    run, now, sample, timestep, encoder_hidden_states, arguments,
                    down_block_additional_residuals, mid_block_additional_residual,
                    down_intrablock_additional_residuals, halves,
                )  # fmt: skip
        except BaseException:
            self._fail(run)
            raise
        run.end((runs.clock() - start) * 1e3)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def _forecast(self, run: Run, now: Evaluation, sample: Tensor) -> Tensor:
        """The output of an evaluation that computes nothing; new."""
        step = now.plan
        if step.damping is None:
            # what is read may be the cache's own buffer
            return run.cache.read("output", step.forecast).clone()
        return self._forecast_in_x0(run, now, sample).to(run.output_dtype)

    def _forecast_in_x0(self, run: Run, now: Evaluation, sample: Tensor) -> Tensor:
        """The output that says of ``sample`` the x0 that is forecast, in float32 at least; new."""
        step = now.plan
        assert run.noise is not None and step.damping is not None
        x0 = run.noise.forecast(
            run.cache, now.index, step.damping, step.guidance_damping, step.x0_correction,
            is_pair=now.is_pair,
        )  # fmt: skip
        return run.noise.output(sample, x0, now.index)

    def _look_for_pair(
        self, run: Run, now: Evaluation, sample: Tensor, text: Tensor, arguments: dict[str, Any]
    ) -> Sequence[Tensor] | None:
        """See whether the batch is one sample twice, and can be cut into halves. Returns the halves
        of ``sample`` where it was cut to be compared."""
        assert run.unet_signature is not None
        batch = sample.shape[0]
        plain = run.unet_signature.is_plain and text.shape[0] == batch
        if not self._rows_are_samples or not (plain or _can_be_halved(arguments, text, batch)):
            run.pair.refute()
            if now.half:
                run.promote("an argument cannot be cut into halves")
        elif run.pair.wants:
            halves = run.pair.compare(sample, text)
            if now.half and not run.pair.wants:
                run.promote("the batch is no pair any more")
            return halves
        return None

    def _terms(self, value: Any, half: bool) -> Terms:
        """What to add to a skip for the residual ``value``."""
        if isinstance(value, Promise):
            terms = value._planned(half) if value._value is None else value.planned(half)
            if terms is not None:
                return terms
            value = value.fresh()
        return [(conditional_half(value) if half else value, 1.0)]

    def _compute_unet(
        self,
        run: Run,
        now: Evaluation,
        sample: Tensor,
        timestep: Any,
        text: Tensor,
        arguments: dict[str, Any],
        down: Any,
        mid: Any,
        intrablock: Any,
        halves: Sequence[Tensor] | None,
    ) -> Tensor:
        step, half, batch, given = now.plan, now.half, sample.shape[0], sample
        depth = step.depth if isinstance(step.depth, int) else None
        count = self._structure.num_layers if depth is None else depth
        residuals = None
        if down is not None:
            residuals = Residuals(
                [self._terms(down[0], half)]
                if count == 1 and len(down)
                else [self._terms(value, half) for value in down[:count]],
                self._terms(mid, half) if depth is None else [],
            )
        hidden = skips = None
        if depth is not None:
            hidden = run.cache.read(f"feature/{depth}", step.forecast, half=half)
            if any(run.freeu.values()) and run.freeu[str(self._structure.boundary(depth)[0])]:
                hidden = hidden.clone()  # FreeU writes into its input
            if step.encoder == "reuse":
                skips = [
                    run.cache.read(f"skip/{j}", step.forecast, half=half) for j in range(count)
                ]
        capture = run.schedule.captures if step.is_key else ()
        assert run.unet_signature is not None
        plain, lora_scale = run.unet_signature.is_plain, 1.0
        if half:
            sample = conditional_half(sample) if halves is None else halves[1]
            text = run.text.half() if run.text.value is text else conditional_half(text)
            if not plain:
                arguments = _cut(arguments, batch)
            if intrablock is not None:
                intrablock = _cut(intrablock, batch)
        if not plain:
            arguments, lora_scale = _take_lora_scale(arguments)
        elif arguments is _NOTHING_GIVEN and self._compiled is None:
            arguments = {}
        with_scale = USE_PEFT_BACKEND and lora_scale != 1.0
        if with_scale:
            scale_lora_layers(self.unet, lora_scale)
        try:
            out, captured = self._function(self.unet, half)(
                self.unet, self._structure, sample, timestep, text,
                self._text_wrapper(run, "unet/", half, now),
                depth=depth, hidden=hidden, skips=skips, residuals=residuals, capture=capture,
                intrablock_residuals=intrablock, **arguments,
            )  # fmt: skip
        finally:
            if with_scale:
                unscale_lora_layers(self.unet, lora_scale)
        if not half:
            whole = out
        elif step.guidance == "off":
            whole = torch.cat([out, out])
        else:
            whole = run.cache.subtract("guidance", step.guidance_forecast, out)
        if step.output_forecast == (1.0,):
            blend = whole
        else:
            blend = run.cache.blend(whole, "output", step.output_forecast)
        if step.gain != 1.0:
            forecast = self._forecast_in_x0(run, now, given)
            blend = forecast.lerp_(blend.to(forecast.dtype), step.gain).to(whole.dtype)
        if step.is_key:
            self._write_features(run, now, captured, given, whole)
        return blend

    def _write_features(
        self,
        run: Run,
        now: Evaluation,
        captured: dict[str, Tensor],
        sample: Tensor,
        out: Tensor,
    ) -> None:
        half = now.half
        wanted, half_only = run.schedule.will_read(after=now.index)
        x0 = None
        if "x0" in wanted:
            assert run.noise is not None
            x0 = run.noise.x0(sample, out, now.index)
            run.output_dtype = out.dtype
        if isinstance(run.schedule, AdaptiveSchedule):
            computed = {**captured, "output": out, **({} if x0 is None else {"x0": x0})}
            run.schedule.measure(now, computed, run.cache, is_pair=run.pair.wants, noise=run.noise)
        cut = half_only and not half and run.pair.confirmed()
        index, history = now.index, run.schedule.history
        for name, value in captured.items():
            if name not in wanted:
                continue
            value = conditional_half(value) if cut else value
            run.cache.write(name, value, evaluation=index, history=history, half=half or cut)
        if "output" in wanted:
            run.cache.write("output", out, evaluation=index, history=history, half=False)
        if x0 is not None:
            run.cache.write("x0", x0, evaluation=index, history=history, half=False)
        if "guidance" in wanted and not half and out.shape[0] % 2 == 0:
            unconditional, conditional = out.chunk(2)
            run.cache.write(
                "guidance", conditional - unconditional, evaluation=index, history=history,
                half=False,
            )  # fmt: skip
            if run.cache.has("guidance", half=False):
                for coefficients in run.schedule.guidance_read(after=index):
                    run.cache.prepare("guidance", coefficients)
        stale = [
            n
            for n in run.cache.names()
            if n.startswith(("feature/", "skip/", "guidance", "output", "x0")) and n not in wanted
        ]
        run.cache.drop(stale)
        if run.cache.refused:
            self._say(
                "max_cache_bytes",
                f"Config.max_cache_bytes={self._config.max_cache_bytes} is too small for this "
                "plan: evaluations are computed instead of reused",
            )


class _PlainText:
    """What makes the conditional half of a text carry the projections that a run keeps, and nothing
    else: the same for every evaluation that neither stores nor reuses cross-attention."""

    def __init__(self, cache: Cache, prefix: str) -> None:
        self._cache, self._prefix = cache, prefix
        self._last: prompt_grain.Text | None = None

    def __call__(self, text: Any) -> Any:
        if not isinstance(text, Tensor):
            return text
        keep, last = _may_be_kept(text), self._last
        if last is None or last.hidden is not text or last.keep_projections is not keep:
            last = self._last = prompt_grain.Text(
                text, self._cache, self._prefix, evaluation=-1, half=True, keep_projections=keep
            )
        return last


def _residual_names(count: int) -> tuple[str, ...]:
    """Names of a ControlNet's ``count`` residuals in the cache, the middle block's last."""
    return (*(f"residual/{j}" for j in range(count - 1)), "residual/mid")


@dataclasses.dataclass(slots=True)
class _Turn:
    """One call of a ControlNet, for the promises that stand for its residuals.

    Attributes:
        compute_fresh: Computes all residuals of the whole batch of a call.
        values: Those of the conditional half, where they were computed in this call.
        held: What ``compute_fresh`` returned, once it was called.
    """

    compute_fresh: Callable[[_ControlCall], list[Tensor]]
    run: Run
    slot: ControlSlot
    now: Evaluation
    call: _ControlCall
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    held: list[Tensor] = dataclasses.field(default_factory=list)

    def fresh(self, j: int) -> Tensor:
        """The value of residual ``j``, computed now."""
        if not self.held:
            # what is computed goes when the promises do: they are not handed out again
            self.slot.promises = [each for each in self.slot.promises if each.turn is not self]
            self.held.extend(self.compute_fresh(self.call))
            self.now.control[self.slot.index] = "computed"
        return self.held[j]

    def planned(self, j: int, half: bool) -> Terms | None:
        """What the plan means by residual ``j``."""
        slot, plan, cache = self.slot, self.now.plan, self.run.cache
        if self.values:
            return [(self.values[slot.names[j]], 1.0)] if half else None
        if plan.control == "off":
            return []
        entry = slot.entries[j]
        # promoted after the ControlNet's turn: what was reused then is not wanted any more
        if plan.control != "reuse" or not cache.has(entry, half=half):
            return None
        value, call = cache.read(entry, plan.of_residuals, half=half), self.call
        count = len(slot.entries)
        return [_scaled(slot.pooled, value, j, count, call.scale, call.guess_mode)]


def _scaled(
    pooled: bool,
    value: Tensor,
    j: int,
    count: int,
    scale: float | Tensor,
    guess_mode: bool,
) -> tuple[Tensor, float]:
    """A cached residual with its scale, as `hgc.models.controlnet.scale_residuals` scales it."""
    if pooled:
        return torch.mean(value * scale, dim=(2, 3), keepdim=True), 1.0
    factor = 10.0 ** (-1.0 + j / (count - 1)) if guess_mode else 1.0
    if isinstance(scale, (int, float)):
        return value, float(scale) * factor
    return value * (scale * factor), 1.0


def _installation_of(module: Any) -> Installation | None:
    mark = getattr(module, "__dict__", {}).get(_MARK)
    return None if mark is None else mark.installation


def _models_of(unet: Any, controlnet: Any) -> tuple[Any, Any, Any]:
    """The UNet, the ControlNets and the pipeline, where one was given in place of the UNet."""
    if not isinstance(unet, DiffusionPipeline) or getattr(unet, "unet", None) is None:
        return unet, controlnet, None
    if controlnet is not None:
        raise TypeError(
            f"controlnet must be left out where a pipeline is given; got "
            f"{type(controlnet).__name__} beside a {type(unet).__name__}"
        )
    return unet.unet, getattr(unet, "controlnet", None), unet


def install(
    unet: UNet2DConditionModel | DiffusionPipeline,
    controlnet: Any = None,
    *,
    config: Config | str = "balanced",
    scheduler: Any = None,
    trust: tuple[Any, ...] = (),
) -> Installation:
    """Make a UNet and its ControlNets reuse features between the steps of a run.

    Args:
        unet: A pipeline, or its ``pipe.unet``.
        controlnet: ``pipe.controlnet``: a ControlNetModel, a list of them, a MultiControlNetModel,
            the same of ControlNetUnionModel, or None for a pipeline without one. To be left out
            where a pipeline is given, whose own is taken.
        config: A :class:`~hgc.Config`, the name of a preset, or the path of a JSON file.
        scheduler: That of the pipeline. A pipeline's own is known, and looked up at every run. Only
            configurations that forecast x0 ask for it; without one they forecast the model's own
            outputs, which is much worse, and warn.
        trust: Classes of modules and attention processors, and functions that are processors, of
            your own or of another package, that may be skipped at evaluations that reuse, and that
            treat each row of a batch by itself. A run of models with any other code inside that
            neither torch nor diffusers nor peft ship is left to diffusers, with a warning.

    Returns:
        The :class:`Installation`; ``with hgc.install(...):`` uninstalls at the end of the block.

    Raises:
        TypeError: a model is not supported, or is compiled already; its class is named. Or a
            pipeline was given, and something for ``controlnet`` beside it.
        ValueError: ``config`` names no preset, or does not fit the model.
        RuntimeError: hgc is installed on one of the models already.
    """
    config = Config.of(config)
    unet, controlnet, pipe = _models_of(unet, controlnet)
    check_unet(unet)
    nets = controlnets(controlnet)
    for module in (unet, *nets):
        if _installation_of(module) is not None:
            raise RuntimeError(
                f"hgc is already installed on this {type(module).__name__}; call "
                "hgc.uninstall(unet, controlnet), or .uninstall() of the Installation, first. "
                "What two pipelines share is to be copied for each (copy.deepcopy)"
            )
    # a pipeline holds its UNet, which holds the installation
    held = weakref.ref(pipe) if pipe is not None and scheduler is None else None

    def current() -> Any:
        return scheduler if held is None else getattr(held(), "scheduler", None)

    installation = Installation(unet, nets, config, scheduler=current, trust=trust)
    installation._check_calibration()
    installation._install()
    return installation


def uninstall(unet: UNet2DConditionModel | DiffusionPipeline, controlnet: Any = None) -> None:
    """Undo :func:`install`: both models are exactly as they were.

    Args:
        unet: The UNet hgc was installed on, or a pipeline with it.
        controlnet: Its ControlNets; they are uninstalled with the UNet whether given or not.

    Raises:
        RuntimeError: hgc is not installed on ``unet``, or its forward was replaced since.
    """
    unet, controlnet, _ = _models_of(unet, controlnet)
    installation = _installation_of(unet)
    if installation is None:
        raise RuntimeError(f"hgc is not installed on this {type(unet).__name__}")
    installation.uninstall()
