"""Judges of pictures that are not the testbed's: transformers' models from a folder, and edges.

Nothing is downloaded. A judge's features, for the Fréchet distance, are its last hidden state,
averaged over the picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hgc.evaluation.models import ModelError

__all__ = ["DepthReader", "PromptReader", "SegmentationReader", "canny", "edge_f1", "softedge_ssim"]

# ControlNet's own demo takes 100 and 200 of 255.
_CANNY_LOW, _CANNY_HIGH = 100 / 255, 200 / 255
# torchmetrics' five scales with windows of 11 pixels need more than 160 of them.
_FIVE_SCALES = 161


class _Reader:
    """A transformers model that reads pictures, with its image processor."""

    kind = ""  # what its class's name ends in
    auto = ""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        config = folder / "config.json"
        if not config.exists():
            raise ModelError(f"judge {folder} holds no config.json, so no transformers model")
        try:
            classes = json.loads(config.read_text()).get("architectures") or []
        except json.JSONDecodeError as error:
            raise ModelError(f"{config} is not JSON: {error}") from None
        if not any(name.endswith(self.kind) for name in classes):
            raise ModelError(
                f"judge {folder}: config.json's architectures are {', '.join(classes) or 'empty'}; "
                f"expected a model {self.kind[0].lower()}{self.kind[1:]}"
            )
        if not (folder / "preprocessor_config.json").exists():
            raise ModelError(f"judge {folder} holds no preprocessor_config.json")
        import torch
        import transformers

        try:
            self._model = (
                getattr(transformers, self.auto)
                .from_pretrained(folder, local_files_only=True)
                .eval()
                .to(device)
            )
            self._processor = transformers.AutoImageProcessor.from_pretrained(
                folder, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"judge {folder}: {error}") from None
        self._device = device
        self._torch = torch

    def _run(self, images: np.ndarray) -> tuple[Any, np.ndarray]:
        """The model's output for uint8 [B, H, W, 3], and its features [B, F]."""
        given = self._processor(images=list(images), return_tensors="pt")
        with self._torch.no_grad():
            out = self._model(
                pixel_values=given["pixel_values"].to(self._device), output_hidden_states=True
            )
        last = out.hidden_states[-1].float()
        # [B, C, h, w] of convolutions and of pyramids, [B, L, C] of transformers
        features = last.mean(dim=(2, 3)) if last.ndim == 4 else last.mean(dim=1)
        return out, features.cpu().numpy()

    def _resized(self, maps: Any, size: tuple[int, int]) -> Any:
        """float [B, K, h, w] at ``size``."""
        return self._torch.nn.functional.interpolate(
            maps.float(), size=size, mode="bilinear", align_corners=False
        )


class SegmentationReader(_Reader):
    """Names the class of each pixel."""

    kind = "ForSemanticSegmentation"
    auto = "AutoModelForSemanticSegmentation"

    @property
    def classes(self) -> int:
        """Number of its classes."""
        return int(self._model.config.num_labels)

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes int64 [B, H, W] and features [B, F] of uint8 [B, H, W, 3]."""
        out, features = self._run(images)
        logits = self._resized(out.logits, images.shape[1:3])
        return logits.argmax(1).cpu().numpy(), features


class DepthReader(_Reader):
    """Says how near each pixel is."""

    kind = "ForDepthEstimation"
    auto = "AutoModelForDepthEstimation"

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Depth float [B, H, W], 0 to 1 in each picture, and features [B, F]."""
        out, features = self._run(images)
        depth = self._resized(out.predicted_depth[:, None], images.shape[1:3])[:, 0]
        return normalised(depth.cpu().numpy()), features


class PromptReader:
    """CLIP: the cosine between picture and prompt, times 100."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        if not (folder / "config.json").exists():
            raise ModelError(f"clip {folder} holds no config.json, so no transformers model")
        import torch
        from transformers import AutoProcessor, CLIPModel

        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"clip {folder}: {error}") from None
        self._model.to(device)
        self._device = device
        self._torch = torch

    def read(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores float64 [B] of uint8 [B, H, W, 3]; 0 where picture and prompt are opposed."""
        given = self._processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding=True,
            truncation=True,
        ).to(self._device)  # fmt: skip
        with self._torch.no_grad():
            out = self._model(**given)
        cosine = self._torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return cosine.clamp(min=0).double().cpu().numpy() * 100


def normalised(depth: np.ndarray) -> np.ndarray:
    """Each map of [B, H, W] from 0 to 1, float64: a judge's depth has no scale of its own."""
    depth = depth.astype(np.float64)
    low = depth.min(axis=(1, 2), keepdims=True)
    span = depth.max(axis=(1, 2), keepdims=True) - low
    return (depth - low) / np.where(span > 0, span, 1.0)


def canny(image: np.ndarray) -> np.ndarray:
    """Edges of uint8 [H, W, 3] as bool [H, W]: scikit-image's Canny at 100 and 200 of 255."""
    from skimage.color import rgb2gray
    from skimage.feature import canny as skimage_canny

    return skimage_canny(rgb2gray(image), low_threshold=_CANNY_LOW, high_threshold=_CANNY_HIGH)


def edge_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of two edge maps, bool [H, W], pixel by pixel; 1 where both are empty."""
    import torch
    from torchmetrics.functional.classification import binary_f1_score

    if not found.any() and not wanted.any():
        return 1.0
    return float(binary_f1_score(torch.from_numpy(found), torch.from_numpy(wanted).int()))


def softedge_ssim(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Multi-scale SSIM of soft edges, uint8 [B, H, W]: float64 [B].

    Five scales, or three where the pictures are too small for five.
    """
    import torch
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as ms_ssim,
    )

    small = min(found.shape[1:]) < _FIVE_SCALES
    few: dict[str, Any] = {"kernel_size": 7, "betas": (0.3, 0.4, 0.3)} if small else {}
    value = ms_ssim(
        torch.from_numpy(found)[:, None].double() / 255,
        torch.from_numpy(wanted)[:, None].double() / 255,
        data_range=1.0, normalize="relu", reduction="none", **few,
    )  # fmt: skip
    return value.double().numpy()
