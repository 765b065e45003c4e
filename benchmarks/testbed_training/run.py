"""The stages in order, each resumed from its checkpoint, and the export after every checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.testbed_training import diffusion, judge, loop, models, vae
from benchmarks.testbed_training.data import Scenes, load_scenes
from benchmarks.testbed_training.export import export, rebuild, save_model
from hgc.testbed.conditions import CONDITIONS
from hgc.testbed.judges import Judge

SHIPPED = models.Sizes()
SHIPPED_FOLDER = Path(__file__).resolve().parents[2] / "hgc" / "testbed" / "model"
STAGES = ("vae", "decoder", "judge", "diffusion")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `train` does. Steps or minutes, whichever ends first; minutes of None means steps only.

    base: folder of a model whose VAE is used where the stage `vae` was not trained here; what is
        exported then holds no VAE and no judge of its own.
    start: folder of a model that the stage `diffusion` begins with, where it has no checkpoint.
    until: a Unix time at which the stage that is running ends.
    captured: steps of `decoder` and `diffusion` are CUDA graphs.

    docs/testbed.md says how the shipped model was made.
    """

    scenes: int = 12000
    rebuilt: int = 4000
    sizes: models.Sizes = SHIPPED
    conditions: tuple[str, ...] = CONDITIONS
    prediction: str = "v_prediction"
    seed: int = 2
    base: Path | None = None
    start: Path | None = None
    vae_steps: int = 6000
    vae_minutes: float | None = None
    decoder_steps: int = 5000
    decoder_minutes: float | None = None
    decoder_batch: int = 8
    judge_steps: int = 1500
    judge_minutes: float | None = None
    steps: int = 4000
    minutes: float | None = None
    batch: int = 32
    peak: float = 1e-3
    split_at: float = 0.9
    save_minutes: float = 4.0
    compiled: bool = False
    captured: bool = False
    until: float | None = None


RECIPES = {
    "shipped": Recipe(),
    "other": Recipe(
        scenes=24000,
        sizes=models.OTHER,
        conditions=("segmentation", "depth"),
        prediction="epsilon",
        seed=17,
        base=SHIPPED_FOLDER,
        batch=128,
        steps=12000,
    ),
}


def _save_vae(model: Any, work: Path) -> None:
    state = {"model": model.state_dict(), "scaling_factor": model.config.scaling_factor}
    loop.save_checkpoint(work / "vae_done.pt", state)


def _trained_vae(recipe: Recipe, work: Path, device: torch.device) -> Any:
    saved = loop.load_checkpoint(work / "vae_done.pt", device)
    if saved is None and recipe.base is not None:
        from diffusers import AutoencoderKL

        own: Any = AutoencoderKL.from_pretrained(recipe.base / "vae", local_files_only=True)
        return own.float().to(device).eval().requires_grad_(False)
    if saved is None:
        raise FileNotFoundError(f"{work / 'vae_done.pt'}: train the stage 'vae' first")
    model = models.make_vae(recipe.sizes).to(device)
    model.load_state_dict(saved["model"])
    model.register_to_config(scaling_factor=saved["scaling_factor"])
    return model.eval().requires_grad_(False)


def _cached(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    if not path.exists():
        part = path.with_suffix(".part.npy")
        np.save(part, make())
        part.rename(path)
    return np.load(path)


def _latents(model: Any, scenes: Scenes, work: Path, device: torch.device) -> np.ndarray:
    """Scaled latents of all scenes; the decoder's further training does not change them."""
    return _cached(
        work / "latents.npy", lambda: diffusion.encode_latents(model, scenes, device).numpy()
    )


def _rebuilt(model: Any, scenes: Scenes, count: int, device: torch.device) -> np.ndarray:
    parts = []
    for start in range(0, min(count, len(scenes)), 50):
        x = rebuild(model, vae.pixels(scenes.image[start : min(start + 50, count)], device))
        x = ((x + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
        parts.append(x.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def finished_judge(work: Path, device: torch.device) -> Judge | None:
    """The judge as its last checkpoint has it, or None."""
    saved = loop.load_checkpoint(work / "judge.pt", device)
    if saved is None:
        return None
    model = Judge().to(device)
    model.load_state_dict(saved["model"])
    return model.eval().requires_grad_(False)


def train(
    recipe: Recipe,
    work: Path,
    out: Path,
    *,
    stages: tuple[str, ...] = STAGES,
    device: torch.device,
    log: Callable[[str], None] = print,
) -> None:
    """Run `stages`, with checkpoints in `work` and the shipped folder at `out`."""
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    scenes = load_scenes(recipe.scenes, work, recipe.conditions)
    log(f"{len(scenes)} scenes after {time.monotonic() - began:.1f} s")
    if "vae" in stages:
        model = vae.train_vae(
            scenes,
            work,
            sizes=recipe.sizes,
            steps=recipe.vae_steps,
            minutes=recipe.vae_minutes,
            device=device,
            log=log,
        )
        _save_vae(model, work)
    if "decoder" in stages:
        model = _trained_vae(recipe, work, device)
        vae.train_decoder(
            model,
            scenes,
            torch.from_numpy(_latents(model, scenes, work, device)),
            work,
            steps=recipe.decoder_steps,
            minutes=recipe.decoder_minutes,
            until=recipe.until,
            batch=recipe.decoder_batch,
            captured=recipe.captured,
            device=device,
            log=log,
        )
        _save_vae(model, work)
        if "diffusion" not in stages:
            save_model(model, out / "vae")
            log(f"exported the VAE to {out / 'vae'}")
    if "judge" in stages:
        model = _trained_vae(recipe, work, device)
        rebuilt = _cached(
            work / "rebuilt.npy", lambda: _rebuilt(model, scenes, recipe.rebuilt, device)
        )
        judge.train_judge(
            scenes,
            rebuilt,
            work,
            steps=recipe.judge_steps,
            minutes=recipe.judge_minutes,
            device=device,
            log=log,
        )
    if "diffusion" in stages:
        model = _trained_vae(recipe, work, device)
        latents = _latents(model, scenes, work, device)

        def on_save(trained: diffusion.Trained, tokenizer: Any, step: int) -> None:
            export(
                out,
                vae=model,
                trained=trained,
                tokenizer=tokenizer,
                judge=finished_judge(work, torch.device("cpu")),
                prediction=recipe.prediction,
                own_vae=recipe.base is None,
            )
            log(f"exported step {step} to {out}")

        diffusion.train_diffusion(
            scenes,
            torch.from_numpy(latents),
            work,
            sizes=recipe.sizes,
            conditions=recipe.conditions,
            prediction=recipe.prediction,
            steps=recipe.steps,
            minutes=recipe.minutes,
            until=recipe.until,
            batch=recipe.batch,
            peak=recipe.peak,
            split_at=recipe.split_at,
            seed=recipe.seed,
            save_minutes=recipe.save_minutes,
            compiled=recipe.compiled,
            captured=recipe.captured,
            start=recipe.start,
            device=device,
            on_save=on_save,
            log=log,
        )
