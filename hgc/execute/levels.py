"""What the scheduler of a run says of its noise, and whether x0 can be forecast in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hgc.run.noise import NoiseLevels
from hgc.run.position import Position
from hgc.run.run import Run
from hgc.run.schedule import Schedules
from hgc.run.snapshot import storage_of
from hgc.run.verdict import Cost, Verdict
from hgc.warn import WarnOnce

__all__ = ["Levels"]

# Solvers of second order take the difference of two evaluations of a step, and in fewer than ten
# steps what a forecast gets wrong in it is multiplied: pictures were at 0.5 to 9 of the uncached
# one's norm from it, at 0.1 with ten.
_FEWEST_OF_SECOND_ORDER = 19


class Levels:
    """Levels of noise by the scheduler.

    scheduler: That of the pipeline, as it is now; None where it is not known.
    """

    def __init__(self, scheduler: Callable[[], Any], warn: WarnOnce) -> None:
        self._scheduler, self._warn = scheduler, warn

    def of(self, schedules: Schedules, position: Position) -> NoiseLevels | None:
        """Those of a run whose plan forecasts x0; None where they are not known."""
        if not schedules.forecast_x0(position.total):
            return None
        scheduler = self._scheduler()
        config = getattr(scheduler, "config", {})
        if config.get("clip_sample") or config.get("thresholding"):
            # its steps go by another x0 than the model's, and forecasts in x0 drift from both
            self._warn(
                "clipped",
                f"{type(scheduler).__name__} clips x0 (clip_sample or thresholding, which Stable "
                "Diffusion's own configurations leave off). Outputs are forecast as the model "
                "gives them instead of in x0",
            )
            return None
        if not NoiseLevels.fits(scheduler):
            unknown = (
                "the scheduler is not known: install on the pipeline, hgc.install(pipe), or pass "
                "scheduler=pipe.scheduler"
                if scheduler is None
                else f"what {type(scheduler).__name__} hands a model is not known to be "
                "alpha x0 + sigma noise with epsilon, v or x0 predicted, and nothing else"
            )
            self._warn(
                "noise",
                f"{unknown}. Outputs are forecast as the model gives them instead of in x0, and "
                "images are much farther from the uncached ones",
            )
            return None
        assert position.timestep is not None
        timesteps = position.timestep.as_strided((position.total,), (1,), 0)
        own = getattr(scheduler, "timesteps", None)
        is_own = isinstance(own, torch.Tensor) and storage_of(own) == position.storage
        keys = schedules.key_evaluations(position.total)
        return NoiseLevels(scheduler, timesteps, keys, is_own=is_own)

    def look_at_channels(self, run: Run, sample: torch.Tensor, latents: int) -> list[Verdict]:
        """Whether a sample [B, C, H, W] of more channels than ``latents`` begins with them, as it
        does in pipelines that inpaint or edit: what it begins with changes then. Marigold's begins
        with the picture. The host waits for the first evaluation, once a run.
        """
        noise = run.noise
        if noise is None or run.now is None or sample.shape[1] <= latents or sample.is_meta:
            return []
        begins = sample[:, :latents]
        if run.now.index == 0:
            noise.first_channels = begins.clone()
            return []
        before, noise.first_channels = noise.first_channels, None
        if before is None or before.shape != begins.shape or not torch.equal(before, begins):
            return []
        why = "the first channels of the sample do not change, and so are not the latents"
        return [Verdict(why, Cost.RUN)]

    def look_at_length(self, run: Run) -> list[Verdict]:
        """Whether ``run`` is too short for forecasts, by the order of its solver."""
        if run.noise is None or run.position.total >= _FEWEST_OF_SECOND_ORDER:
            return []
        scheduler = self._scheduler()
        if getattr(scheduler, "order", 1) < 2:
            return []
        why = f"{type(scheduler).__name__} takes differences, and {run.position.total} evaluations"
        return [Verdict(f"{why} are too few to forecast them", Cost.RUN)]
