"""What one evaluation computes and what it reads from the cache."""

from __future__ import annotations

import dataclasses
from typing import Any

from hgc.planning.fields import ConfigError, choice, integer, number, unknown_keys

__all__ = ["ATTENTION", "CONTROL", "ENCODER", "GUIDANCE", "StepPlan"]

FULL = "full"

CONTROL = ("compute", "reuse", "off")
ENCODER = ("needed", "reuse")
ATTENTION = ("compute", "reuse")
GUIDANCE = ("both", "reuse", "off")


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one evaluation computes and what it reads from the cache.

    An evaluation is one call of the ControlNet(s), then of the UNet.

    Attributes:
        control: ``"compute"`` runs the ControlNet(s), ``"reuse"`` takes their cached residuals,
            ``"off"`` leaves them out.
        depth: ``"full"`` computes everything. An integer ``k`` computes the ``k`` outermost decoder
            layers with the encoder layers they need, on top of the cached input of the first of
            them; ``0`` computes nothing and takes the output itself from the cache.
        encoder: ``"needed"`` computes the skips those layers read, ``"reuse"`` takes them from the
            cache (encoder propagation). Only read where ``depth`` is an integer above 0.
        attention: ``"reuse"`` takes the output of each cross-attention from the cache, or, where
            the text changed and maps are kept, applies the cached map to the fresh values.
        guidance: ``"both"`` halves of a classifier-free guidance batch; ``"reuse"`` computes the
            conditional half and restores the other from the cached difference; ``"off"`` sets the
            unconditional half to the conditional one.
        forecast: A cached feature is ``sum_i forecast[i] * value[i]`` over its last key values,
            newest first: ``(1.0,)`` is reuse, ``(1 + a, -a)`` extrapolates to first order.
        guidance_forecast: The same for the cached guidance difference.
        control_forecast: The same for the ControlNets' residuals. ``None``: as ``forecast``.
        output_forecast: The output is ``output_forecast[0]`` times the computed one and
            ``output_forecast[1 + i]`` times the one computed at the ``i``-th last key evaluation:
            ``(1.0,)`` leaves it as computed. It makes the run's scheduler a multistep method of
            another order, with coefficients of its own at each evaluation.
        damping: Where ``depth`` is 0, the output is what says of its sample the x0 (the clean
            latents) that is forecast from the last two key evaluations', on a line in the log-SNR
            of which so much of the slope is taken. ``None``, or where the run's scheduler is not
            known: the model's own output is forecast, by ``forecast``.
        guidance_damping: The same for the guidance difference of x0. ``None``: as ``damping``.
        x0_correction: Added to that forecast: ``sum_i x0_correction[i] * x0[i]`` over the x0 of the
            last key evaluations, newest first; nothing where fewer are held.
        gain: Where ``depth`` is an integer above 0, the output is the x0 forecast plus so much of
            what the computed layers say beyond it: 1.0 is what they say, 0.0 the forecast. Others
            count less in a run whose key evaluations are nearer to each other than those of 7 of 20
            steps: times ``NoiseLevels.spacing``.
    """

    control: str = "compute"
    depth: int | str = FULL
    encoder: str = "needed"
    attention: str = "compute"
    guidance: str = "both"
    forecast: tuple[float, ...] = (1.0,)
    guidance_forecast: tuple[float, ...] = (1.0,)
    control_forecast: tuple[float, ...] | None = None
    output_forecast: tuple[float, ...] = (1.0,)
    damping: float | None = None
    guidance_damping: float | None = None
    x0_correction: tuple[float, ...] = ()
    gain: float = 1.0

    def __post_init__(self) -> None:
        choice("StepPlan", "control", self.control, CONTROL)
        choice("StepPlan", "encoder", self.encoder, ENCODER)
        choice("StepPlan", "attention", self.attention, ATTENTION)
        choice("StepPlan", "guidance", self.guidance, GUIDANCE)
        if self.depth != FULL:
            integer("StepPlan", "depth", self.depth, 0)
        for name in (
            "forecast", "guidance_forecast", "control_forecast", "output_forecast", "x0_correction"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name == "control_forecast":
                continue
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
                value = tuple(value)
            if not isinstance(value, tuple) or not (value or name == "x0_correction"):
                kind = "tuple" if name == "x0_correction" else "non-empty tuple"
                raise ConfigError(f"StepPlan.{name} must be a {kind}; got {value!r}")
            for coefficient in value:
                number("StepPlan", name, coefficient, -100.0, 100.0)
        for name in ("damping", "guidance_damping", "gain"):
            if getattr(self, name) is not None:
                number("StepPlan", name, getattr(self, name), -2.0, 2.0)

    @property
    def of_residuals(self) -> tuple[float, ...]:
        """Coefficients of the ControlNets' residuals."""
        return self.forecast if self.control_forecast is None else self.control_forecast

    @property
    def tells_halves(self) -> bool:
        """Whether the halves of a guidance pair are not treated alike."""
        return self.guidance != "both" or self.guidance_damping not in (None, self.damping)

    @property
    def in_output(self) -> StepPlan:
        """The step with the model's own output forecast instead of x0."""
        if self.damping is None:
            return self
        return dataclasses.replace(
            self, damping=None, guidance_damping=None, x0_correction=(), gain=1.0
        )

    @property
    def is_key(self) -> bool:
        """True where everything is computed, so that later evaluations may read it."""
        return self.depth == FULL

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from a full evaluation, ready for JSON."""
        default = StepPlan()
        fields = dataclasses.asdict(self)
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in fields.items()
            if v != getattr(default, k)
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepPlan:
        """The inverse of :meth:`to_dict`. Raises :class:`ConfigError` naming a wrong field."""
        if not isinstance(data, dict):
            raise ConfigError(f"a StepPlan must be an object of fields; got {data!r}")
        unknown_keys("StepPlan", data, {f.name for f in dataclasses.fields(cls)})
        return cls(**data)
