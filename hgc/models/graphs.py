"""One function of tensors for each kind of evaluation, to be compiled or captured.

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

from hgc.models.attention import Processor, Text, cross_attentions
from hgc.models.controlnet import control_function
from hgc.models.layer_calls import TimeColumns, TimeRow
from hgc.models.structure import UNetStructure
from hgc.models.unet import Residuals, run_unet

__all__ = ["Function", "GraphKey", "Networks"]

Tensor = torch.Tensor
# of tensors, plain containers of them and settings
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class GraphKey:
    """What tells one kind of evaluation, and so one graph, from another.

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
        watched: Queries and keys of the cross-attentions are returned.
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
    watched: bool = False
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
    """Stands for the run's cache within a graph: what may be read was given, what is written is
    taken out. Names are without the network's prefix."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self.given = given
        self.taken: dict[str, Tensor] = {}
        self.watched: list[tuple[Tensor, Tensor, int]] = []

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

    def watch(self, query: Tensor, key: Tensor, heads: int) -> None:
        self.watched.append((query, key, heads))


def _wrap_in_graph(key: GraphKey, exchange: _Exchange) -> Callable[[Any], Any] | None:
    """What makes the text carry ``exchange`` to the cross-attentions, within a graph."""
    mode = key.mode
    if mode is None:
        return None

    def wrap(text: Tensor) -> Text:
        return Text(
            hidden=text,
            cache=exchange,  # type: ignore[arg-type]
            prefix="",
            evaluation=0,
            half=key.half,
            mode=mode,
            store=key.store.__contains__ if key.store else None,
            map_format=key.map_format,
            watch=exchange.watch if key.watched else None,
        )

    return wrap


def _unet_function(
    unet: Any, structure: UNetStructure, key: GraphKey, fused: bool, columns: TimeColumns | None
) -> Function:
    def evaluate(
        sample: Tensor,
        timestep: Any,
        row: Tensor | None,
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
        if key.terms is not None:
            residuals = Residuals([[(v, 1.0) for v in d] for d in down], [(v, 1.0) for v in mid])
        extra = None if intrablock is None else list(intrablock)
        out, captured = run_unet(
            unet, structure, sample, timestep, text, _wrap_in_graph(key, exchange),
            depth=key.depth, hidden=hidden, skips=skips, residuals=residuals,
            capture=key.capture, fused=fused, time=_time_row(row, columns),
            intrablock_residuals=extra, **arguments,
        )  # fmt: skip
        return out, captured, exchange.taken, exchange.watched, len(extra or ())

    return evaluate


def _time_row(row: Tensor | None, columns: TimeColumns | None) -> TimeRow | None:
    return None if row is None or columns is None else TimeRow(row, columns)


def _control_function(
    net: Any, key: GraphKey, fused: bool, columns: TimeColumns | None
) -> Function:
    run_network = control_function(net)

    def evaluate(
        sample: Tensor,
        timestep: Any,
        row: Tensor | None,
        text: Any,
        given: dict[str, Tensor],
        hint: Tensor | list[Tensor],
        arguments: dict[str, Any],
    ) -> Any:
        exchange = _Exchange(given)
        wrap = _wrap_in_graph(key, exchange)
        residuals = run_network(
            net, sample, timestep, text, hint, wrap,
            fused=fused, time=_time_row(row, columns), **arguments,
        )  # fmt: skip
        return residuals, exchange.taken, exchange.watched

    return evaluate


class Networks:
    """Runs a UNet and its ControlNets by one function of tensors for each kind of evaluation.

    What compiles or captures these functions is a subclass. The executor calls :meth:`run_unet`
    and :meth:`run_controlnet` where it would call the pure functions of the same names.

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

    def _function(self, key: GraphKey, make: Callable[[], Function]) -> Function:
        """What computes evaluations of the kind ``key`` as the function that ``make`` makes."""
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
        fused: bool = False,
        time: TimeRow | None = None,
        intrablock_residuals: list[Tensor] | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :func:`hgc.models.unet.run_unet`; ``half``: the rows are the conditional half."""
        added = arguments.get("added_cond_kwargs")
        processed = unet.process_encoder_hidden_states(text, added) if wrap_text else text
        blocks: tuple[str, ...] = ("",)
        if depth is not None:
            blocks = structure.attention_blocks(depth, encodes=skips is None)
        spec, given, of_text = self._text(unet, wrap_text, processed, arguments, blocks)
        down: list[list[Tensor]] = []
        mid: list[Tensor] = []
        terms = None
        if residuals is not None:
            # a scale that changes must not change the graph
            down = [[v if s == 1.0 else v * s for v, s in skip] for skip in residuals.down]
            mid = [v if s == 1.0 else v * s for v, s in residuals.mid]
            terms = (*map(len, down), len(mid))
        extra = list(intrablock_residuals) if intrablock_residuals else None
        key = GraphKey(
            network=self._networks[id(unet)],
            half=half,
            depth=depth,
            reuses_encoder=skips is not None,
            terms=terms,
            capture=capture,
            intrablock=len(extra or ()),
            shape=self._shape(sample),
            **of_text,
        )
        row, columns = (None, None) if time is None else (time.row, time.columns)
        function = self._function(key, lambda: _unet_function(unet, structure, key, fused, columns))
        out, captured, taken, watched, left = function(
            sample, timestep, row, text, given, hidden, skips, down, mid, extra, arguments
        )
        if extra is not None and intrablock_residuals is not None:
            # diffusers takes them out of the caller's list
            del intrablock_residuals[: len(extra) - left]
        self._write(spec, taken, watched)
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
        *,
        fused: bool = False,
        time: TimeRow | None = None,
        **arguments: Any,
    ) -> list[Tensor]:
        """See :func:`hgc.models.controlnet.run_controlnet` and, for a ControlNet-Union,
        :func:`~hgc.models.controlnet.run_controlnet_union`; ``half``: the rows are the conditional
        half."""
        spec, given, of_text = self._text(net, wrap_text, text, arguments)
        key = GraphKey(
            network=self._networks[id(net)], half=half, shape=self._shape(sample), **of_text
        )
        row, columns = (None, None) if time is None else (time.row, time.columns)
        function = self._function(key, lambda: _control_function(net, key, fused, columns))
        residuals, taken, watched = function(sample, timestep, row, text, given, hint, arguments)
        self._write(spec, taken, watched)
        return list(residuals)

    def _text(
        self,
        net: Any,
        wrap_text: Callable[[Any], Any] | None,
        text: Any,
        arguments: dict[str, Any],
        blocks: tuple[str, ...] = ("",),
    ) -> tuple[Text | None, dict[str, Tensor], dict[str, Any]]:
        """What the text of this evaluation carries, the tensors that its cross-attentions read from
        the cache (projected now where they are not kept yet), and what of it is part of the key.

        ``blocks``: What the names of the cross-attentions begin with that are run.
        """
        spec = None if wrap_text is None else wrap_text(text)
        if not isinstance(spec, Text):
            return None, {}, {}
        rows = "half" if spec.half else "both"
        masked = arguments.get("encoder_attention_mask") is not None
        given: dict[str, Tensor] = {}
        names = []
        for name, attn in self._attentions[id(net)]:
            if not name.startswith(blocks):
                continue
            names.append(name)
            output, mapped = f"attention/{name}", f"map/{name}"
            if spec.mode == "output" and spec.cache.has(spec.prefix + output, half=spec.half):
                given[output] = spec.cache.read(spec.prefix + output, half=spec.half)
                continue
            if spec.mode == "map" and spec.cache.has(spec.prefix + mapped, half=spec.half):
                given[mapped] = spec.cache.read(spec.prefix + mapped, half=spec.half)
            processor = attn.processor
            simple = isinstance(processor, Processor) and processor.is_simple(attn, masked)
            if spec.keep_projections and simple:
                key, value = spec.projections(name, attn)
                given[f"key/{name}/{rows}"], given[f"value/{name}/{rows}"] = key, value
        of_text = {
            "mode": spec.mode,
            "given": frozenset(given),
            "store": frozenset(n for n in names if spec.store is not None and spec.store(n)),
            "map_format": spec.map_format,
            "watched": spec.watch is not None,
        }
        return spec, given, of_text

    def _write(
        self,
        spec: Text | None,
        taken: dict[str, Tensor],
        watched: list[tuple[Tensor, Tensor, int]],
    ) -> None:
        """Put what a graph stored into the run's cache, and show what is watched."""
        if spec is None:
            return
        at: dict[str, Any] = {"evaluation": spec.evaluation, "half": spec.half}
        for name, tensor in taken.items():
            if name.startswith("map/"):
                spec.cache.put_buffer(spec.prefix + name, self._owned(tensor), **at)
            else:
                spec.cache.write(spec.prefix + name, tensor, history=1, **at)
        if spec.watch is not None:
            for query, key, heads in watched:
                spec.watch(query, key, heads)
