"""The prompt grain: cross-attention whose keys, values, outputs or maps are reused.

What an evaluation reuses is not state of a processor. It travels with the text, as the
``encoder_hidden_states`` that the cross-attentions alone receive: a :class:`Text`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as processors
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel

import hgc_kernels
from hgc.run.cache import Cache, conditional_half

__all__ = ["PLAIN_PROCESSORS", "Processor", "Text", "cross_attentions", "unwrapped", "wrap"]

Tensor = torch.Tensor

# Processors of diffusers that do the same at every call, with each row of a batch by itself, and
# have no settings that change.
PLAIN_PROCESSORS = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.AttnAddedKVProcessor,
    processors.AttnAddedKVProcessor2_0,
    processors.FusedAttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
)


@dataclasses.dataclass
class Text:
    """The text of one evaluation of one network, and what its cross-attentions reuse.

    Attributes:
        hidden: ``encoder_hidden_states``, [B, S, D], for the rows computed now.
        cache: Of the run.
        prefix: Before the names of this network's entries in it.
        evaluation: Index of the evaluation.
        half: The rows computed now are the conditional half.
        keep_projections: Keys and values may be kept for the run (the text does not change).
        mode: ``"compute"``, ``"output"`` (reuse the projected output) or ``"map"`` (apply the
            cached map to fresh values).
        store: Whether the output of the layer of a name is kept for later evaluations; None: of
            none.
        map_format: Where given, maps are stored in that format.
        watch: Called with query [B, S_q, C], key [B, S_kv, C] and the number of heads, where a
            map is computed.
    """

    hidden: Tensor
    cache: Cache
    prefix: str
    evaluation: int
    half: bool = False
    keep_projections: bool = True
    mode: str = "compute"
    store: Callable[[str], bool] | None = None
    map_format: str | None = None
    watch: Callable[[Tensor, Tensor, int], None] | None = None

    def projections(self, name: str, attn: Attention) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, C] of one cross-attention, projected once a run."""
        if not self.keep_projections:
            return attn.to_k(self.hidden), attn.to_v(self.hidden)
        rows = "half" if self.half else "both"
        pair = []
        for kind, layer in (("key", attn.to_k), ("value", attn.to_v)):
            full = f"{self.prefix}{kind}/{name}/"
            held = self.cache.kept(full + rows)
            if held is None and self.half:
                whole = self.cache.kept(full + "both")
                held = None if whole is None else conditional_half(whole)
            if held is None:
                held = self.cache.keep(full + rows, layer(self.hidden))
            pair.append(held)
        return pair[0], pair[1]


class Processor:
    """Wraps the processor of a cross-attention. Without a :class:`Text` it is that processor."""

    _OWN = ("name", "inner", "_standard")

    def __init__(self, name: str, inner: Any) -> None:
        self.name = name
        self.inner = inner
        self._standard = type(inner) is AttnProcessor2_0

    def __setattr__(self, name: str, value: Any) -> None:
        # settings are those of the processor
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.inner, memo)

    def __reduce__(self) -> Any:
        # a pickled model is an uninstalled one
        return (_itself, (self.inner,))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # diffusers looks at the classes of processors, and makes new ones from them
        return type(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        text = encoder_hidden_states
        rest = (*args,) if temb is None and not args else (temb, *args)
        if not isinstance(text, Text):
            return self.inner(attn, hidden_states, text, attention_mask, *rest, **kwargs)
        entry = f"{text.prefix}attention/{self.name}"
        if text.mode == "output" and text.cache.has(entry, half=text.half):
            return text.cache.read(entry, half=text.half)
        if hidden_states.ndim != 3 or not self.is_simple(attn, attention_mask is not None):
            out = self.inner(attn, hidden_states, text.hidden, attention_mask, *rest, **kwargs)
        else:
            out = self._attend(attn, hidden_states, text)
        if text.store is not None and text.store(self.name):
            text.cache.write(entry, out, evaluation=text.evaluation, history=1, half=text.half)
        return out

    def is_simple(self, attn: Attention, masked: bool) -> bool:
        """Whether it attends itself: no option is set that only the wrapped processor has."""
        return (
            self._standard
            and not masked
            and attn.spatial_norm is None
            and attn.group_norm is None
            and not attn.norm_cross
            and attn.norm_q is None
            and attn.norm_k is None
            and not attn.residual_connection
        )

    def _attend(self, attn: Attention, hidden_states: Tensor, text: Text) -> Tensor:
        """AttnProcessor2_0 with keys and values projected once, and maps kept or applied."""
        batch, length, _ = hidden_states.shape
        entry = f"{text.prefix}map/{self.name}"
        applies_map = text.mode == "map" and text.cache.has(entry, half=text.half)
        # before keys and values, as diffusers does: adapters with dropout draw in this order
        query = None if applies_map else attn.to_q(hidden_states)
        key, value = text.projections(self.name, attn)
        head_dim = key.shape[-1] // attn.heads
        if query is None:
            stored = text.cache.read(entry, half=text.half)
            values = value.view(batch, -1, attn.heads, head_dim)
            out = hgc_kernels.apply_map(stored, values)
            return _project(attn, out.reshape(batch, length, -1))
        if text.watch is not None:
            text.watch(query, key, attn.heads)
        if text.map_format is not None:
            shape = (batch, -1, attn.heads, head_dim)
            buffer = hgc_kernels.new_map(
                batch,
                length,
                attn.heads,
                key.shape[1],
                format=text.map_format,
                device=query.device,
            )
            out = hgc_kernels.attend_and_store(
                query.view(shape), key.view(shape), value.view(shape), buffer
            )
            text.cache.put_buffer(entry, buffer, evaluation=text.evaluation, half=text.half)
            return _project(attn, out.reshape(batch, length, -1))
        query = query.view(batch, -1, attn.heads, head_dim).transpose(1, 2)
        key = key.view(batch, -1, attn.heads, head_dim).transpose(1, 2)
        value = value.view(batch, -1, attn.heads, head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        out = out.transpose(1, 2).reshape(batch, -1, attn.heads * head_dim)
        return _project(attn, out.to(query.dtype))


def _itself(value: Any) -> Any:
    return value


def _project(attn: Attention, out: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def wrap(name: str, inner: Any) -> Processor:
    """A :class:`Processor` around ``inner`` that takes the keyword arguments ``inner`` takes."""
    # Attention.forward hands a processor only the arguments its signature names.
    inner_names = set(inspect.signature(inner.__call__).parameters)
    extra = sorted(inner_names - set(inspect.signature(Processor.__call__).parameters))
    if not extra:
        return Processor(name, inner)
    call = Processor.__call__

    def __call__(self: Processor, *args: Any, **kwargs: Any) -> Tensor:
        return call(self, *args, **kwargs)

    parameters = list(inspect.signature(call).parameters.values())
    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in extra]
    keywords = parameters.pop()
    __call__.__signature__ = inspect.Signature([*parameters, *named, keywords])  # type: ignore[attr-defined]
    return type("Processor", (Processor,), {"__call__": __call__})(name, inner)


def unwrapped(processor: Any) -> Any:
    """The processor that hgc wrapped, or ``processor`` itself."""
    while isinstance(processor, Processor):
        processor = processor.inner
    return processor


def carries_text(model: torch.nn.Module) -> bool:
    """Whether the text of ``model`` reaches cross-attentions named ``attn2`` alone."""
    return not any(
        isinstance(module, DualTransformer2DModel)
        or (isinstance(module, BasicTransformerBlock) and module.only_cross_attention)
        for module in model.modules()
    )


def cross_attentions(model: torch.nn.Module) -> dict[str, Attention]:
    """The cross-attentions of a UNet or ControlNet, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention) and name.endswith(".attn2")
    }
