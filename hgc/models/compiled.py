"""Compiled evaluations: ``torch.compile`` sees one function for each kind of evaluation."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hgc.models.graphs import Function, GraphKey, Networks

__all__ = ["CompiledNetworks"]


def _named(function: Callable[..., Any], name: str) -> Function:
    """``function`` with a code of its own. Dynamo counts recompiles, and remembers which sizes
    changed, by the code's name and place: kinds must not share them."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name, co_qualname=name)
    return types.FunctionType(
        code, function.__globals__, name, function.__defaults__, function.__closure__
    )


def _nothing() -> None:
    pass


class CompiledNetworks(Networks):
    """Networks whose functions are compiled. What they return may lie in memory that the next call
    overwrites: CUDA graphs do that.

    Args:
        unet: The UNet.
        nets: Its ControlNets.
        options: For ``torch.compile``.
    """

    def __init__(self, unet: Any, nets: Iterable[Any], options: dict[str, Any]) -> None:
        self._options: dict[str, Any] = {"fullgraph": True, **options}
        torch.compile(_nothing, **self._options)  # raises what is wrong with the options now
        super().__init__(unet, nets)
        self._compiled: dict[GraphKey, Callable[..., Any]] = {}

    @property
    def kinds(self) -> tuple[GraphKey, ...]:
        """The keys of the kinds of evaluations seen so far, each with a compiled function."""
        return tuple(self._compiled)

    def _shape(self, sample: torch.Tensor) -> tuple[int, ...] | None:
        # A function a size: torch would compile the second size with dynamic shapes, which are
        # slower, and count sizes towards its limit of recompiles.
        return None if self._options.get("dynamic") else super()._shape(sample)

    def _function(self, key: GraphKey, make: Callable[[], Function]) -> Function:
        compiled = self._compiled.get(key)
        if compiled is None:
            same = sum(other.name == key.name for other in self._compiled)
            name = f"{key.name}_{same}" if same else key.name
            compiled = torch.compile(_named(make(), name), **self._options)
            self._compiled[key] = compiled
        return compiled
