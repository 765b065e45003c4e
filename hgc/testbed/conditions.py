"""Condition images: what the ControlNets see.

Each function is deterministic and returns uint8, so a condition can be computed from a scene, or
(for the two edge maps) from any picture, which is how the judges compare an output with its
condition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hgc.testbed.scenes import PALETTE, Scene

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CONDITIONS", "canny", "condition_image", "condition_map", "softedge", "to_rgb"]

CONDITIONS = ("segmentation", "canny", "softedge", "depth")


def check_condition(condition: str) -> str:
    """Return `condition` if it is one of `CONDITIONS`; raise TypeError or ValueError if not."""
    if not isinstance(condition, str):
        raise TypeError(f"condition: expected a string, got {type(condition).__name__}")
    if condition not in CONDITIONS:
        raise ValueError(f"condition: expected one of {', '.join(CONDITIONS)}; got {condition!r}")
    return condition


def _luma(image: np.ndarray) -> np.ndarray:
    """Grey float32 [H, W] in [0, 1] of a uint8 RGB image [H, W, 3]."""
    return image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255


def canny(image: np.ndarray) -> np.ndarray:
    """Canny edges of a uint8 RGB image [H, W, 3]: uint8 [H, W], 0 or 255.

    Thresholds are quantiles of the gradient, so night and fog keep their edges.
    """
    from skimage.feature import canny as skimage_canny

    edges = skimage_canny(
        _luma(image), sigma=1.0, low_threshold=0.75, high_threshold=0.88, use_quantiles=True
    )
    return edges.astype(np.uint8) * 255


def softedge(image: np.ndarray) -> np.ndarray:
    """Soft edges of a uint8 RGB image [H, W, 3]: uint8 [H, W].

    The smoothed gradient's magnitude over its 95th percentile, a deterministic stand-in for HED.
    """
    from scipy.ndimage import gaussian_gradient_magnitude

    magnitude = gaussian_gradient_magnitude(_luma(image), sigma=1.5)
    scale = max(float(np.quantile(magnitude, 0.95)), 1e-3)
    return (np.clip(magnitude / scale, 0, 1) * 255 + 0.5).astype(np.uint8)


def condition_map(scene: Scene, condition: str) -> np.ndarray:
    """The condition in its compact form, uint8 [64, 64]: class indices for "segmentation"."""
    check_condition(condition)
    if condition == "segmentation":
        return scene.segmentation
    if condition == "canny":
        return canny(scene.image)
    if condition == "softedge":
        return softedge(scene.image)
    return (np.clip(scene.depth, 0, 1) * 255 + 0.5).astype(np.uint8)


def to_rgb(compact: np.ndarray, condition: str) -> np.ndarray:
    """A compact condition, uint8 [..., H, W], as uint8 RGB [..., H, W, 3]."""
    check_condition(condition)
    if condition == "segmentation":
        return PALETTE[compact]
    return np.repeat(compact[..., None], 3, axis=-1)


def condition_image(scene: Scene, condition: str) -> Image.Image:
    """The condition as the RGB image a pipeline takes as `image`."""
    from PIL import Image

    return Image.fromarray(to_rgb(condition_map(scene, condition), condition))
