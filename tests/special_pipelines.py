"""diffusers' pipelines whose call is not that of Stable Diffusion: how each is made small, and one
request of it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import diffusers
import models
import numpy as np
import torch
from diffusers.pipelines.controlnet.pipeline_controlnet_blip_diffusion import (
    BlipDiffusionControlNetPipeline,
)
from diffusers.pipelines.kolors import pipeline_kolors, pipeline_kolors_img2img
from diffusers.pipelines.pag import pipeline_pag_kolors
from PIL import Image

from hgc import testbed

STEPS = 8
Tensor = torch.Tensor

# diffusers.KolorsPipeline is a placeholder where sentencepiece is not installed; these are not
KOLORS = (
    pipeline_kolors.KolorsPipeline,
    pipeline_kolors_img2img.KolorsImg2ImgPipeline,
    pipeline_pag_kolors.KolorsPAGPipeline,
)


# -- small models ---------------


@functools.cache
def tokenizer() -> Any:
    """The one that comes with the testbed: 576 tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(testbed.__file__).parent / "model" / "tokenizer")


def text_encoder(seed: int = 3, **changes: Any) -> Any:
    """A CLIP text encoder for :func:`tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**{**_clip_text(), **changes})
    return models._seeded(seed, lambda: CLIPTextModel(config))


def _clip_text() -> dict[str, Any]:
    return {
        "vocab_size": 576,
        "hidden_size": models.TEXT,
        "intermediate_size": models.TEXT,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 32,
        "eos_token_id": 575,
        "projection_dim": models.TEXT,
    }


def image_encoder(seed: int = 4) -> Any:
    """A CLIP image encoder for pictures of 32 x 32."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=models.TEXT,
        intermediate_size=models.TEXT,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=32,
        patch_size=8,
        projection_dim=models.TEXT,
    )
    return models._seeded(seed, lambda: CLIPVisionModelWithProjection(config))


def with_prompts(cls: Any, unet: Any = None, **more: Any) -> Any:
    """A pipeline of ``cls`` that takes prompts as words."""
    given = {"text_encoder": text_encoder(), "tokenizer": tokenizer(), **more}
    return models.pipeline(cls, unet if unet is not None else models.small_unet(), **given)


def common(seed: int, *, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    """Arguments that nearly every pipeline takes."""
    return {
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        **more,
    }


def embeddings(seed: int) -> dict[str, Tensor]:
    return {"prompt_embeds": models.text(seed), "negative_prompt_embeds": models.text(seed + 500)}


def picture(seed: int, size: int = 32) -> Any:
    """As the ``PIL`` picture that some pipelines want."""
    array = (models.picture(seed, size)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return Image.fromarray(array)


PROMPTS = ("a red house", "a blue tree", "a dog on a hill", "two cats")


def words(seed: int) -> str:
    return PROMPTS[seed % len(PROMPTS)]


# -- with text as embeddings ---------------


def kolors(cls: Any) -> Any:
    """Its text goes through a projection of the UNet's."""
    unet = models.small_xl_unet(encoder_hid_dim=models.TEXT, encoder_hid_dim_type="text_proj")
    pipe = models.pipeline(cls, unet)
    if "Img2Img" in cls.__name__:
        # diffusers drops the pooled embeddings on their way into this method
        pipe.encode_prompt = lambda prompt_embeds, negative_prompt_embeds, **rest: (
            prompt_embeds, negative_prompt_embeds, prompt_embeds[:, 0, :8],
            negative_prompt_embeds[:, 0, :8],
        )  # fmt: skip
    return pipe


def depth_to_image() -> Any:
    unet = models.small_unet(in_channels=5)
    return models.pipeline(diffusers.StableDiffusionDepth2ImgPipeline, unet)


def depth_to_image_call(pipe: Any, seed: int) -> Tensor:
    depth, start = models.picture(seed)[:, 0], models.picture(seed + 50)
    return pipe(
        image=start, depth_map=depth, strength=0.8, **embeddings(seed), **common(seed)
    ).images


def upscale() -> Any:
    return models.pipeline(
        diffusers.StableDiffusionUpscalePipeline,
        models.small_unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=models.scheduler(diffusers.DDPMScheduler),
    )


def upscale_call(pipe: Any, seed: int) -> Tensor:
    low = models.picture(seed, 16) * 2 - 1
    return pipe(image=low, noise_level=20, **embeddings(seed), **common(seed)).images


def unclip_parts() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    normalizer = models._seeded(7, lambda: StableUnCLIPImageNormalizer(embedding_dim=8))
    return {
        "unet": models.small_unet(
            class_embed_type="projection", projection_class_embeddings_input_dim=16
        ),
        "image_normalizer": normalizer,
        "image_noising_scheduler": models.scheduler(diffusers.DDPMScheduler),
        "image_encoder": image_encoder(),
    }


def unclip_image() -> Any:
    return models.pipeline(diffusers.StableUnCLIPImg2ImgPipeline, **unclip_parts())


def unclip_image_call(pipe: Any, seed: int) -> Tensor:
    image = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed + 70))
    # classifier-free guidance takes the negative of the image from the pipeline
    return pipe(
        image_embeds=image, noise_level=3, height=32, width=32, **embeddings(seed), **common(seed)
    ).images


def unclip_text() -> Any:
    from diffusers import PriorTransformer
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{**_clip_text(), "hidden_size": 8, "projection_dim": 8})
    prior = models._seeded(
        8,
        lambda: PriorTransformer(
            num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8,
            num_embeddings=32,
        ),
    )  # fmt: skip
    return with_prompts(
        diffusers.StableUnCLIPPipeline,
        prior=prior,
        prior_tokenizer=tokenizer(),
        prior_text_encoder=models._seeded(9, lambda: CLIPTextModelWithProjection(config)),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000,
            clip_sample=True, clip_sample_range=5.0, beta_schedule="squaredcos_cap_v2",
        ),
        **unclip_parts(),
    )  # fmt: skip


def unclip_text_call(pipe: Any, seed: int) -> Tensor:
    return pipe(
        words(seed), prior_num_inference_steps=2, height=32, width=32, **common(seed)
    ).images


def variation() -> Any:
    return models.pipeline(
        diffusers.StableDiffusionImageVariationPipeline,
        models.small_unet(),
        image_encoder=image_encoder(),
    )


def variation_call(pipe: Any, seed: int) -> Tensor:
    return pipe(models.picture(seed), height=32, width=32, **common(seed)).images


def marigold(cls: Any, in_channels: int = 8, out_channels: int = 4, **more: Any) -> Any:
    pipe = models.pipeline(
        cls,
        models.small_unet(in_channels=in_channels, out_channels=out_channels),
        scheduler=models.scheduler(diffusers.DDIMScheduler),
        **more,
    )
    pipe.empty_text_embedding = models.text(5)
    return pipe


def marigold_intrinsics() -> Any:
    """Two images with one UNet: the appearance."""
    stack = {"prediction_space": "stack", "sub_target_names": ["roughness", "metallicity", None]}
    properties = {
        "target_names": ["albedo", "material"],
        "albedo": {"prediction_space": "srgb"},
        "material": stack,
    }
    cls = diffusers.MarigoldIntrinsicsPipeline
    return marigold(cls, in_channels=12, out_channels=8, target_properties=properties)


def marigold_call(pipe: Any, seed: int, **more: Any) -> Tensor:
    found = pipe(
        models.picture(seed),
        num_inference_steps=STEPS,
        processing_resolution=0,
        match_input_resolution=False,
        output_type="pt",
        generator=torch.Generator().manual_seed(seed),
        **more,
    )
    return found.prediction


# -- with words ---------------


def blip_controlnet() -> Any:
    """With the text encoder and the image processor of BLIP-Diffusion; its Q-Former, which is run
    once before the loop, is a stand-in."""
    from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import (
        BlipImageProcessor,
    )
    from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel
    from transformers import CLIPTextConfig

    class QFormer(torch.nn.Module):
        class config:
            num_query_tokens = 2

        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Linear(3, 2 * models.TEXT)

        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, image_input: Tensor, **kwargs: Any) -> Tensor:
            return self.out(image_input.mean((2, 3))).reshape(len(image_input), 2, models.TEXT)

    config = CLIPTextConfig(**_clip_text())
    return BlipDiffusionControlNetPipeline(
        tokenizer=tokenizer(),
        text_encoder=models._seeded(3, lambda: ContextCLIPTextModel(config)),
        vae=models.vae(),
        unet=models.small_unet(),
        scheduler=models.scheduler(diffusers.PNDMScheduler, skip_prk_steps=True),
        qformer=models._seeded(6, QFormer),
        controlnet=models.small_controlnet(),
        image_processor=BlipImageProcessor(size={"height": 32, "width": 32}),
    )


def blip_controlnet_call(pipe: Any, seed: int) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    made = common(seed, output_type="pt", prompt_reps=1)
    return pipe(
        [words(seed)], picture(seed + 5), picture(seed), ["dog"], ["dog"],
        neg_prompt="bad", height=32, width=32, **made,
    ).images  # fmt: skip


def ledits(unet: Any = None) -> Any:
    return with_prompts(
        diffusers.LEditsPPPipelineStableDiffusion,
        unet() if unet is not None else None,
        scheduler=models.scheduler(
            diffusers.DPMSolverMultistepScheduler,
            algorithm_type="sde-dpmsolver++", solver_order=2,
        ),
    )  # fmt: skip


def ledits_invert(pipe: Any, seed: int, generator: torch.Generator) -> None:
    pipe.set_progress_bar_config(disable=True)
    pipe.invert(
        image=picture(seed), source_prompt=words(seed), num_inversion_steps=STEPS, skip=0.1,
        generator=generator, height=32, width=32,
    )  # fmt: skip


def ledits_call(pipe: Any, seed: int, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if more:  # inverted by another pipeline, so that only the edit is compared
        other = ledits(lambda: copy.deepcopy(pipe.unet))
        ledits_invert(other, seed, generator)
        pipe.scheduler = other.scheduler
        for name in ("eta", "inversion_steps", "batch_size", "init_latents", "zs"):
            setattr(pipe, name, getattr(other, name))
    else:
        ledits_invert(pipe, seed, generator)
    return pipe(
        editing_prompt=[words(seed + 1), words(seed + 2)],
        edit_guidance_scale=[3.0, 4.0],
        edit_threshold=[0.5, 0.6],
        generator=generator,
        output_type="latent",
        **{"use_cross_attn_mask": False, "use_intersect_mask": False, **more},
    ).images


def attend_and_excite_call(pipe: Any, seed: int) -> Tensor:
    return pipe(
        words(seed), token_indices=[2, 3], max_iter_to_alter=3, thresholds={0: 0.1},
        attn_res=(16, 16), height=32, width=32, **common(seed),
    ).images  # fmt: skip


def sag_call(pipe: Any, seed: int, **more: Any) -> Tensor:
    made = {**embeddings(seed), **common(seed), **more}
    return pipe(height=32, width=32, **made).images


def gligen(**more: Any) -> Any:
    unet = models.small_unet(attention_type="gated")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("alpha_attn", "alpha_dense")):
                parameter.fill_(2.0)  # a new one adds nothing
    return with_prompts(diffusers.StableDiffusionGLIGENPipeline, unet, **more)


def gligen_call(pipe: Any, seed: int, **more: Any) -> Tensor:
    made = common(seed, **{"gligen_scheduled_sampling_beta": 0.5, **more})
    return pipe(
        words(seed), gligen_phrases=["dog"], gligen_boxes=[[0.1, 0.2, 0.7, 0.8]],
        height=32, width=32, **made,
    ).images  # fmt: skip


def diff_edit() -> Any:
    return with_prompts(
        diffusers.StableDiffusionDiffEditPipeline,
        scheduler=models.scheduler(diffusers.DDIMScheduler),
        inverse_scheduler=models.scheduler(diffusers.DDIMInverseScheduler),
    )


def diff_edit_call(pipe: Any, seed: int) -> Tensor:
    """The mask, the inversion, the image."""
    pipe.set_progress_bar_config(disable=True)
    generator, start = torch.Generator().manual_seed(seed), picture(seed + 50)
    mask = pipe.generate_mask(
        start, words(seed), source_prompt=words(seed + 1), num_maps_per_mask=2,
        num_inference_steps=STEPS, generator=generator,
    )  # fmt: skip
    inverted = pipe.invert(
        words(seed + 1), start, num_inference_steps=STEPS, generator=generator
    ).latents
    return pipe(
        words(seed), mask_image=mask, image_latents=inverted, negative_prompt=words(seed + 1),
        num_inference_steps=STEPS, guidance_scale=3.0, generator=generator, output_type="latent",
    ).images  # fmt: skip


def panorama() -> Any:
    """Its windows are 64 latents wide, of a VAE that makes one of eight pixels."""
    vae = models._seeded(
        2,
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2,
        ),
    )  # fmt: skip
    cls = diffusers.StableDiffusionPanoramaPipeline
    return models.pipeline(cls, models.small_unet(), vae=vae)


def panorama_call(pipe: Any, seed: int, **more: Any) -> Tensor:
    made = {**embeddings(seed), **common(seed), **more}
    return pipe(height=64, width=576, **made).images


def video_zero_call(pipe: Any, seed: int) -> Tensor:
    made = common(seed, t0=4, t1=5)
    return torch.as_tensor(
        pipe(words(seed), video_length=2, height=32, width=32, **made).images
    )  # fmt: skip


def semantic_call(pipe: Any, seed: int, edits: int = 2) -> Tensor:
    return pipe(
        words(seed), editing_prompt=[words(seed + k + 1) for k in range(edits)],
        edit_guidance_scale=4.0, edit_warmup_steps=1, height=32, width=32, **common(seed),
    ).images  # fmt: skip


def ldm3d_call(pipe: Any, seed: int) -> Tensor:
    made = common(seed, output_type="np")
    return torch.as_tensor(pipe(height=32, width=32, **embeddings(seed), **made).rgb)


def cycle() -> Any:
    scheduler = models.scheduler(diffusers.DDIMScheduler, set_alpha_to_one=False, steps_offset=1)
    return with_prompts(diffusers.CycleDiffusionPipeline, scheduler=scheduler)


def cycle_call(pipe: Any, seed: int) -> Tensor:
    made = common(seed, eta=0.1)
    start = models.picture(seed) * 2 - 1
    return pipe(words(seed), words(seed + 1), start, strength=0.8, **made).images


def paint_by_example() -> Any:
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
    from transformers import CLIPVisionConfig

    config = CLIPVisionConfig(
        hidden_size=models.TEXT, intermediate_size=models.TEXT, num_attention_heads=2,
        num_hidden_layers=1, image_size=32, patch_size=8,
    )  # fmt: skip
    return models.pipeline(
        diffusers.PaintByExamplePipeline,
        models.small_unet(in_channels=9),
        image_encoder=models._seeded(
            4, lambda: PaintByExampleImageEncoder(config, proj_size=models.TEXT)
        ),
    )


def paint_by_example_call(pipe: Any, seed: int) -> Tensor:
    mask = (models.picture(seed + 90)[:, :1] > 0.5).float()
    return pipe(
        models.picture(seed + 7), models.picture(seed) * 2 - 1, mask, height=32, width=32,
        **common(seed),
    ).images  # fmt: skip


def parallel_steps_call(pipe: Any, seed: int) -> Tensor:
    made = {**embeddings(seed), **common(seed)}
    return pipe(parallel=3, height=32, width=32, **made).images


def bert_text_to_image() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    config = LDMBertConfig(
        vocab_size=576, encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2,
        head_dim=8, d_model=models.TEXT, max_position_embeddings=77,
    )  # fmt: skip
    return models.pipeline(
        diffusers.LDMTextToImagePipeline,
        models.small_unet(),
        vqvae=models.vae(),
        bert=models._seeded(3, lambda: LDMBertModel(config)),
        tokenizer=tokenizer(),
    )


def bert_text_to_image_call(pipe: Any, seed: int) -> Tensor:
    made = common(seed, output_type="np")
    return torch.as_tensor(pipe(words(seed), height=32, width=32, **made).images)


# -- modular pipelines ---------------


def modular(guider: Any = None, controlnet: Any = None) -> Any:
    """The denoising blocks of SDXL: its models are called once a guidance half."""
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.modular_pipelines.stable_diffusion_xl import (
        modular_blocks_stable_diffusion_xl as blocks,
    )

    pipe = blocks.StableDiffusionXLCoreDenoiseStep().init_pipeline()
    pipe.update_components(
        unet=models.small_xl_unet(),
        vae=models.vae(),
        scheduler=models.scheduler(diffusers.EulerDiscreteScheduler),
        guider=guider() if guider is not None else ClassifierFreeGuidance(guidance_scale=3.0),
        controlnet=controlnet() if controlnet is not None else None,
    )
    return pipe


def modular_call(pipe: Any, seed: int, **more: Any) -> Tensor:
    pooled = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed + 9))
    if pipe.controlnet is not None:
        more.setdefault("control_image", models.picture(seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        pooled_prompt_embeds=pooled[0], negative_pooled_prompt_embeds=pooled[1],
        height=32, width=32, num_inference_steps=STEPS, output="latents",
        generator=torch.Generator().manual_seed(seed), **embeddings(seed), **more,
    )  # fmt: skip


def perturbed() -> Any:
    """Three calls a step: with, without, and with the prompt and perturbed attention."""
    from diffusers.guiders import PerturbedAttentionGuidance
    from diffusers.hooks import LayerSkipConfig

    layers = LayerSkipConfig(
        indices=[0], fqn="mid_block.attentions.0.transformer_blocks", skip_attention=False,
        skip_ff=False, skip_attention_scores=True,
    )  # fmt: skip
    return PerturbedAttentionGuidance(
        guidance_scale=3.0, perturbed_guidance_scale=1.5, perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0, perturbed_guidance_config=layers,
    )  # fmt: skip


def ending() -> Any:
    """Guidance in the first half of the steps only."""
    from diffusers.guiders import ClassifierFreeGuidance

    return ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5)
