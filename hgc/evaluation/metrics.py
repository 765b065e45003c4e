"""The numbers of a row, from what was measured picture by picture.

Pictures are float32 [B, H, W, 3] in [0, 1]. Where one condition has several pictures they stand
next to each other, and the bootstrap resamples conditions, not pictures: pictures of one condition
are no independent evidence.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
from typing import Any

import numpy as np

__all__ = [
    "Summary",
    "class_counts",
    "flip",
    "flip_maps",
    "flip_version",
    "frechet",
    "interval",
    "iou_of_counts",
    "jod",
    "jod_version",
    "loss_interval",
    "pixels_per_degree",
    "psnr",
    "ratio_interval",
    "relative_l2",
    "relative_loss",
    "ssim",
    "summary",
    "worst_share",
]

WORST = 0.05
RESAMPLES = 2000
# Of equal pictures, where it would be infinite.
PSNR_LIMIT = 100.0
# FLIP's own default: a display 0.7 m and 3840 pixels wide, seen from 0.7 m. It holds for pictures
# of 512 pixels; see `pixels_per_degree`.
PIXELS_PER_DEGREE = 67.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """One measure over a set of pictures.

    Attributes:
        mean: Over all pictures.
        low: Lower end of the mean's 95% bootstrap interval.
        high: Upper end.
        worst: Mean of the worst 5% of pictures; None where the measure is of the whole set.
    """

    mean: float
    low: float
    high: float
    worst: float | None = None


def _same_shape(images: np.ndarray, reference: np.ndarray) -> None:
    if images.shape != reference.shape:
        raise ValueError(
            f"images and reference must have one shape; got {images.shape} and {reference.shape}"
        )


def relative_l2(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Distance of each picture, or row of features, to its reference: float64 [B].

    images, reference: float [B, ...], black at 0. A reference that is zero all over gives 0 where
    the picture is too, else infinity.

    Equivalent to:
        np.linalg.norm(image - reference) / np.linalg.norm(reference)
    """
    _same_shape(images, reference)
    flat = images.reshape(len(images), -1).astype(np.float64)
    true = reference.reshape(len(reference), -1).astype(np.float64)
    difference = np.linalg.norm(flat - true, axis=1)
    norm = np.linalg.norm(true, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0.0, 0.0, difference / norm)


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal to noise ratio of each picture in dB, at most 100: float64 [B]."""
    _same_shape(images, reference)
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    value = peak_signal_noise_ratio(
        torch.from_numpy(images).double(),
        torch.from_numpy(reference).double(),
        data_range=1.0,
        reduction="none",
        dim=(1, 2, 3),
    )
    return value.clamp(max=PSNR_LIMIT).numpy()


def ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture, 1 where they are equal: float64 [B]."""
    _same_shape(images, reference)
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    # in float64: in float32 the variances of smooth pictures are differences of close numbers
    value = structural_similarity_index_measure(
        torch.from_numpy(images).double().permute(0, 3, 1, 2),
        torch.from_numpy(reference).double().permute(0, 3, 1, 2),
        data_range=1.0,
        reduction="none",
    )
    assert isinstance(value, torch.Tensor)
    return value.double().reshape(len(images)).numpy()


def pixels_per_degree(height: int, width: int) -> float:
    """Pixels a degree of the eye's field at which FLIP and JOD look at a picture.

    Every picture is seen at the size of one of 512 pixels at 67 pixels a degree: its shorter side
    fills 7.6 degrees, 9 cm at 70 cm. So 67 with 512 pixels, 8.375 with the testbed's 64, which
    would be a thumbnail of one degree at 67.
    """
    return PIXELS_PER_DEGREE * min(height, width) / 512


def _check_displayable(images: np.ndarray, reference: np.ndarray) -> None:
    """What FLIP and JOD take; FLIP ends the process when it is given something else."""
    _same_shape(images, reference)
    for name, given in (("images", images), ("reference", reference)):
        if given.ndim != 4 or given.shape[-1] != 3 or 0 in given.shape[1:]:
            raise ValueError(f"{name} must have the shape [B, H, W, 3]; got {given.shape}")
        if not ((given >= 0.0) & (given <= 1.0)).all():
            raise ValueError(
                f"{name} must be numbers from 0 to 1; got {given.min()} to {given.max()}"
            )


def _flip_evaluator() -> Any | None:
    try:
        import flip_evaluator
    except ImportError:
        return None
    return flip_evaluator


def flip_version() -> str | None:
    """Of flip-evaluator; None where it is not installed."""
    return None if _flip_evaluator() is None else importlib.metadata.version("flip-evaluator")


def flip_maps(images: np.ndarray, reference: np.ndarray) -> np.ndarray | None:
    """LDR-FLIP of each pixel, 0 to 1, at :func:`pixels_per_degree`: float32 [B, H, W].

    images, reference: sRGB in [0, 1]. None where flip-evaluator is not installed.
    """
    _check_displayable(images, reference)
    package = _flip_evaluator()
    if package is None:
        return None
    parameters = {"ppd": pixels_per_degree(*images.shape[1:3])}
    found = np.empty(images.shape[:3], np.float32)
    for i, (image, true) in enumerate(zip(images, reference, strict=True)):
        found[i] = package.evaluate(
            np.ascontiguousarray(true, np.float32), np.ascontiguousarray(image, np.float32),
            "LDR", inputsRGB=True, applyMagma=False, computeMeanError=False,
            parameters=dict(parameters),
        )[0][..., 0]  # fmt: skip
    return found


def flip(images: np.ndarray, reference: np.ndarray) -> np.ndarray | None:
    """Mean of :func:`flip_maps` of each picture, 0 where they are equal: float64 [B]."""
    maps = flip_maps(images, reference)
    return None if maps is None else maps.mean(axis=(1, 2), dtype=np.float64)


def jod_version() -> str | None:
    """Of cvvdp; None where it is not installed."""
    if importlib.util.find_spec("pycvvdp") is None:
        return None
    return importlib.metadata.version("cvvdp")


@functools.lru_cache(maxsize=4)
def _cvvdp(height: int, width: int) -> Any:
    import pycvvdp
    import torch

    seen = pycvvdp.vvdp_display_geometry((width, height), ppd=pixels_per_degree(height, width))
    return pycvvdp.cvvdp(
        display_name="standard_4k", display_geometry=seen, device=torch.device("cpu"), quiet=True
    )


def jod(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """ColorVideoVDP of each picture in just-objectionable differences, 10 where they are equal, at
    :func:`pixels_per_degree`, on its ``standard_4k`` display: float64 [B].

    images, reference: sRGB in [0, 1]. Needs cvvdp.
    """
    _check_displayable(images, reference)
    import torch

    metric = _cvvdp(*images.shape[1:3])
    values = []
    with torch.no_grad():
        for image, true in zip(images, reference, strict=True):
            values.append(float(metric.predict(image, true, dim_order="HWC")[0]))
    return np.array(values, np.float64)


def worst_share(values: np.ndarray, *, higher_is_worse: bool) -> float:
    """Mean of the worst 5% of ``values`` [N]: of the worst ``ceil(N / 20)`` of them."""
    count = max(1, math.ceil(WORST * len(values) - 1e-9))
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return float((ordered[-count:] if higher_is_worse else ordered[:count]).mean())


@functools.lru_cache(maxsize=4)
def _weights(count: int, draws: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of ``count`` is drawn: the set itself, then ``draws`` resamples of it."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return np.concatenate([np.ones((1, count)), drawn])


def _a_condition(values: np.ndarray, images: int) -> np.ndarray:
    """Means over the pictures of each condition."""
    return np.asarray(values, dtype=np.float64).reshape(-1, images).mean(axis=1)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def interval(values: np.ndarray, images: int = 1) -> tuple[float, float]:
    """95% bootstrap interval of the mean of ``values`` [N]; ``images`` of each condition."""
    grouped = _a_condition(values, images)
    return _percentiles(_weights(len(grouped))[1:] @ grouped / len(grouped))


def summary(values: np.ndarray, *, higher_is_worse: bool, images: int = 1) -> Summary:
    """Mean, interval and worst 5% of ``values`` [N]; ``images`` of each condition."""
    values = np.asarray(values, dtype=np.float64)
    worst = worst_share(values, higher_is_worse=higher_is_worse)
    return Summary(float(values.mean()), *interval(values, images), worst)


def ratio_interval(
    values: np.ndarray, others: np.ndarray, images: int = 1
) -> tuple[float, float, float]:
    """Mean of ``values`` over that of ``others``, pictures of the same conditions: (ratio, low,
    high), the 95% interval by a bootstrap that draws both together."""
    top, bottom = _a_condition(values, images), _a_condition(others, images)
    weights = _weights(len(top))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (weights @ top) / (weights @ bottom)
    return float(ratios[0]), *_percentiles(ratios[1:])


def class_counts(matrices: np.ndarray) -> np.ndarray:
    """Pixels hit, true and judged a class, int64 [..., K, 3], of confusion matrices [..., K, K]
    (true class by judged class)."""
    hit = np.diagonal(matrices, axis1=-2, axis2=-1)
    return np.stack([hit, matrices.sum(-1), matrices.sum(-2)], axis=-1)


def iou_of_counts(counts: np.ndarray) -> np.ndarray:
    """Mean IoU of each of ``counts`` [..., K, 3], over the classes that occur in its truth."""
    hit, true, judged = (counts[..., i].astype(np.float64) for i in range(3))
    present = true > 0
    iou = np.divide(hit, true + judged - hit, out=np.zeros_like(hit), where=present)
    return iou.sum(-1) / np.maximum(present.sum(-1), 1)


def relative_loss(score: np.ndarray | float, reference: np.ndarray | float) -> np.ndarray | float:
    """Share of ``reference`` that ``score`` is below it; negative where it is above.

    Both higher-is-better, and of one sign: with minus an RMSE it is the share the error grew by.
    0 where both are 0.
    """
    score, reference = np.asarray(score, np.float64), np.asarray(reference, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = (reference - score) / np.abs(reference)
    return np.where(score == reference, 0.0, loss)


def _figures(scores: np.ndarray, counts: np.ndarray | None, images: int) -> np.ndarray:
    """The score of the set, then of each resample of it."""
    if counts is None:
        grouped = _a_condition(scores, images)
        return _weights(len(grouped)) @ grouped / len(grouped)
    flat = counts.reshape(len(counts) // images, images, -1).sum(axis=1)
    summed = _weights(len(flat)) @ flat
    return iou_of_counts(summed.reshape(-1, *counts.shape[1:]))


def fidelity_interval(
    scores: np.ndarray, counts: np.ndarray | None = None, images: int = 1
) -> tuple[float, float, float]:
    """The score of a set and its 95% bootstrap interval: (score, low, high).

    scores: one a picture [N]. counts: [N, K, 3], where the score of a set is the IoU of its summed
    counts and not the mean of scores.
    """
    figures = _figures(scores, counts, images)
    return float(figures[0]), *_percentiles(figures[1:])


def loss_interval(
    scores: np.ndarray,
    reference: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    reference_counts: np.ndarray | None = None,
    images: int = 1,
) -> tuple[float, float, float]:
    """The relative loss over a set of pictures, and its 95% bootstrap interval: (loss, low, high).

    scores, reference: one a picture [N], higher is better; the same conditions in the same order,
    so they are resampled together. counts, reference_counts: as in :func:`fidelity_interval`.
    images: pictures of each condition. Percentiles of 2000 resamples of the conditions.
    """
    ours = _figures(scores, counts, images)
    losses = np.asarray(relative_loss(ours, _figures(reference, reference_counts, images)))
    return float(losses[0]), *_percentiles(losses[1:])


def frechet(features: np.ndarray, reference: np.ndarray) -> float | None:
    """Frechet distance between two sets of features [N, F] and [M, F], each taken as a normal
    distribution; None where a set has fewer than two.

    With fewer pictures than features it is biased upwards, for all methods alike: compare sets of
    one size only.
    """
    if len(features) < 2 or len(reference) < 2:
        return None
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = torch.nn.Identity()
    given.num_features = features.shape[1]
    metric = FrechetInceptionDistance(feature=given)
    metric.update(torch.from_numpy(np.asarray(reference, np.float64)), real=True)
    metric.update(torch.from_numpy(np.asarray(features, np.float64)), real=False)
    # of two equal sets rounding leaves a number near zero on either side of it
    return max(0.0, float(metric.compute()))
