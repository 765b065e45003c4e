"""What is compared: the pipeline as it is, presets, plans from files, and fewer steps."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hgc.config import Config, ConfigError
from hgc.evaluation.models import load_shapes, sd15_macs
from hgc.evaluation.peers import PEERS, peer
from hgc.presets import PRESETS

if TYPE_CHECKING:
    from hgc.macs import Macs

__all__ = ["Candidate", "candidates", "equal_steps", "macs_here", "steps_of"]

# The number of steps the presets' key steps are written for, and of the uncached run.
REFERENCE_STEPS = 20
_STEPS = re.compile(r"(\d+)-steps?")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of a table: a way to make the pictures.

    Attributes:
        name: In tables.
        config: What hgc is installed with; None: without hgc.
        steps: Denoising steps of the run.
        equal_to: Names of the candidates this run, with fewer steps, is the equal of in MACs.
    """

    name: str
    config: Config | None
    steps: int
    equal_to: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, with what it is the equal of."""
        return f"{self.name} (vs {', '.join(self.equal_to)})" if self.equal_to else self.name


def steps_of(config: Config, steps: int) -> int:
    """Steps ``config`` runs at where the uncached run makes ``steps``.

    Its own number where that is 20, and its share of it otherwise; a plan that is written out step
    by step has one length only.
    """
    if config.steps is not None or steps == REFERENCE_STEPS:
        return config.num_evaluations
    return max(1, round(config.num_evaluations * steps / REFERENCE_STEPS))


@functools.cache
def macs_here(config: Config | None, steps: int) -> Macs:
    """MACs of one picture of the testbed under classifier-free guidance."""
    import hgc
    from hgc.macs import Macs

    if config is None:
        return _evaluation_here() * steps
    shapes = load_shapes("testbed")
    count = hgc.count_macs(shapes.unet, list(shapes.controlnets), config, num_evaluations=steps)
    return Macs(count.total, count.paper)


@functools.cache
def _evaluation_here() -> Macs:
    import hgc

    shapes = load_shapes("testbed")
    return hgc.count_macs(
        shapes.unet, list(shapes.controlnets), "exact", num_evaluations=1
    ).full_evaluation


def equal_steps(config: Config, steps: int) -> int:
    """The fewest uncached steps that cost at least as much as ``config`` does at ``steps``.

    Counted on the testbed and on SD1.5, each in both conventions, and the largest taken: fewer
    steps is never given fewer MACs than the plan it is compared with.
    """
    needed = 1
    for count in (macs_here, sd15_macs):
        done, one = count(config, steps), count(None, 1)
        needed = max(needed, math.ceil(done.total / one.total), math.ceil(done.paper / one.paper))
    return needed


def candidates(
    names: Sequence[str] = ("presets", "fewer-steps"), steps: int = REFERENCE_STEPS
) -> list[Candidate]:
    """The rows that ``names`` stand for, the uncached run first.

    names: "presets" (all of them), the name of a preset, the path of a JSON file written by
    ``Config.to_json``, "peers" (the schedules of other caches, see `hgc.evaluation.peers`) or one
    of them ("deepcache-3"), "fewer-steps" (next to each plan the uncached pipeline at equal MACs),
    or "6-steps" (the uncached pipeline at 6 steps).
    steps: steps of the uncached run.

    Raises ConfigError where a name is none of these.
    """
    plans: dict[str, Config] = {}
    peers: dict[str, Config] = {}
    fewer: dict[int, list[str]] = {}
    equal = False
    for name in names:
        short = _STEPS.fullmatch(name)
        if name == "presets":
            plans.update(PRESETS)
        elif name == "peers":
            peers.update({p: config for p in PEERS if (config := peer(p, steps)) is not None})
        elif name == "fewer-steps":
            equal = True
        elif short:
            if int(short.group(1)) < 1:
                raise ConfigError(f"row {name!r}: the number of steps must be at least 1")
            fewer.setdefault(int(short.group(1)), [])
        elif name == "uncached":
            continue
        elif (schedule := peer(name, steps)) is not None:
            peers[name] = schedule
        else:
            config = _config(name)
            label = Path(name).stem if name.endswith(".json") else config.name
            if label in plans and plans[label] != config:
                raise ConfigError(f"two different rows are named {label!r}; rename one file")
            plans[label] = config
    found = [Candidate("uncached", None, steps)]
    matched: dict[int, list[str]] = {}
    # A peer's schedule is made for the uncached run's number of steps, a preset has its own.
    planned = [(label, config, steps_of(config, steps)) for label, config in plans.items()]
    planned += [(label, config, steps) for label, config in peers.items()]
    for label, config, count in planned:
        found.append(Candidate(label, config, count))
        if equal and not config.is_exact:
            matched.setdefault(equal_steps(config, count), []).append(label)
    for count, labels in matched.items():
        if count < steps:
            at = max(i for i, c in enumerate(found) if c.name in labels)
            found.insert(at + 1, _fewer(count, tuple(labels)))
    found += [_fewer(count) for count in fewer if count not in matched]
    return found


def _fewer(count: int, labels: tuple[str, ...] = ()) -> Candidate:
    return Candidate(f"{count} step{'s' * (count > 1)}", None, count, labels)


def _config(name: str) -> Config:
    if name.endswith(".json"):
        try:
            return Config.of(name)
        except OSError as error:
            raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    try:
        return Config.preset(name)
    except ConfigError as error:
        raise ConfigError(
            f"{error} A row is also 'presets', 'peers', 'fewer-steps', '6-steps' or a .json file."
        ) from None
