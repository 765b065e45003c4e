"""Stage 1: the VAE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.testbed_training import loop, models
from benchmarks.testbed_training.data import Scenes


def pixels(image: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [B, 64, 64, 3] -> float32 [B, 3, 64, 64] in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(image)).to(device)
    return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def train_vae(
    scenes: Scenes,
    work: Path,
    *,
    sizes: models.Sizes,
    steps: int,
    minutes: float | None = None,
    batch: int = 16,
    device: torch.device,
    log: Callable[[str], None] = print,
) -> Any:
    """Train (or resume) the VAE; sets `scaling_factor` to one over the latents' deviation."""
    torch.manual_seed(1)
    vae = models.make_vae(sizes).to(device)
    optimizer = loop.make_optimizer(vae.parameters(), 1e-3, 0.0)
    clock = loop.Clock(steps, minutes)
    save = loop.resumed(work / "vae.pt", vae, optimizer, clock, device)
    vae.train()
    for index in loop.batches(len(scenes), batch, seed=1 + clock.step):
        if clock.progress() >= 1:
            break
        # Most of training is on quarters of pictures, many small steps for the price of a few; the
        # last part sees whole ones, because group norms look at all of a picture.
        if clock.progress() < 0.7:
            top, left = np.random.default_rng(clock.step).integers(0, 33, 2)
            window = scenes.image[index.numpy()][:, top : top + 32, left : left + 32]
        else:
            window = scenes.image[index.numpy()[: batch // 2]]
        x = pixels(window, device)  # [B, 3, 32, 32] or [B // 2, 3, 64, 64]
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        y = vae.decode(z, return_dict=False)[0]
        difference = y - x
        # The KL term only keeps the latents bounded: reconstruction is what the judge needs.
        loss = difference.abs().mean() + 2 * difference.square().mean()
        loss = loss + 1e-5 * posterior.kl().mean() / z[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        loop.set_rate(optimizer, clock.rate(2e-3, warm_up=60))
        optimizer.step()
        clock.step += 1
        if clock.step % 50 == 0:
            error = difference.detach().abs().mean().item() * 127.5
            log(
                f"vae {clock.step} loss {loss.item():.4f} L1 {error:.2f}/255 "
                f"z {z.std().item():.2f} {clock.seconds():.0f}s"
            )
        if clock.step % 150 == 0:
            save()
    save()
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        z = vae.encode(pixels(scenes.image[:256], device)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    log(
        f"vae done: {clock.step} steps, {clock.seconds():.0f} s, "
        f"scaling factor {vae.config.scaling_factor}"
    )
    return vae


def train_decoder(
    vae: Any,
    scenes: Scenes,
    latents: torch.Tensor,
    work: Path,
    *,
    steps: int,
    minutes: float | None = None,
    until: float | None = None,
    batch: int = 8,
    captured: bool = False,
    device: torch.device,
    log: Callable[[str], None] = print,
) -> Any:
    """Train (or resume) the decoder further, on `latents` of a fixed encoder.

    `latents`: scaled latent means, float32 [N, 4, 16, 16]. What the diffusion model learned stays
    valid, since the encoder does not move. The loss adds the picture's gradients, so that edges
    come out as sharp as the latents allow.
    """
    torch.manual_seed(4)
    decoder = [vae.decoder, vae.post_quant_conv]
    parameters = [p for module in decoder for p in module.requires_grad_(True).parameters()]
    optimizer = loop.make_optimizer(parameters, 1e-3, 0.0)
    clock = loop.Clock(steps, minutes, until)
    save = loop.resumed(work / "decoder.pt", vae, optimizer, clock, device)
    vae.decoder.train()
    images = torch.from_numpy(scenes.image).to(device)
    latents = latents.to(device) / vae.config.scaling_factor

    def step(index: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        x = images[index].permute(0, 3, 1, 2).float() / 127.5 - 1
        z = latents[index]
        # A generated latent is not exactly one of the encoder's. Most noise is little, or it would
        # hide what the encoder says of fine patterns.
        level = 0.05 * torch.rand(len(z), 1, 1, 1, device=device) ** 3
        z = z + level * torch.randn_like(z)
        difference = vae.decode(z, return_dict=False)[0] - x
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        loss = difference.abs().mean() + 2 * difference.square().mean() + edges
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    run = loop.Captured(step) if captured else step
    running = torch.zeros((), device=device)
    for index in loop.batches(len(scenes), batch, 40 + clock.step, device):
        if clock.progress() >= 1:
            break
        loop.set_rate(optimizer, clock.rate(1.5e-3, warm_up=100))
        running += run(index)
        clock.step += 1
        if clock.step % 100 == 0:
            log(f"decoder {clock.step} loss {running.item() / 100:.4f} {clock.seconds():.0f}s")
            running.zero_()
        if clock.step % 500 == 0:
            save()
    save()
    log(f"decoder done: {clock.step} steps, {clock.seconds():.0f} s")
    return vae.eval().requires_grad_(False)
