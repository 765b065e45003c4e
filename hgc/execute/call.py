"""A call of a UNet or of a ControlNet: its arguments, normalised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from hgc.run.cache import conditional_half
from hgc.run.residuals import fresh

__all__ = ["ControlCall", "UNetCall", "UnionCall", "cut"]

Tensor = torch.Tensor

_KNOWN_BATCHED = {"text_embeds", "time_ids", "image_embeds"}
_SETTINGS = (bool, int, float, str, type(None))


def cut(value: Any, batch: int) -> Any:
    """The conditional half of ``value``, where it has the rows of the batch."""
    if value is None:
        return None
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
        return conditional_half(value)
    if isinstance(value, (list, tuple)):
        return type(value)(cut(v, batch) for v in value)
    if isinstance(value, dict):
        return {k: None if v is None else cut(v, batch) for k, v in value.items()}
    return value


@dataclasses.dataclass(slots=True)
class UNetCall:
    """One call of a UNet.

    Attributes:
        arguments: Those that the network's function takes by name, batched ones among them.
        down, mid, intrablock: Residuals, as they were given.
    """

    unet: UNet2DConditionModel
    sample: Tensor
    timestep: Tensor | float | int
    text: Tensor
    arguments: dict[str, Any]
    down: Any
    mid: Any
    intrablock: Any
    return_dict: bool

    @classmethod
    def of(
        cls,
        unet: UNet2DConditionModel,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetCall:
        """The call with the arguments of diffusers' forward."""
        arguments = {
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "added_cond_kwargs": added_cond_kwargs,
            "encoder_attention_mask": encoder_attention_mask,
        }
        return cls(
            unet, sample, timestep, encoder_hidden_states, arguments,
            down_block_additional_residuals, mid_block_additional_residual,
            down_intrablock_additional_residuals, return_dict,
        )  # fmt: skip

    @property
    def is_t2i_adapter(self) -> bool:
        """Whether the residuals are those of a T2I-Adapter, given in the way of old pipelines."""
        return self.down is not None and self.mid is None

    def settings(self) -> tuple[Any, ...]:
        """All that the output depends on beside the sample, the timestep and the text."""
        return (*self.arguments.values(),)

    def can_be_halved(self) -> bool:
        """Whether every batched argument is one whose rows are known to be samples."""
        added = self.arguments["added_cond_kwargs"]
        cross = self.arguments["cross_attention_kwargs"]
        if added and set(added) - _KNOWN_BATCHED:
            return False
        if cross and not all(isinstance(v, _SETTINGS) for v in cross.values()):
            return False
        return self.text.shape[0] == self.sample.shape[0]

    def by(self, forward: Callable[..., Any]) -> Any:
        """What diffusers' ``forward`` makes of it."""
        return forward(
            self.sample, self.timestep, self.text, **self.arguments,
            down_block_additional_residuals=fresh(self.down),
            mid_block_additional_residual=fresh(self.mid),
            down_intrablock_additional_residuals=self.intrablock,
            return_dict=self.return_dict,
        )  # fmt: skip

    def output(self, out: Tensor) -> Any:
        """``out`` as diffusers' forward returns it."""
        return UNet2DConditionOutput(sample=out) if self.return_dict else (out,)


@dataclasses.dataclass(slots=True)
class ControlCall:
    """One call of a ControlNet.

    Attributes:
        cond: ``controlnet_cond`` as it was given.
        scale: That of the residuals.
        arguments: The others that the network's function takes, batched ones among them.
    """

    net: ControlNetModel | ControlNetUnionModel
    sample: Tensor
    timestep: Tensor | float | int
    text: Tensor
    cond: Any
    scale: float | Tensor
    guess_mode: bool
    arguments: dict[str, Any]
    return_dict: bool

    @classmethod
    def of(
        cls,
        net: ControlNetModel,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float | Tensor = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlCall:
        """The call with the arguments of diffusers' forward."""
        arguments = {
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "added_cond_kwargs": added_cond_kwargs,
            "cross_attention_kwargs": cross_attention_kwargs,
        }
        return cls(
            net, sample, timestep, encoder_hidden_states, controlnet_cond, conditioning_scale,
            guess_mode, arguments, return_dict,
        )  # fmt: skip

    @property
    def asked(self) -> dict[str, Any]:
        """All that diffusers' forward was given beside the first four and ``arguments``."""
        return {"conditioning_scale": self.scale, "guess_mode": self.guess_mode}

    def scale_of(self, half: bool) -> float | Tensor:
        """The scale, or where each row has its own and ``half`` asks for it, that half's."""
        return cut(self.scale, self.sample.shape[0]) if half else self.scale

    @property
    def is_off(self) -> bool:
        """Whether its residuals are zeros, by its scale."""
        return isinstance(self.scale, (int, float)) and self.scale == 0.0

    @property
    def conditions(self) -> Sequence[Tensor]:
        """The condition images, [B, C, H, W] each."""
        return (self.cond,)

    @property
    def pixels_a_latent(self) -> int:
        """Pixels of the condition along a side of one latent pixel."""
        return self.conditions[0].shape[-1] // self.sample.shape[-1]

    def residual_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the residuals, the middle block's last."""
        net, sample = self.net, self.sample
        batch, _, height, width = sample.shape
        shapes: list[tuple[int, ...]] = [(batch, net.config.block_out_channels[0], height, width)]
        for block, channels in zip(net.down_blocks, net.config.block_out_channels, strict=True):
            shapes += [(batch, channels, height, width)] * len(block.resnets)
            if block.downsamplers is not None:
                height, width = (height + 1) // 2, (width + 1) // 2
                shapes.append((batch, channels, height, width))
        shapes.append((batch, net.config.block_out_channels[-1], height, width))
        if net.config.global_pool_conditions:
            shapes = [(*shape[:2], 1, 1) for shape in shapes]
        return shapes

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments of the network's function that have no row a sample."""
        return {}

    def settings(self) -> tuple[Any, ...]:
        """All that residuals depend on beside the sample, the timestep, text and condition."""
        return (*self.asked.values(), *self.arguments.values())

    def by(self, forward: Callable[..., Any], *, return_dict: bool | None = None) -> Any:
        """What diffusers' ``forward`` makes of it; ``return_dict`` in place of the caller's."""
        return forward(
            self.sample, self.timestep, encoder_hidden_states=self.text, controlnet_cond=self.cond,
            return_dict=self.return_dict if return_dict is None else return_dict,
            **self.arguments, **self.asked,
        )  # fmt: skip

    def output(self, residuals: Sequence[Tensor]) -> Any:
        """``residuals``, the middle block's last, as diffusers' forward returns them."""
        if not self.return_dict:
            return residuals[:-1], residuals[-1]
        return ControlNetOutput(
            down_block_res_samples=tuple(residuals[:-1]), mid_block_res_sample=residuals[-1]
        )


@dataclasses.dataclass(slots=True)
class UnionCall(ControlCall):
    """One call of a ControlNet-Union: several conditions, and of which kind each is."""

    given: dict[str, Any]
    weights: list[float] | None

    @classmethod
    def of(  # type: ignore[override]
        cls,
        net: ControlNetUnionModel,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: list[Tensor],
        control_type: Tensor,
        control_type_idx: list[int],
        conditioning_scale: float | list[float] = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        from_multi: bool = False,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> UnionCall:
        """The call with the arguments of diffusers' forward."""
        scales: list[float] = (
            [conditioning_scale] * len(controlnet_cond)
            if isinstance(conditioning_scale, (int, float))
            else list(conditioning_scale)
        )
        # one condition: the scale is that of the residuals; several are weighed before the encoder
        single = from_multi or len(control_type_idx) == 1
        arguments = {
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "added_cond_kwargs": added_cond_kwargs,
            "cross_attention_kwargs": cross_attention_kwargs,
            "control_type": control_type,
        }
        return cls(
            net, sample, timestep, encoder_hidden_states, controlnet_cond,
            scales[0] if single else 1.0, guess_mode, arguments, return_dict,
            given={
                "control_type_idx": control_type_idx, "from_multi": from_multi,
                "conditioning_scale": conditioning_scale, "guess_mode": guess_mode,
            },
            weights=None if single else scales,
        )  # fmt: skip

    @property
    def asked(self) -> dict[str, Any]:
        return self.given

    @property
    def conditions(self) -> Sequence[Tensor]:
        return list(self.cond)

    @property
    def constants(self) -> dict[str, Any]:
        return {"control_type_idx": self.given["control_type_idx"], "weights": self.weights}
