"""The numbers of a row, from what was measured scene by scene."""

from __future__ import annotations

import math

import numpy as np

__all__ = [
    "corpus_iou",
    "loss_interval",
    "relative_l2",
    "relative_loss",
    "worst_share",
]

WORST = 0.05
RESAMPLES = 2000


def relative_l2(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Distance of each picture to its reference: float64 [B].

    images, reference: float [B, H, W, C] in [0, 1], black at 0. A reference that is black all over
    gives 0 where the picture is black too, else infinity.

    Equivalent to:
        np.linalg.norm(image - reference) / np.linalg.norm(reference)
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images and reference must have one shape; got {images.shape} and {reference.shape}"
        )
    flat = images.reshape(len(images), -1).astype(np.float64)
    true = reference.reshape(len(reference), -1).astype(np.float64)
    difference = np.linalg.norm(flat - true, axis=1)
    norm = np.linalg.norm(true, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0.0, 0.0, difference / norm)


def worst_share(values: np.ndarray, *, higher_is_worse: bool) -> float:
    """Mean of the worst 5% of ``values`` [N]: of the worst ``ceil(N / 20)`` of them."""
    count = max(1, math.ceil(WORST * len(values) - 1e-9))
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return float((ordered[-count:] if higher_is_worse else ordered[:count]).mean())


def corpus_iou(matrices: np.ndarray) -> np.ndarray:
    """Mean IoU of each confusion matrix [..., K, K] (true class by judged class), over the classes
    that occur in its truth: float64 [...]."""
    hit = np.diagonal(matrices, axis1=-2, axis2=-1).astype(np.float64)
    true = matrices.sum(-1)
    union = true + matrices.sum(-2) - hit
    present = true > 0
    iou = np.divide(hit, union, out=np.zeros_like(hit), where=present)
    return iou.sum(-1) / np.maximum(present.sum(-1), 1)


def relative_loss(score: np.ndarray | float, reference: np.ndarray | float) -> np.ndarray | float:
    """Share of ``reference`` that ``score`` is below it; negative where it is above.

    Both higher-is-better, and of one sign: with minus an RMSE it is the share the error grew by.
    """
    return (reference - score) / np.abs(reference)


def loss_interval(
    scores: np.ndarray,
    reference: np.ndarray,
    *,
    confusion: np.ndarray | None = None,
    reference_confusion: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The relative loss over a set of scenes, and its 95% bootstrap interval.

    scores, reference: one a scene [N], higher is better; the same scenes in the same order, so
    they are resampled together.
    confusion, reference_confusion: [N, K, K], where the score of a set is the IoU of its summed
    confusion and not the mean of scores.

    Returns (loss, low, high). Percentiles of 2000 resamples of the scenes.
    """
    count = len(scores)
    draws = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=RESAMPLES
    )
    weights = np.concatenate([np.ones((1, count), np.int64), draws])
    if confusion is not None and reference_confusion is not None:

        def figure(matrices: np.ndarray) -> np.ndarray:
            summed = weights @ matrices.reshape(count, -1)
            return corpus_iou(summed.reshape(-1, *matrices.shape[1:]))

        losses = relative_loss(figure(confusion), figure(reference_confusion))
    else:
        losses = relative_loss(weights @ scores / count, weights @ reference / count)
    losses = np.asarray(losses)
    low, high = np.percentile(losses[1:], [2.5, 97.5])
    return float(losses[0]), float(low), float(high)
