"""A small real Stable Diffusion ControlNet model, shipped with the package, and its judges.

The model was trained on rendered scenes (`hgc.testbed.scenes`), so each picture it makes can be
compared with an exact answer. Four conditions have a ControlNet each:

| condition | measure of `fidelity` (higher is better) |
|---|---|
| segmentation | mean IoU of the judge's classes against the scene's |
| canny | F1 of the picture's Canny edges against the condition's, 1 pixel of tolerance |
| softedge | multi-scale SSIM of the picture's soft edges against the condition's |
| depth | minus the RMSE of the judge's depth against the scene's, so 0 is best |

Pictures are 64 x 64. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hgc.testbed.conditions import CONDITIONS, check_condition, condition_image
from hgc.testbed.scenes import CLASSES, HELD_OUT_SEED, Scene, render

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionControlNetPipeline

__all__ = [
    "CLASSES",
    "CONDITIONS",
    "GUIDANCE_SCALE",
    "MEASURES",
    "NUM_STEPS",
    "Scene",
    "condition_image",
    "conditions_in",
    "fidelity",
    "held_out",
    "load_pipeline",
    "mean_iou",
    "path",
    "plans",
    "read_images",
    "render",
]

# The settings the tables of docs/testbed.md are measured with.
NUM_STEPS = 20
GUIDANCE_SCALE = 3.5

MEASURES = {
    "segmentation": "mean IoU",
    "canny": "edge F1",
    "softedge": "MS-SSIM",
    "depth": "-RMSE",
}


def path() -> Path:
    """The folder of the shipped model, in Stable Diffusion's layout.

    Raises FileNotFoundError where the package was installed without its weights.
    """
    folder = Path(__file__).resolve().parent / "model"
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no model: the package was installed without its data files. Reinstall "
            "it, or train the testbed with benchmarks/train_testbed.py."
        )
    return folder


def conditions_in(folder: Path) -> tuple[str, ...]:
    """The conditions that a testbed model in `folder` has a ControlNet for.

    Raises FileNotFoundError where `folder` holds none.
    """
    found = tuple(c for c in CONDITIONS if (folder / f"controlnet_{c}" / "config.json").exists())
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no model of the testbed: expected a folder that "
            "benchmarks/train_testbed.py wrote, with controlnet_segmentation or another condition's"
        )
    return found


def plans() -> dict[str, Path]:
    """The presets calibrated on the testbed for 20 steps, by name ("balanced-calibrated").

    Each is a file that ``hgc.install(config=...)`` takes, and costs what its preset does. The
    coefficients of its outputs were refined on scenes that no table uses
    (benchmarks/refine_plans.py).
    """
    folder = Path(__file__).resolve().parent / "plans"
    names = (f"{name}-calibrated" for name in ("paper", "balanced", "fast", "turbo"))
    return {name: folder / f"{name}.json" for name in names}


def load_pipeline(
    condition: str | Sequence[str] = "segmentation",
    *,
    folder: Path | None = None,
    scheduler: Any = None,
    torch_dtype: torch.dtype | None = None,
) -> StableDiffusionControlNetPipeline:
    """The testbed's pipeline with the ControlNet of `condition`, on the CPU.

    condition: one of `CONDITIONS`, or a list of them (a MultiControlNet in that order).
    folder: another model that benchmarks/train_testbed.py wrote; None: the shipped one. Where it
        holds no VAE it was trained with the shipped one's.
    scheduler: a scheduler, or None for UniPC as the model's folder has it.
    torch_dtype: None loads fp32.

    Equivalent to:
        controlnet = ControlNetModel.from_pretrained(path() / "controlnet_segmentation")
        pipe = StableDiffusionControlNetPipeline.from_pretrained(path(), controlnet=controlnet)
    """
    names = [condition] if isinstance(condition, str) else condition
    if not isinstance(names, Sequence) or len(names) == 0:
        raise TypeError(
            "condition: expected a name or a non-empty list of names, got "
            f"{type(condition).__name__}"
        )
    for name in names:
        check_condition(name)
    folder = path() if folder is None else folder
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionControlNetPipeline

    from hgc.models.supported import in_dtype

    given = in_dtype(torch.float32 if torch_dtype is None else torch_dtype)
    nets = [
        ControlNetModel.from_pretrained(
            folder / f"controlnet_{name}", local_files_only=True, **given
        )
        for name in names
    ]
    more = {} if scheduler is None else {"scheduler": scheduler}
    if not (folder / "vae").is_dir():
        more["vae"] = AutoencoderKL.from_pretrained(path() / "vae", local_files_only=True, **given)
    # Both libraries load behind a progress bar, which is noise at this size.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(
            folder,
            controlnet=nets[0] if isinstance(condition, str) else nets,
            safety_checker=None,
            local_files_only=True,
            **given,
            **more,
        )
    finally:
        for library in shown:
            library.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def held_out(n: int, start: int = 0) -> list[Scene]:
    """Scenes `start` to `start + n - 1` of those never used in training; the same on each call."""
    for name, value in (("n", n), ("start", start)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    return [render(HELD_OUT_SEED + start + i) for i in range(n)]


def read_images(images: Any) -> np.ndarray:
    """Pictures as uint8 [B, 64, 64, 3] RGB.

    images: PIL images, or an array: uint8, or float in [0, 1], [B, 64, 64, 3].
    """
    from hgc.testbed.judges import as_array

    return as_array(images)


def fidelity(condition: str, images: Any, scenes: Sequence[Scene]) -> np.ndarray:
    """How well each picture keeps to its condition: float64 [B], higher is better.

    images: what `read_images` takes, one a scene. The measure is `MEASURES[condition]`. For
    segmentation the score is the mean IoU over the classes of one picture; quote the corpus figure
    of `mean_iou`, which small objects cannot sway.
    """
    check_condition(condition)
    from hgc.testbed import judges

    return judges.scores(condition, images, scenes)


def mean_iou(images: Any, scenes: Sequence[Scene]) -> float:
    """Mean IoU in [0, 1] over the whole set: one confusion matrix, then the mean over classes."""
    from hgc.testbed import judges

    return judges.corpus_iou(judges.confusion(images, scenes))
