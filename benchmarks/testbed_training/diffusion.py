"""Stage 3: text encoder, UNet and the ControlNets, trained together.

Every batch holds samples of all conditions and a few without any. For the first part of
training the conditions share one ControlNet behind their condition embeddings, so each of its
weights learns from all samples; then it is copied, and each condition trains its own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.testbed_training import loop, models
from benchmarks.testbed_training.data import Scenes
from hgc.testbed.scenes import PALETTE

# Samples of the conditions in a batch of all four; one sample of 16 sees no condition.
SHARES = {"segmentation": 24, "canny": 12, "softedge": 12, "depth": 12}
# Most that the loss counts a sample whose prediction is the noise, which is no limit but for the
# last twentieth of the timesteps.
MOST = 100.0
WEIGHT_DECAY = 0.01


class Trained(nn.Module):
    """All that stage 3 trains. `trunks` holds one shared ControlNet, or one a condition."""

    def __init__(
        self, sizes: models.Sizes, tokenizer: Any, conditions: Sequence[str], trunks: int
    ) -> None:
        super().__init__()
        self.conditions = tuple(conditions)
        self.text_encoder = models.make_text_encoder(sizes, tokenizer)
        self.unet = models.make_unet(sizes)
        self.embeddings = nn.ModuleDict()
        self.trunks = nn.ModuleList()
        for condition in self.conditions:
            controlnet = models.make_controlnet(sizes)
            self.embeddings[condition] = controlnet.controlnet_cond_embedding
            # The embedding runs outside, so that one trunk can serve several of them.
            controlnet.controlnet_cond_embedding = nn.Identity()
            if len(self.trunks) < trunks:
                self.trunks.append(controlnet)

    def split(self) -> None:
        """Give every condition its own copy of the shared trunk."""
        for _ in self.conditions[1:]:
            self.trunks.append(copy.deepcopy(self.trunks[0]))

    def load_exported(self, folder: Path) -> None:
        """Load the weights of a model that was exported, where every condition has its trunk."""
        from diffusers import ControlNetModel, UNet2DConditionModel
        from transformers import CLIPTextModel

        nets = [
            ControlNetModel.from_pretrained(folder / f"controlnet_{c}", local_files_only=True)
            for c in self.conditions
        ]
        read = (
            CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True),
            UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True),
            *(net.controlnet_cond_embedding for net in nets),
            *nets,
        )
        own = (self.text_encoder, self.unet, *self.embeddings.values(), *self.trunks)
        for net in nets:
            net.controlnet_cond_embedding = nn.Identity()
        for module, loaded in zip(own, read, strict=True):
            module.load_state_dict(loaded.state_dict())

    def controlnet(self, condition: str) -> Any:
        """The condition's ControlNetModel, a copy with its own condition embedding in place."""
        index = self.conditions.index(condition) if len(self.trunks) > 1 else 0
        whole = copy.deepcopy(self.trunks[index])
        whole.controlnet_cond_embedding = copy.deepcopy(self.embeddings[condition])
        return whole


def split_optimizer(
    model: Trained, old: torch.optim.AdamW, shared: list[nn.Parameter], peak: float
) -> torch.optim.AdamW:
    """An optimizer of the split model in which each copy inherits the shared trunk's moments."""
    new = loop.make_optimizer(model.parameters(), peak, WEIGHT_DECAY)
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
    def update(self, mine: list[nn.Parameter], trained: list[nn.Parameter]) -> None:
        """`mine` and `trained`: the parameters of `self.model` and of the model it averages."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(mine, trained, 1 - decay)


@torch.no_grad()
def encode_latents(
    vae: Any, scenes: Scenes, device: torch.device, batch: int = 200
) -> torch.Tensor:
    """Scaled latent means, float32 [N, 4, 16, 16], on the CPU."""
    from benchmarks.testbed_training.vae import pixels

    parts = []
    for start in range(0, len(scenes), batch):
        x = pixels(scenes.image[start : start + batch], device)
        parts.append(vae.encode(x).latent_dist.mean.cpu())
    return torch.cat(parts) * vae.config.scaling_factor


@dataclasses.dataclass(frozen=True)
class Resident:
    """The training set on the device.

    latents: float32 [N, 4, 16, 16], scaled. ids: int64 [N, 32], the captions' tokens.
    no_ids: int64 [32], those of an empty caption. maps: condition -> uint8 [N, 64, 64].
    palette: float32 [10, 3] in [0, 1], the colours of the segmentation.
    """

    latents: torch.Tensor
    ids: torch.Tensor
    no_ids: torch.Tensor
    maps: dict[str, torch.Tensor]
    palette: torch.Tensor

    @classmethod
    def of(
        cls, scenes: Scenes, latents: torch.Tensor, tokenizer: Any, device: torch.device
    ) -> Resident:
        ids = torch.tensor(
            tokenizer(
                ["", *scenes.caption],
                padding="max_length",
                truncation=True,
                max_length=models.TEXT_LENGTH,
            )["input_ids"]
        ).to(device)
        maps = {c: torch.from_numpy(m).to(device) for c, m in scenes.maps.items()}
        palette = torch.from_numpy(PALETTE).to(device).float() / 255
        return cls(latents.to(device), ids[1:], ids[0], maps, palette)

    def condition(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, 64, 64] in [0, 1], as a pipeline prepares the condition's picture."""
        compact = self.maps[name][index]
        if name == "segmentation":
            return self.palette[compact.long()].permute(0, 3, 1, 2).contiguous()
        return (compact.float() / 255)[:, None].expand(-1, 3, -1, -1).contiguous()


def shares_of(batch: int, conditions: Sequence[str]) -> dict[str, int]:
    whole = sum(SHARES[c] for c in conditions)
    return {c: max(1, round(batch * 15 / 16 * SHARES[c] / whole)) for c in conditions}


def sample_loss(
    model: Trained,
    run_unet: Callable[..., Any],
    run_trunks: list[Callable[..., Any]],
    data: Resident,
    alphas: torch.Tensor,  # [1000], the products of the noise schedule
    prediction: str,
    index: torch.Tensor,  # int64 [B]
) -> torch.Tensor:
    """Mean squared error of the velocity over one batch, whichever the model predicts.

    An error in the noise is one in the velocity divided by sqrt(alpha). Without that weight the
    first steps of a run, which settle the layout, would have next to none in the loss.
    """
    batch, device = len(index), index.device
    clean = data.latents[index]
    # A little noise that is the same all over a picture hides its mean, which would otherwise
    # shine through at the last timestep and stand in for the prompt's light.
    noise = torch.randn_like(clean) + 0.1 * torch.randn(batch, 4, 1, 1, device=device)
    # Stratified timesteps: one from each of `batch` equal slices, in random order.
    slices = torch.rand(batch, device=device).argsort() + torch.rand(batch, device=device)
    timesteps = (slices * (1000 / batch)).long().clamp_(0, 999)
    alpha = alphas[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    conditions, start = {}, 0
    for condition, share in shares_of(batch, model.conditions).items():
        conditions[condition] = data.condition(condition, index[start : start + share])
        start += share
    dropped = torch.rand(batch, 1, device=device) < 0.1
    ids = torch.where(dropped, data.no_ids, data.ids[index])
    hidden = model.text_encoder(ids).last_hidden_state
    predicted = forward(model, run_unet, run_trunks, noisy, timesteps, hidden, conditions)
    if prediction == "epsilon":
        return ((predicted - noise).square() / alpha.clamp(min=1 / MOST)).mean()
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    return (predicted - velocity).square().mean()


def forward(
    model: Trained,
    run_unet: Callable[..., Any],
    run_trunks: list[Callable[..., Any]],
    noisy: torch.Tensor,  # [B, 4, 16, 16]
    timesteps: torch.Tensor,  # [B]
    hidden: torch.Tensor,  # [B, 32, C]
    conditions: dict[str, torch.Tensor],  # condition -> [b, 3, 64, 64], in the batch's order
) -> torch.Tensor:
    """Predicted noise or velocity [B, 4, 16, 16]; samples after the last condition see none."""
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
    conditions: Sequence[str],
    prediction: str = "v_prediction",
    steps: int,
    minutes: float | None = None,
    until: float | None = None,
    batch: int = 64,
    peak: float = 1e-3,
    split_at: float = 0.9,
    seed: int = 2,
    save_minutes: float = 4.0,
    compiled: bool = False,
    captured: bool = False,
    start: Path | None = None,
    device: torch.device,
    on_save: Callable[[Trained, Any, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Trained, Any]:
    """Train (or resume) stage 3. Returns the averaged models and the tokenizer.

    `on_save(average, tokenizer, step)` is called after every checkpoint. captured: every step is
    one CUDA graph. start: a model's folder to begin with where there is no checkpoint.
    """
    torch.manual_seed(seed)
    tokenizer = models.make_tokenizer()
    path = work / "diffusion.pt"
    saved = loop.load_checkpoint(path, device)
    begun = 1 if start is None else len(conditions)
    trunks = saved["trunks"] if saved is not None else begun
    model = Trained(sizes, tokenizer, conditions, trunks).to(device)
    if saved is None and start is not None:
        model.load_exported(start)
        log(f"diffusion begins with the weights of {start}")
    average = Average(model, 0.998)
    optimizer = loop.make_optimizer(model.parameters(), peak, WEIGHT_DECAY)
    clock = loop.Clock(steps, minutes, until)
    if saved is not None:
        model.load_state_dict(saved["model"])
        average.model.load_state_dict(saved["average"])
        average.updates = saved["average_updates"]
        loop.load_optimizer(optimizer, saved["optimizer"])
        clock.load(saved["clock"])
        log(f"diffusion resumes at step {clock.step}, {len(model.trunks)} trunk(s)")
    data = Resident.of(scenes, latents, tokenizer, device)
    alphas = models.make_scheduler().alphas_cumprod.to(device)
    run_unet = torch.compile(model.unet) if compiled else model.unet

    def stepper() -> Callable[[torch.Tensor], torch.Tensor]:
        """A step with the trunks and the optimizer of now; returns its loss."""
        run_trunks = [torch.compile(t) if compiled else t for t in model.trunks]
        parameters, averaged = list(model.parameters()), list(average.model.parameters())

        def step(index: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = sample_loss(model, run_unet, run_trunks, data, alphas, prediction, index)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            return loss.detach()

        run = loop.Captured(step) if captured else step

        def step_and_average(index: torch.Tensor) -> torch.Tensor:
            loss = run(index)
            average.update(averaged, parameters)
            return loss

        return step_and_average

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

    model.train()
    step = stepper()
    saved_at = clock.seconds()
    running = torch.zeros((), device=device)
    # The seed moves with the step, so a resumed run does not see the same order again.
    order_seed = 998 + seed + clock.step
    for index in loop.batches(len(scenes), batch, order_seed, device):
        if clock.progress() >= 1:
            break
        if len(model.trunks) < len(conditions) and clock.progress() >= split_at:
            shared = list(model.trunks[0].parameters())
            model.split()
            average.model.split()
            optimizer = split_optimizer(model, optimizer, shared, peak)
            step = stepper()
            log(f"diffusion step {clock.step}: one ControlNet a condition from here on")
        rate = clock.rate(peak, warm_up=100)
        loop.set_rate(optimizer, rate)
        running += step(index)
        clock.step += 1
        if clock.step % 25 == 0:
            # Reading the loss also keeps the host from running far ahead of a GPU.
            mean = running.item() / 25
            running.zero_()
            log(
                f"diffusion {clock.step} loss {mean:.4f} rate {rate:.1e} {clock.seconds():.0f}s "
                f"({clock.progress():.1%})"
            )
        if clock.seconds() - saved_at > 60 * save_minutes:
            save()
            saved_at = clock.seconds()
    save()
    log(f"diffusion done: {clock.step} steps, {clock.seconds():.0f} s")
    return average.model, tokenizer
