"""Layers of diffusers divide what they return by a factor that is 1 in nearly every model: a launch
and two passes over memory for the same bits. While hgc runs them they do not.

x / 1 is x for every float, save for the payload of a NaN, and for denormal numbers where
`torch.set_flush_denormal` is on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from hgc.models.structure import UNetStructure, modules_inside

__all__ = ["factors_of", "undivided"]

_FACTORS = {ResnetBlock2D: "output_scale_factor", Attention: "rescale_output_factor"}
_Place = tuple[dict[str, Any], str]


class _One(torch.Tensor):
    """One. A tensor divided by it is that tensor itself; all else sees a tensor that holds 1.0."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # Python asks a subclass of what stands on the left first
    def __rtruediv__(self, other: Any) -> Any:
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        return 1.0

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (float, (1.0,))


_ONE = torch.tensor(1.0).as_subclass(_One)


def factors_of(
    model: Any, structure: UNetStructure, depth: int | None, *, encodes: bool
) -> list[_Place]:
    """Where the factors lie of what is run: of all layers of ``model``, or of the UNet at
    ``depth``. None where a layer is compiled by itself, which would be compiled again.

    ``encodes``: The skips are computed too.
    """
    if depth is None:
        parts = modules_inside(model)
    else:
        layers = [
            layer
            for name, i in structure.layers(depth, encodes=encodes)
            for kind in ("resnets", "attentions")
            for layer in list(getattr(model.get_submodule(name), kind, ()))[i : i + 1]
        ]
        parts = [part for layer in layers for part in (layer, *modules_inside(layer))]
    if any(
        part.__dict__.get("_compiled_call_impl") is not None
        or type(part).__name__ == "OptimizedModule"
        for part in parts
    ):
        return []
    return [(part.__dict__, _FACTORS[type(part)]) for part in parts if type(part) in _FACTORS]


@contextlib.contextmanager
def undivided(places: Iterable[_Place]) -> Iterator[None]:
    """Within the block the layers whose factors lie in ``places`` do not divide by 1."""
    held = [
        (own, name, factor)
        for own, name in places
        for factor in [own.get(name)]
        # another thread may have put ours there, and takes it away when it likes
        if factor is not _ONE and isinstance(factor, (int, float)) and factor == 1
    ]
    for own, name, _ in held:
        own[name] = _ONE
    try:
        yield
    finally:
        for own, name, factor in held:
            if own.get(name) is _ONE:
                own[name] = factor
