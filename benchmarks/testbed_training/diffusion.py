"""Stage 3: text encoder, UNet and the four ControlNets, trained together.

Every batch holds samples of all four conditions and a few without any. For the first part of
training the conditions share one ControlNet behind four condition embeddings, so each of its
weights learns from all samples; then it is copied, and each condition trains its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.testbed_training import loop, models
from benchmarks.testbed_training.data import Scenes
from hgc.testbed.conditions import CONDITIONS, to_rgb

# Samples a condition in a batch of 64; the rest of the batch sees no condition.
SHARES = {"segmentation": 24, "canny": 12, "softedge": 12, "depth": 12}


class Trained(nn.Module):
    """All that stage 3 trains. `trunks` holds one shared ControlNet, or one a condition."""

    def __init__(self, sizes: models.Sizes, tokenizer: Any, trunks: int) -> None:
        super().__init__()
        self.text_encoder = models.make_text_encoder(sizes, tokenizer)
        self.unet = models.make_unet(sizes)
        self.embeddings = nn.ModuleDict()
        self.trunks = nn.ModuleList()
        for condition in CONDITIONS:
            controlnet = models.make_controlnet(sizes)
            self.embeddings[condition] = controlnet.controlnet_cond_embedding
            # The embedding runs outside, so that one trunk can serve four of them.
            controlnet.controlnet_cond_embedding = nn.Identity()
            if len(self.trunks) < trunks:
                self.trunks.append(controlnet)

    def split(self) -> None:
        """Give every condition its own copy of the shared trunk."""
        for _ in CONDITIONS[1:]:
            self.trunks.append(copy.deepcopy(self.trunks[0]))

    def controlnet(self, condition: str) -> Any:
        """The condition's ControlNetModel, a copy with its own condition embedding in place."""
        index = CONDITIONS.index(condition) if len(self.trunks) > 1 else 0
        whole = copy.deepcopy(self.trunks[index])
        whole.controlnet_cond_embedding = copy.deepcopy(self.embeddings[condition])
        return whole


def make_optimizer(model: Trained, peak: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )


def split_optimizer(
    model: Trained, old: torch.optim.AdamW, shared: list[nn.Parameter], peak: float
) -> torch.optim.AdamW:
    """An optimizer of the split model in which each copy inherits the shared trunk's moments."""
    new = make_optimizer(model, peak)
    for parameter, state in old.state.items():
        new.state[parameter] = state
    for trunk in list(model.trunks)[1:]:
        for original, copied in zip(shared, trunk.parameters(), strict=True):
            if original in old.state:
                new.state[copied] = {k: v.clone() for k, v in old.state[original].items()}
    return new


class Average:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.model.parameters()), [p.detach() for p in model.parameters()], 1 - decay
        )


@torch.no_grad()
def encode_latents(
    vae: Any, scenes: Scenes, device: torch.device, batch: int = 100
) -> torch.Tensor:
    """Scaled latent means, float32 [N, 4, 16, 16], on the CPU."""
    from benchmarks.testbed_training.vae import pixels

    parts = []
    for start in range(0, len(scenes), batch):
        x = pixels(scenes.image[start : start + batch], device)
        parts.append(vae.encode(x).latent_dist.mean.cpu())
    return torch.cat(parts) * vae.config.scaling_factor


def condition_tensor(compact: np.ndarray, condition: str, device: torch.device) -> torch.Tensor:
    """uint8 [B, 64, 64] -> float32 [B, 3, 64, 64] in [0, 1], as a pipeline prepares it."""
    rgb = torch.from_numpy(np.ascontiguousarray(to_rgb(compact, condition))).to(device)
    return rgb.permute(0, 3, 1, 2).float().div_(255).contiguous()


def shares_of(batch: int) -> dict[str, int]:
    return {c: max(1, round(batch * n / 64)) for c, n in SHARES.items()}


def forward(
    model: Trained,
    run_unet: Callable[..., Any],
    run_trunks: list[Callable[..., Any]],
    noisy: torch.Tensor,  # [B, 4, 16, 16]
    timesteps: torch.Tensor,  # [B]
    hidden: torch.Tensor,  # [B, 32, C]
    conditions: dict[str, torch.Tensor],  # condition -> [b, 3, 64, 64], in the batch's order
) -> torch.Tensor:
    """Predicted velocity [B, 4, 16, 16]; samples after the last condition see none."""
    embedded = [model.embeddings[c](x) for c, x in conditions.items()]
    seen = sum(len(e) for e in embedded)
    if len(run_trunks) == 1:
        embedded = [torch.cat(embedded)]
    parts, start = [], 0
    for trunk, e in zip(run_trunks, embedded, strict=True):
        rows = slice(start, start + len(e))
        down, mid = trunk(noisy[rows], timesteps[rows], hidden[rows], e, return_dict=False)
        parts.append([*down, mid])
        start += len(e)
    blind = len(noisy) - seen
    residuals = []
    for same in zip(*parts, strict=True):
        nothing = same[0].new_zeros(blind, *same[0].shape[1:])
        residuals.append(torch.cat([*same, nothing]))
    return run_unet(
        noisy,
        timesteps,
        hidden,
        down_block_additional_residuals=residuals[:-1],
        mid_block_additional_residual=residuals[-1],
        return_dict=False,
    )[0]


def train_diffusion(
    scenes: Scenes,
    latents: torch.Tensor,
    work: Path,
    *,
    sizes: models.Sizes,
    steps: int,
    minutes: float | None = None,
    batch: int = 64,
    peak: float = 1e-3,
    split_at: float = 0.9,
    save_minutes: float = 4.0,
    compiled: bool = False,
    device: torch.device,
    on_save: Callable[[Trained, Any, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Trained, Any]:
    """Train (or resume) stage 3. Returns the averaged models and the tokenizer.

    `on_save(average, tokenizer, step)` is called after every checkpoint.
    """
    torch.manual_seed(2)
    tokenizer = models.make_tokenizer()
    path = work / "diffusion.pt"
    saved = loop.load_checkpoint(path, device)
    trunks = saved["trunks"] if saved is not None else 1
    model = Trained(sizes, tokenizer, trunks).to(device)
    average = Average(model, 0.998)
    optimizer = make_optimizer(model, peak)
    clock = loop.Clock(steps, minutes)
    if saved is not None:
        model.load_state_dict(saved["model"])
        average.model.load_state_dict(saved["average"])
        average.updates = saved["average_updates"]
        optimizer.load_state_dict(saved["optimizer"])
        clock.load(saved["clock"])
        log(f"diffusion resumes at step {clock.step}, {len(model.trunks)} trunk(s)")

    def runners() -> tuple[Callable[..., Any], list[Callable[..., Any]]]:
        if not compiled:
            return model.unet, list(model.trunks)
        return torch.compile(model.unet), [torch.compile(t) for t in model.trunks]

    def save() -> None:
        state = {
            "trunks": len(model.trunks),
            "model": model.state_dict(),
            "average": average.model.state_dict(),
            "average_updates": average.updates,
            "optimizer": optimizer.state_dict(),
            "clock": clock.state(),
        }
        loop.save_checkpoint(path, state)
        if on_save is not None:
            on_save(average.model, tokenizer, clock.step)

    def token_ids(texts: list[str]) -> torch.Tensor:
        encoded = tokenizer(
            texts, padding="max_length", truncation=True, max_length=models.TEXT_LENGTH
        )
        return torch.tensor(encoded["input_ids"])

    ids = token_ids(scenes.caption)  # [N, 32]
    no_ids = token_ids([""])[0]
    scheduler = models.make_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    shares = shares_of(batch)
    run_unet, run_trunks = runners()
    model.train()
    saved_at = clock.seconds()
    running = 0.0
    # The seed moves with the step, so a resumed run does not see the same order again.
    for index in loop.batches(len(scenes), batch, seed=1000 + clock.step):
        if clock.progress() >= 1:
            break
        if len(model.trunks) == 1 and clock.progress() >= split_at:
            shared = list(model.trunks[0].parameters())
            model.split()
            average.model.split()
            optimizer = split_optimizer(model, optimizer, shared, peak)
            run_unet, run_trunks = (
                run_unet,
                ([torch.compile(t) for t in model.trunks] if compiled else list(model.trunks)),
            )
            log(f"diffusion step {clock.step}: one ControlNet a condition from here on")
        rows = index.numpy()
        clean = latents[index].to(device)
        # A little noise that is the same all over a picture hides its mean, which would otherwise
        # shine through at the last timestep and stand in for the prompt's light.
        noise = torch.randn_like(clean) + 0.1 * torch.randn(batch, 4, 1, 1, device=device)
        # Stratified timesteps: one from each of `batch` equal slices, in random order.
        slices = torch.randperm(batch, device=device) + torch.rand(batch, device=device)
        timesteps = (slices * (1000 / batch)).long().clamp_(0, 999)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        conditions, start = {}, 0
        for condition, share in shares.items():
            compact = scenes.maps[condition][rows[start : start + share]]
            conditions[condition] = condition_tensor(compact, condition, device)
            start += share
        dropped = torch.rand(batch) < 0.1
        batch_ids = torch.where(dropped[:, None], no_ids, ids[index]).to(device)
        hidden = model.text_encoder(batch_ids).last_hidden_state
        predicted = forward(model, run_unet, run_trunks, noisy, timesteps, hidden, conditions)
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        loss = (predicted - velocity).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        loop.set_rate(optimizer, clock.rate(peak, warm_up=100))
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        clock.step += 1
        running += loss.item()
        if clock.step % 25 == 0:
            log(
                f"diffusion {clock.step} loss {running / 25:.4f} rate "
                f"{optimizer.param_groups[0]['lr']:.1e} {clock.seconds():.0f}s "
                f"({clock.progress():.1%})"
            )
            running = 0.0
        if clock.seconds() - saved_at > 60 * save_minutes:
            save()
            saved_at = clock.seconds()
    save()
    log(f"diffusion done: {clock.step} steps, {clock.seconds():.0f} s")
    return average.model, tokenizer
