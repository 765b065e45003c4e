"""What a pipeline hands to the models: tensors of the right shapes, without values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from diffusers import ControlNetUnionModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

__all__ = ["Inputs", "Shapes", "text_width"]

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a pipeline hands to the models, without the values.

    Attributes:
        batch: Rows of the batch: twice the images under classifier-free guidance.
        height: Of the latents.
        width: Of the latents.
        tokens: Length of the text.
        pixels_a_latent: Of the condition, along a side.
        dtype: Of everything.
    """

    batch: int
    height: int
    width: int
    tokens: int = 77
    pixels_a_latent: int = 8
    dtype: torch.dtype = torch.float32


class Inputs:
    """What is handed to the models of one run, each tensor made once, on the meta device.

    What a model takes beside the sample and the text depends on its config: labels of a class,
    pooled texts, embeddings of an image. Some embeddings have one of these alone.

    Args:
        unet: The UNet.
        nets: The ControlNets.
        shapes: Of the tensors.
    """

    def __init__(self, unet: UNet2DConditionModel, nets: list[Any], shapes: Shapes) -> None:
        self._shapes, self._texts = shapes, dict[int, Tensor]()
        with torch.device("meta"):
            batch, height, width = shapes.batch, shapes.height, shapes.width
            self._sample = torch.empty(batch, unet.config.in_channels, height, width)
            self._unet = self._for_unet(unet)
            self._nets = [self._for_controlnet(net) for net in nets]

    def unet(self) -> tuple[Tensor, dict[str, Any]]:
        """The sample, and the arguments that go by name."""
        return self._sample, self._unet

    def controlnet(self, j: int) -> tuple[Tensor, dict[str, Any]]:
        """The same of the ControlNet with number ``j``."""
        return self._nets[j]

    def _for_unet(self, unet: UNet2DConditionModel) -> dict[str, Any]:
        config, batch = unet.config, self._shapes.batch
        condition = None
        if config.time_cond_proj_dim is not None:
            condition = torch.empty(batch, config.time_cond_proj_dim)
        return {
            "encoder_hidden_states": self._text(text_width(unet)),
            "timestep_cond": condition,
            **self._embedded(unet),
        }

    def _for_controlnet(self, net: Any) -> tuple[Tensor, dict[str, Any]]:
        config, shapes = net.config, self._shapes
        size = (shapes.height * shapes.pixels_a_latent, shapes.width * shapes.pixels_a_latent)
        condition = torch.empty(shapes.batch, config.conditioning_channels, *size)
        arguments = {
            "encoder_hidden_states": self._text(text_width(net)),
            **self._embedded(net),
        }
        if isinstance(net, ControlNetUnionModel):  # one kind of control
            arguments["controlnet_cond"] = [condition]
            arguments["control_type"] = torch.empty(shapes.batch, config.num_control_type)
            arguments["control_type_idx"] = [0]
        else:
            arguments["controlnet_cond"] = condition
        # inpainting UNets have more channels than their ControlNet
        return self._sample[:, : config.in_channels], arguments

    def _text(self, width: int) -> Tensor:
        """The text, the same for all models that take it in that width."""
        if width not in self._texts:
            shapes = self._shapes
            self._texts[width] = torch.empty(shapes.batch, shapes.tokens, width)
        return self._texts[width]

    def _embedded(self, model: Any) -> dict[str, Any]:
        """What is embedded with the time."""
        batch = self._shapes.batch
        added = {k: torch.empty(batch, width) for k, width in _added_widths(model.config).items()}
        labels = None
        if model.class_embedding is not None:
            labels = torch.empty(batch, *_label(model), dtype=_label_dtype(model.config))
        return {"class_labels": labels, "added_cond_kwargs": added or None}


def text_width(model: Any) -> int:
    """The width of the text that a UNet or a ControlNet takes."""
    if isinstance(model, UNet2DConditionModel) and model.config.encoder_hid_dim is not None:
        # the text is projected from it; or an image is, and the text is not looked at
        return int(model.config.encoder_hid_dim)
    width = model.config.cross_attention_dim
    if isinstance(width, int):
        return width
    # one a block, and the blocks that take the text have the same
    for module in model.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            return int(module.cross_attention_dim)
    return int(width[0])


def _added_widths(config: Any) -> dict[str, int]:
    """The width of each tensor of ``added_cond_kwargs``, by its name there."""
    added: dict[str, int] = {}
    kind, projected = config.addition_embed_type, config.encoder_hid_dim_type
    if kind == "text_time":
        each, width = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
        # those of SDXL; its refiner has five, and which of the two has no bearing on the MACs
        times = min(6, width // each)
        added = {"text_embeds": width - times * each, "time_ids": times}
    if kind == "text_image":
        added["text_embeds"] = config.cross_attention_dim
    if kind == "image" or projected == "image_proj":
        added["image_embeds"] = config.encoder_hid_dim
    elif kind == "text_image" or projected == "text_image_proj":
        added["image_embeds"] = config.cross_attention_dim
    return added


def _label(model: Any) -> tuple[int, ...]:
    """The shape of one class label."""
    kind = model.config.class_embed_type
    if kind in ("projection", "simple_projection"):
        return (model.config.projection_class_embeddings_input_dim,)
    if kind == "identity":  # an embedding of the time's width
        return (model.time_embedding.linear_2.out_features,)
    return ()


def _label_dtype(config: Any) -> torch.dtype:
    is_number = config.class_embed_type is None and config.num_class_embeds is not None
    return torch.int64 if is_number else torch.float32
