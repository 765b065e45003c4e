"""Whether the layers that an evaluation computes are what they were at the one before."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from hgc.models import attention as prompt_grain
from hgc.models.structure import UNetStructure
from hgc.models.unet import UP_BLOCKS, freeu_of
from hgc.run.run import Run
from hgc.run.verdict import Cost, Verdict
from hgc.watch.processors import Processors
from hgc.watch.weights import KeyValueWeights, Place, Sighting

__all__ = ["Layers"]


class Layers:
    """The processors of attentions, the weights that make keys and values (which change when a LoRA
    is fused or swapped), and FreeU. What an evaluation does not compute is looked at when one does.

    What was seen is compared in one pass for as long as nothing changes: each change begins another
    epoch, by which what other runs saw does not hold for them any more.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        models: Sequence[torch.nn.Module],
        structure: UNetStructure,
        processors: Processors,
    ) -> None:
        self._unet, self._structure, self._processors = unet, structure, processors
        self._cross_attentions = {
            id(model): [(attn, name) for name, attn in prompt_grain.cross_attentions(model).items()]
            for model in models
        }
        self._weights: dict[int, KeyValueWeights] = {}
        self._epochs = itertools.count(1)
        self._epoch = 0
        self._seen: dict[tuple[int, Any], Sighting] = {}
        self._at_depth: dict[int, list[int]] = {}
        self._up_blocks: dict[Any, list[str]] = {}

    def changed(self) -> None:
        """Something that is looked at was replaced."""
        self._epoch = next(self._epochs)

    def look(self, run: Run, model: torch.nn.Module, depth: Any = "full") -> list[Verdict]:
        """What ``run`` finds changed in the layers of ``model`` that are computed at ``depth``.
        Where processors were replaced, nothing but that: adopt them and look again."""
        key, epoch, last = (id(model), depth), self._epoch, run.last_seen
        seen = self._seen.get(key)
        if seen is not None and seen.epoch == epoch:
            if seen.is_same():
                if last.looked.get(key) == epoch:
                    return []
            else:
                self.changed()
                epoch = self._epoch
        if not self._processors.in_place(model, depth):
            self._processors.were_set = True
            return [Verdict("the attention processors changed", Cost.FEATURES)]
        found = []
        # read before it is compared: what changes in between is seen the next time
        freeu = self._freeu_places(depth) if model is self._unet else ()
        if model is self._unet and self._freeu_changed(last.freeu, depth):
            self.changed()
            found.append(Verdict("FreeU changed", Cost.FEATURES))
        known = self._weights.get(id(model))
        if known is None or not known.same(depth):
            computed = functools.partial(self._computed, model)
            text = model._modules, "encoder_hid_proj"
            known = KeyValueWeights(self._cross_attentions[id(model)], text, computed, known)
            self._weights[id(model)] = known
            self.changed()
        value = (known.generation, known.total)
        if last.weights.setdefault(id(model), value) != value:
            last.weights[id(model)] = value
            found.append(Verdict("the weights changed", Cost.FEATURES))
        placed = self._processors.places(model, depth)
        if freeu is not None and placed is not None and epoch == self._epoch:
            places = [
                *((holder, "processor", p) for holder, p in zip(*placed, strict=True)),
                *known.places(depth),
                *freeu,
            ]
            self._seen[key] = Sighting(epoch, places, *known.versions(places))
            last.looked[key] = epoch
        return found

    def draws(self, model: torch.nn.Module) -> bool:
        """Whether ``model`` makes keys and values at random, as it was last looked at."""
        known = self._weights.get(id(model))
        return known is not None and known.draws

    def _freeu_places(self, depth: Any) -> list[Place] | None:
        """Where FreeU is enabled in the up blocks that an evaluation of ``depth`` runs, and what
        is there; None where a block may have it elsewhere."""
        blocks = self._blocks()
        places: list[Place] = []
        for key in self._blocks_at(depth):
            block = blocks[key]
            if type(block) not in UP_BLOCKS:
                return None
            own = block.__dict__
            names = ("s1",) if own.get("s1") is None else ("s1", "s2", "b1", "b2")
            places += [(blocks, key, block), *((own, name, own.get(name)) for name in names)]
        return places

    def _freeu_changed(self, known: dict[str, Any], depth: Any) -> bool:
        """Whether FreeU is not what a run knows of it; it then knows."""
        blocks, changed = self._blocks(), False
        for key in self._blocks_at(depth):
            block = blocks[key]
            plain = type(block) in UP_BLOCKS and "s1" not in block.__dict__
            found = None if plain else freeu_of(block)
            changed = known.setdefault(key, found) != found or changed
            known[key] = found
        return changed

    def _blocks(self) -> dict[str, Any]:
        up_blocks: Any = self._unet._modules["up_blocks"]
        return up_blocks._modules

    def _blocks_at(self, depth: Any) -> Sequence[str]:
        """The up blocks, by their names in the list, that an evaluation of ``depth`` runs."""
        if depth not in self._up_blocks:
            decoder = self._structure.decoder
            layers = decoder if depth == "full" else decoder[len(decoder) - depth :]
            self._up_blocks[depth] = [*dict.fromkeys(str(block) for block, _ in layers)]
        return self._up_blocks[depth]

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
