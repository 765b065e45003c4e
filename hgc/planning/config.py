"""What to reuse: :class:`Config`, its presets, and its JSON form.

A ``Config`` is data. :func:`hgc.plan` turns it into one :class:`~hgc.StepPlan` an evaluation, and
the executor runs those; nothing else in the package decides what is reused.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

from hgc.planning.fields import ConfigError, choice, integer, number, unknown_keys
from hgc.planning.presets import FIELDS
from hgc.planning.step import ATTENTION, CONTROL, ENCODER, GUIDANCE, StepPlan

__all__ = ["PRESETS", "Calibration", "Config", "ConfigError", "StepPlan", "model_name", "presets"]

_MAP_FORMATS = ("fp32", "fp16", "bf16", "e4m3")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a calibrated configuration was measured on, and what was measured.

    Attributes:
        model: Class and shape of the UNet, as :func:`model_name` gives it.
        scheduler: Class of the scheduler.
        steps: Steps of the configuration's run.
        uncached_steps: Steps of the run it was compared with.
        macs_share: Its MACs over those of that run.
        distance: Relative L2 of the final latents to that run's, mean over inputs.
        distance_worst: The same of the worst input.
        fewer_steps: Uncached steps that cost at least as many MACs.
        fewer_steps_distance: Their distance.
        inputs: Number of inputs.
        timesteps: Of the run, where they are known: what the coefficients were refined at.
    """

    model: str
    scheduler: str
    steps: int
    uncached_steps: int
    macs_share: float
    distance: float
    distance_worst: float
    fewer_steps: int
    fewer_steps_distance: float
    inputs: int
    timesteps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.timesteps, list):
            object.__setattr__(self, "timesteps", tuple(self.timesteps))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "timesteps":
                if not isinstance(value, tuple):
                    raise ConfigError(f"Calibration.timesteps must be a list; got {value!r}")
                for timestep in value:
                    number("Calibration", "timesteps", timestep, -1e9, 1e9)
            elif field.type == "str":
                if not isinstance(value, str):
                    raise ConfigError(f"Calibration.{field.name} must be a string; got {value!r}")
            elif field.type == "int":
                integer("Calibration", field.name, value, 0)
            else:
                number("Calibration", field.name, value, 0.0, 1e9)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        """From JSON's object. Raises :class:`ConfigError` naming a wrong or missing field."""
        if not isinstance(data, dict):
            raise ConfigError(f"Config.calibration must be an object of fields; got {data!r}")
        names = {f.name for f in dataclasses.fields(cls)}
        unknown_keys("Calibration", data, names)
        missing = sorted(names - set(data) - {"timesteps"})
        if missing:
            raise ConfigError(f"Calibration lacks the field {missing[0]!r}")
        return cls(**data)


def model_name(model: Any) -> str:
    """A model's class with a digest of its configuration: equal for models of one shape."""
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    return f"{type(model).__name__} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclasses.dataclass(frozen=True)
class Config:
    """What HGC reuses, for a run of ``num_evaluations`` evaluations; it scales to other lengths.

    Attributes:
        name: A label for reports.
        num_evaluations: The number of evaluations ``key_steps`` is written for, and the number of
            steps the configuration is meant for.
        key_steps: The evaluations that compute everything, starting with 0. ``None``: all of them.
        depth: Decoder layers computed at the other evaluations (see :class:`StepPlan`).
        encoder: Skips at the other evaluations: ``"needed"`` or ``"reuse"``.
        control: ControlNet at the other evaluations: ``"reuse"``, ``"compute"`` or ``"off"``.
        attention: Cross-attention at the other evaluations: ``"compute"`` or ``"reuse"``.
        attention_gate: Fraction of the run after which key evaluations reuse the cross-attention
            too. 1.0: never.
        guidance: Halves computed at the other evaluations: ``"both"``, ``"reuse"`` or ``"off"``.
        conditional_key_steps: Key steps that compute the conditional half only.
        control_key_steps: Key steps at which the ControlNets are computed, starting with 0; at the
            others their cached residuals stand in. ``None``: all of them.
        feature_damping: ``a`` of the first-order forecast of cached features. An evaluation ``d``
            after the last key, the keys before it ``g`` apart, reads
            ``(1 + a d/g) last - (a d/g) previous``. 0.0 is plain reuse.
        difference_damping: The same for the cached guidance difference.
        damping: Of the forecast of x0, see :class:`StepPlan`: what evaluations of ``depth=0`` are,
            and what those of another depth correct where ``gain`` is not 1.0. They read no
            features, which ``feature_damping`` is of.
        guidance_damping: The same for the guidance difference of x0. ``None``: as ``damping``.
        gain: How much of what evaluations of a ``depth`` above 0 say beyond the forecast of x0
            counts; less in a run whose key evaluations are nearer than those of 7 of 20 steps, as
            the dampings take less. 1.0: x0 is not forecast.
        adaptive: Each run places its key evaluations itself. At every key evaluation it measures
            how far the cached feature's forecast was from what was computed, in relative L2 (that
            of the row of the batch where it is largest), and sets the distance to the next one so
            that this error becomes ``adaptive``. ``key_steps`` says where key evaluations are until
            something was measured, and the nearest of them what one computes. 0.0: all evaluations
            are key ones. ``None``: ``key_steps`` decides.
        max_gap: With ``adaptive``, the largest distance of two key evaluations. ``None``: twice the
            largest of the rule's.
        fresh_values: Keep the cross-attention maps, so that a prompt that changes within a run
            keeps its layout: a cached map is applied to the fresh values.
        map_format: Storage of those maps: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"e4m3"``.
        max_cache_bytes: Upper bound of the bytes a run may hold. Past it, evaluations are computed
            instead of reused, and a warning says so.
        steps: An explicit plan, one :class:`StepPlan` an evaluation, for exactly
            ``num_evaluations``. A run of another length follows the rule, ``key_steps`` and the
            fields after it, and warns; without ``key_steps`` it is computed in full.
        calibration: What :func:`hgc.calibrate` measured it on; a use on something else warns.
    """

    name: str = "custom"
    num_evaluations: int = 20
    key_steps: tuple[int, ...] | None = None
    depth: int = 1
    encoder: str = "needed"
    control: str = "reuse"
    attention: str = "compute"
    attention_gate: float = 1.0
    guidance: str = "both"
    conditional_key_steps: tuple[int, ...] = ()
    control_key_steps: tuple[int, ...] | None = None
    feature_damping: float = 0.0
    difference_damping: float = 0.0
    damping: float = 0.6
    guidance_damping: float | None = 0.4
    gain: float = 1.0
    adaptive: float | None = None
    max_gap: int | None = None
    fresh_values: bool = False
    map_format: str = "fp16"
    max_cache_bytes: int | None = None
    steps: tuple[StepPlan, ...] | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        for name in ("key_steps", "conditional_key_steps", "control_key_steps", "steps"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"Config.name must be a non-empty string; got {self.name!r}")
        integer("Config", "num_evaluations", self.num_evaluations, 1)
        integer("Config", "depth", self.depth, 0)
        choice("Config", "encoder", self.encoder, ENCODER)
        choice("Config", "control", self.control, CONTROL)
        choice("Config", "attention", self.attention, ATTENTION)
        choice("Config", "guidance", self.guidance, GUIDANCE)
        choice("Config", "map_format", self.map_format, _MAP_FORMATS)
        number("Config", "attention_gate", self.attention_gate, 0.0, 1.0)
        number("Config", "feature_damping", self.feature_damping, -2.0, 2.0)
        number("Config", "difference_damping", self.difference_damping, -2.0, 2.0)
        number("Config", "damping", self.damping, -2.0, 2.0)
        if self.guidance_damping is not None:
            number("Config", "guidance_damping", self.guidance_damping, -2.0, 2.0)
        number("Config", "gain", self.gain, -2.0, 2.0)
        if not isinstance(self.fresh_values, bool):
            raise ConfigError(f"Config.fresh_values must be a bool; got {self.fresh_values!r}")
        if self.max_cache_bytes is not None:
            integer("Config", "max_cache_bytes", self.max_cache_bytes, 0)
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise ConfigError(f"Config.calibration must be a Calibration; got {self.calibration!r}")
        self._check_keys()
        self._check_adaptive()
        if self.steps is not None:
            if not isinstance(self.steps, tuple) or not all(
                isinstance(s, StepPlan) for s in self.steps
            ):
                raise ConfigError("Config.steps must be a tuple of StepPlan")
            if len(self.steps) != self.num_evaluations:
                raise ConfigError(
                    f"Config.steps must have num_evaluations={self.num_evaluations} entries; "
                    f"got {len(self.steps)}"
                )
        is_a_label = FIELDS.get(self.name) and self.key_steps is self.steps is self.adaptive is None
        if is_a_label:
            raise ConfigError(
                f"Config({self.name!r}) would compute everything and only be called so: "
                f"Config.preset({self.name!r}) is the preset"
            )

    def _check_keys(self) -> None:
        for name in ("key_steps", "conditional_key_steps", "control_key_steps"):
            keys = getattr(self, name)
            if keys is None and name != "conditional_key_steps":
                continue
            if not isinstance(keys, tuple):
                raise ConfigError(f"Config.{name} must be a tuple of integers; got {keys!r}")
            for key in keys:
                integer("Config", name, key, 0)
            if list(keys) != sorted(set(keys)):
                raise ConfigError(f"Config.{name} must rise without repeats; got {keys!r}")
            if keys and keys[-1] >= self.num_evaluations:
                raise ConfigError(
                    f"Config.{name} must lie below num_evaluations={self.num_evaluations}; "
                    f"got {keys[-1]}"
                )
        for name in ("key_steps", "control_key_steps"):
            keys = getattr(self, name)
            if keys is not None and (not keys or keys[0] != 0):
                raise ConfigError(f"Config.{name} must start with 0; got {keys!r}")
        keys = self.key_steps if self.key_steps is not None else range(self.num_evaluations)
        for name in ("conditional_key_steps", "control_key_steps"):
            stray = sorted(set(getattr(self, name) or ()) - set(keys))
            if stray:
                raise ConfigError(f"Config.{name} must be key steps; {stray[0]} is not in {keys!r}")

    def _check_adaptive(self) -> None:
        if self.max_gap is not None:
            integer("Config", "max_gap", self.max_gap, 1)
        if self.adaptive is None:
            if self.max_gap is not None:
                raise ConfigError("Config.max_gap bounds what Config.adaptive decides: set both")
            return
        number("Config", "adaptive", self.adaptive, 0.0, 1000.0)
        for name, why in (
            ("steps", "is a plan that is fixed"),
            ("calibration", "was measured on a plan that is fixed"),
        ):
            if getattr(self, name) is not None:
                raise ConfigError(f"Config.adaptive cannot be used where Config.{name} {why}")
        if self.key_steps is None:
            raise ConfigError(
                "Config.adaptive needs Config.key_steps, which decides until something was measured"
            )

    @property
    def is_exact(self) -> bool:
        """True where only loss-free reuse is left: the images are bit-identical."""
        if self.steps is not None and any(s != StepPlan() for s in self.steps):
            return False
        if self.steps is not None and self.key_steps is None:
            return True  # and a run of another length is computed in full
        if self.adaptive:
            return False
        every = self.key_steps is None or len(self.key_steps) == self.num_evaluations
        every = every or self.adaptive == 0.0
        all_control = self.control_key_steps is None or len(self.control_key_steps) == len(
            self.key_steps or range(self.num_evaluations)
        )
        return (
            every and all_control and not self.conditional_key_steps and self.attention_gate >= 1.0
        )

    @property
    def forecasts_x0(self) -> bool:
        """Whether an evaluation forecasts x0, for which the scheduler must be known."""
        by_rule = self.key_steps is not None and (self.depth == 0 or self.gain != 1.0)
        return by_rule or any(step.damping is not None for step in self.steps or ())

    def plans(self, total: int) -> bool:
        """Whether there is a plan for a run of ``total`` evaluations: not where ``steps`` are
        written for another number and no rule stands beside them."""
        return self.steps is None or self.key_steps is not None or total == self.num_evaluations

    @property
    def rule(self) -> Config | None:
        """The rule that ``steps`` were refined from, without them and their calibration: what is
        followed where they do not apply. None where there is none."""
        if self.key_steps is None:
            return None
        return self.replace(steps=None, calibration=None)

    @property
    def depths(self) -> set[int]:
        """Depths of the evaluations that are not key ones."""
        found = {s.depth for s in self.steps or () if isinstance(s.depth, int)}
        return found if self.key_steps is None else found | {self.depth}

    @property
    def reuses_attention(self) -> bool:
        """Whether evaluations reuse cross-attention, or maps of it."""
        between = self.key_steps is not None and self.depth > 0 and self.attention == "reuse"
        planned = any(step.attention == "reuse" for step in self.steps or ())
        return between or planned or self.attention_gate < 1.0 or self.fresh_values

    def check_depth(self, num_layers: int) -> None:
        """Raise :class:`ConfigError` where evaluations reuse more decoder layers than there are."""
        deepest = max(self.depths, default=0)
        if deepest > num_layers:
            place = "depth" if self.steps is None or deepest == self.depth else "steps: depth"
            raise ConfigError(
                f"Config.{place} must be at most {num_layers}, the number of decoder layers of "
                f"this UNet; got {deepest}"
            )

    @classmethod
    def preset(cls, name: str) -> Config:
        """The preset called ``name``; :class:`ConfigError`, a ValueError, names them all."""
        if not isinstance(name, str) or name not in PRESETS:
            close = difflib.get_close_matches(str(name), PRESETS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"no preset named {name!r}; presets: {', '.join(PRESETS)}.{hint}")
        return PRESETS[name]

    @classmethod
    def of(cls, config: Config | str) -> Config:
        """``config`` itself, or the preset of that name, or the configuration in that JSON file."""
        if isinstance(config, Config):
            return config
        if isinstance(config, Path) or (isinstance(config, str) and config.endswith(".json")):
            return cls.from_json(Path(config))
        if isinstance(config, str):
            return cls.preset(config)
        raise TypeError(
            f"config must be an hgc.Config or the name of a preset; got {type(config).__name__}"
        )

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, validated again."""
        unknown_keys("Config", changes, {f.name for f in dataclasses.fields(self)})
        return dataclasses.replace(self, **changes)

    def to_json(self, path: str | Path | None = None) -> str:
        """The configuration as JSON text (fields that differ from the default); also written to
        ``path`` where one is given."""
        default = Config()
        data: dict[str, Any] = {"name": self.name, "num_evaluations": self.num_evaluations}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in data or value == getattr(default, field.name):
                continue
            if field.name == "steps":
                value = [s.to_dict() for s in value]
            if field.name == "calibration":
                value = dataclasses.asdict(value)
            data[field.name] = list(value) if isinstance(value, tuple) else value
        text = json.dumps(data, indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Config:
        """Read what :meth:`to_json` wrote: a :class:`~pathlib.Path`, or the JSON text itself.

        Raises :class:`ConfigError` naming the field where one is unknown or wrong, or where the
        text is not JSON.
        """
        where = str(source) if isinstance(source, Path) else "config"
        try:
            text = source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError too
            raise ConfigError(f"{where} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{where} must hold an object of fields; got {type(data).__name__}")
        unknown_keys("Config", data, {f.name for f in dataclasses.fields(cls)})
        if data.get("steps") is not None:
            if not isinstance(data["steps"], list):
                raise ConfigError("Config.steps must be a list of objects")
            data["steps"] = tuple(StepPlan.from_dict(s) for s in data["steps"])
        if data.get("calibration") is not None:
            data["calibration"] = Calibration.from_dict(data["calibration"])
        return cls(**data)


PRESETS = {name: Config(name=name, **fields) for name, fields in FIELDS.items()}


def presets() -> dict[str, Config]:
    """The presets by name, the most exact one first."""
    return dict(PRESETS)
