"""UNets and ControlNets by name or folder, on the meta device: their shapes without weights."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hgc.planning.config import Config
    from hgc.report.macs import Macs

__all__ = ["KNOWN", "ModelError", "ModelShapes", "load_shapes", "sd15_macs"]

_SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
KNOWN: dict[str, dict[str, Any]] = {
    "sd15": {"unet": {**_SD15, "sample_size": 64}, "controlnet": _SD15},
    "sdxl": {
        "unet": {
            **_SDXL,
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "sample_size": 128,
        },
        "controlnet": _SDXL,
    },
}


class ModelError(ValueError):
    """A model's name or folder is not one that can be used; the message says which can."""


@dataclasses.dataclass(frozen=True)
class ModelShapes:
    """A UNet with its ControlNets on the meta device.

    Attributes:
        name: What was asked for.
        unet: On the meta device.
        controlnets: On the meta device; empty where the model has none.
    """

    name: str
    unet: Any  # diffusers' classes are untyped where they inherit from torch's
    controlnets: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Pixels along a side of the pictures it was made for."""
        side = self.unet.config.sample_size or 64
        nets = self.controlnets
        factor = 2 ** (len(nets[0].config.conditioning_embedding_out_channels) - 1) if nets else 8
        return int(side if isinstance(side, int) else side[0]) * factor


def _class_in(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("_class_name"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {error}") from None


def _on_meta(cls: Any, folder: Path) -> Any:
    import torch

    found = _class_in(folder)
    if found != cls.__name__:
        raise ModelError(f"{folder} holds a {found}; expected a {cls.__name__}")
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder)).eval()


def load_shapes(model: str, controlnet: Sequence[Path] = ()) -> ModelShapes:
    """The shapes of ``model``.

    model: "sd15", "sdxl", "testbed", or a folder: of a diffusers pipeline (with a ``unet`` folder
    in it, and a ``controlnet`` folder or none) or of a UNet.
    controlnet: folders of ControlNets, which then take the place of the model's own.

    Raises ModelError where there is no such model or the folder holds something else.
    """
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    own: list[Path] = []
    nets: list[Any] = []
    unet: Any
    if model in KNOWN:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**KNOWN[model]["unet"])
            if not controlnet:
                nets = [ControlNetModel(**KNOWN[model]["controlnet"])]
    else:
        folder = Path(model)
        if model == "testbed":
            from hgc import testbed

            folder = testbed.path()
            own = [folder / "controlnet_segmentation"]
        elif not folder.is_dir():
            raise ModelError(
                f"no model named {model!r}, and no folder of that name; models: "
                f"{', '.join(KNOWN)}, testbed, or the folder of a diffusers pipeline or UNet"
            )
        where = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
        if not (where / "config.json").exists():
            raise ModelError(
                f"{folder} holds neither unet/config.json (a diffusers pipeline) nor config.json "
                "(a UNet)"
            )
        unet = _on_meta(UNet2DConditionModel, where)
        if not own and (folder / "controlnet").is_dir():
            # a MultiControlNet saves its first net as "controlnet", the others as "controlnet_1"...
            own = [folder / "controlnet"]
            while (more := folder / f"controlnet_{len(own)}").is_dir():
                own.append(more)
    for place in controlnet or own:
        if not (place / "config.json").exists():
            raise ModelError(f"{place} holds no config.json, so no ControlNet")
        nets.append(_on_meta(ControlNetModel, place))
    return ModelShapes(model, unet, tuple(nets))


@functools.cache
def _sd15() -> ModelShapes:
    return load_shapes("sd15")


@functools.cache
def sd15_macs(config: Config | None, num_evaluations: int) -> Macs:
    """MACs of a run of SD1.5 + ControlNet at 512 x 512 under CFG, with ``config`` or without hgc.

    This is what a plan would cost on the model its figures are quoted for.
    """
    import hgc
    from hgc.report.macs import Macs

    shapes = _sd15()
    if config is None:
        return _sd15_evaluation() * num_evaluations
    count = hgc.count_macs(
        shapes.unet, list(shapes.controlnets), config, num_evaluations=num_evaluations
    )
    return Macs(count.total, count.paper)


@functools.cache
def _sd15_evaluation() -> Macs:
    import hgc

    shapes = _sd15()
    return hgc.count_macs(
        shapes.unet, list(shapes.controlnets), "exact", num_evaluations=1
    ).full_evaluation
