"""Forecasts in x0: what the outputs of a model say of the clean latents, and the way back.

What a UNet is given is ``x = alpha x0 + sigma noise`` with ``alpha^2 + sigma^2 = 1``, whatever the
scheduler: those that work on other scales divide by them first. So an output, whether it predicts
the noise, v or the clean latents themselves, is linear in ``x`` and in the ``x0`` that it speaks
of. Between evaluations x0 changes much less than the output, and nearly linearly in
``log(alpha / sigma)``.

Levels of noise are numbers of the host. The timesteps are on the device, so they are copied when a
run begins and waited for when its first evaluation is launched: the copy is done by then, and the
device still has that evaluation to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hgc.run.cache import Cache, conditional_half

__all__ = ["NoiseLevels", "to_host"]

Tensor = torch.Tensor

# x0 = of_sample x + of_output out, by the scheduler's prediction type
_FORMS = {
    "epsilon": lambda alpha, sigma: (1.0 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "sample": lambda alpha, sigma: (0.0, 1.0),
}
# The distance in log-SNR between key evaluations, a little below those of 7 of 20 steps, from which
# on dampings and gains are as they were given. With nearer ones x0 is nearer to a line, and shallow
# layers have less to say: docs/decisions/008.
_FAR_APART = 0.6
# How far ahead a line is followed, in distances of its two key evaluations: x0 settles where the
# last step leaps to almost no noise, and two of almost one level say nothing of a direction.
_FARTHEST = 1.7
# Evaluations of one timestep, as second-order schedulers make them, are nearer than this.
_NO_GAP = 1e-6
# Schedules that end in pure noise have an alpha of zero there: as diffusers bounds it.
_SMALLEST = 2.0**-12


def to_host(value: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host that is under way, and the event after which it is there."""
    if value.device.type == "cpu":
        return value.clone(), None
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    copy.copy_(value, non_blocking=True)
    event = None
    if value.is_cuda:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(value.device))
    return copy, event


def _arrived(copies: Sequence[tuple[Tensor, Any]]) -> list[Any]:
    for _, event in copies:
        if event is not None:
            event.synchronize()
    return [copy.double().numpy() for copy, _ in copies]


class NoiseLevels:
    """The noise at each evaluation of a run, and forecasts of x0 in it.

    Args:
        scheduler: With ``alphas_cumprod``, and a prediction type that :meth:`fits`.
        timesteps: [N], of the run, on its device.
        keys: Indices of the evaluations whose x0 is computed, as planned.
        is_own: Whether ``timesteps`` are those that the scheduler holds now: then its sigmas are
            those of the run.
    """

    def __init__(
        self, scheduler: Any, timesteps: Tensor, keys: Sequence[int], *, is_own: bool
    ) -> None:
        self._form = _FORMS[scheduler.config.get("prediction_type", "epsilon")]
        sigmas = getattr(scheduler, "sigmas", None) if is_own else None
        given = [timesteps, scheduler.alphas_cumprod]
        if isinstance(sigmas, Tensor) and len(sigmas) >= len(timesteps):
            given.append(sigmas[: len(timesteps)])
        self._under_way = [*map(to_host, given)]
        self._levels: list[tuple[float, float]] = []  # of_sample, of_output at each evaluation
        self._log_snr: list[float] = []
        self._keys = list(keys)
        self._spacing = 1.0
        # by which key evaluations, and what lies between their x0 of the conditional half
        self._moved: tuple[list[int], Tensor] | None = None
        self.first_channels: Tensor | None = None  # of the run's first sample, to be compared

    @staticmethod
    def fits(scheduler: Any) -> bool:
        """Whether what the scheduler hands a model is of the form above, at timesteps of its
        training, and all that the model hands back is its prediction."""
        config = getattr(scheduler, "config", {})
        return (
            isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)
            and config.get("prediction_type", "epsilon") in _FORMS
            and config.get("timestep_type", "discrete") == "discrete"
            and not config.get("use_flow_sigmas", False)
            # half of the channels would be no prediction
            and not str(config.get("variance_type")).startswith("learned")
        )

    def _read(self) -> None:
        timesteps, alphas_cumprod, *own = _arrived(self._under_way)
        self._under_way = []
        # sigma / alpha; trained timesteps are whole numbers, schedulers interpolate between them
        log_ratios = 0.5 * (
            np.log1p(-np.minimum(alphas_cumprod, 1 - 1e-12))
            - np.log(np.maximum(alphas_cumprod, 1e-12))
        )

        def at(steps: np.ndarray) -> np.ndarray:
            return np.interp(steps, np.arange(len(log_ratios)), log_ratios)

        found = at(timesteps)
        if own:
            # those that the scheduler goes by, where they are these timesteps': some round them
            # to whole ones, some evaluate between their sigmas
            with np.errstate(divide="ignore"):
                sigmas = np.log(own[0])
            rounded = (at(timesteps - 0.5) <= sigmas) & (sigmas <= at(timesteps + 0.5))
            found = np.where(rounded, sigmas, found)
        alphas = np.clip(1.0 / np.sqrt(1.0 + np.exp(2.0 * found)), _SMALLEST, 1.0)
        sigmas = np.clip(1.0 / np.sqrt(1.0 + np.exp(-2.0 * found)), _SMALLEST, 1.0)
        self._levels = [
            self._form(a, s) for a, s in zip(alphas.tolist(), sigmas.tolist(), strict=True)
        ]
        self._log_snr = found = np.log(alphas / sigmas).tolist()
        gaps = np.abs(np.diff([found[key] for key in self._keys]))
        gaps = gaps[gaps > _NO_GAP]
        if len(gaps):
            self._spacing = min(1.0, float(np.median(gaps)) / _FAR_APART)

    def _at(self, evaluation: int) -> tuple[float, float]:
        if self._under_way:
            self._read()
        return self._levels[evaluation]

    def x0(self, sample: Tensor, out: Tensor, evaluation: int) -> Tensor:
        """What ``out`` says of the clean latents, in float32 at least; new.

        sample: [B, C or more, H, W]; what lies behind the channels of ``out`` is no latents.
        """
        of_sample, of_output = self._at(evaluation)
        wide = torch.promote_types(out.dtype, torch.float32)
        x0 = out.to(wide) * of_output
        return x0.add_(sample[:, : out.shape[1]], alpha=of_sample) if of_sample else x0

    def output(self, sample: Tensor, x0: Tensor, evaluation: int, weight: float = 1.0) -> Tensor:
        """The inverse of :meth:`x0`: ``weight`` times the output that says ``x0`` of ``sample``;
        new."""
        of_sample, of_output = self._at(evaluation)
        out = x0 * (weight / of_output)
        if of_sample:
            out.add_(sample[:, : x0.shape[1]], alpha=-weight * of_sample / of_output)
        return out

    @property
    def spacing(self) -> float:
        """How far key evaluations are apart: 1 where as far as those of 7 of 20 steps or farther,
        else their share of that."""
        if self._under_way:
            self._read()
        return self._spacing

    def slope(self, damping: float, evaluation: int, newest: int, previous: int) -> float:
        """``s`` of the forecast ``x0 + s (x0 - previous x0)``: a line in the log-SNR, damped; less
        so in a run whose key evaluations are nearer to each other than 7 of 20 steps are. No slope
        (a damping of 0) stays none. The line is followed no farther than 1.7 times the distance of
        its two key evaluations."""
        spacing = self.spacing
        if damping != 0.0:
            damping = 1.0 - (1.0 - damping) * spacing
        found = self._log_snr
        behind, ahead = found[newest] - found[previous], found[evaluation] - found[newest]
        if abs(behind) <= _NO_GAP:
            return 0.0
        return damping * max(-_FARTHEST, min(_FARTHEST, ahead / behind))

    def forecast(
        self,
        cache: Cache,
        evaluation: int,
        damping: float,
        guidance_damping: float | None,
        correction: Sequence[float] = (),
        *,
        is_pair: bool,
    ) -> Tensor:
        """x0 at ``evaluation`` by those that are in the cache; read-only.

        On the line through the last two the conditional half goes by ``damping``, its difference to
        the other one by ``guidance_damping``; a batch that is no guidance pair by ``damping``. To
        that ``correction`` times the values is added, newest first.
        """
        x0 = self._line(cache, evaluation, damping, guidance_damping, is_pair=is_pair)
        values = cache.values("x0")
        if len(values) >= len(correction):
            for coefficient, value in zip(correction, values, strict=False):
                if coefficient != 0.0:
                    x0 = torch.add(x0, value, alpha=coefficient)
        return x0

    def _line(
        self,
        cache: Cache,
        evaluation: int,
        damping: float,
        guidance_damping: float | None,
        *,
        is_pair: bool,
    ) -> Tensor:
        keys = cache.evaluations("x0")
        if len(keys) < 2:
            return cache.read("x0")
        slope = apart = self.slope(damping, evaluation, *keys[:2])
        if is_pair and guidance_damping is not None:
            apart = self.slope(guidance_damping, evaluation, *keys[:2])
        x0 = cache.read("x0", (1.0 + apart, -apart))
        if apart == slope or math.isclose(apart, slope):
            return x0
        if self._moved is None or self._moved[0] != keys:
            newest, previous = map(conditional_half, cache.values("x0")[:2])
            self._moved = keys, newest - previous
        x0.unflatten(0, (2, -1)).add_(self._moved[1], alpha=slope - apart)
        return x0
