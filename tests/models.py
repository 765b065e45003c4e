"""Real diffusers classes at small configurations, with random weights."""

from __future__ import annotations

import inspect

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

TEXT = 16  # width of the text
TOKENS = 7


def _seeded(seed: int, make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def sd15_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    """SD1.5's topology: four levels, 12 skips, 16 cross-attentions."""
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 2,
        **changes,
    }
    return _seeded(seed, lambda: UNet2DConditionModel(**config))


def sd15_controlnet(seed: int = 1, **changes) -> ControlNetModel:
    config = {
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 2,
        "conditioning_embedding_out_channels": (4, 4),
        **changes,
    }

    def make() -> ControlNetModel:
        net = ControlNetModel(**config)
        # a new ControlNet adds exactly nothing; give it something to say
        for module in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(module.weight, std=0.3)
        torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
        return net

    return _seeded(seed, make)


_SDXL = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}


def sdxl_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    """SDXL's topology: three levels, 9 skips."""
    config = {
        **_SDXL,
        "sample_size": 16,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    }
    return _seeded(seed, lambda: UNet2DConditionModel(**config))


def sdxl_controlnet(seed: int = 1, **changes) -> ControlNetModel:
    return sd15_controlnet(seed, **{**_SDXL, **changes})


# -- two levels only: as small as a UNet can be and still have blocks that are run in part -------

_SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
}
_SMALL_XL = {
    **_SMALL,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}


def _loud(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Random weights hardly listen to the text and say little; make them as loud as trained ones,
    so that an image shows what was asked for."""
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith(".attn2"):
                module.to_q.weight.mul_(2)
                module.to_out[0].weight.mul_(2)
        unet.conv_out.weight.mul_(4)
    return unet


def small_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    """SD1.5's blocks on two levels: 4 skips."""
    config = {
        **_SMALL,
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        **changes,
    }
    return _seeded(seed, lambda: _loud(UNet2DConditionModel(**config)))


def small_controlnet(seed: int = 1, **changes) -> ControlNetModel:
    """The ControlNet of :func:`small_unet`."""
    types = ("CrossAttnDownBlock2D", "DownBlock2D")
    return sd15_controlnet(seed, **{**_SMALL, "down_block_types": types, **changes})


def small_xl_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    """SDXL's blocks on two levels: 4 skips."""
    config = {
        **_SMALL_XL,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    }
    return _seeded(seed, lambda: _loud(UNet2DConditionModel(**config)))


def small_xl_controlnet(seed: int = 1, **changes) -> ControlNetModel:
    """The ControlNet of :func:`small_xl_unet`."""
    types = ("DownBlock2D", "CrossAttnDownBlock2D")
    return sd15_controlnet(seed, **{**_SMALL_XL, "down_block_types": types, **changes})


def small_xl_union(seed: int = 1, **changes) -> ControlNetUnionModel:
    """The ControlNet-Union of :func:`small_xl_unet`, with three kinds of control."""
    config = {
        **_SMALL_XL,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (4, 4),
        "num_control_type": 3,
        "num_trans_channel": 8,
        "num_trans_head": 2,
        "num_proj_channel": 8,
        **changes,
    }
    config["projection_class_embeddings_input_dim"] = 6 * 4 + 8

    def make() -> ControlNetUnionModel:
        net = ControlNetUnionModel(**config)
        for module in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(module.weight, std=0.3)
        for module in (net.controlnet_cond_embedding.conv_out, net.spatial_ch_projs):
            torch.nn.init.normal_(module.weight, std=0.3)
        return net

    return _seeded(seed, make)


def vae(seed: int = 2) -> AutoencoderKL:
    return _seeded(
        seed,
        lambda: AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
        ),
    )


def text_encoder(seed: int = 3):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=TEXT,
        intermediate_size=TEXT,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=TOKENS,
    )
    return _seeded(seed, lambda: CLIPTextModel(config))


def scheduler(cls=UniPCMultistepScheduler, **changes):
    if "clip_sample" in inspect.signature(cls.__init__).parameters:
        changes.setdefault("clip_sample", False)  # as SD's own configurations
    return cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changes)


def sd15_pipeline(
    unet=None, controlnet=None, scheduler_class=UniPCMultistepScheduler, cls=None
) -> StableDiffusionControlNetPipeline:
    pipe = (cls or StableDiffusionControlNetPipeline)(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet if unet is not None else sd15_unet(),
        controlnet=controlnet if controlnet is not None else sd15_controlnet(),
        scheduler=scheduler(scheduler_class),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_pipeline(unet=None, controlnet=None) -> StableDiffusionXLControlNetPipeline:
    pipe = StableDiffusionXLControlNetPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet if unet is not None else sdxl_unet(),
        controlnet=controlnet if controlnet is not None else sdxl_controlnet(),
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(seed: int, batch: int = 1) -> torch.Tensor:
    """[batch, TOKENS, TEXT]"""
    return torch.randn(batch, TOKENS, TEXT, generator=torch.Generator().manual_seed(seed))


def change_text(at: int) -> dict:
    """Arguments of a call that change the prompt at evaluation ``at``."""

    def callback(pipe, i, t, kwargs):
        if i == at - 1:
            return {"prompt_embeds": torch.cat([text(500), text(77)])}
        return {}

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }


def picture(seed: int, size: int = 32, width: int | None = None) -> torch.Tensor:
    """A condition image [1, 3, size, width] in [0, 1]."""
    return torch.rand(
        1, 3, size, width or size, generator=torch.Generator().manual_seed(1000 + seed)
    )


def draw(pipe, seed: int = 0, steps: int = 6, size: int = 32, **changes) -> torch.Tensor:
    """The latents of one call of ``pipe``, [1, 4, size / 2, size / 2]."""
    arguments = {
        "prompt_embeds": text(seed),
        "negative_prompt_embeds": text(seed + 500),
        "image": picture(seed, size),
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "height": size,
        "width": size,
        **changes,
    }
    if "XL" in type(pipe).__name__:
        pooled = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed + 9))
        arguments.setdefault("pooled_prompt_embeds", pooled[0])
        arguments.setdefault("negative_pooled_prompt_embeds", pooled[1])
    return pipe(**arguments).images


def pipeline(cls, unet, controlnet=None, scheduler_class=UniPCMultistepScheduler, **components):
    """A pipeline of any class on ``unet``: a small VAE, texts as embeddings, no other model."""
    parameters = inspect.signature(cls.__init__).parameters
    given = {"vae": vae(), "unet": unet, "controlnet": controlnet, **components}
    given.setdefault("scheduler", scheduler(scheduler_class))
    for name, value in {"requires_safety_checker": False, "add_watermarker": False}.items():
        given.setdefault(name, value)
    arguments = {
        name: given.get(name)
        for name, parameter in parameters.items()
        if name in given or (name != "self" and parameter.default is inspect.Parameter.empty)
    }
    pipe = cls(**arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request(pipe, seed: int = 0, steps: int = 8, size: int = 32, **changes):
    """The arguments of one call of ``pipe``, whatever its class, to latents."""
    names = inspect.signature(type(pipe).__call__).parameters
    is_xl = "pooled_prompt_embeds" in names
    start, control = picture(seed + 50, size), picture(seed, size)
    pooled = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed + 9))
    known = {
        "prompt_embeds": text(seed),
        "negative_prompt_embeds": text(seed + 500),
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "height": size,
        "width": size,
        "strength": 0.8,
        "control_mode": [1],
    }
    if is_xl:
        known |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    union = "control_mode" in names
    if "control_image" in names:
        known["control_image"] = [control] if union else control
        known["image"] = start
    else:
        conditioned = "controlnet" in pipe.components or "adapter" in pipe.components
        known["image"] = control if conditioned else start
    if "mask_image" in names:
        known["mask_image"] = (picture(seed + 90, size)[:, :1] > 0.5).float()
    arguments = {name: value for name, value in known.items() if name in names}
    return {**arguments, **changes}
