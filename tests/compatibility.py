"""The rows of docs/compatibility.md: pipeline classes and uses, each with what must hold for it.

Each row makes real diffusers pipelines at the smallest configurations that have every kind of
block, with random weights, and is judged by :func:`outcome`:

- ``exact``: the image with ``config="exact"`` equals the image without hgc, bit for bit;
- ``shallow``: the image with :data:`SHALLOW`, a plan that reuses everything that a plan can, is
  within the row's stated distance (relative L2), evaluations were reused, and it is nearer to the
  image of this use than to the image without it, so that a use that is silently ignored shows;
- ``uninstall``: every attribute, processor and hook is the object it was, and the image the same;
- ``next``: a request after another one on one installation equals it in a fresh one, bit for bit.

``scripts/write_compatibility.py`` writes the table from these outcomes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import models
import special_pipelines as special
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

import hgc
from hgc.warn import HgcWarning

STEPS = 8
# Presets run nothing between key steps, or one layer; this plan reuses all that a plan can:
# features, residuals, guidance differences, and a key step's other half.
SHALLOW = hgc.Config(
    name="shallow",
    key_steps=(0, 3, 7, 11, 16, 19),
    conditional_key_steps=(19,),
    guidance="reuse",
    feature_damping=1.0,
    difference_damping=0.35,
)


def call(pipe: Any, seed: int = 0, **changes: Any) -> torch.Tensor:
    """The latents (or the picture) of one request."""
    return pipe(**models.request(pipe, seed, **{"steps": STEPS, **changes})).images


def install(pipe: Any, config: Any) -> hgc.Installation:
    """hgc on the UNet of ``pipe`` and its ControlNets."""
    return hgc.install(pipe.unet, getattr(pipe, "controlnet", None), config=config)


@dataclasses.dataclass(frozen=True)
class Row:
    """A pipeline class or a use.

    Attributes:
        group: Heading of the table it stands in.
        name: First column.
        make: Makes the pipeline, the same every time.
        call: One request of a pipeline and a seed.
        plain: The same request without the use, where there is one.
        install: Installs a configuration.
        distance: Stated bound of the distance under ``shallow``.
        in_full: A part of the warning that says why nothing is reused; such a row's ``shallow``
            image is the image without hgc.
        same_in_full: In full, but without a warning: there is nothing to say.
        refuses: A part of the TypeError that :func:`hgc.install` raises.
        in_a_call: The first evaluation raises it, not the installation.
        changes_models: A request puts other objects into the models (adapters, processors).
        slow: Not in the quick run of the tests.
        note: For the table.
    """

    group: str
    name: str
    make: Callable[[], Any]
    call: Callable[[Any, int], torch.Tensor] = call
    plain: Callable[[Any, int], torch.Tensor] | None = None
    install: Callable[[Any, Any], hgc.Installation] = install
    distance: float = 0.15
    in_full: str = ""
    same_in_full: bool = False
    refuses: str = ""
    in_a_call: bool = False
    changes_models: bool = False
    slow: bool = False
    note: str = ""


ROWS: list[Row] = []
SLOW = re.compile(
    "nested|one after the other|from_pipe|save_pretrained|Inpaint|PAGImg2Img|, SDXL|strength="
    "|20 steps|InstructPix2Pix|float16|Kolors|UnCLIP|Marigold|LEdits|Panorama|BlipDiff|VideoZero"
    "|Attend|compile"
)


def row(group: str, name: str, make: Callable[[], Any], **more: Any) -> None:
    """Add a row."""
    more.setdefault("slow", bool(SLOW.search(name)))
    ROWS.append(Row(group, name, make, **more))


# -- pipelines ---------------------------------------------------------------------------------


def sd(cls: Any = None, **components: Any) -> Any:
    """A pipeline of the SD family; with a ControlNet where its class takes one."""
    cls = cls or diffusers.StableDiffusionControlNetPipeline
    components.setdefault("unet", models.small_unet())
    if "ControlNet" in cls.__name__:
        components.setdefault("controlnet", models.small_controlnet())
    return models.pipeline(cls, **components)


def xl(cls: Any = None, **components: Any) -> Any:
    """The same of the SDXL family."""
    cls = cls or diffusers.StableDiffusionXLControlNetPipeline
    components.setdefault("unet", models.small_xl_unet())
    if "Union" in cls.__name__:
        components.setdefault("controlnet", models.small_xl_union())
    elif "ControlNet" in cls.__name__:
        components.setdefault("controlnet", models.small_xl_controlnet())
    return models.pipeline(cls, **components)


def pipelines(group: str, make: Callable[..., Any], *names: str, **more: Any) -> None:
    """A row a pipeline class."""
    for name in names:
        row(group, f"`{name}`", functools.partial(make, getattr(diffusers, name)), **more)


CONTROLNET = "Pipelines with a ControlNet"
pipelines(
    CONTROLNET, sd,
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
)  # fmt: skip
row(
    CONTROLNET, "`StableDiffusionControlNetInpaintPipeline`, inpainting UNet (9 channels)",
    lambda: sd(
        diffusers.StableDiffusionControlNetInpaintPipeline, unet=models.small_unet(in_channels=9)
    ),
)  # fmt: skip
pipelines(
    CONTROLNET, xl,
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
)  # fmt: skip


def union_of_two(pipe: Any, seed: int) -> torch.Tensor:
    pictures = [models.picture(seed), models.picture(seed + 7)]
    return call(pipe, seed, control_image=pictures, control_mode=[0, 2])


def union_image(pipe: Any, seed: int) -> torch.Tensor:
    return call(pipe, seed)


row(
    CONTROLNET, "ControlNet-Union, two kinds of control",
    lambda: xl(diffusers.StableDiffusionXLControlNetUnionPipeline),
    call=union_of_two, plain=union_image,
)  # fmt: skip
row(
    CONTROLNET, "ControlNet-Union, control ends early",
    lambda: xl(diffusers.StableDiffusionXLControlNetUnionPipeline),
    call=functools.partial(call, control_guidance_end=0.2), plain=call,
)  # fmt: skip


def two_unions() -> Any:
    from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel

    nets = [models.small_xl_union(), models.small_xl_union(5)]
    return xl(
        diffusers.StableDiffusionXLControlNetUnionPipeline,
        controlnet=MultiControlNetUnionModel(nets),
    )


def two_unions_call(pipe: Any, seed: int, scale: Any = (1.0, 0.7)) -> torch.Tensor:
    return call(
        pipe,
        seed,
        control_image=[models.picture(seed), models.picture(seed + 7)],
        control_mode=[0, 1],
        controlnet_conditioning_scale=list(scale),
    )


row(
    CONTROLNET, "`MultiControlNetUnionModel`", two_unions, call=two_unions_call,
    plain=functools.partial(two_unions_call, scale=(1.0, 0.0)),
)  # fmt: skip

PAG = "Perturbed-attention guidance"
pipelines(
    PAG, sd,
    "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
)  # fmt: skip
pipelines(
    PAG, xl,
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
)  # fmt: skip
row(
    PAG, "Perturbed attention without classifier-free guidance",
    lambda: sd(diffusers.StableDiffusionControlNetPAGPipeline),
    call=functools.partial(call, guidance_scale=0.0), plain=call,
)  # fmt: skip

ADAPTER = "T2I-Adapter"


def adapter(seed: int = 4, *, for_xl: bool = False) -> Any:
    """A T2I-Adapter whose features have the sizes of the small UNets' levels."""

    def make() -> Any:
        kind, factor = ("full_adapter_xl", 4) if for_xl else ("full_adapter", 2)
        return diffusers.T2IAdapter(
            channels=[8, 16], num_res_blocks=1, downscale_factor=factor, adapter_type=kind
        )

    return models._seeded(seed, make)


row(
    ADAPTER, "`StableDiffusionAdapterPipeline`",
    lambda: sd(diffusers.StableDiffusionAdapterPipeline, adapter=adapter()),
    plain=functools.partial(call, adapter_conditioning_scale=0.0),
)  # fmt: skip
row(
    ADAPTER, "`StableDiffusionXLAdapterPipeline`",
    lambda: xl(diffusers.StableDiffusionXLAdapterPipeline, adapter=adapter(for_xl=True)),
    plain=functools.partial(call, adapter_conditioning_scale=0.0),
)  # fmt: skip
row(
    ADAPTER, "`adapter_conditioning_factor=0.2`",
    lambda: xl(diffusers.StableDiffusionXLAdapterPipeline, adapter=adapter(for_xl=True)),
    call=functools.partial(call, adapter_conditioning_factor=0.2), plain=call,
)  # fmt: skip


def two_adapters() -> Any:
    net = diffusers.MultiAdapter([adapter(), adapter(5)])
    return sd(diffusers.StableDiffusionAdapterPipeline, adapter=net)


row(
    ADAPTER, "`MultiAdapter`", two_adapters,
    call=lambda pipe, seed: call(
        pipe, seed, image=[models.picture(seed), models.picture(seed + 7)],
        adapter_conditioning_scale=[0.7, 0.4],
    ),
    plain=lambda pipe, seed: call(
        pipe, seed, image=[models.picture(seed), models.picture(seed + 7)],
        adapter_conditioning_scale=[0.0, 0.0],
    ),
)  # fmt: skip

PLAIN = "Pipelines without a ControlNet: `hgc.install(pipe.unet)`"
pipelines(
    PLAIN, sd,
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)  # fmt: skip
row(
    PLAIN, "`StableDiffusionInpaintPipeline`, inpainting UNet (9 channels)",
    lambda: sd(diffusers.StableDiffusionInpaintPipeline, unet=models.small_unet(in_channels=9)),
)  # fmt: skip
row(
    PLAIN, "`StableDiffusionInstructPix2PixPipeline`",
    lambda: sd(
        diffusers.StableDiffusionInstructPix2PixPipeline, unet=models.small_unet(in_channels=8)
    ),
)  # fmt: skip
pipelines(
    PLAIN, xl,
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)  # fmt: skip
row(
    PLAIN, "`StableDiffusionXLInstructPix2PixPipeline`",
    lambda: xl(
        diffusers.StableDiffusionXLInstructPix2PixPipeline,
        unet=models.small_xl_unet(in_channels=8),
    ),
)  # fmt: skip
row(
    PLAIN, "`LatentConsistencyModelPipeline`",
    lambda: sd(
        diffusers.LatentConsistencyModelPipeline,
        unet=models.small_unet(time_cond_proj_dim=8),
        scheduler=models.scheduler(diffusers.LCMScheduler),
    ),
)  # fmt: skip
row(
    PLAIN, "`LatentConsistencyModelImg2ImgPipeline`",
    lambda: sd(
        diffusers.LatentConsistencyModelImg2ImgPipeline,
        unet=models.small_unet(time_cond_proj_dim=8),
        scheduler=models.scheduler(diffusers.LCMScheduler),
    ),
)  # fmt: skip
for kolors in special.KOLORS:
    row(PLAIN, f"`{kolors.__name__}`", functools.partial(special.kolors, kolors))
row(
    PLAIN, "`StableDiffusionDepth2ImgPipeline`", special.depth_to_image,
    call=special.depth_to_image_call,
)  # fmt: skip
row(PLAIN, "`StableDiffusionUpscalePipeline`", special.upscale, call=special.upscale_call)
row(PLAIN, "`StableUnCLIPPipeline`", special.unclip_text, call=special.unclip_text_call)
row(PLAIN, "`StableUnCLIPImg2ImgPipeline`", special.unclip_image, call=special.unclip_image_call)
row(
    PLAIN, "`StableDiffusionImageVariationPipeline`", special.variation,
    call=special.variation_call,
)  # fmt: skip
row(
    PLAIN, "`MarigoldDepthPipeline`",
    functools.partial(special.marigold, diffusers.MarigoldDepthPipeline),
    call=special.marigold_call,
)  # fmt: skip
row(
    PLAIN, "`MarigoldDepthPipeline`, an ensemble, one after the other",
    functools.partial(special.marigold, diffusers.MarigoldDepthPipeline),
    call=functools.partial(special.marigold_call, ensemble_size=3, batch_size=1),
)  # fmt: skip
row(
    PLAIN, "`MarigoldNormalsPipeline`",
    functools.partial(special.marigold, diffusers.MarigoldNormalsPipeline),
    call=special.marigold_call,
)  # fmt: skip
row(
    PLAIN, "`MarigoldIntrinsicsPipeline`", special.marigold_intrinsics,
    call=special.marigold_call,
)  # fmt: skip
INVERSION = "an inversion adds up errors: use `exact` for it, where the edit must be close"
row(
    PLAIN, "`LEditsPPPipelineStableDiffusion`", special.ledits, call=special.ledits_call,
    changes_models=True, distance=0.5, note=INVERSION,
)  # fmt: skip
WATCHING = "is not known"
row(
    PLAIN, "`LEditsPPPipelineStableDiffusion`, `use_cross_attn_mask=True`",
    functools.partial(special.ledits, models.sd15_unet),
    call=functools.partial(special.ledits_call, use_cross_attn_mask=True),
    in_full=WATCHING, changes_models=True,
    note="its processors keep attention maps: left to diffusers, a warning says so",
)  # fmt: skip
row(
    PLAIN, "`LDMTextToImagePipeline`", special.bert_text_to_image,
    call=special.bert_text_to_image_call, in_full="the text changed, at",
    note="it builds its text anew at every step: computed in full, a warning says so",
)  # fmt: skip

DEPRECATED = "Pipelines that diffusers has deprecated"


def deprecated(name: str, make: Callable[[], Any] | None = None, **more: Any) -> None:
    cls = getattr(diffusers, name)
    made = make or functools.partial(special.with_prompts, cls)
    more.setdefault("slow", name not in ("StableDiffusionSAGPipeline",))
    row(DEPRECATED, f"`{name}`", made, **more)


row(
    DEPRECATED, "`BlipDiffusionControlNetPipeline`", special.blip_controlnet,
    call=special.blip_controlnet_call, slow=True,
)  # fmt: skip
deprecated("StableDiffusionAttendAndExcitePipeline", call=special.attend_and_excite_call,
           in_full=WATCHING, note="its processors keep attention maps")  # fmt: skip
deprecated(
    "StableDiffusionSAGPipeline",
    lambda: models.pipeline(diffusers.StableDiffusionSAGPipeline, models.small_unet()),
    call=special.sag_call, in_full="a hook is in place on",
    note="it puts a hook and a processor that keep what they see into the middle block",
)  # fmt: skip
deprecated("StableDiffusionGLIGENPipeline", special.gligen, call=special.gligen_call,
           plain=functools.partial(special.gligen_call, gligen_scheduled_sampling_beta=0.0),
           changes_models=True)  # fmt: skip
deprecated("StableDiffusionDiffEditPipeline", special.diff_edit, call=special.diff_edit_call,
           distance=0.6, note=INVERSION)  # fmt: skip
deprecated("StableDiffusionPanoramaPipeline", special.panorama, call=special.panorama_call,
           in_full="runs end at once",
           note="it builds its text anew for every window: a warning says so")  # fmt: skip
deprecated("TextToVideoZeroPipeline", call=special.video_zero_call, changes_models=True)
deprecated("SemanticStableDiffusionPipeline", call=special.semantic_call,
           note="four prompts of one image: both halves are always computed")  # fmt: skip
deprecated("StableDiffusionLDM3DPipeline",
           lambda: models.pipeline(diffusers.StableDiffusionLDM3DPipeline, models.small_unet()),
           call=special.ldm3d_call)  # fmt: skip
deprecated("CycleDiffusionPipeline", special.cycle, call=special.cycle_call,
           in_full="the text changed, at",
           note="it builds its text anew at every step")  # fmt: skip
deprecated("PaintByExamplePipeline", special.paint_by_example, call=special.paint_by_example_call)
deprecated(
    "StableDiffusionParadigmsPipeline",
    lambda: models.pipeline(
        diffusers.StableDiffusionParadigmsPipeline, models.small_unet(),
        scheduler_class=diffusers.DDIMParallelScheduler,
    ),
    call=special.parallel_steps_call, in_full="the timestep is not one of several",
    note="several timesteps in one batch",
)  # fmt: skip

MODULAR = "Modular pipelines: a call a guidance half"
for name, make, arguments in (
    ("SDXL blocks", special.modular, {}),
    ("SDXL blocks with a ControlNet",
     functools.partial(special.modular, None, models.small_xl_controlnet), {}),
    ("`guess_mode`", functools.partial(special.modular, None, models.small_xl_controlnet),
     {"guess_mode": True}),
    ("Guidance in the first half of the steps",
     functools.partial(special.modular, special.ending, models.small_xl_controlnet), {}),
    ("Perturbed attention: three calls a step",
     functools.partial(special.modular, special.perturbed), {}),
):  # fmt: skip
    row(
        MODULAR, name, make, call=functools.partial(special.modular_call, **arguments),
        slow=name != "SDXL blocks with a ControlNet",
        # diffusers' registry of hooks stays on the model, with or without hgc
        changes_models=name.startswith("Perturbed"),
    )  # fmt: skip


# -- requests ----------------------------------------------------------------------------------

USES = "Requests"


def use(name: str, make: Callable[[], Any] = sd, plain: Any = call, **arguments: Any) -> None:
    """A row that differs from a plain request by some arguments."""
    more = {k: arguments.pop(k) for k in ("same_in_full", "distance", "note") if k in arguments}
    row(
        USES, name, make,
        call=functools.partial(call, **arguments), plain=plain, **more,
    )  # fmt: skip


def callback(function: Callable[..., dict[str, Any]], *inputs: str) -> dict[str, Any]:
    """Arguments of a pipeline that calls ``function(pipe, step, tensors)`` after every step."""
    return {
        "callback_on_step_end": lambda pipe, i, t, tensors: function(pipe, i, tensors) or {},
        "callback_on_step_end_tensor_inputs": ["latents", *inputs],
    }


use("`guess_mode`", guess_mode=True)
use("`guess_mode` without guidance", guess_mode=True, guidance_scale=1.0)
use("`guess_mode`, SDXL", xl, guess_mode=True)
use("`control_guidance_start=0.3`", control_guidance_start=0.3)
use("`control_guidance_end=0.2`", control_guidance_end=0.2)
use("`control_guidance_start=0.3, control_guidance_end=0.7`, SDXL", xl, control_guidance_start=0.3,
    control_guidance_end=0.7)  # fmt: skip
use("`controlnet_conditioning_scale=0.3`", controlnet_conditioning_scale=0.3)
use("`controlnet_conditioning_scale=0`", controlnet_conditioning_scale=0.0)
use("`guidance_rescale`", functools.partial(sd, diffusers.StableDiffusionPipeline),
    plain=functools.partial(call, guidance_scale=9.0), guidance_scale=9.0,
    guidance_rescale=1.0)  # fmt: skip
use("No guidance", guidance_scale=1.0)
use("No guidance, SDXL", xl, guidance_scale=1.0)
use("No negative prompt (zeros), SDXL", xl, negative_prompt_embeds=torch.zeros(1, 7, 16),
    negative_pooled_prompt_embeds=torch.zeros(1, 8))  # fmt: skip


def end_guidance(pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    if i == 1:
        pipe._guidance_scale = 1.0
        return {k: v.chunk(2)[-1] for k, v in tensors.items() if k != "latents"}
    return {}


use("Guidance switched off by a callback", guidance_scale=8.0,
    plain=functools.partial(call, guidance_scale=8.0),
    **callback(end_guidance, "prompt_embeds", "image"))  # fmt: skip
use(
    "The same, SDXL", xl, guidance_scale=8.0, plain=functools.partial(call, guidance_scale=8.0),
    **callback(end_guidance, "prompt_embeds", "add_text_embeds", "add_time_ids", "image"),
)  # fmt: skip
use("Prompt weighting", prompt_embeds=models.text(0) * torch.linspace(0.5, 2, 7)[:, None])


def other_prompt(pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    if i in (0, 4):
        return {"prompt_embeds": torch.cat([models.text(500), 3 * models.text(77 + i)])}
    return {}


def edit_prompt(pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    if i in (0, 4):
        tensors["prompt_embeds"][1:].mul_(-2)
    return {}


use("A prompt that changes between steps", **callback(other_prompt, "prompt_embeds"))
use("A prompt written to between steps", **callback(edit_prompt, "prompt_embeds"))
use("`num_images_per_prompt=2`", num_images_per_prompt=2, plain=None)
use("Two prompts", plain=None, prompt_embeds=models.text(0, 2),
    negative_prompt_embeds=models.text(500, 2))  # fmt: skip
use(
    "Two prompts from one noise, no guidance", plain=None, prompt_embeds=models.text(0, 2),
    negative_prompt_embeds=None, guidance_scale=1.0,
    latents=models.text(5, 1).reshape(-1)[:64].reshape(1, 4, 4, 4).repeat(2, 1, 4, 4),
)  # fmt: skip
use("64 x 32", width=64, plain=None, image=models.picture(0, 32, 64))
use("40 x 24 (odd latents below the first level)", height=40, width=24, plain=None,
    image=models.picture(0, 40, 24))  # fmt: skip
use("20 steps", steps=20, plain=None, distance=0.3)
use("4 steps", steps=4, plain=None, same_in_full=True,
    note="a short run has key steps only")  # fmt: skip
use("1 step", steps=1, plain=None, same_in_full=True)
use("LCM, 4 steps", functools.partial(sd, scheduler=models.scheduler(diffusers.LCMScheduler)),
    steps=4, plain=None, guidance_scale=1.0, same_in_full=True)  # fmt: skip
use("LCM, 8 steps, no guidance", functools.partial(
    sd, scheduler=models.scheduler(diffusers.LCMScheduler)), plain=None,
    guidance_scale=1.0)  # fmt: skip


def four_steps(pipe: Any, config: Any) -> hgc.Installation:
    """A plan of one's own for four steps, where :data:`SHALLOW` is asked for."""
    own = hgc.Config(name="four", num_evaluations=4, key_steps=(0, 2), depth=2)
    return install(pipe, own if config is SHALLOW else config)


row(
    USES, "LCM, 4 steps, a plan with key steps 0 and 2",
    functools.partial(sd, scheduler=models.scheduler(diffusers.LCMScheduler)),
    call=functools.partial(call, steps=4, guidance_scale=1.0), install=four_steps,
)  # fmt: skip
use("`timesteps=[...]`", functools.partial(sd, scheduler=models.scheduler(
    diffusers.EulerDiscreteScheduler)), plain=None,
    timesteps=[900, 850, 700, 600, 400, 300, 100, 20])  # fmt: skip
use("`sigmas=[...]`, SDXL", functools.partial(xl, scheduler=models.scheduler(
    diffusers.EulerDiscreteScheduler)), plain=None,
    sigmas=[14.0, 9.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.1])  # fmt: skip
use("`denoising_end=0.7`, SDXL", functools.partial(
    xl, diffusers.StableDiffusionXLPipeline), denoising_end=0.7, steps=12, plain=None,
    distance=0.3)  # fmt: skip


def base_and_refiner(pipe: Any, seed: int) -> torch.Tensor:
    """The first half of the noise by one pipeline, the second by another on the same UNet."""
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    refiner.set_progress_bar_config(disable=True)
    latents = call(pipe, seed, denoising_end=0.5, steps=16)
    arguments = {"image": latents, "denoising_start": 0.5, "steps": 16}
    return call(refiner, seed, **arguments)


row(
    USES, "`denoising_end`, then `denoising_start` (base and refiner)",
    functools.partial(xl, diffusers.StableDiffusionXLPipeline), call=base_and_refiner,
)  # fmt: skip


def move_latents(pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"].roll(3, -1)} if i == 3 else {}


def other_control(pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"image": 9 - 20 * models.picture(60).repeat(2, 1, 1, 1)} if i == 1 else {}


def other_mask(pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    """Channels of the sample that are the same at every other step."""
    if i != 2:
        return {}
    masked = models.text(5).reshape(-1)[:64].reshape(1, 4, 4, 4).repeat(2, 1, 4, 4)
    return {"mask": 1 - tensors["mask"], "masked_image_latents": masked}


def more_latents(pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    if i != 3:
        return {}
    return {"latents": torch.nn.functional.interpolate(tensors["latents"], scale_factor=2)}


def interrupt(pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = i >= 4
    return {}


use("A callback that edits the latents", **callback(move_latents))
use("A callback that changes the control image", **callback(other_control, "image"))
use("A callback that changes the mask, inpainting UNet (9 channels)", functools.partial(
    sd, diffusers.StableDiffusionInpaintPipeline, unet=models.small_unet(in_channels=9)),
    **callback(other_mask, "mask", "masked_image_latents"))  # fmt: skip
use("A callback that changes the size of the latents", functools.partial(
    sd, diffusers.StableDiffusionPipeline,
    scheduler=models.scheduler(diffusers.EulerDiscreteScheduler)), plain=None,
    **callback(more_latents))  # fmt: skip
use("A callback that interrupts", **callback(interrupt))
use("To pictures, not latents", output_type="pt", plain=None)

for strength in (0.3, 1.0):
    use(f"Image to image, `strength={strength}`",
        functools.partial(sd, diffusers.StableDiffusionControlNetImg2ImgPipeline),
        strength=strength, steps=16, plain=None, distance=0.4)  # fmt: skip


# -- ControlNets --------------------------------------------------------------------------------

SEVERAL = "Several ControlNets"


def multi() -> Any:
    nets = [models.small_controlnet(), models.small_controlnet(5)]
    return sd(controlnet=MultiControlNetModel(nets))


def multi_call(pipe: Any, seed: int, **changes: Any) -> torch.Tensor:
    return call(pipe, seed, image=[models.picture(seed), models.picture(seed + 7)], **changes)


for name, changes in {
    "`MultiControlNetModel`": {},
    "One with a scale of its own": {"controlnet_conditioning_scale": [1.0, 0.3]},
    "One switched off": {"controlnet_conditioning_scale": [0.0, 1.0]},
    "The window of one ended": {"control_guidance_end": [0.2, 1.0]},
    "Windows of their own": {
        "control_guidance_start": [0.0, 0.5],
        "control_guidance_end": [0.5, 1.0],
    },
    "`guess_mode` with two": {"guess_mode": True},
}.items():
    row(SEVERAL, name, multi, call=functools.partial(multi_call, **changes),
        plain=multi_call if changes else None)  # fmt: skip
row(
    SEVERAL, "Given to `hgc.install` as a list", multi, call=multi_call,
    install=lambda pipe, config: hgc.install(
        pipe.unet, list(pipe.controlnet.nets), config=config
    ),
)  # fmt: skip


def one_net_twice() -> Any:
    net = models.small_controlnet()
    return sd(controlnet=MultiControlNetModel([net, net]))


row(SEVERAL, "One ControlNet with two conditions", one_net_twice, call=multi_call)


def install_unet_only(pipe: Any, config: Any) -> hgc.Installation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HgcWarning)
        return hgc.install(pipe.unet, config=config)


row(
    SEVERAL, "A ControlNet that hgc is not installed on", sd, install=install_unet_only,
    note="it runs at every step; a warning says so",
)  # fmt: skip


# -- schedulers ----------------------------------------------------------------------------------

SCHEDULERS = "Schedulers"
for name in (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
):

    def with_scheduler(name: str = name) -> Any:
        cls = getattr(diffusers, name)
        made = cls() if name.startswith("EDM") else models.scheduler(cls)
        return sd(scheduler=made)

    quick = name.startswith(("DDIMSch", "EulerDis", "Heun", "LCM", "PNDM"))
    # second-order schedulers make twice the evaluations, with no more key steps
    more = name.startswith(("EDM", "Heun", "KDPM2", "PNDM"))
    distance = 0.5 if more else 0.15
    row(SCHEDULERS, f"`{name}`", with_scheduler, slow=not quick, distance=distance)


# -- adapters ------------------------------------------------------------------------------------

ADAPTERS = "LoRA, IP-Adapter, FreeU"


def lora_weights(seed: int, targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "proj_in")) -> Any:
    """A LoRA for the small UNet, as a file would hold it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = models.small_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(unet)
    return {f"unet.{k}": torch.randn(v.shape, generator=generator) * 0.2 for k, v in state.items()}


def with_lora(*seeds: int) -> Any:
    pipe = sd(text_encoder=models.text_encoder())
    for seed in seeds:
        pipe.load_lora_weights(lora_weights(seed), adapter_name=f"lora{seed}")
    if seeds:
        pipe.set_adapters([f"lora{seed}" for seed in seeds])
    return pipe


def without_lora(pipe: Any, seed: int) -> torch.Tensor:
    pipe.disable_lora()
    try:
        return call(pipe, seed)
    finally:
        pipe.enable_lora()


def scaled_lora(pipe: Any, seed: int) -> torch.Tensor:
    return call(pipe, seed, cross_attention_kwargs={"scale": 0.4})


def lora_schedule(pipe: Any, seed: int) -> torch.Tensor:
    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i in (0, 4):
            pipe.set_adapters(["lora1"], [1.0 + 0.2 * i])
        return {}

    pipe.set_adapters(["lora1"], [0.1])
    return call(pipe, seed, **callback(change))


def lora_scale_schedule(pipe: Any, seed: int) -> torch.Tensor:
    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        pipe._cross_attention_kwargs = {"scale": 0.2 * (i // 2)}
        return {}

    return call(pipe, seed, cross_attention_kwargs={"scale": 0.0}, **callback(change))


def other_lora_at_half(pipe: Any, seed: int) -> torch.Tensor:
    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i == 1:
            pipe.set_adapters(["lora2"])
        return {}

    pipe.set_adapters(["lora1"])
    return call(pipe, seed, **callback(change))


def lora_for_one_call(pipe: Any, seed: int) -> torch.Tensor:
    """What a server does: load, draw, unload."""
    pipe.load_lora_weights(lora_weights(seed + 1), adapter_name="mine")
    try:
        return call(pipe, seed)
    finally:
        pipe.unload_lora_weights()


def fused_lora(pipe: Any, seed: int) -> torch.Tensor:
    saved = copy.deepcopy(pipe.unet.state_dict())
    pipe.load_lora_weights(lora_weights(seed + 1), adapter_name="mine")
    pipe.fuse_lora(lora_scale=0.7)
    try:
        return call(pipe, seed)
    finally:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        pipe.unet.load_state_dict(saved)  # unfusing rounds


def fused_at_half(pipe: Any, seed: int) -> torch.Tensor:
    saved = copy.deepcopy(pipe.unet.state_dict())

    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i == 1:
            pipe.load_lora_weights(lora_weights(1), adapter_name="mine")
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return {}

    try:
        return call(pipe, seed, **callback(change))
    finally:
        pipe.unet.load_state_dict(saved)


row(ADAPTERS, "A LoRA, loaded before install", lambda: with_lora(1), plain=without_lora)
row(ADAPTERS, "Two LoRAs", lambda: with_lora(1, 2), plain=without_lora)
row(
    ADAPTERS,
    "A LoRA switched off",
    lambda: with_lora(1),
    call=without_lora,
    changes_models=True,
    plain=call,
)
row(
    ADAPTERS,
    '`cross_attention_kwargs={"scale": 0.4}`',
    lambda: with_lora(1),
    call=scaled_lora,
    changes_models=True,
    plain=call,
)
row(
    ADAPTERS,
    "A LoRA scale that changes between steps",
    lambda: with_lora(1),
    call=lora_schedule,
    changes_models=True,
    plain=without_lora,
)
row(
    ADAPTERS,
    "`cross_attention_kwargs` that change between steps",
    lambda: with_lora(1),
    call=lora_scale_schedule,
    changes_models=True,
    plain=call,
)
row(
    ADAPTERS,
    "Another LoRA from the third step on",
    lambda: with_lora(1, 2),
    call=other_lora_at_half,
    changes_models=True,
    plain=without_lora,
)
row(
    ADAPTERS,
    "Loaded after install, unloaded after the call",
    sd,
    call=lora_for_one_call,
    changes_models=True,
    plain=call,
)
row(
    ADAPTERS,
    "Fused after install, unfused after the call",
    sd,
    call=fused_lora,
    changes_models=True,
    plain=call,
)
row(
    ADAPTERS,
    "Loaded, fused and unloaded by a callback",
    sd,
    call=fused_at_half,
    changes_models=True,
    plain=call,
)
row(
    ADAPTERS,
    "A LoRA on the ControlNet too",
    lambda: _with_control_lora(),
    plain=lambda pipe, seed: call(sd(), seed),
)


def _with_control_lora() -> Any:
    from peft import LoraConfig

    pipe = with_lora(1)
    pipe.controlnet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.controlnet.add_adapter(
            LoraConfig(r=2, lora_alpha=4, target_modules=["to_k", "to_v"], init_lora_weights=False)
        )
    pipe.controlnet.eval()
    return pipe


def hot_swapped(pipe: Any, seed: int) -> torch.Tensor:
    """One LoRA in the place of another, from the third step on."""

    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i == 1:
            pipe.load_lora_weights(lora_weights(2), adapter_name="mine", hotswap=True)
        return {}

    pipe.load_lora_weights(lora_weights(1), adapter_name="mine")
    try:
        return call(pipe, seed, **callback(change))
    finally:
        pipe.unload_lora_weights()


def lora_of_one(pipe: Any, seed: int) -> torch.Tensor:
    pipe.load_lora_weights(lora_weights(1), adapter_name="mine")
    try:
        return call(pipe, seed)
    finally:
        pipe.unload_lora_weights()


row(
    ADAPTERS, "Hot-swapped by a callback (`hotswap=True`)", sd, call=hot_swapped,
    changes_models=True, plain=lora_of_one,
)  # fmt: skip


def with_adapter(kind: str) -> Any:
    import peft

    pipe = sd()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(peft, kind)(
            r=4, target_modules=["to_k", "to_v", "to_q"], init_weights=False
        )
        pipe.unet.add_adapter(config, "mine")
    pipe.unet.eval()
    return pipe


def switched_off_at_half(pipe: Any, seed: int) -> torch.Tensor:
    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i == 1:
            pipe.unet.disable_adapters()
        return {}

    try:
        return call(pipe, seed, **callback(change))
    finally:
        pipe.unet.enable_adapters()


for kind in ("LoHa", "LoKr"):
    row(
        ADAPTERS, f"{kind}, switched off by a callback",
        functools.partial(with_adapter, f"{kind}Config"), call=switched_off_at_half,
        changes_models=True, plain=call,
    )  # fmt: skip


def ip_adapter_weights(unet: Any, seed: int = 5, tokens: int = 4) -> dict[str, Any]:
    """An IP-Adapter for ``unet``, as a file would hold it."""
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": weights(tokens * width, 8),
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    adapter, k = {}, 1
    channels = unet.config.block_out_channels
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        block = int(name.split(".")[1]) if not name.startswith("mid") else -1
        hidden = channels[::-1][block] if name.startswith("up") else channels[block]
        adapter[f"{k}.to_k_ip.weight"] = weights(hidden, width)
        adapter[f"{k}.to_v_ip.weight"] = weights(hidden, width)
        k += 2
    return {"image_proj": projection, "ip_adapter": adapter}


def with_ip_adapter(make: Callable[[], Any] = sd) -> Any:
    pipe = make()
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    pipe.set_ip_adapter_scale(1.0)
    return pipe


def ip_call(pipe: Any, seed: int, **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 1, 8, generator=generator)
    return call(pipe, seed, **{"ip_adapter_image_embeds": [embeds], **changes})


def ip_off(pipe: Any, seed: int) -> torch.Tensor:
    pipe.set_ip_adapter_scale(0.0)
    try:
        return ip_call(pipe, seed)
    finally:
        pipe.set_ip_adapter_scale(1.0)


def ip_schedule(pipe: Any, seed: int) -> torch.Tensor:
    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i == 1:
            pipe.set_ip_adapter_scale(0.0)
        return {}

    pipe.set_ip_adapter_scale(1.0)
    try:
        return ip_call(pipe, seed, **callback(change))
    finally:
        pipe.set_ip_adapter_scale(1.0)


def ip_for_one_call(pipe: Any, seed: int) -> torch.Tensor:
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    pipe.set_ip_adapter_scale(1.0)
    try:
        return ip_call(pipe, seed)
    finally:
        pipe.unload_ip_adapter()


row(
    ADAPTERS,
    "IP-Adapter",
    with_ip_adapter,
    call=ip_call,
    plain=ip_off,
    note="cross-attention is computed, the rest follows the plan",
)
row(
    ADAPTERS,
    "IP-Adapter, SDXL",
    functools.partial(with_ip_adapter, xl),
    call=ip_call,
    plain=ip_off,
)
row(
    ADAPTERS,
    "IP-Adapter, scale set to 0 by a callback",
    with_ip_adapter,
    call=ip_schedule,
    plain=ip_call,
)
row(
    ADAPTERS,
    "IP-Adapter loaded after install, unloaded after the call",
    sd,
    call=ip_for_one_call,
    changes_models=True,
    plain=call,
)


def ip_exchanged(pipe: Any, seed: int) -> torch.Tensor:
    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i == 1:
            put_ip_adapter(pipe, 6)
        return {}

    put_ip_adapter(pipe, 5)
    return ip_call(pipe, seed, **callback(change))


def put_ip_adapter(pipe: Any, seed: int) -> None:
    pipe.unload_ip_adapter()
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet, seed)])
    pipe.set_ip_adapter_scale(1.0)


row(
    ADAPTERS, "IP-Adapter exchanged by a callback", with_ip_adapter, call=ip_exchanged,
    changes_models=True, plain=ip_call,
)  # fmt: skip
row(
    ADAPTERS,
    "IP-Adapter with masks",
    with_ip_adapter,
    call=functools.partial(
        ip_call,
        cross_attention_kwargs={
            "ip_adapter_masks": [(models.picture(1)[:, :1, :16, :16] > 0.5).float()[None, 0]]
        },
    ),
    plain=ip_call,
    note="both halves of guidance are always computed",
)


def with_freeu() -> Any:
    pipe = sd()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return pipe


def without_freeu(pipe: Any, seed: int) -> torch.Tensor:
    pipe.disable_freeu()
    try:
        return call(pipe, seed)
    finally:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def freeu_at_half(pipe: Any, seed: int) -> torch.Tensor:
    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i == 1:
            pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        return {}

    pipe.disable_freeu()
    try:
        return call(pipe, seed, **callback(change))
    finally:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


row(ADAPTERS, "FreeU", with_freeu, plain=without_freeu)
row(ADAPTERS, "FreeU from the third step on", with_freeu, call=freeu_at_half, plain=without_freeu)


# -- modules -------------------------------------------------------------------------------------

MODULES = "What is done to the modules"


def cast(dtype: torch.dtype) -> Callable[[], Any]:
    def make() -> Any:
        return sd().to(dtype=dtype)

    return make


def call_like(pipe: Any, seed: int, **changes: Any) -> torch.Tensor:
    """A request with the prompt in the dtype of the UNet."""
    dtype = next(p.dtype for p in pipe.vae.parameters())
    embeds = {
        "prompt_embeds": models.text(seed).to(dtype),
        "negative_prompt_embeds": models.text(seed + 500).to(dtype),
    }
    return call(pipe, seed, **embeds, **changes)


row(MODULES, "bfloat16", cast(torch.bfloat16), call=call_like)
row(MODULES, "float16", cast(torch.float16), call=call_like)


def cast_and_back(pipe: Any, seed: int) -> torch.Tensor:
    """`.to(dtype)` while installed, and a request in each."""
    pipe.to(dtype=torch.bfloat16)
    try:
        low = call_like(pipe, seed)
    finally:
        pipe.to(dtype=torch.float32)
    return low.float()


row(MODULES, "`.to(dtype)` after install", cast(torch.bfloat16), call=cast_and_back)


def channels_last() -> Any:
    pipe = sd()
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.controlnet.to(memory_format=torch.channels_last)
    return pipe


row(MODULES, "channels_last", channels_last)


def autocast(pipe: Any, seed: int) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return call(pipe, seed)


def inference_mode(pipe: Any, seed: int) -> torch.Tensor:
    with torch.inference_mode():
        return call(pipe, seed)


row(MODULES, "`torch.autocast`", sd, call=autocast)
row(MODULES, "`torch.inference_mode`", sd, call=inference_mode)


def model_offload() -> Any:
    """What `enable_model_cpu_offload` does, with the CPU as the device to run on."""
    from accelerate import cpu_offload_with_hook

    pipe = sd()
    _, hook = cpu_offload_with_hook(pipe.unet, "cpu")
    cpu_offload_with_hook(pipe.controlnet, "cpu", prev_module_hook=hook)
    return pipe


def sequential_offload() -> Any:
    """What `enable_sequential_cpu_offload` does, with the CPU as the device to run on."""
    from accelerate import cpu_offload

    pipe = sd()
    for module in (pipe.unet, pipe.controlnet, pipe.vae):
        cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    return pipe


row(MODULES, "`enable_model_cpu_offload` (accelerate's hooks)", model_offload)
row(MODULES, "`enable_sequential_cpu_offload` (accelerate's hooks)", sequential_offload)


def group_offload(pipe: Any, level: str) -> Any:
    from diffusers.hooks import apply_group_offloading

    for module in (pipe.unet, pipe.controlnet):
        apply_group_offloading(
            module,
            torch.device("cpu"),
            torch.device("cpu"),
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
        )
    return pipe


class InstalledUnderOffload:
    """hgc installed first, group offload enabled then; taken away in the other order."""

    def __init__(self, pipe: Any, config: Any) -> None:
        self._pipe = pipe
        self._installation = install(pipe, config)
        self._engine = self._installation._engine
        group_offload(pipe, "block_level")

    def __enter__(self) -> InstalledUnderOffload:
        return self

    def __exit__(self, *exc: object) -> None:
        self.uninstall()

    def uninstall(self) -> None:
        for model in (self._pipe.unet, self._pipe.controlnet):
            model._diffusers_hook.remove_hook("group_offloading", recurse=True)
            for module in model.modules():
                # diffusers leaves its registry, and the forward it found, on the instance
                module.__dict__.pop("_diffusers_hook", None)
                if module not in (self._pipe.unet, self._pipe.controlnet):
                    module.__dict__.pop("forward", None)
        self._installation.uninstall()


row(MODULES, "Group offload, leaf level", lambda: group_offload(sd(), "leaf_level"))
row(
    MODULES,
    "Group offload, block level, enabled after install",
    sd,
    install=InstalledUnderOffload,
    in_full="which is run in part",
    note="with blocks that are run in part left to diffusers, a warning says so; prefer leaf level",
)


def layerwise() -> Any:
    pipe = sd()
    for module in (pipe.unet, pipe.controlnet):
        module.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
    return pipe


row(MODULES, "Layerwise casting", layerwise)


def sliced() -> Any:
    pipe = sd()
    pipe.enable_attention_slicing(1)
    return pipe


def slicing_on_and_off(pipe: Any, seed: int) -> torch.Tensor:
    def change(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i == 3:
            pipe.enable_attention_slicing(1)
        return {}

    try:
        return call(pipe, seed, **callback(change))
    finally:
        pipe.disable_attention_slicing()


def other_processor() -> Any:
    from diffusers.models.attention_processor import AttnProcessor

    pipe = sd()
    pipe.unet.set_attn_processor(AttnProcessor())
    return pipe


def fused_projections() -> Any:
    pipe = sd()
    pipe.fuse_qkv_projections(vae=False)
    return pipe


row(MODULES, "Attention slicing", sliced)
row(
    MODULES,
    "Attention slicing from the third step on",
    sd,
    call=slicing_on_and_off,
    changes_models=True,
)
row(MODULES, "`AttnProcessor`", other_processor)


class Edit:
    """Edits attention from the fifth evaluation on; counts its calls to know where it stands, as
    the controllers of prompt-to-prompt do."""

    def __init__(self, layers: int) -> None:
        self.layers, self.calls = layers, 0

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None,
        attention_mask: Any = None,
    ) -> Any:  # fmt: skip
        self.calls += 1
        inner = diffusers.models.attention_processor.AttnProcessor2_0()
        out = inner(attn, hidden_states, encoder_hidden_states, attention_mask)
        return out * (1.0 if self.calls <= 4 * self.layers else 0.2)


def edited(pipe: Any, seed: int) -> torch.Tensor:
    saved = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(Edit(len(saved)))
    try:
        return call(pipe, seed)
    finally:
        pipe.unet.set_attn_processor(saved)


def hooked() -> Any:
    pipe = sd()
    pipe.unet.mid_block.register_forward_hook(lambda module, args, out: out * 0.9)
    return pipe


row(
    MODULES, "Processors that edit attention and count their calls (prompt-to-prompt)", sd,
    call=edited, changes_models=True, in_full=WATCHING,
    note="left to diffusers, a warning says so; `trust=` names those that may be skipped",
)  # fmt: skip
row(
    MODULES, "A hook on a module inside the UNet", hooked, in_full="a hook is in place on",
    note="left to diffusers, a warning says so",
)  # fmt: skip


def regional(backend: str) -> Any:
    pipe = sd()
    pipe.unet.compile_repeated_blocks(backend=backend)
    return pipe


for backend in ("eager", "aot_eager"):
    row(
        MODULES, f'`unet.compile_repeated_blocks(backend="{backend}")`',
        functools.partial(regional, backend),
        note="compiled blocks run as they are, cross-attention in them is computed",
    )  # fmt: skip
row(MODULES, "`fuse_qkv_projections`", fused_projections)


def copied_while_installed(pipe: Any, seed: int) -> torch.Tensor:
    """The image of a deepcopy of installed models: an uninstalled one."""
    other = sd(unet=copy.deepcopy(pipe.unet), controlnet=copy.deepcopy(pipe.controlnet))
    assert torch.equal(call(other, seed), call(sd(), seed))
    return call(pipe, seed)


def saved_while_installed(pipe: Any, seed: int) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        pipe.unet.save_pretrained(folder)
        other = sd(unet=type(pipe.unet).from_pretrained(folder).eval())
    assert torch.equal(call(other, seed), call(sd(), seed))
    return call(pipe, seed)


def from_pipe(pipe: Any, seed: int) -> torch.Tensor:
    """A second pipeline on the installed models, then the first again."""
    other = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return torch.cat([call(other, seed, steps=12), call(pipe, seed)])


row(MODULES, "`copy.deepcopy` while installed", sd, call=copied_while_installed)
row(MODULES, "`save_pretrained` while installed", sd, call=saved_while_installed)
row(MODULES, "`from_pipe`: two pipelines, one UNet", sd, call=from_pipe)


# -- runs and threads ----------------------------------------------------------------------------

RUNS = "Runs and threads"


def second_pipeline(pipe: Any) -> Any:
    return sd(unet=pipe.unet, controlnet=pipe.controlnet)


def nested(pipe: Any, seed: int) -> torch.Tensor:
    """Another request of another pipeline on the same UNet inside a callback."""
    other, images = second_pipeline(pipe), []

    def inner(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
        if i in (1, 3, 4):
            images.append(call(other, seed + 20 + i))
        return {}

    outer = call(pipe, seed, **callback(inner))
    return torch.cat([outer, *images])


def alone(pipe: Any, seed: int) -> torch.Tensor:
    others = [call(second_pipeline(pipe), seed + 20 + i) for i in (1, 3, 4)]
    return torch.cat([call(pipe, seed), *others])


def threads(pipe: Any, seed: int, count: int = 3) -> torch.Tensor:
    images: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        images[k] = call(second_pipeline(pipe), seed + k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    images[count] = call(pipe, seed)
    return torch.cat([images[k] for k in sorted(images)])


class Stop(Exception):
    """Raised by a callback."""


def after(error: type[BaseException]) -> Callable[[Any, int], torch.Tensor]:
    def then(pipe: Any, seed: int) -> torch.Tensor:
        def fail(pipe: Any, i: int, tensors: Any) -> dict[str, Any]:
            if i == 4:
                raise error
            return {}

        with contextlib.suppress(error):
            call(pipe, seed + 3, **callback(fail))
        return call(pipe, seed)

    return then


def evaluations(pipe: Any, seed: int, steps: int = STEPS) -> Any:
    """A denoising loop of one's own, as a generator that can be left at any step."""
    schedule = copy.deepcopy(pipe.scheduler)
    schedule.set_timesteps(steps)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    prompts = torch.cat([models.text(seed + 500), models.text(seed)])
    condition = models.picture(seed).repeat(2, 1, 1, 1)
    for t in schedule.timesteps:
        # around each step alone: a suspended generator would leave gradients off for its caller
        with torch.no_grad():
            both = schedule.scale_model_input(torch.cat([latents] * 2), t)
            down, mid = pipe.controlnet(
                both,
                t,
                encoder_hidden_states=prompts,
                controlnet_cond=condition,
                return_dict=False,
            )
            noise = pipe.unet(
                both,
                t,
                encoder_hidden_states=prompts,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
            first, second = noise.chunk(2)
            latents = schedule.step(first + 5 * (second - first), t, latents).prev_sample
        yield latents


def abandoned(pipe: Any, seed: int) -> torch.Tensor:
    left = evaluations(pipe, seed + 3)
    for _ in range(5):
        next(left)
    image = call(pipe, seed)
    left.close()
    return torch.cat([image, list(evaluations(pipe, seed))[-1]])


def generators_in_turns(pipe: Any, seed: int) -> torch.Tensor:
    loops = [evaluations(pipe, seed + k) for k in range(3)]
    return torch.cat([torch.stack(row)[:, 0] for row in zip(*loops, strict=True)][-1:])


row(RUNS, "A request of another pipeline inside a callback", sd, call=nested, plain=None)
row(RUNS, "The same requests one after the other", sd, call=alone)
row(RUNS, "Threads with a pipeline each on one UNet", sd, call=threads)
row(RUNS, "After an exception in a callback", sd, call=after(Stop))
row(RUNS, "After KeyboardInterrupt in a callback", sd, call=after(KeyboardInterrupt))


def out_of_memory(inside: str) -> Callable[[Any, int], torch.Tensor]:
    """A request that runs out of memory in its fifth call of a layer, then another."""

    def then(pipe: Any, seed: int) -> torch.Tensor:
        layer, calls = getattr(pipe, inside).conv_in, []

        def forward(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == (5 if inside == "unet" else 2):
                raise torch.OutOfMemoryError
            return type(layer).forward(layer, x)

        layer.forward = forward
        try:
            call(pipe, seed + 3)
        except torch.OutOfMemoryError:
            pass
        else:
            raise AssertionError("the fault was not met")
        finally:
            del layer.forward
        return call(pipe, seed)

    return then


row(RUNS, "After out of memory in the UNet", sd, call=out_of_memory("unet"))
row(RUNS, "After out of memory in the ControlNet", sd, call=out_of_memory("controlnet"))
row(RUNS, "A loop of one's own, left in the middle", sd, call=abandoned)
row(RUNS, "Three loops of one's own in turns", sd, call=generators_in_turns)


# -- what is refused -----------------------------------------------------------------------------

REFUSED = "Refused at install"


@dataclasses.dataclass
class Bare:
    """Models without a pipeline."""

    unet: Any
    controlnet: Any = None


def refuse(name: str, make: Callable[[], Any], text: str, **more: Any) -> None:
    row(REFUSED, name, make, refuses=text, **more)


def motion_unet() -> Any:
    return diffusers.UNetMotionModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        motion_num_attention_heads=2,
        num_attention_heads=2,
        layers_per_block=1,
    )


def xs_unet() -> Any:
    return diffusers.UNetControlNetXSModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        num_attention_heads=2,
        ctrl_block_out_channels=(4, 8),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=2,
        ctrl_conditioning_embedding_out_channels=(4, 4),
    )


refuse("AnimateDiff (`UNetMotionModel`)", lambda: Bare(motion_unet()), "got UNetMotionModel")
refuse(
    "ControlNet-XS (`UNetControlNetXSModel`)", lambda: Bare(xs_unet()), "got UNetControlNetXSModel"
)
refuse(
    "Blocks of other families (DeepFloyd IF, Kandinsky, K-upscaler)",
    lambda: Bare(models.small_unet(down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"))),
    "SimpleCrossAttnDownBlock2D; supported",
)
refuse(
    "SparseControlNet",
    lambda: Bare(
        models.small_unet(),
        diffusers.SparseControlNetModel(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            num_attention_heads=2,
            motion_num_attention_heads=2,
            layers_per_block=1,
        ),
    ),
    "got SparseControlNetModel",
)
refuse(
    "Group offload, block level, enabled before install",
    lambda: group_offload(sd(), "block_level"),
    "install hgc first",
)


def twice() -> Any:
    pipe = sd()
    return Bare(pipe, pipe.controlnet)


refuse("A whole pipeline and its ControlNet given to `hgc.install`", twice, "must be left out")


def other_class(name: str) -> Any:
    """Without weights: only its class is asked for."""
    with torch.device("meta"):
        return Bare(getattr(diffusers, name)())


refuse("Text-to-video (`UNet3DConditionModel`)",
       functools.partial(other_class, "UNet3DConditionModel"), "got UNet3DConditionModel",
       slow=True)  # fmt: skip
refuse("Stable Video Diffusion (`UNetSpatioTemporalConditionModel`)",
       functools.partial(other_class, "UNetSpatioTemporalConditionModel"),
       "got UNetSpatioTemporalConditionModel", slow=True)  # fmt: skip
refuse("Kandinsky 3 (`Kandinsky3UNet`)", functools.partial(other_class, "Kandinsky3UNet"),
       "got Kandinsky3UNet", slow=True)  # fmt: skip
refuse("Unconditional pipelines (`UNet2DModel`)", functools.partial(other_class, "UNet2DModel"),
       "got UNet2DModel")  # fmt: skip


def compiled_module() -> Any:
    pipe = sd()
    return Bare(torch.compile(pipe.unet, backend="eager"), pipe.controlnet)


def compiled_in_place() -> Any:
    pipe = sd()
    pipe.unet.compile(backend="eager")
    return pipe


def compiled_afterwards(pipe: Any, seed: int) -> torch.Tensor:
    pipe.unet.compile(backend="eager")
    try:
        return call(pipe, seed)
    finally:
        pipe.unet.__dict__.pop("_compiled_call_impl", None)


refuse("`torch.compile(unet)` before install", compiled_module, "plain module", slow=True)
refuse("`unet.compile()` before install", compiled_in_place, "plain module", slow=True)

row("Refused at the first evaluation", "`unet.compile()` after install", sd,
    call=compiled_afterwards, refuses="call .compile() of the Installation", in_a_call=True,
    slow=True)  # fmt: skip


# -- outcomes ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a row gave; the cells of its line in the table.

    Attributes:
        exact: Bit for bit, under ``exact``.
        shallow: Within the stated distance, and seen to be what was asked for.
        distance: Measured under ``shallow``.
        without: That of the image without the use, where there is one.
        reused: Evaluations of the last run that were not computed in full, and of how many.
        uninstall: Nothing is left, and the image is as before.
        next: The request after another one equals a fresh one.
        refused: What install said, for a row that is refused.
    """

    exact: bool = False
    shallow: bool = False
    distance: float = 0.0
    without: float | None = None
    reused: tuple[int, int] = (0, 0)
    uninstall: bool = False
    next: bool = False
    refused: str = ""

    @property
    def good(self) -> bool:
        """Whether everything that must hold for a row holds."""
        return bool(self.refused) or (self.exact and self.shallow and self.uninstall and self.next)


def residue(pipe: Any, by: Callable[[Any], Any] = id) -> list[Any]:
    """Everything an installation could leave behind: every attribute of every module, by identity
    or, where requests change them, by type."""
    found: list[Any] = []
    net = getattr(pipe, "controlnet", None)
    for model in (pipe.unet, *([net] if net is not None else [])):
        for name, module in model.named_modules():
            attributes = {k: by(v) for k, v in module.__dict__.items()}
            found.append((name, attributes, len(module._forward_hooks)))
    return found


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """Relative L2 distance of ``x`` from ``y``."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def reused_of(installation: hgc.Installation) -> tuple[int, int]:
    """Evaluations of the last run that reused something, and all of them."""
    last = installation._engine.registry.last
    report = [] if last is None else last.report
    if len(report) < 2:  # not of the run that the last call alone made
        reports = [report, *(run.report for run in installation._engine.registry.runs.values())]
        report = max(reports, key=lambda r: sum(row.plan != hgc.StepPlan() for row in r))
    return sum(row.plan != hgc.StepPlan() for row in report), len(report)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bit for bit, NaN nowhere."""
    return bool(torch.equal(x, y) and x.isfinite().all())


def outcome(row: Row) -> Outcome:
    """Judge ``row``."""
    if row.refuses:
        made = row.make()
        before = residue(made) if isinstance(made.unet, torch.nn.Module) else []
        try:
            installation = row.install(made, SHALLOW)
            if row.in_a_call:
                with installation:
                    row.call(made, 0)
        except TypeError as error:
            found = re.search(re.escape(row.refuses), str(error))
            clean = not before or residue(made) == before
            return Outcome(refused=str(error) if found and clean else "")
        return Outcome()
    pipe = row.make()
    reference = row.call(pipe, 0)
    without = relative(row.plain(pipe, 0), reference) if row.plain is not None else None
    by = type if row.changes_models else id
    before = residue(pipe, by)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with row.install(pipe, "exact"):
            exact = same(row.call(pipe, 0), reference)
        installation = row.install(pipe, SHALLOW)
        try:
            row.call(pipe, 1)
            image = row.call(pipe, 0)
            reused = reused_of(installation)
        finally:
            installation.uninstall()
        uninstall = residue(pipe, by) == before and same(row.call(pipe, 0), reference)
        other = row.make()
        with row.install(other, SHALLOW):
            fresh = row.call(other, 0)
    said = [str(w.message) for w in caught if issubclass(w.category, HgcWarning)]
    distance = relative(image, reference)
    if row.in_full or row.same_in_full:
        shallow = same(image, reference) and reused[0] == 0
        shallow = shallow and (row.same_in_full or any(row.in_full in s for s in said))
    else:
        shallow = 0 < distance <= row.distance and reused[0] > 0
        if without is not None:
            shallow = shallow and distance < 0.5 * without
    return Outcome(exact, shallow, distance, without, reused, uninstall, same(image, fresh))


# -- the page ------------------------------------------------------------------------------------

FAILED = "**fails**"


def cells(row: Row, found: Outcome) -> list[str]:
    """The cells of a row after the first."""
    if row.refuses:
        said = f"TypeError: {found.refused}" if found.refused else FAILED
        return [f"`{said}`" if found.refused else said]

    def cell(holds: bool, text: str = "yes") -> str:
        return text if holds else FAILED

    reused, total = found.reused
    if row.in_full or row.same_in_full:
        shallow = cell(found.shallow, "computed in full: the same image")
    else:
        without = "" if found.without is None else f"; {found.without:.2f} without it"
        text = f"{found.distance:.3f} (at most {row.distance:g}{without}), {reused} of {total}"
        shallow = cell(found.shallow, text)
    return [cell(found.exact), shallow, cell(found.uninstall), cell(found.next), row.note]


INTRODUCTION = """# Compatibility

What runs with hgc, and what is checked about it. Written by `python scripts/write_compatibility.py`
from the outcomes of [tests/compatibility.py](../tests/compatibility.py), with diffusers {diffusers}
and torch {torch} on a CPU; `pytest -m "slow or not slow" tests/test_compatibility.py` checks every
line again. Each row runs real diffusers classes at the smallest configurations, with random weights
and {steps} steps where it says nothing else. Quality is not measured here: see
[fidelity.md](fidelity.md).

- **exact**: with `config="exact"` the image equals the one without hgc, bit for bit.
- **shallow**: with one decoder layer between key steps it is within the stated distance (relative
  L2; random weights) of the image without hgc, and evaluations were reused: so many of so many. For
  a use, it is less than half as far as the image without that use: nothing that was asked for is
  silently ignored.
- **uninstall**: every attribute of every module is the object it was before, and the image too.
- **next**: a request that follows another on one installation equals it in a fresh one, bit for
  bit.

One pipeline cannot serve several threads at once, with or without hgc: its scheduler keeps the
state of a run. Give each thread a pipeline of its own; they may share the UNet and the ControlNet.

Every pipeline of diffusers {diffusers} that has a UNet and can be imported is here, or its UNet's
class is among those refused, but for: `LEditsPPPipelineStableDiffusionXL`,
`StableDiffusionGLIGENTextImagePipeline`, `TextToVideoZeroSDXLPipeline`, `BlipDiffusionPipeline` (as
their siblings), `AltDiffusion*`, `StableDiffusionPipelineSafe`,
`StableDiffusionModelEditingPipeline`, `StableDiffusionPix2PixZeroPipeline`,
`StableDiffusionInpaintPipelineLegacy`, `UnCLIP*`, `VersatileDiffusion*` (deprecated), `AudioLDM*`
and `MusicLDMPipeline` (their UNets are called without text, and computed in full with a warning).
"""


def page(outcomes: dict[int, Outcome]) -> str:
    """The text of docs/compatibility.md, of the outcome of each row by its index."""
    lines = [
        INTRODUCTION.format(diffusers=diffusers.__version__, torch=torch.__version__, steps=STEPS)
    ]
    group = ""
    for i, row in enumerate(ROWS):
        if row.group != group:
            group = row.group
            lines += ["", f"## {group}", ""]
            if row.refuses:
                who = "the call" if row.in_a_call else "`hgc.install`"
                lines += [f"| pipeline or use | {who} raises |", "|---|---|"]
            else:
                lines += [
                    "| pipeline or use | exact | shallow | uninstall | next | |",
                    "|---|---|---|---|---|---|",
                ]
        lines.append("| " + " | ".join([row.name, *cells(row, outcomes[i])]) + " |")
    return "\n".join(lines) + "\n"
