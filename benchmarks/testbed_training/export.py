"""Write the trained models as the folder that is shipped."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.testbed_training import models
from benchmarks.testbed_training.diffusion import Trained
from hgc.testbed.judges import Judge


def _half(module: Any) -> Any:
    return copy.deepcopy(module).cpu().eval().half()


def save_model(module: Any, folder: Path) -> None:
    """Write one diffusers model in fp16, without the note of the folder it came from."""
    _half(module).save_pretrained(folder)
    _clean(folder)


def _clean(folder: Path) -> None:
    for path in folder.rglob("config.json"):
        # diffusers notes the folder a model came from; it means nothing elsewhere.
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.rglob("*"):
        # safetensors writes files only their owner can read.
        path.chmod(0o755 if path.is_dir() else 0o644)


def export(
    folder: Path,
    *,
    vae: Any,
    trained: Trained,
    tokenizer: Any,
    judge: Judge | None,
    prediction: str = "v_prediction",
    own_vae: bool = True,
) -> None:
    """Write a Stable Diffusion folder, one `controlnet_<condition>` each, and the judge.

    Weights are fp16 on disk. The folder is built beside its place and then swapped in, so a reader
    never meets half of it. own_vae: False leaves out the VAE, which is then the testbed's.
    """
    from diffusers import StableDiffusionPipeline

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(trained.text_encoder),
        tokenizer=tokenizer,
        unet=_half(trained.unet),
        scheduler=models.make_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(part, safe_serialization=True)
    if not own_vae:
        shutil.rmtree(part / "vae")
    for condition in trained.conditions:
        _half(trained.controlnet(condition)).save_pretrained(part / f"controlnet_{condition}")
    # transformers loads in the dtype the configuration names; a plain load must be fp32.
    config_path = part / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if judge is not None:
        judge.save(part / "judge")
    elif (folder / "judge").exists():
        shutil.copytree(folder / "judge", part / "judge")
    _clean(part)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def rebuild(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """The VAE's round trip without sampling, [B, 3, 64, 64] in [-1, 1]."""
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean
        return vae.decode(z, return_dict=False)[0].clamp(-1, 1)
