"""Whether a run is the one that a configuration was made for, and its fitted steps apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hgc.planning.config import Config, model_name
from hgc.run.run import Run
from hgc.run.verdict import Cost, Verdict
from hgc.warn import WarnOnce

__all__ = ["FittedSteps"]


class FittedSteps:
    """Compares a run with what its configuration was calibrated on: the model, the scheduler, the
    timesteps, their number. Where they differ it warns, and the fitted steps do not apply.

    scheduler: That of the pipeline, as it is now; None where it is not known.
    """

    def __init__(self, config: Config, scheduler: Callable[[], Any], warn: WarnOnce) -> None:
        self._config, self._scheduler, self._warn = config, scheduler, warn
        self._known = config.calibration
        self._has_rule = config.steps is not None and config.key_steps is not None

    def warn_of_another_model(self, unet: Any) -> bool:
        """Whether the configuration was calibrated on another model than ``unet``; warns if so."""
        known = self._known
        if known is None or model_name(unet) == known.model:
            return False
        self._warn(
            "calibration of the model",
            f"{self._config.name!r} was calibrated on {known.model}; this model is "
            f"{model_name(unet)}. {self._instead()}",
        )
        return True

    def begin_run(self, run: Run) -> list[Verdict]:
        """What follows where a run has another length, or goes by another scheduler; where neither
        is so, its timesteps are asked for, to be compared once they are on the host."""
        config, known, total = self._config, self._known, run.position.total
        if total == config.num_evaluations:
            if known is None:
                return []
            found = self._by_another_scheduler(known.scheduler)
            if found or len(known.timesteps) != total:
                return found
            run.fetch_timesteps()
            return self.look_at_timesteps(run)
        made = "is"
        if known is not None:
            made = f"was calibrated at {known.steps} steps of {known.scheduler}, which is"
        rule = ""
        if self._has_rule:
            rule = ", and follows key_steps and the fields after it instead of steps"
        if rule or known is not None:
            self._warn(
                "length",
                f"{config.name!r} {made} for {config.num_evaluations} evaluations; this run has "
                f"{total}{rule}",
            )
        return []

    def _by_another_scheduler(self, known: str) -> list[Verdict]:
        """Schedulers may share their timesteps and still need other coefficients."""
        scheduler = self._scheduler()
        if scheduler is None or type(scheduler).__name__ == known:
            return []
        self._warn(
            "scheduler",
            f"{self._config.name!r} was calibrated with {known}; this run's scheduler is "
            f"{type(scheduler).__name__}. {self._instead()}",
        )
        return [Verdict("another scheduler", Cost.STEPS)]

    def look_at_timesteps(self, run: Run) -> list[Verdict]:
        """Whether a run's timesteps are others than those of the calibration: another scheduler's,
        or spaced otherwise."""
        found, known = run.fetched_timesteps(), self._known
        if found is None:
            return []
        assert known is not None
        if all(abs(a - b) <= 0.5 for a, b in zip(found, known.timesteps, strict=True)):
            return []
        self._warn(
            "timesteps",
            f"{self._config.name!r} was calibrated at other timesteps, those of "
            f"{known.scheduler}: from {known.timesteps[0]:g} to {known.timesteps[-1]:g}; this "
            f"run's are from {found[0]:g} to {found[-1]:g}. {self._instead()}",
        )
        return [Verdict("other timesteps", Cost.STEPS)]

    def _instead(self) -> str:
        """What is done where fitted steps do not apply."""
        if not self._has_rule:
            return "Its distance is not measured here: run hgc.calibrate"
        return "It follows key_steps and the fields after it instead of steps: run hgc.calibrate"
