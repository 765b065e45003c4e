"""The weights that make keys and values of cross-attention: whether they are what they were."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["KeyValueWeights", "Sighting", "all_are", "draws", "module_state"]

Place = tuple[dict[str, Any], str, Any]

_version = torch.Tensor._version.__get__  # type: ignore[attr-defined]


def all_are(found: Iterable[Any], known: Iterable[Any]) -> bool:
    """Whether each of ``found`` is the very object in ``known``."""
    return all(map(operator.is_, found, known))


class KeyValueWeights:
    """The weights that make keys and values in a model, as they were when they were last looked at:
    all parameters of ``to_k`` and ``to_v``, those of adapters around them too, and of what projects
    the text before.

    They are looked at in every evaluation, and modules are slow to look things up in, so where the
    weights are is kept too.

    Attributes:
        generation: Goes up where other weights are found.
        total: Sum of how often each was written to.
    """

    def __init__(
        self,
        attentions: list[tuple[Any, str]],
        text: tuple[dict[str, Any], str],
        computed: Callable[[Any], Sequence[int]],
        before: KeyValueWeights | None,
    ) -> None:
        self._computed = computed
        self._of_text = _places(*text)
        self._of_attentions = [
            [*_places(attn._modules, "to_k"), *_places(attn._modules, "to_v")]
            for attn, _ in attentions
        ]
        places = self.places("full")
        # those whose writes are counted, and how often each was written to
        self._versions = {
            id(w): w._version
            for _, _, w in places
            if isinstance(w, torch.Tensor) and not w.is_meta and not w.is_inference()
        }
        self.total = sum(self._versions.values())
        self.generation = 0
        # offloaded layer by layer, a weight is another object at every evaluation
        self._here = [w for _, _, w in places if isinstance(w, torch.Tensor) and not w.is_meta]
        if before is not None:
            same = len(self._here) == len(before._here) and all_are(self._here, before._here)
            self.generation = before.generation + (not same)
        self._layers = [
            layer
            for _, _, layer in places
            if isinstance(layer, torch.nn.Module)
            and any(isinstance(module, _DropoutNd) for module in layer.modules())
        ]
        self._sightings: dict[Any, Sighting] = {}

    def same(self, depth: Any) -> bool:
        """Whether those in the layers that are computed at ``depth`` are what they were."""
        if depth not in self._sightings:
            places = self.places(depth)
            self._sightings[depth] = Sighting(0, places, *self.versions(places))
        return self._sightings[depth].is_same()

    def places(self, depth: Any) -> list[Place]:
        """Where they are: a dictionary and a key in it each, and what is there."""
        found = list(self._of_text)
        for i in self._computed(depth):
            found += self._of_attentions[i]
        return found

    def versions(self, places: Iterable[Place]) -> tuple[list[Any], list[int]]:
        """Of what is at ``places``: weights whose writes are counted, and how often each was
        written to."""
        counted = [w for _, _, w in places if id(w) in self._versions]
        return counted, [self._versions[id(w)] for w in counted]

    @property
    def draws(self) -> bool:
        """Whether keys and values are made at random: of an adapter with dropout, in training."""
        return any(map(draws, self._layers))


def _places(parts: dict[str, Any], name: str) -> list[Place]:
    """The module ``name`` in ``parts``, and every parameter in it."""
    layer = parts.get(name)
    found: list[Place] = [(parts, name, layer)]
    for module in () if layer is None else layer.modules():
        found += [(module._parameters, key, value) for key, value in module._parameters.items()]
    return found


class Sighting:
    """What an evaluation that computes certain layers finds in them, to be compared in one pass.

    Attributes:
        epoch: Of the installation, when it was seen.
    """

    __slots__ = ("_counted", "_dicts", "_keys", "_values", "_versions", "epoch")

    def __init__(
        self, epoch: int, places: Sequence[Place], counted: list[Any], versions: list[int]
    ) -> None:
        self.epoch = epoch
        self._dicts = [each for each, _, _ in places]
        self._keys = [key for _, key, _ in places]
        self._values = [value for _, _, value in places]
        self._counted, self._versions = counted, versions

    def is_same(self) -> bool:
        """Whether everything is where it was, none of the weights written to."""
        return (
            all(map(operator.is_, map(dict.get, self._dicts, self._keys), self._values))
            and [*map(_version, self._counted)] == self._versions
        )


def draws(module: torch.nn.Module) -> bool:
    """Whether the output of ``module`` is made at random: it has dropout and is in training."""
    return any(
        isinstance(each, _DropoutNd) and each.training and each.p > 0 for each in module.modules()
    )


def module_state(module: torch.nn.Module) -> tuple[Any, ...]:
    """What the output of ``module`` depends on beside its input: weights and settings. A weight
    that is offloaded is another object at every evaluation, and stands for none."""
    found: list[Any] = []
    for each in module.modules():
        weights = each._parameters.values()
        found += [None if w is None or w.is_meta else w for w in weights]
        found += [value for name, value in vars(each).items() if name[0] != "_"]
    return tuple(found)
