"""Which layers a UNet has, read once at install."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusers import UNet2DConditionModel

__all__ = ["UNetStructure", "adapter_state", "modules_inside"]


def modules_inside(module: Any) -> list[Any]:
    """All modules inside of ``module``. Walked once a run: quicker than ``modules()``."""
    found = [part for part in module._modules.values() if part is not None]
    for part in found:  # grows while it is walked
        if part._modules:
            found += [inner for inner in part._modules.values() if inner is not None]
    return found


def adapter_state(layer: Any) -> tuple[Any, ...]:
    """What the adapters of a layer of peft's add now: which are active, their scales, whether they
    are merged or switched off."""
    return (
        tuple(layer.active_adapters),
        tuple(getattr(layer, "scaling", {}).items()),
        bool(layer.merged),
        bool(layer.disable_adapters),
    )


@dataclasses.dataclass(frozen=True)
class UNetStructure:
    """Positions in a UNet, counted from the outside: decoder layer ``k`` of depth ``k``.

    Attributes:
        decoder: For each decoder layer from the innermost on, its (up block, layer in it).
        encoder: For each skip from the outermost on, its (down block, layer in it); the layer
            equals the number of layers where the skip is the downsampler's output. Skip 0 is
            ``conv_in``'s output and has block -1.
    """

    decoder: tuple[tuple[int, int], ...]
    encoder: tuple[tuple[int, int], ...]

    @property
    def num_layers(self) -> int:
        """Decoder layers, and skips: 12 on SD1.5, 9 on SDXL."""
        return len(self.decoder)

    def boundary(self, depth: int) -> tuple[int, int]:
        """(up block, layer in it) of the first decoder layer computed at ``depth``."""
        return self.decoder[self.num_layers - depth]

    def layers(self, depth: int, *, encodes: bool = True) -> list[tuple[str, int]]:
        """The layers computed at ``depth``, as (name of the block, layer in it).

        ``encodes``: The skips are computed too.
        """
        encoder = self.encoder[:depth] if encodes else ()
        return [
            *((f"up_blocks.{b}", i) for b, i in self.decoder[self.num_layers - depth :]),
            *((f"down_blocks.{b}", i) for b, i in encoder if b >= 0),
        ]

    def attention_blocks(self, depth: int, *, encodes: bool = True) -> tuple[str, ...]:
        """What the names of the attentions computed at ``depth`` begin with."""
        layers = self.layers(depth, encodes=encodes)
        return tuple(f"{block}.attentions.{i}." for block, i in layers)

    @classmethod
    def of(cls, unet: UNet2DConditionModel) -> UNetStructure:
        """Read the structure of ``unet``."""
        decoder = tuple(
            (b, layer)
            for b, block in enumerate(unet.up_blocks)
            for layer in range(len(block.resnets))
        )
        encoder = [(-1, 0)]
        for b, block in enumerate(unet.down_blocks):
            count = len(block.resnets) + (block.downsamplers is not None)
            encoder += [(b, layer) for layer in range(count)]
        if len(encoder) != len(decoder):
            raise TypeError(
                f"unet has {len(encoder)} encoder skips and {len(decoder)} decoder layers that "
                "read one; hgc needs them to be equal"
            )
        return cls(decoder, tuple(encoder))
