"""The weights that make keys and values of cross-attention: whether they are what they were."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

__all__ = ["KeyValueWeights", "Sighting", "all_are", "module_state"]

Place = tuple[dict[str, Any], str, Any]

# Looked up in every evaluation, without a step of the interpreter for each.
_to_k, _to_v, _weight = map(operator.methodcaller, ("get",) * 3, ("to_k", "to_v", "weight"))
_version = torch.Tensor._version.__get__  # type: ignore[attr-defined]


def all_are(found: Iterable[Any], known: list[Any]) -> bool:
    """Whether each of ``found`` is the very object in ``known``."""
    return all(map(operator.is_, found, known))


class KeyValueWeights:
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
        before: KeyValueWeights | None,
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
            same = len(self._here) == len(before._here) and all_are(self._here, before._here)
            self.generation = before.generation + (not same)
        self._parts: dict[Any, tuple[list[Any], ...]] = {}

    def same(self, depth: Any) -> bool:
        """Whether those in the layers that are computed at ``depth`` are what they were."""
        modules, holders, known, counted, versions = self._at(depth)
        found = itertools.chain(map(_to_k, modules), map(_to_v, modules), map(_weight, holders))
        return all_are(found, known) and [*map(_version, counted)] == versions

    def places(self, depth: Any) -> Iterator[Place]:
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


class Sighting:
    """What an evaluation that computes certain layers finds in them, to be compared in one pass.

    Attributes:
        epoch: Of the installation, when it was seen.
    """

    __slots__ = ("_counted", "_dicts", "_keys", "_values", "_versions", "epoch")

    def __init__(
        self,
        epoch: int,
        places: list[Place],
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
            all(map(operator.is_, map(dict.get, self._dicts, self._keys), self._values))
            and [*map(_version, self._counted)] == self._versions
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
