"""One function for each kind of evaluation that the executor asks for, to be compiled or captured.

The executor decides, and reads and writes the cache; what it calls is pure. So each kind of call
(which network, how deep, whole or half batch, what goes in and out) becomes a function of tensors
alone. A kind is never told apart inside a graph: nothing in it changes from evaluation to
evaluation but tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hgc.models.attention import Processor, Text, _is_plain, cross_attentions
from hgc.models.controlnet import control_function
from hgc.models.structure import UNetStructure
from hgc.models.unet import Residuals, run_unet

__all__ = ["Kind", "Networks"]

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tells one function from another.

    Attributes:
        network: ``"unet"``, or ``"controlnet"`` and its number.
        half: The rows are the conditional half.
        depth: Decoder layers computed; None for everything.
        reuses_encoder: The skips come from the cache.
        terms: How many residuals are added to each skip, and to the middle block's output last;
            None without residuals.
        capture: Names of the intermediate tensors that are returned.
        mode: Of the cross-attentions: ``"compute"``, ``"output"`` or ``"map"``; None where the
            text is handed over as it is.
        given: Names of the keys, values, outputs and maps that come from the cache.
        store: Cross-attentions whose output is returned.
        map_format: Of the maps that are returned; None for no maps.
        intrablock: How many residuals of T2I-Adapters there are.
        shape: Of the sample; None where one graph is to serve all (``dynamic=True``).
    """

    network: str
    half: bool
    depth: int | None = None
    reuses_encoder: bool = False
    terms: tuple[int, ...] | None = None
    capture: tuple[str, ...] = ()
    mode: str | None = None
    given: frozenset[str] = frozenset()
    store: frozenset[str] = frozenset()
    map_format: str | None = None
    intrablock: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """A short name, which profilers and torch's logs show."""
        parts = [self.network]
        if self.network == "unet":
            parts.append("full" if self.depth is None else f"depth{self.depth}")
        if self.reuses_encoder:
            parts.append("reused_encoder")
        if self.mode in ("output", "map"):
            parts.append(f"reused_{self.mode}")
        if self.store:
            parts.append("storing_attention")
        if self.map_format is not None:
            parts.append("storing_maps")
        if self.half:
            parts.append("half")
        return "_".join(parts)


class _Exchange:
    """Stands for the run's cache in a graph: what may be read was given, what is written is taken.
    Names are without the network's prefix."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self.given = given
        self.taken: dict[str, Tensor] = {}

    def has(self, name: str, *, half: bool) -> bool:
        return name in self.given

    def read(self, name: str, *, half: bool = False) -> Tensor:
        return self.given[name]

    def write(
        self, name: str, tensor: Tensor, *, evaluation: int, history: int, half: bool
    ) -> None:
        self.taken[name] = tensor

    def put_buffer(self, name: str, buffer: Tensor, *, evaluation: int, half: bool) -> bool:
        self.taken[name] = buffer
        return True

    def kept(self, name: str) -> Tensor | None:
        return self.given.get(name)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


def _wrap_in_graph(kind: Kind, exchange: _Exchange) -> Callable[[Any], Any] | None:
    """What makes the text carry ``exchange`` to the cross-attentions, within a graph."""
    mode = kind.mode
    if mode is None:
        return None

    def wrap(text: Tensor) -> Text:
        return Text(
            hidden=text,
            cache=exchange,  # type: ignore[arg-type]
            prefix="",
            evaluation=0,
            half=kind.half,
            mode=mode,
            store=kind.store.__contains__ if kind.store else None,
            map_format=kind.map_format,
        )

    return wrap


def _unet_function(unet: Any, structure: UNetStructure, kind: Kind) -> Callable[..., Any]:
    def evaluate(
        sample: Tensor,
        timestep: Any,
        text: Any,
        given: dict[str, Tensor],
        hidden: Tensor | None,
        skips: list[Tensor] | None,
        down: list[list[Tensor]],
        mid: list[Tensor],
        intrablock: list[Tensor] | None,
        arguments: dict[str, Any],
    ) -> Any:
        exchange = _Exchange(given)
        residuals = None
        if kind.terms is not None:
            residuals = Residuals([[(v, 1.0) for v in d] for d in down], [(v, 1.0) for v in mid])
        extra = None if intrablock is None else list(intrablock)
        out, captured = run_unet(
            unet, structure, sample, timestep, text, _wrap_in_graph(kind, exchange),
            depth=kind.depth, hidden=hidden, skips=skips, residuals=residuals,
            capture=kind.capture, intrablock_residuals=extra, **arguments,
        )  # fmt: skip
        return out, captured, exchange.taken, len(extra or ())

    return evaluate


def _control_function(net: Any, kind: Kind) -> Callable[..., Any]:
    run_network = control_function(net)

    def evaluate(
        sample: Tensor,
        timestep: Any,
        text: Any,
        given: dict[str, Tensor],
        hint: Tensor | list[Tensor],
        arguments: dict[str, Any],
    ) -> Any:
        exchange = _Exchange(given)
        wrap = _wrap_in_graph(kind, exchange)
        residuals = run_network(net, sample, timestep, text, hint, wrap, **arguments)
        return residuals, exchange.taken

    return evaluate


class Networks:
    """Stands for `hgc.models.unet.run_unet` and `run_controlnet` in an installation that was
    compiled or captured.

    Args:
        unet: The UNet.
        nets: Its ControlNets.
    """

    # Whether what a function returns lies in memory of its caller. What does not is valid until the
    # next call of any network: the executor copies captured tensors into the run's buffers, and
    # scales residuals into new memory, before that; all else is copied here.
    hands_over = False

    def __init__(self, unet: Any, nets: Iterable[Any]) -> None:
        models = (unet, *nets)
        names = ("unet", *(f"controlnet{i}" for i in range(len(models) - 1)))
        self._networks = {id(model): name for model, name in zip(models, names, strict=True)}
        self._attentions = {id(model): list(cross_attentions(model).items()) for model in models}

    def _function(self, kind: Kind, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """What computes an evaluation of ``kind`` as the function does that ``make`` makes."""
        raise NotImplementedError

    def _shape(self, sample: Tensor) -> tuple[int, ...] | None:
        return tuple(sample.shape)

    def _owned(self, tensor: Tensor) -> Tensor:
        return tensor if self.hands_over else tensor.clone()

    def clear(self) -> None:
        """Free what can be made again."""

    def begin_run(self) -> None:
        """A run begins."""

    def run_unet(
        self,
        half: bool,
        unet: Any,
        structure: UNetStructure,
        sample: Tensor,
        timestep: Any,
        text: Any,
        wrap_text: Callable[[Any], Any] | None = None,
        *,
        depth: int | None = None,
        hidden: Tensor | None = None,
        skips: list[Tensor] | None = None,
        residuals: Residuals | None = None,
        capture: tuple[str, ...] = (),
        intrablock_residuals: list[Tensor] | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`hgc.models.unet.run_unet`; ``half`` says that the rows are the conditional half."""
        added = arguments.get("added_cond_kwargs")
        processed = unet.process_encoder_hidden_states(text, added) if wrap_text else text
        spec, given, store = self._text(
            unet, wrap_text, processed, arguments, _visited(structure, depth, skips is None)
        )
        down: list[list[Tensor]] = []
        mid: list[Tensor] = []
        terms = None
        if residuals is not None:
            # a scale that changes must not change the graph
            down = [[v if s == 1.0 else v * s for v, s in skip] for skip in residuals.down]
            mid = [v if s == 1.0 else v * s for v, s in residuals.mid]
            terms = (*map(len, down), len(mid))
        kind = Kind(
            network=self._networks[id(unet)],
            half=half,
            depth=depth,
            reuses_encoder=skips is not None,
            terms=terms,
            capture=capture,
            mode=None if spec is None else spec.mode,
            given=frozenset(given),
            store=store,
            map_format=None if spec is None else spec.map_format,
            intrablock=len(intrablock_residuals or ()),
            shape=self._shape(sample),
        )
        function = self._function(kind, lambda: _unet_function(unet, structure, kind))
        extra = list(intrablock_residuals) if intrablock_residuals else None
        out, captured, taken, left = function(
            sample, timestep, text, given, hidden, skips, down, mid, extra, arguments
        )
        if extra is not None and intrablock_residuals is not None:
            # diffusers takes them out of the caller's list
            del intrablock_residuals[: len(extra) - left]
        self._write(spec, taken)
        return self._owned(out), captured

    def run_controlnet(
        self,
        half: bool,
        net: Any,
        sample: Tensor,
        timestep: Any,
        text: Any,
        hint: Tensor | list[Tensor],
        wrap_text: Callable[[Any], Any] | None = None,
        **arguments: Any,
    ) -> list[Tensor]:
        """`hgc.models.controlnet.run_controlnet` or its like for a ControlNet-Union; ``half`` as
        for the UNet."""
        spec, given, store = self._text(net, wrap_text, text, arguments, None)
        kind = Kind(
            network=self._networks[id(net)],
            half=half,
            mode=None if spec is None else spec.mode,
            given=frozenset(given),
            store=store,
            map_format=None if spec is None else spec.map_format,
            shape=self._shape(sample),
        )
        function = self._function(kind, lambda: _control_function(net, kind))
        residuals, taken = function(sample, timestep, text, given, hint, arguments)
        self._write(spec, taken)
        return list(residuals)

    def _text(
        self,
        net: Any,
        wrap_text: Callable[[Any], Any] | None,
        text: Any,
        arguments: dict[str, Any],
        visited: tuple[str, ...] | None,
    ) -> tuple[Text | None, dict[str, Tensor], frozenset[str]]:
        """What the text of this evaluation carries, the tensors that its cross-attentions read from
        the cache (projected now where they are not kept yet), and those whose output is stored.

        ``visited``: beginnings of the names of the cross-attentions that are run; None for all.
        """
        spec = None if wrap_text is None else wrap_text(text)
        if not isinstance(spec, Text):
            return None, {}, frozenset()
        rows = "half" if spec.half else "both"
        given: dict[str, Tensor] = {}
        names = []
        for name, attn in self._attentions[id(net)]:
            if visited is not None and not name.startswith(visited):
                continue
            names.append(name)
            output, mapped = f"attention/{name}", f"map/{name}"
            if spec.mode == "output" and spec.cache.has(spec.prefix + output, half=spec.half):
                given[output] = spec.cache.read(spec.prefix + output, half=spec.half)
                continue
            if spec.mode == "map" and spec.cache.has(spec.prefix + mapped, half=spec.half):
                given[mapped] = spec.cache.read(spec.prefix + mapped, half=spec.half)
            if spec.keep_projections and _is_projected(attn, arguments):
                key, value = spec.projections(name, attn)
                given[f"key/{name}/{rows}"], given[f"value/{name}/{rows}"] = key, value
        store = frozenset(n for n in names if spec.store is not None and spec.store(n))
        return spec, given, store

    def _write(self, spec: Text | None, taken: dict[str, Tensor]) -> None:
        """Put what a graph stored into the run's cache."""
        if spec is None:
            return
        at: dict[str, Any] = {"evaluation": spec.evaluation, "half": spec.half}
        for name, tensor in taken.items():
            if name.startswith("map/"):
                spec.cache.put_buffer(spec.prefix + name, self._owned(tensor), **at)
            else:
                spec.cache.write(spec.prefix + name, tensor, history=1, **at)


def _is_projected(attn: Any, arguments: dict[str, Any]) -> bool:
    """Whether :class:`~hgc.models.attention.Processor` reads the projections of ``attn``."""
    processor = attn.processor
    masked = arguments.get("encoder_attention_mask") is not None
    standard = isinstance(processor, Processor) and processor._standard
    return standard and not masked and _is_plain(attn)


def _visited(structure: UNetStructure, depth: int | None, encodes: bool) -> tuple[str, ...] | None:
    """Beginnings of the names of the attentions run at ``depth``; None for all."""
    if depth is None:
        return None
    layers = [
        f"up_blocks.{b}.attentions.{layer}."
        for b, layer in structure.decoder[structure.num_layers - depth :]
    ]
    if encodes:
        layers += [f"down_blocks.{b}.attentions.{j}." for b, j in structure.encoder[:depth]]
    return tuple(layers)
