"""Stage 2: the judge, on rendered pictures and on what the VAE makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks.testbed_training import loop
from benchmarks.testbed_training.data import Scenes
from benchmarks.testbed_training.vae import pixels
from hgc.testbed.judges import Judge


def _disturb(x: torch.Tensor) -> torch.Tensor:
    """Noise on a third of the samples, [B, 3, 64, 64].

    No blur: a judge that sees through blur cannot tell a sharp picture from a soft one, and soft
    pictures are what too few denoising steps make.
    """
    size = len(x)
    level = torch.rand(size, 1, 1, 1, device=x.device) * 0.08
    noisy = torch.rand(size, 1, 1, 1, device=x.device) < 1 / 3
    return x + torch.randn_like(x) * level * noisy


def train_judge(
    scenes: Scenes,
    rebuilt: np.ndarray,
    work: Path,
    *,
    steps: int,
    minutes: float | None = None,
    batch: int = 32,
    device: torch.device,
    log: Callable[[str], None] = print,
) -> Judge:
    """Train (or resume) the judge. `rebuilt`: uint8 [M, 64, 64, 3], the first M scenes' pictures
    after the VAE's round trip; half of each batch comes from them."""
    torch.manual_seed(3)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.01)
    clock = loop.Clock(steps, minutes)
    save = loop.resumed(work / "judge.pt", judge, optimizer, clock, device)
    half = batch // 2
    own = loop.batches(len(scenes), half, seed=30 + clock.step)
    after_vae = loop.batches(len(rebuilt), half, seed=31 + clock.step)
    judge.train()
    while clock.progress() < 1:
        a, b = next(own).numpy(), next(after_vae).numpy()
        rows = np.concatenate([a, b])
        x = pixels(np.concatenate([scenes.image[a], rebuilt[b]]), device)
        labels = torch.from_numpy(scenes.maps["segmentation"][rows]).long().to(device)
        depth = torch.from_numpy(scenes.maps["depth"][rows]).float().to(device) / 255
        light = torch.from_numpy(scenes.light[rows]).to(device)
        classes, deep, lights = judge(_disturb(x))
        loss = functional.cross_entropy(classes, labels)
        loss = (
            loss + 2 * (deep - depth).abs().mean() + 0.1 * functional.cross_entropy(lights, light)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        loop.set_rate(optimizer, clock.rate(3e-3, warm_up=50))
        optimizer.step()
        clock.step += 1
        if clock.step % 25 == 0:
            right = (classes.argmax(1) == labels).float().mean().item()
            log(
                f"judge {clock.step} loss {loss.item():.4f} pixels right {right:.3f} "
                f"{clock.seconds():.0f}s"
            )
        if clock.step % 100 == 0:
            save()
    save()
    log(f"judge done: {clock.step} steps, {clock.seconds():.0f} s")
    return judge.eval().requires_grad_(False)
