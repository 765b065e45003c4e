"""The judges: a small network that reads a picture, and the measures made from what it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hgc.testbed.conditions import canny, condition_map, softedge
from hgc.testbed.scenes import CLASSES, LIGHTS, SIZE, Scene

__all__ = [
    "Judge",
    "as_array",
    "confusion",
    "corpus_iou",
    "load_judge",
    "read",
    "scores",
    "set_judge",
]


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(4, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.silu(self.norm1(self.conv1(x)))
        return functional.silu(self.norm2(self.conv2(x)))


class Judge(nn.Module):
    """A U-Net that names each pixel's class, its depth, and the picture's light.

    Input: float32 [B, 3, 64, 64] in [-1, 1]. Output of `forward`: class logits [B, 10, 64, 64],
    depth [B, 64, 64] in about [0, 1], light logits [B, 4].
    """

    def __init__(self, widths: Sequence[int] = (20, 40, 64, 96)) -> None:
        super().__init__()
        self.widths = tuple(int(w) for w in widths)
        channels, down = 3, []
        for width in self.widths:
            down.append(_Block(channels, width))
            channels = width
        self.down = nn.ModuleList(down)
        up = []
        for width in reversed(self.widths[:-1]):
            up.append(_Block(channels + width, width))
            channels = width
        self.up = nn.ModuleList(up)
        self.segment = nn.Conv2d(channels, len(CLASSES), 1)
        self.deepen = nn.Conv2d(channels, 1, 1)
        self.lighten = nn.Linear(self.widths[-1], len(LIGHTS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else functional.max_pool2d(x, 2))
            skips.append(x)
        light = self.lighten(x.mean(dim=(2, 3)))
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = block(torch.cat([functional.interpolate(x, scale_factor=2.0), skip], dim=1))
        return self.segment(x), self.deepen(x)[:, 0], light

    def save(self, folder: Path) -> None:
        """Write `judge.safetensors` (fp16) and `judge.json` to `folder`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().half().contiguous().cpu() for k, v in self.state_dict().items()}
        save_file(state, folder / "judge.safetensors")
        (folder / "judge.json").write_text(json.dumps({"widths": self.widths}) + "\n")


def load_judge(folder: Path) -> Judge:
    """The judge saved in `folder`, in fp32 and evaluation mode."""
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((folder / "judge.json").read_text())
    judge = Judge(config["widths"])
    state = load_file(folder / "judge.safetensors")
    judge.load_state_dict({k: v.float() for k, v in state.items()})
    return judge.eval().requires_grad_(False)


_judge: Judge | None = None


def set_judge(judge: Judge | None) -> None:
    """Judge with this one from now on; None goes back to the shipped one."""
    global _judge
    _judge = judge


def _shipped() -> Judge:
    if _judge is None:
        from hgc.testbed import path

        set_judge(load_judge(path() / "judge"))
    assert _judge is not None
    return _judge


def as_array(images: Any) -> np.ndarray:
    """Pictures as uint8 [B, 64, 64, 3]; see `hgc.testbed.read_images`."""
    if isinstance(images, np.ndarray):
        array = images
    elif isinstance(images, Sequence) and len(images) > 0:
        array = np.stack([np.asarray(image) for image in images])
    else:
        raise TypeError(
            f"images: expected a non-empty list of pictures or an array, "
            f"got {type(images).__name__}"
        )
    if array.ndim != 4 or array.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"images: expected [B, {SIZE}, {SIZE}, 3], got {list(array.shape)}; the judges know "
            "this size only"
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"images: expected uint8 or float in [0, 1], got {array.dtype}")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise ValueError("images: expected finite floats in [0, 1]")
    return (array * 255 + 0.5).astype(np.uint8)


def _pair(images: Any, scenes: Sequence[Scene]) -> np.ndarray:
    array = as_array(images)
    if len(array) != len(scenes):
        raise ValueError(f"expected one picture a scene, got {len(array)} for {len(scenes)} scenes")
    return array


@torch.no_grad()
def read(images: Any, judge: Judge | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the judge sees: classes uint8 [B, 64, 64], depth float32 [B, 64, 64], light int64 [B].

    judge: None takes the shipped one.
    """
    judge = _shipped() if judge is None else judge
    array = as_array(images)
    classes, depths, lights = [], [], []
    for start in range(0, len(array), 32):
        x = torch.from_numpy(np.ascontiguousarray(array[start : start + 32]))
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
        logits, depth, light = judge(x)
        classes.append(logits.argmax(1).to(torch.uint8).numpy())
        depths.append(depth.clamp(0, 1).numpy())
        lights.append(light.argmax(1).numpy())
    return np.concatenate(classes), np.concatenate(depths), np.concatenate(lights)


def confusion(images: Any, scenes: Sequence[Scene], judge: Judge | None = None) -> np.ndarray:
    """Pixel counts int64 [10, 10], true class by judged class. Sums over parts of a set add up."""
    array = _pair(images, scenes)
    seen = read(array, judge)[0].astype(np.int64)
    true = np.stack([s.segmentation for s in scenes]).astype(np.int64)
    count = len(CLASSES)
    flat = np.bincount((true * count + seen).ravel(), minlength=count * count)
    return flat.reshape(count, count)


def corpus_iou(matrix: np.ndarray) -> float:
    """Mean IoU of a confusion matrix over the classes that occur in the truth."""
    hit = np.diag(matrix).astype(np.float64)
    union = matrix.sum(0) + matrix.sum(1) - hit
    present = matrix.sum(1) > 0
    return float((hit[present] / union[present]).mean())


def _edge_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of two edge maps, bool [64, 64]; an edge one pixel off counts as found."""
    from scipy.ndimage import binary_dilation

    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    near = np.ones((3, 3), bool)
    precision = (found & binary_dilation(wanted, near)).sum() / found.sum()
    recall = (wanted & binary_dilation(found, near)).sum() / wanted.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def scores(condition: str, images: Any, scenes: Sequence[Scene]) -> np.ndarray:
    """See `hgc.testbed.fidelity`."""
    array = _pair(images, scenes)
    if condition == "segmentation":
        return np.array(
            [corpus_iou(confusion(array[i : i + 1], [s])) for i, s in enumerate(scenes)]
        )
    if condition == "canny":
        return np.array(
            [
                _edge_f1(canny(image) > 0, condition_map(scene, "canny") > 0)
                for image, scene in zip(array, scenes, strict=True)
            ]
        )
    if condition == "softedge":
        from torchmetrics.functional.image import (
            multiscale_structural_similarity_index_measure as ms_ssim,
        )

        found = np.stack([softedge(image) for image in array]).astype(np.float32) / 255
        wanted = np.stack([condition_map(s, "softedge") for s in scenes]).astype(np.float32) / 255
        # Three scales of the usual five: the coarsest of five would be 4 pixels wide here.
        value = ms_ssim(
            torch.from_numpy(found)[:, None],
            torch.from_numpy(wanted)[:, None],
            data_range=1.0,
            kernel_size=7,
            betas=(0.3, 0.4, 0.3),
            normalize="relu",
            reduction="none",
        )
        return value.double().numpy()
    true = np.stack([s.depth for s in scenes])
    error = read(array)[1] - true
    return -np.sqrt(np.square(error, dtype=np.float64).mean(axis=(1, 2)))
