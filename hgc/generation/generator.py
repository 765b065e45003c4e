"""A pipeline with hgc on it: a batch of pictures to make in, pixels out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hgc.generation.items import Picture

if TYPE_CHECKING:
    import numpy as np

    from hgc.planning.config import Config

__all__ = ["Generator", "Made"]


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A batch that was made.

    Attributes:
        pixels: uint8 [B, H, W, 3], RGB.
        is_finite: bool [B]; where False the picture held a NaN or an infinity.
        seconds: Of the pipeline call.
        macs: MACs done, one picture; 0 where hgc left the run to diffusers, or was not there.
        macs_uncached: MACs of the same picture without hgc.
        evaluations: Of the run.
        reused: Those of them that did not compute everything.
        held_bytes: The most bytes that hgc held.
    """

    pixels: np.ndarray
    is_finite: np.ndarray
    seconds: float
    macs: int = 0
    macs_uncached: int = 0
    evaluations: int = 0
    reused: int = 0
    held_bytes: int = 0


class Generator:
    """Makes pictures with a diffusers ControlNet pipeline from text.

    pipe: on its device. config: what hgc is installed with. One thread may use it.
    """

    def __init__(self, pipe: Any, config: Config, *, steps: int, guidance: float) -> None:
        import hgc

        self._pipe, self._config = pipe, config
        self._steps, self._guidance = steps, guidance
        self._installation = hgc.install(pipe, config=config)

    def __call__(self, pictures: Sequence[Picture]) -> Made:
        """The pictures, which share one scale of the ControlNet."""
        pixels, is_finite, seconds = self._call(pictures)
        try:
            report = self._installation.report()
        except RuntimeError:  # left to diffusers, as a warning said
            return Made(pixels, is_finite, seconds)
        return Made(
            pixels,
            is_finite,
            seconds,
            macs=report.macs.total // len(pictures),
            macs_uncached=report.full_macs.total // len(pictures),
            evaluations=len(report.rows),
            reused=sum(row.depth != "full" or row.guidance != "both" for row in report.rows),
            held_bytes=report.peak_bytes,
        )

    def uncached(self, pictures: Sequence[Picture]) -> Made:
        """The same pictures without hgc."""
        import hgc

        self._installation.uninstall()
        try:
            return Made(*self._call(pictures))
        finally:
            self._installation = hgc.install(self._pipe, config=self._config)

    def _call(self, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray, float]:
        import torch

        items = [one.item for one in pictures]
        negatives = [item.negative_prompt for item in items]
        begun = time.perf_counter()
        out = self._pipe(
            [item.text for item in items],
            image=[one.condition for one in pictures],
            negative_prompt=[text or "" for text in negatives] if any(negatives) else None,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            controlnet_conditioning_scale=items[0].scale,
            generator=[torch.Generator().manual_seed(one.seed) for one in pictures],
            output_type="pt",
        ).images
        is_finite = torch.isfinite(out).flatten(1).all(1)
        # as diffusers makes PIL images of them; bytes travel in place of floats
        pixels = (out.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        pixels = pixels.permute(0, 2, 3, 1).contiguous().cpu()
        return pixels.numpy(), is_finite.cpu().numpy(), time.perf_counter() - begun
