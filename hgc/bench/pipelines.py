"""Pipelines to be timed: of true size with random weights, the testbed's, or a folder's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hgc.evaluation.models import KNOWN, ModelError, load_folder

__all__ = ["load_pipeline", "random_weights"]

_POOL = 1 << 20


def random_weights(model: Any, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Give a model on the meta device random weights, in seconds.

    Weights of rank 2 and more are normal with the variance that keeps activations in range; they
    repeat after a million values. Norms are the identity, biases are 0.
    """
    # not the diffusers override, which warns of modules that checkpoints keep in float32
    model = torch.nn.Module.to(model, dtype=dtype).to_empty(device=device)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    offset = 0
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            scale = 1.0 / math.sqrt(weight[0].numel())
            flat = weight.view(-1)
            done = 0
            while done < flat.numel():
                count = min(flat.numel() - done, _POOL - offset)
                torch.mul(pool[offset : offset + count], scale, out=flat[done : done + count])
                done += count
                offset = (offset + count) % _POOL
    return model.eval().requires_grad_(False)


def _random_pipeline(model: str, device: str, dtype: torch.dtype) -> Any:
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        StableDiffusionControlNetPipeline,
        StableDiffusionXLControlNetPipeline,
        UNet2DConditionModel,
        UniPCMultistepScheduler,
    )

    with torch.device("meta"):
        unet = UNet2DConditionModel(**KNOWN[model]["unet"])
        net = ControlNetModel(**KNOWN[model]["controlnet"])
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            # SDXL's decoder overflows in half precision, and its pipelines upcast where this is set
            force_upcast=False,
        )
    parts = {
        "unet": random_weights(unet, device, dtype, 0),
        "controlnet": random_weights(net, device, dtype, 1),
        "vae": random_weights(vae, device, dtype, 2),
        "scheduler": UniPCMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        "text_encoder": None,
        "tokenizer": None,
    }
    if model == "sdxl":
        return StableDiffusionXLControlNetPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
    return StableDiffusionControlNetPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def load_pipeline(
    model: str,
    controlnet: Sequence[Path] = (),
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The pipeline of ``model``: "sd15" or "sdxl" with random weights, "testbed", or the folder of
    a diffusers pipeline, with the ControlNets in the folders ``controlnet`` where some are given.

    Raises ModelError where there is no such model or the folder holds none.
    """
    if model in KNOWN:
        if controlnet:
            raise ModelError(f"{model} has random weights and a ControlNet of its own")
        pipe = _random_pipeline(model, device, dtype)
    elif model == "testbed":
        from hgc import testbed

        pipe = testbed.load_pipeline("segmentation", torch_dtype=dtype)
    else:
        if not (Path(model) / "model_index.json").exists():
            raise ModelError(
                f"no model named {model!r}, and no folder of that name with a model_index.json; "
                f"models: {', '.join(KNOWN)}, testbed, or the folder of a diffusers pipeline"
            )
        pipe = load_folder(Path(model), controlnet, dtype)
        if not hasattr(pipe, "unet"):
            raise ModelError(f"{model} holds a {type(pipe).__name__}, which has no UNet")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
