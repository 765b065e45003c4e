"""Which attention processors are in place, and those that stand around them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from hgc.models import attention as prompt_grain
from hgc.models.structure import UNetStructure
from hgc.models.supported import has_compiled_parts
from hgc.warn import WarnOnce
from hgc.watch.trust import Trust
from hgc.watch.weights import all_are

__all__ = ["Processors"]

_processor = operator.itemgetter("processor")
_Places = tuple[list[dict[str, Any]], list[Any]]


class Processors:
    """The attention processors of the models; those of cross-attentions are wrapped.

    Attributes:
        generation: Goes up where others are in place.
        were_set: Some were, by diffusers' method: all are to be looked at.
        wraps: Whether cross-attentions can reuse, and are given the text in a wrapper.
        treat_rows_alike: Whether each row of a batch is known to be treated by itself.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        structure: UNetStructure,
        trust: Trust,
        warn: WarnOnce,
        *,
        reuse_attention: bool,
    ) -> None:
        self._reuse_attention = reuse_attention  # plans do
        self._models, self._structure, self._trust, self._warn = models, structure, trust, warn
        self.generation = 0
        self.were_set = False
        self.wraps = self.treat_rows_alike = True
        self._carry_text = all(prompt_grain.carries_text(model) for model in models)
        self._blocks_compiled = False
        self._wrapped: list[tuple[Any, Any]] = []  # an attention, and what wraps its processor
        self._attentions = {
            id(model): [(n, m) for n, m in model.named_modules() if isinstance(m, Attention)]
            for model in models
        }
        self._cross_attentions = {
            id(model): prompt_grain.cross_attentions(model) for model in models
        }
        # of all attentions of a model, and of those computed at a depth: where their processors
        # are, and what they must be
        self._placed: dict[int, dict[Any, _Places]] = {}
        self._closed = False

    def adopt(self) -> list[Any]:
        """Wrap those of all cross-attentions, as they are now; returns all, unwrapped."""
        # A block compiled by itself gets the text as it is: one graph serves all such blocks.
        if self._closed:
            return []
        compiled = any(map(has_compiled_parts, self._models))
        known = self._placed and compiled == self._blocks_compiled
        self.were_set = False
        if not known or not all(map(self.in_place, self._models)):
            self._blocks_compiled = compiled
            self._wrap()
            for model, attentions in self._attentions.items():
                # a processor with weights is a submodule
                holders = [
                    attn._modules if "processor" in attn._modules else attn.__dict__
                    for _, attn in attentions
                ]
                self._placed[model] = {"full": (holders, [*map(_processor, holders)])}
            self.generation += 1
        found = [each for placed in self._placed.values() for each in placed["full"][1]]
        self.treat_rows_alike = all(map(self._trust.treats_rows_alike, found))
        return [*map(prompt_grain.unwrapped, found)]

    def _wrap(self) -> None:
        found = [
            (name, attn)
            for model in self._models
            for name, attn in self._cross_attentions[id(model)].items()
        ]
        current = {id(attn): wrapper for attn, wrapper in self._wrapped}
        if (
            not self._blocks_compiled
            and len(found) == len(self._wrapped)
            and all(current.get(id(attn)) is attn.processor for _, attn in found)
        ):
            return
        self._restore()
        # A processor with weights is a submodule; wrapping it would take them out of the model.
        weighty = any(isinstance(attn.processor, torch.nn.Module) for _, attn in found)
        self.wraps = (
            self._carry_text
            and not weighty
            and not self._blocks_compiled
            and not self._trust.vouches_around_attention()
        )
        if not self.wraps and not weighty:
            return
        if not all(self._trust.knows(attn.processor) for _, attn in found):
            return  # runs are left to diffusers
        if weighty and self._reuse_attention:
            self._warn(
                "processors",
                "cross-attention processors with weights of their own (an IP-Adapter) are in "
                "place: cross-attention is computed, everything else follows the plan",
            )
        if weighty:
            return
        for name, attn in found:
            attn.processor = prompt_grain.wrap(name, attn.processor)
            self._wrapped.append((attn, attn.processor))

    def close(self) -> None:
        """Put back what was wrapped, and wrap nothing any more."""
        self._closed = True
        self._restore()

    def _restore(self) -> None:
        """Put back what was wrapped; a user may have saved a wrapper and put it elsewhere."""
        for model in self._models:
            for module in model.modules():
                processor = getattr(module, "processor", None)
                original = prompt_grain.unwrapped(processor)
                if original is not processor:
                    module.processor = original
        self._wrapped.clear()
        self._placed = {}

    def in_place(self, model: torch.nn.Module, depth: Any = "full") -> bool:
        """Whether those of the attentions of ``model`` that are computed at ``depth`` are those
        that were adopted."""
        found = self.places(model, depth)
        try:
            return found is not None and all_are(map(_processor, found[0]), found[1])
        except KeyError:  # one with weights took the place of one without, or the reverse
            return False

    def places(self, model: torch.nn.Module, depth: Any) -> _Places | None:
        """Where they are, and what is there; None where none were adopted."""
        placed = self._placed.get(id(model))
        if placed is None:
            return None
        found = placed.get(depth)
        if found is None:
            begin = self._structure.attention_blocks(depth)
            names = [name for name, _ in self._attentions[id(model)]]
            both = [*zip(*placed["full"], strict=True)]
            part = [each for name, each in zip(names, both, strict=True) if name.startswith(begin)]
            found = placed[depth] = ([holder for holder, _ in part], [p for _, p in part])
        return found
