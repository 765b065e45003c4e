"""Models by name or folder: pipelines, and UNets and ControlNets on the meta device."""

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

__all__ = [
    "DTYPES",
    "KNOWN",
    "ModelError",
    "ModelShapes",
    "load_folder",
    "load_shapes",
    "sd15_macs",
]

# torch's names.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
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
        from hgc.report.macs import pixels_a_latent

        side = self.unet.config.sample_size or 64
        return int(side if isinstance(side, int) else side[0]) * pixels_a_latent(self.controlnets)

    def macs(
        self,
        config: Config | None,
        evaluations: int,
        *,
        height: int | None = None,
        width: int | None = None,
        images: int = 1,
    ) -> Macs:
        """MACs of a run under classifier-free guidance, with ``config`` or without hgc, counted as
        :func:`hgc.count_macs` does.

        Raises ConfigError where ``config`` does not fit the model.
        """
        import hgc

        count = hgc.count_macs(
            self.unet, list(self.controlnets), "exact" if config is None else config,
            num_evaluations=1 if config is None else evaluations,
            height=height, width=width, images=images,
        )  # fmt: skip
        return count.full_evaluation * evaluations if config is None else count.done


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


def sd15_macs(config: Config | None, num_evaluations: int) -> Macs:
    """MACs of a run of SD1.5 + ControlNet at 512 x 512 under CFG, with ``config`` or without hgc.

    This is what a plan would cost on the model its figures are quoted for.
    """
    return _sd15().macs(config, num_evaluations)


def load_folder(folder: Path, controlnet: Sequence[Path] = (), dtype: Any = None) -> Any:
    """The diffusers pipeline in ``folder``, with the ControlNets in the folders ``controlnet``
    where some are given. Nothing is downloaded.

    Raises ModelError where there is none, or it cannot be loaded.
    """
    from diffusers import AutoPipelineForText2Image, ControlNetModel, DiffusionPipeline

    from hgc.models.supported import in_dtype

    if not (folder / "model_index.json").exists():
        raise ModelError(f"{folder} holds no model_index.json, so no diffusers pipeline")
    given: dict[str, Any] = {"local_files_only": True, **({} if dtype is None else in_dtype(dtype))}
    parts = json.loads((folder / "model_index.json").read_text())
    # a pipeline saved without a text encoder loads only where the gap is named
    more: dict[str, Any] = {name: None for name, kind in parts.items() if kind == [None, None]}
    # a safety checker paints black what it dislikes, cached or not
    if "safety_checker" in parts:
        more["safety_checker"] = None
    loader: Any = DiffusionPipeline
    try:
        if controlnet:
            nets = [ControlNetModel.from_pretrained(place, **given) for place in controlnet]
            more["controlnet"] = nets[0] if len(nets) == 1 else nets
            # one that was saved with its ControlNet is of the class that is needed
            if "ControlNet" not in str(parts.get("_class_name")):
                loader = AutoPipelineForText2Image
        pipe = loader.from_pretrained(folder, **given, **more)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} could not be loaded: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe
