"""What is compared: the pipeline as it is, presets, plans from files, peers, and fewer steps."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path

from hgc.evaluation.models import sd15_macs
from hgc.evaluation.peers import (
    PACKAGES,
    PEERS,
    SKIPS,
    grid,
    method_of,
    package_row,
    peer,
    refined_rows,
)
from hgc.evaluation.subject import Subject, Testbed, ays, check_scheduler
from hgc.planning.config import PRESETS, Config, ConfigError, model_name
from hgc.planning.rule import plan

__all__ = ["Candidate", "candidates", "equal_steps", "own_schedulers", "steps_of", "testbed"]

# The number of steps the presets' key steps are written for, and of the uncached run.
REFERENCE_STEPS = 20
_STEPS = re.compile(r"(\d+)-steps?")
# The solvers of "6-steps@grid".
_GRID = ("unipc-grid", "dpm++2m-grid")


@functools.cache
def testbed() -> Testbed:
    """The shipped model as a subject, one for all, so that its MACs are counted once."""
    return Testbed()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of a table: a way to make the pictures.

    Attributes:
        name: In tables.
        config: What hgc is installed with; None: without hgc.
        steps: Denoising steps of the run.
        equal_to: Names of the candidates this run, with fewer steps, is the equal of in MACs.
        scheduler: Of this run; None: that of the evaluation.
        package: Of "deepcache-pypi-N": another package is switched on instead of hgc.
        group: Of runs that differ in the scheduler only and compete: tables show the nearest to the
            uncached pictures. Empty: competes with none.
    """

    name: str
    config: Config | None
    steps: int
    equal_to: tuple[str, ...] = ()
    scheduler: str | None = None
    package: str | None = None
    group: str = ""

    @property
    def label(self) -> str:
        """The name, with what it is the equal of."""
        return f"{self.name} (vs {', '.join(self.equal_to)})" if self.equal_to else self.name

    @property
    def method(self) -> str:
        """What runs differ in work only have in common: a line of the plot."""
        if self.package is not None:
            return "DeepCache (package)"
        if self.config is None:
            return f"fewer steps, {self.scheduler}" if self.scheduler else "fewer steps"
        name, _, scheduler = self.name.partition("@")
        own = "hgc" if self.config.calibration is None else "hgc, calibrated"
        method = method_of(name) or own
        return f"{method}, {scheduler}" if scheduler else method

    @property
    def is_plain(self) -> bool:
        """Whether nothing is cached."""
        return self.config is None and self.package is None


def steps_of(config: Config, steps: int) -> int:
    """Steps ``config`` runs at where the uncached run makes ``steps``.

    Its own number where that is what it was calibrated against, 20 without a calibration, and its
    share of it otherwise; a plan that is written out step by step has one length only.
    """
    known = config.calibration
    reference = REFERENCE_STEPS if known is None else max(1, known.uncached_steps)
    if config.steps is not None or steps == reference:
        return config.num_evaluations
    return max(1, round(config.num_evaluations * steps / reference))


def equal_steps(config: Config, steps: int, subject: Subject | None = None) -> int:
    """The fewest uncached steps that cost at least as much as ``config`` does at ``steps``.

    Counted on the subject (None: the testbed) in both conventions, and where the subject stands for
    SD1.5, on that too, and the largest taken: fewer steps is never given fewer MACs than the plan
    it is compared with.
    """
    subject = testbed() if subject is None else subject
    needed = 1
    for count in (subject.macs, sd15_macs) if subject.stands_for_sd15 else (subject.macs,):
        done, one = count(config, steps), count(None, 1)
        needed = max(needed, math.ceil(done.total / one.total), math.ceil(done.paper / one.paper))
    return needed


def own_schedulers(names: Sequence[str], own: str) -> tuple[str | None, ...]:
    """``names`` with None for ``own``, which comes first."""
    for name in names:
        check_scheduler(name)
    return (None, *(name for name in dict.fromkeys(names) if name != own))


def candidates(
    names: Sequence[str] = ("presets", "fewer-steps"),
    steps: int = REFERENCE_STEPS,
    *,
    subject: Subject | None = None,
    schedulers: Sequence[str | None] = (None,),
) -> list[Candidate]:
    """The rows that ``names`` stand for, the uncached run first.

    names: "presets" (all of them), the name of a preset, "calibrated" and "fewer-steps-calibrated"
    (presets, and uncached runs of fewer steps, whose coefficients were refined on the model) or one
    of them ("fast-calibrated", "fewer-steps-6-calibrated"), the path of a JSON file written by
    ``Config.to_json``, "peers" (the schedules of other caches, see `hgc.evaluation.peers`) or one
    of them ("deepcache-3"), "skip-x0" (both networks left out between key steps, at five numbers of
    them) or one of them ("skip-x0-7"), "ays" (the uncached pipeline
    at the 10 timesteps that diffusers ships), "deepcache-pypi-3" (the package DeepCache at that
    interval), "fewer-steps" (next to each plan the uncached pipeline at equal MACs), or "6-steps"
    (the uncached pipeline at 6 steps); each but "ays" and "fewer-steps" also with a scheduler of
    its own, as "fast@dpm++2m". "6-steps@grid" is the nearer of two solvers at timesteps of the
    uncached run.
    steps: steps of the uncached run.
    subject: what they are for; None: the testbed.
    schedulers: of the runs with fewer steps, each a row; None: that of the evaluation.

    Raises ConfigError where a name is none of these, its plan is for another model or not there, or
    the model does not fit it.
    """
    subject = testbed() if subject is None else subject
    layers = subject.decoder_layers()
    plans: dict[str, _Planned] = {}
    peers: dict[str, _Planned] = {}
    packages: list[tuple[str, str | None]] = []
    plain: list[Candidate] = []
    # steps, scheduler, and the group of those it competes with
    fewer: dict[tuple[int, str | None, str], None] = {}
    equal = False
    for asked in names:
        name, scheduler = _split(asked)
        short = _STEPS.fullmatch(name)
        if name == "presets":
            for label, config in PRESETS.items():
                plans[_at(label, scheduler)] = _Planned(config, scheduler)
        elif name in ("peers", "skip-x0"):
            for label in PEERS if name == "peers" else SKIPS:
                schedule = peer(label, steps, layers)
                assert schedule is not None
                peers[_at(label, scheduler)] = _Planned(schedule, scheduler)
        elif refined := refined_rows(name, steps):
            for label, (_, own) in refined.items():
                config = _config(_refined_file(label, subject, steps), subject)
                plans[_at(label, scheduler)] = _Planned(config, scheduler or own)
        elif name == "ays":
            if scheduler is not None:
                raise ConfigError(f"row {asked!r}: 'ays' is timesteps of DPM++ 2M; it has no '@'")
            own_timesteps, count = ays(subject)
            plain.append(Candidate("ays", None, count, scheduler=own_timesteps))
        elif name == "fewer-steps":
            equal = True
        elif short:
            if int(short.group(1)) < 1:
                raise ConfigError(f"row {name!r}: the number of steps must be at least 1")
            count = int(short.group(1))
            if scheduler is None:
                fewer.update(dict.fromkeys((count, one, _steps(count)) for one in schedulers))
            elif scheduler == "grid":
                grid(count, steps)  # there are so many
                group = f"{_steps(count)}@grid"
                fewer.update(dict.fromkeys((count, one, group) for one in _GRID))
            else:
                fewer[count, scheduler, ""] = None
        elif name == "uncached":
            continue
        elif (package := package_row(name)) is not None:
            packages.append((package, scheduler))
        elif (schedule := peer(name, steps, layers)) is not None:
            peers[_at(name, scheduler)] = _Planned(schedule, scheduler)
        else:
            config = _config(name, subject)
            label = _at(Path(name).stem if name.endswith(".json") else config.name, scheduler)
            if label in plans and plans[label].config != config:
                raise ConfigError(f"two different rows are named {label!r}; rename one file")
            plans[label] = _Planned(config, scheduler)
    found = [Candidate("uncached", None, steps)]
    matched: dict[int, list[str]] = {}
    # A peer's schedule is made for the uncached run's number of steps, a preset has its own.
    planned = [(label, one, steps_of(one.config, steps)) for label, one in plans.items()]
    planned += [(label, one, steps) for label, one in peers.items()]
    for label, one, count in planned:
        found.append(Candidate(label, one.config, count, scheduler=one.scheduler))
        _fits(label, one.config, count, layers)
        if equal and not one.config.is_exact:
            matched.setdefault(equal_steps(one.config, count, subject), []).append(label)
    for count, labels in matched.items():
        if count < steps:
            at = max(i for i, c in enumerate(found) if c.name in labels)
            group = _steps(count)
            found[at + 1 : at + 1] = [_fewer(count, s, group, tuple(labels)) for s in schedulers]
            for s in schedulers:
                fewer.pop((count, s, _steps(count)), None)
                fewer.pop((count, s, ""), None)
    found += [
        Candidate(_at(name, scheduler), None, steps, scheduler=scheduler, package=name)
        for name, scheduler in dict.fromkeys(packages)
    ]
    return found + plain + [_fewer(*one) for one in fewer]


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A plan, and the scheduler it is asked to run with."""

    config: Config
    scheduler: str | None


def _refined_file(label: str, subject: Subject, steps: int) -> str:
    if subject.plans is None:
        raise ConfigError(f"row {label!r} is refined on scenes of the testbed, for its models only")
    file = subject.plans / f"{label}.json"
    if not file.is_file():
        raise ConfigError(
            f"row {label!r}: {file} is not there; benchmarks/refine_plans.py --steps {steps} "
            "makes it"
        )
    return str(file)


def _split(asked: str) -> tuple[str, str | None]:
    """The row and the scheduler of "row@scheduler"."""
    name, at, scheduler = asked.rpartition("@")
    if not at or asked.endswith(".json"):
        return asked, None
    if scheduler == "grid" and _STEPS.fullmatch(name):
        return name, scheduler
    return name, check_scheduler(scheduler)


def _at(name: str, scheduler: str | None) -> str:
    return f"{name}@{scheduler}" if scheduler else name


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def _fewer(
    count: int, scheduler: str | None, group: str, labels: tuple[str, ...] = ()
) -> Candidate:
    name = _at(_steps(count), scheduler)
    return Candidate(name, None, count, labels, scheduler, group=group)


def _fits(label: str, config: Config, steps: int, layers: int) -> None:
    used = [config.depth, *(step.depth for step in plan(config, steps))]
    depths = [depth for depth in used if isinstance(depth, int)]
    if max(depths, default=0) > layers:
        raise ConfigError(
            f"row {label!r} is a plan for another model: its depth is {max(depths)}, and this one "
            f"has {layers} decoder layers"
        )


def _config(name: str, subject: Subject) -> Config:
    if name.endswith(".json"):
        try:
            config = Config.of(name)
        except OSError as error:
            raise ConfigError(f"cannot read {name}: {error.strerror}") from None
        here = model_name(subject.shapes().unet)
        if config.calibration is not None and config.calibration.model != here:
            raise ConfigError(
                f"{name} is a plan for another model: its calibration.model is "
                f"{config.calibration.model}, this one is {here}"
            )
        return config
    try:
        return Config.preset(name)
    except ConfigError as error:
        raise ConfigError(
            f"{error} A row is also 'presets', 'calibrated', 'peers', 'skip-x0', "
            f"{', '.join(map(repr, PACKAGES))}, 'fewer-steps', '6-steps', '6-steps@grid', "
            "''fewer-steps-calibrated', 'ays', 'spectrum-6' or a .json file."
        ) from None
