"""Which run is this? Runs are told apart by the identity of what a pipeline call builds once.

A pipeline call makes one text tensor (``encoder_hidden_states``), one condition tensor a
ControlNet and one tensor of timesteps, and passes the first two, and views of the third, at every
evaluation. They are held by strong reference, so that no address can be given to another tensor
while a run lives, and compared by identity. Nothing here reads a value on the device.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
import itertools
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin

from hgc.planning.config import Config, StepPlan
from hgc.planning.rule import plan, reads
from hgc.run.adaptive import AdaptiveSchedule
from hgc.run.cache import Cache, conditional_half
from hgc.run.maps import MapSums
from hgc.run.noise import NoiseLevels, to_host
from hgc.run.residuals import PromiseSet

__all__ = ["ControlSlot", "Evaluation", "Position", "Run", "Runs", "position_of", "same_tensor"]

Tensor = torch.Tensor
_equal = torch.equal


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def same_tensor(x: Any, y: Any) -> bool:
    """Whether two values are the same tensor, or the same view of one. For values that are held."""
    if x is y:
        return True
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or type(x) is not type(y):
        return False
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and x.layout == y.layout == torch.strided
        and _storage(x) == _storage(y)
        and x.storage_offset() == y.storage_offset()
        and x.stride() == y.stride()
    )


# Compared by type and value, their subclasses too; everything else by identity.
_PLAIN = (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device)


class Held:
    """A value as it was when it was taken: compares unequal once it was written to."""

    __slots__ = ("_half", "items", "parts", "value", "version")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._half: Tensor | None = None
        self.version = _version(value) if isinstance(value, Tensor) else None
        # of a container each element is held, not the container: it may be filled with others later
        self.items: dict[Any, Held] | None = None
        self.parts: list[Held] | None = None
        if isinstance(value, dict):
            self.items = {k: Held(v) for k, v in value.items()}
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            self.parts = [Held(v) for v in value]

    def half(self) -> Tensor:
        """The conditional half of the tensor that is held: the same view each time."""
        if self._half is None:
            # detached: a view holds what it is a view of, see `Run.is_abandoned`
            self._half = conditional_half(self.value).detach()
        return self._half

    def is_(self, other: Any) -> bool:
        """Whether ``other`` is the value, and nobody has written to it since."""
        value, version = self.value, self.version
        if version is not None:
            if value is other:
                return version < 0 or bool(value._version == version)
            return same_tensor(value, other) and _version(other) == version
        if type(other) is not type(value):
            return False
        if self.items is not None:
            return other.keys() == self.items.keys() and all(
                held.is_(other[key]) for key, held in self.items.items()
            )
        if self.parts is not None:
            return len(other) == len(self.parts) and all(
                a.is_(b) for a, b in zip(self.parts, other, strict=True)
            )
        return value is other or (isinstance(value, _PLAIN) and bool(value == other))


class Signature:
    """Values that features depend on, as they were at an evaluation.

    Most are settings, which are compared as a whole; tensors, objects and what contains some are
    held one by one.
    """

    __slots__ = ("held", "is_plain", "types", "values")

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.types = tuple(map(type, values))
        self.values = values
        plain = all(kind in _PLAIN for kind in self.types)
        self.held = None if plain else Held(values)
        # settings alone: no tensor, and nothing that may hold one
        self.is_plain = plain

    def same(self, values: tuple[Any, ...]) -> bool:
        """Whether ``values`` are the same, none of them written to in between."""
        if self.held is not None:
            return self.held.is_(values)
        return tuple(map(type, values)) == self.types and values == self.values


@dataclasses.dataclass(slots=True)
class Position:
    """Where an evaluation stands in its run, read off the timestep tensor without a sync."""

    timestep: Tensor | None  # None: of a run that was freed
    index: int
    total: int
    storage: int  # of the timesteps; theirs alone while ``timestep`` is held
    base: Tensor | None = None  # what ``timestep`` is a view of, where torch says so

    def same_schedule(self, other: Position) -> bool:
        """Whether both timesteps are views of one tensor."""
        held = self.timestep is not None and other.timestep is not None
        return held and self.storage == other.storage


def position_of(timestep: Any, last: Position | None = None) -> Position | None:
    """The position, or None where ``timestep`` is not an element of a tensor of timesteps.

    ``last``: that of an evaluation before, of which ``timestep`` may be a neighbour.
    """
    if not isinstance(timestep, Tensor) or timestep.dim() != 0:
        return None
    base = timestep._base
    if base is not None and last is not None and base is last.base:
        return Position(timestep, timestep.storage_offset(), last.total, last.storage, base)  # type: ignore[arg-type]
    if timestep.is_meta:
        return None
    storage = timestep.untyped_storage()
    total = storage.nbytes() // timestep.element_size()
    if total < 2:
        return None
    return Position(timestep, int(timestep.storage_offset()), total, storage._cdata, base)


def scheduler_of(position: Position) -> SchedulerMixin | None:
    """The scheduler whose timesteps a run goes by: a local of one of the callers, or an attribute
    of one, as of a pipeline. None where there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            held = getattr(value, "__dict__", None)
            found = held.get("scheduler") if isinstance(held, dict) else None
            for one in (value, found):
                if isinstance(one, SchedulerMixin):
                    timesteps = getattr(one, "timesteps", None)
                    if isinstance(timesteps, Tensor) and _storage(timesteps) == position.storage:
                        return one
        frame = frame.f_back
    return None


class PairCheck:
    """Whether the batch is a classifier-free guidance pair: one sample twice, with two texts. A
    check is of one text: where it changes, another begins.

    Two images made from one seed without guidance look like a pair at the first evaluation and
    then part, since their texts differ: two evaluations must agree. Every later one is compared
    too. On a GPU the comparison runs on the device and is read an evaluation later.
    """

    EVALUATIONS = 2

    def __init__(self, assume: bool | None = None) -> None:
        self._assume = assume
        self._pending: list[tuple[Tensor | bool, Any]] = []
        self._agreed = 0
        self._refuted = False
        # of the text, which is the same for as long as a check lasts
        self._texts_differ: Tensor | bool | None = None

    @property
    def wants(self) -> bool:
        """Whether another evaluation is to be compared."""
        return not self._refuted

    def refute(self) -> None:
        """The batch is not, or may not be, a pair."""
        self._refuted = True

    def compare(self, sample: Tensor, text: Tensor) -> Sequence[Tensor] | None:
        """Start the comparison of the halves of ``sample`` and of ``text``. Returns the halves of
        ``sample``, where it has two."""
        halves: Sequence[Tensor] | None = None
        batch = sample.shape[0]
        if batch % 2 or text.shape[0] != batch:
            self._refuted = True
        elif self._assume is not None:
            self._pending.append((self._assume, None))
        else:
            # slices: a host comes to them sooner than to `chunk`
            first, second = halves = sample[: batch // 2], sample[batch // 2 :]
            if sample.is_cpu:
                if not self._differs(text) or not _equal(first, second):
                    self._refuted = True
                elif batch == 2 or not self._all_alike(sample):
                    self._agreed += 1
            else:
                equal = torch.eq(first, second).all() & self._differs(text)
                if batch > 2:
                    equal = torch.stack([equal, torch.eq(sample[1:], sample[:1]).all()])
                self._pending.append(to_host(equal))
        return halves

    def _differs(self, text: Tensor) -> Tensor | bool:
        """Whether the halves of ``text`` differ."""
        if self._texts_differ is None:
            first, second = text.chunk(2)
            self._texts_differ = (
                not torch.equal(first, second) if text.is_cpu else torch.ne(first, second).any()
            )
        return self._texts_differ

    @staticmethod
    def _all_alike(sample: Tensor) -> bool:
        """One sample more than twice: several edits of one image, or images made from one noise.
        Such an evaluation says nothing."""
        return sample.shape[0] > 2 and torch.equal(sample[1:], sample[:1].expand_as(sample[1:]))

    def confirmed(self) -> bool:
        """Whether enough evaluations agreed. Waits for a copy started an evaluation ago."""
        if self._pending:
            self._read()
        return not self._refuted and self._agreed >= self.EVALUATIONS

    def _read(self) -> None:
        for flag, event in self._pending:
            if event is not None:
                event.synchronize()
            several = isinstance(flag, Tensor) and flag.dim() > 0
            pair, alike = flag.tolist() if several else (bool(flag), False)  # type: ignore[union-attr]
            if not pair:
                self._refuted = True
            elif not alike:
                self._agreed += 1
        self._pending.clear()


@dataclasses.dataclass(slots=True)
class ControlSlot:
    """One ControlNet with one condition, in a run."""

    net: Any
    cond: Held
    index: int
    text: Held | None = None
    called_at: int = -1
    signature: Signature | None = None
    embedding: Signature | None = None  # of the condition, as it was when it was last computed
    prefix: str = ""  # before the names of its cache entries
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)  # of its residuals
    names: tuple[str, ...] = ()  # of them in the cache, after the prefix
    entries: tuple[str, ...] = ()  # the same with the prefix
    pooled: bool = False  # the network hands out the means of its residuals
    zeros: PromiseSet[Any] | None = None  # in place of them
    promises: list[PromiseSet[Any]] = dataclasses.field(
        default_factory=list
    )  # to be handed out again

    def __post_init__(self) -> None:
        self.prefix = f"control{self.index}/"


@dataclasses.dataclass(slots=True)
class Evaluation:
    """A row of the report: what one evaluation did.

    Attributes:
        index: Position in the run.
        plan: What was done, as a step plan.
        why: ``"plan"``, or why the plan was not followed.
        control: What each ControlNet called did, by the index of its slot: ``"computed"``,
            ``"reused"`` or ``"off"``.
        milliseconds: Host time spent in hgc and the models; on a GPU, the time to launch.
        batch: Rows of the batch.
        half: Whether only the conditional half was computed.
        is_pair: Whether the batch is known to be a guidance pair, where the plan asks for it.
    """

    index: int
    plan: StepPlan
    why: str = "plan"
    control: dict[int, str] = dataclasses.field(default_factory=dict)
    milliseconds: float = 0.0
    batch: int = 0
    half: bool = False
    is_pair: bool = False
    held_bytes: int = 0


_FULL_STEP = StepPlan()


class Schedule:
    """A plan, and what its evaluations read: the same for every run of its length.

    Attributes:
        plan: A step an evaluation.
        history: How many key values of a feature its forecasts read at most.
        captures: Intermediate tensors of the UNet that are read. The same at every key evaluation,
            so that compiled ones are one graph.
        residuals: For each evaluation, what it reads of a ControlNet.
        needed: For each evaluation, what else must be cached before any network is called.
        halves: Whether any evaluation tells the halves of the batch apart.
        keeps_attention: For each evaluation, whether a later one reuses cross-attention.
    """

    def __init__(self, steps: Sequence[StepPlan], num_layers: int) -> None:
        self.plan = tuple(steps)
        self.history = max(
            max(
                len(s.forecast), len(s.of_residuals), len(s.guidance_forecast),
                len(s.output_forecast) - 1, len(s.x0_correction),
                2 if s.damping is not None else 1,
            )
            for s in steps
        )  # fmt: skip
        self._reads = [reads(step, num_layers) for step in steps]
        read = set[str]().union(*self._reads)
        self.captures = tuple(sorted(n for n in read if n.startswith(("feature/", "skip/"))))
        self.residuals = [
            tuple(sorted(n for n in names if n.startswith("residual/"))) for names in self._reads
        ]
        self.needed = [
            tuple(sorted(names - {"attention", "guidance", *residuals}))
            for names, residuals in zip(self._reads, self.residuals, strict=True)
        ]
        self.halves = any(step.tells_halves for step in steps)
        later = [i for i, step in enumerate(steps) if step.attention == "reuse"]
        self.keeps_attention = [bool(later) and i < later[-1] for i in range(len(steps))]
        self._whole: dict[int, StepPlan] = {}
        self._will_read: dict[int, tuple[frozenset[str], bool]] = {}
        self._guidance_read: dict[int, tuple[tuple[float, ...], ...]] = {}

    def decide(self, index: int, made: Sequence[Evaluation]) -> str:
        """Why evaluation ``index``, after those in ``made``, is as ``plan`` has it."""
        return "plan"

    def whole(self, index: int) -> StepPlan:
        """The step of evaluation ``index`` with both halves of the batch computed."""
        if index not in self._whole:
            self._whole[index] = dataclasses.replace(
                self.plan[index], guidance="both", guidance_forecast=(1.0,)
            )
        return self._whole[index]

    def will_read(self, *, after: int) -> tuple[frozenset[str], bool]:
        """Names that evaluations after ``after`` read before they fall out of the history, and
        whether all of those need the conditional half only."""
        if after not in self._will_read:
            self._will_read[after] = self._find_will_read(after)
        return self._will_read[after]

    def guidance_read(self, *, after: int) -> tuple[tuple[float, ...], ...]:
        """With which coefficients evaluations read the guidance difference that ``after`` writes,
        before another is written."""
        if after not in self._guidance_read:
            rest = self.plan[after + 1 :]
            until = itertools.takewhile(lambda s: not (s.is_key and s.guidance == "both"), rest)
            found = (step.guidance_forecast for step in until if step.guidance == "reuse")
            self._guidance_read[after] = tuple(dict.fromkeys(found))
        return self._guidance_read[after]

    def _find_will_read(self, after: int) -> tuple[frozenset[str], bool]:
        names: set[str] = set()
        half_only = True
        overwritten = dict.fromkeys(("features", "residual", "guidance", "attention"), 0)
        for step, read in zip(self.plan[after + 1 :], self._reads[after + 1 :], strict=True):
            for name in read:
                group = name.partition("/")[0]
                if overwritten.get(group, overwritten["features"]) < self.history:
                    names.add(name)
                    # outputs are kept whole whoever reads them
                    if step.guidance == "both" and group not in ("output", "x0"):
                        half_only = False
            overwritten["residual"] += step.control == "compute"
            overwritten["features"] += step.is_key
            overwritten["guidance"] += step.is_key and step.guidance == "both"
            overwritten["attention"] += step.is_key and step.attention == "compute"
            if min(overwritten.values()) >= self.history:
                break
        return frozenset(names), half_only and bool(names)


class Schedules:
    """The schedules of one configuration on one model, by length."""

    def __init__(self, config: Config, num_layers: int) -> None:
        self.config = config
        self._num_layers = num_layers
        self._known: dict[tuple[int, str], Schedule] = {}

    def of(self, total: int, *, in_x0: bool = True) -> Schedule | AdaptiveSchedule:
        """What the configuration plans for ``total`` evaluations, or what plans them in one run.

        in_x0: Whether the run can forecast x0; the model's own outputs are forecast otherwise.
        """
        if self.config.adaptive:
            return AdaptiveSchedule(self.config, self._num_layers, total, in_x0=in_x0)
        return self._of(total, "x0" if in_x0 else "output")

    def full(self, total: int) -> Schedule:
        """Every evaluation in full."""
        return self._of(total, "full")

    def _of(self, total: int, kind: str) -> Schedule:
        if (total, kind) not in self._known:
            steps = [_FULL_STEP] * total if kind == "full" else plan(self.config, total)
            if kind == "output":
                steps = [step.in_output for step in steps]
            self._known[total, kind] = Schedule(steps, self._num_layers)
        return self._known[total, kind]


def _nobody() -> None:
    return None


class Run:
    """The evaluations of one pipeline call, and everything kept for them."""

    # more attributes than Python looks up quickly in a dictionary
    __slots__ = (
        "__weakref__", "_assume", "_changed_at", "_schedules", "broken", "by_diffusers", "cache",
        "changes_in_a_row", "completed", "config", "ended", "factor", "finished", "first", "freeu",
        "latent_size", "looked", "maps", "mean_maps", "noise", "now", "output_dtype", "pair",
        "placing", "plain_text", "position", "report", "schedule", "slots", "text", "timesteps",
        "tokens", "trains", "unet_signature", "warned", "was_pair", "weights",
    )  # fmt: skip

    def __init__(
        self,
        schedules: Schedules,
        text: Tensor,
        position: Position,
        assume: bool | None,
        noise: NoiseLevels | None = None,
    ) -> None:
        config = schedules.config
        self.config = config
        self._schedules = schedules
        self.text = Held(text)
        self.position = position
        self.first = position.index
        self.cache = Cache(config.max_cache_bytes)
        self.maps = MapSums(self.cache.reserve) if config.fresh_values else None
        self.mean_maps: Tensor | None = None  # of the finished run
        self.was_pair = False  # before a change, which starts the check of the pair again
        self._assume = assume
        self.pair = PairCheck(assume)
        self.slots: list[ControlSlot] = []
        self.report: list[Evaluation] = []
        self.unet_signature: Signature | None = None
        self.weights: dict[int, tuple[int, int]] = {}  # of each model: what they were last
        self.placing = 0  # which attention processors it knows
        self.looked: dict[tuple[int, Any], int] = {}  # at which state of the models, by what
        self.freeu: dict[str, tuple[float, ...] | None] = {}  # of each up block
        self.plain_text: dict[str, Any] = {}  # by the prefix of the network
        self.timesteps: tuple[Tensor, Any] | None = None  # on their way to the host
        self.noise = noise  # where outputs are forecast in x0
        self.output_dtype = torch.float32  # of the UNet's
        self.broken: str | None = None
        self.completed = -1  # last index whose UNet evaluation was finished
        self.now: Evaluation | None = None  # the evaluation under way
        self.changes_in_a_row = 0
        self._changed_at = -1
        self.by_diffusers = False  # what is left of it, untouched
        self.trains: bool | None = None  # whether weights want gradients; None: not asked
        self.finished = False
        self.ended: Any = _nobody  # of a run that ended: its text, where that is still held
        self.warned = False
        # for the report, which is asked for when the tensors are gone
        self.latent_size = (0, 0)
        self.tokens = text.shape[1]
        self.factor = 8
        other_length = config.num_evaluations != position.total
        if config.steps is not None and config.key_steps is None and other_length:
            self.schedule: Schedule | AdaptiveSchedule = schedules.full(position.total)
            self.broken = (
                f"the plan {config.name!r} is for {config.num_evaluations} evaluations and this "
                f"run has {position.total}"
            )
        else:
            self.schedule = schedules.of(position.total, in_x0=noise is not None)

    # -- what an evaluation does ------------------------------------------------------------

    def advance(self, position: Position) -> bool:
        """Start the evaluation at ``position`` where it is the next of a run that goes by its plan;
        False where there is more to be seen to, see :meth:`begin`."""
        index, before = position.index, self.position
        if (
            self.now is not None
            or not 0 < index == self.completed + 1 == before.index + 1
            or position.storage != before.storage
            or before.timestep is None
            or self.finished
            or self.broken is not None
            or self.changes_in_a_row > 2
            or self.timesteps is not None
        ):
            return False
        self.position = position
        why = self.schedule.decide(index, self.report)
        self.now = Evaluation(index, self.schedule.plan[index], why)
        self._settle()
        return True

    def begin(self, position: Position) -> Evaluation:
        """Start the evaluation at ``position``, or return it where it is under way."""
        if self.now is not None and self.now.index == position.index:
            self.position = position
            return self.now
        previous = self.position.index if self.now is not None or self.completed >= 0 else None
        self.position = position
        why = self.schedule.decide(position.index, self.report)
        step = self.schedule.plan[position.index]
        if self.broken is not None:
            step, why = _FULL_STEP, self.broken
        elif previous is None:
            step, why = _FULL_STEP, "first evaluation" if not step.is_key else "plan"
        elif position.index != previous + 1:
            step, why = _FULL_STEP, "evaluations were left out"
            self.cache.drop_history()
        if self.completed != (previous if previous is not None else -1):
            # the last evaluation never reached its UNet: an exception, or a ControlNet on its own
            step, why = _FULL_STEP, "the evaluation before this one did not end"
            self.cache.drop_history()
        self.now = Evaluation(position.index, step, why)
        self._settle()
        return self.now

    def _settle(self) -> None:
        """Fit the planned step to what is known and held: the pair, the cache."""
        now = self.now
        assert now is not None
        step, index = now.plan, now.index
        if step is _FULL_STEP:
            return
        half = step.guidance != "both"
        now.is_pair = step.tells_halves and self.pair.confirmed()
        if half and not now.is_pair:
            step, half = self.schedule.whole(index), False
        for name in self.schedule.needed[index]:
            if not self.cache.has(name, half=half):
                self.promote(f"{name} is not cached")
                return
        if step.guidance == "reuse" and not self.cache.has("guidance", half=False):
            self.promote("guidance is not cached")
            return
        now.plan = step
        now.half = half

    def promote(self, why: str) -> None:
        """Compute the evaluation under way in full."""
        assert self.now is not None
        if self.now.plan != _FULL_STEP or self.now.half:
            self.now.plan = _FULL_STEP
            self.now.half = False
            self.now.why = why

    def give_up(self, why: str) -> None:
        """Compute the rest of the run in full."""
        self.broken = why
        self.schedule = self._schedules.full(len(self.schedule.plan))
        self.cache.drop_history()
        if self.now is not None:
            self.promote(why)

    def leave(self, why: str) -> None:
        """Leave the rest of the run to diffusers."""
        self.give_up(why)
        self.cache.clear()
        self.by_diffusers = self.warned = True

    def follow(self, schedules: Schedules) -> None:
        """Go on by another configuration's schedule. What it needs and the cache lacks is computed
        in full."""
        self._schedules = schedules
        if self.broken is None:
            self.schedule = schedules.of(len(self.schedule.plan), in_x0=self.noise is not None)

    def change(self, why: str, *, keep_maps: bool = False) -> None:
        """Something that features depend on has changed: drop them and compute in full."""
        assert self.now is not None
        if self._changed_at != self.now.index:
            again = self._changed_at == self.now.index - 1
            self.changes_in_a_row = self.changes_in_a_row + 1 if again else 1
            self._changed_at = self.now.index
        self.was_pair = self.was_pair or (self.maps is not None and self.pair.confirmed())
        self.pair = PairCheck(self._assume)
        self.cache.drop(n for n in self.cache.names() if not (keep_maps and "map/" in n))
        self.cache.drop_kept("unet/")
        self.cache.drop_kept("control")
        self.promote(why)
        self.now.why = why

    def end(self, milliseconds: float) -> None:
        """The UNet evaluation under way is done."""
        assert self.now is not None
        self.now.milliseconds += milliseconds
        self.now.held_bytes = self.cache.bytes
        self.report.append(self.now)
        self.completed = self.now.index
        self.now = None
        if self.completed == self.position.total - 1:
            self.finished = True
            self.ended = weakref.ref(self.text.value)
            self.free()

    def attention_maps(self) -> Tensor | None:
        """Mean cross-attention maps so far, [images, tokens, h, w], where they are kept."""
        if self.maps is None:
            return self.mean_maps
        return self.maps.mean(self.latent_size, self.was_pair or self.pair.confirmed())

    def free(self) -> None:
        """Give back every tensor, the pipeline's own too. What is left of a finished run are its
        mean maps, where it kept maps."""
        if self.finished:
            self.mean_maps = self.attention_maps()
        self.maps = None
        self.pair = PairCheck(self._assume)
        self.position = dataclasses.replace(self.position, timestep=None, base=None)
        self.plain_text.clear()
        self.cache.clear()
        self.unet_signature = None
        self.timesteps = None
        self.text = Held(None)
        for slot in self.slots:
            slot.signature = slot.embedding = None
            slot.zeros, slot.promises = None, []
            slot.cond = Held(None)
            slot.text = None

    def is_abandoned(self) -> bool:
        """Whether nobody but this run holds its text: the pipeline call that made it is gone, by
        an exception perhaps."""
        text = self.text.value
        for slot in self.slots:
            slot.promises = [found for found in slot.promises if found.is_held]
        holders = {id(h) for h in (self.text, *(s.text for s in self.slots)) if _holds(h, text)}
        return sys.getrefcount(text) <= len(holders) + 2  # `text`, and the argument

    def is_next(self, position: Position) -> bool:
        """Whether ``position`` is that of the evaluation after the last one, which ended."""
        return (
            position.index == self.completed + 1
            and self.now is None
            and not self.finished
            and self.position.same_schedule(position)
        )

    # -- ControlNets ------------------------------------------------------------------------

    def slot(self, net: Any, cond: Any) -> ControlSlot:
        """The slot of ``net`` with the condition ``cond``, made at its first call."""
        for slot in self.slots:
            if slot.net is net and slot.cond.is_(cond):
                return slot
        slot = ControlSlot(net, Held(cond), len(self.slots))
        self.slots.append(slot)
        return slot


class Runs:
    """The runs of one thread, newest last; the least recently used goes first."""

    LIMIT = 4

    def __init__(self) -> None:
        self.runs: collections.OrderedDict[int, Run] = collections.OrderedDict()
        self.last: Run | None = None
        self.forced = 0
        self.short = 0  # runs one after the other that ended after one or two evaluations
        self.crowded = False  # runs had to make room that were under way
        self._single: tuple[Any, ...] = ()
        self.clock = time.perf_counter

    def is_one_step(self, timestep: Any, text: Any) -> bool:
        """Whether a timestep that is alone in its tensor may be that of a run of one evaluation:
        its text was not seen at another such timestep."""
        if not isinstance(timestep, Tensor) or not isinstance(text, Tensor):
            return False
        if timestep.numel() > 1:
            return False
        seen = [reference() for reference in self._single]
        self._single = (weakref.ref(text), weakref.ref(timestep))
        return not seen or seen[0] is not text or seen[1] is timestep

    def is_past_end(self, text: Tensor, position: Position) -> bool:
        """Whether an evaluation is one more at the last timestep of the run that has just ended."""
        last = self.last
        return (
            last is not None
            and position.index == last.completed == position.total - 1
            and last.finished
            and last.ended() is text
        )

    def add(self, run: Run) -> Run:
        """Take in a new run."""
        for old in list(self.runs.values()):
            if not old.finished and old.is_abandoned():
                self.short += 0 < len(old.report) < 3
                self.forget(old)
        while len(self.runs) >= self.LIMIT:
            old = self.runs.popitem(last=False)[1]
            self.crowded = self.crowded or not old.finished
            old.free()
        self.runs[id(run)] = run
        self.last = run
        return run

    def use(self, run: Run) -> Run:
        """Mark ``run`` as the last used."""
        if run is not self.last:
            self.runs.move_to_end(id(run))
        self.last = run
        if len(run.report) > 2:
            self.short = 0
        return run

    def forget(self, run: Run) -> None:
        """Drop ``run`` and what it holds."""
        run.free()
        self.runs.pop(id(run), None)

    def clear(self) -> None:
        """Drop all runs."""
        for run in list(self.runs.values()):
            self.forget(run)
        self.last = None

    def _usable(self, position: Position) -> list[Run]:
        """Runs on the same schedule that have not gone past ``position``, newest first."""
        return [
            run
            for run in reversed(self.runs.values())
            if not run.finished and run.position.same_schedule(position)
        ]

    def find(self, text: Tensor, position: Position, batch: int, cond: Any = None) -> Run | None:
        """The run that an evaluation belongs to, or None where it starts a new one.

        Args:
            text: ``encoder_hidden_states`` of the call.
            position: Of its timestep.
            batch: Rows of its sample.
            cond: The condition, for a ControlNet.
        """
        last = self.last
        if (
            last is not None
            and not last.finished
            and last.text.value is text
            and last.position.same_schedule(position)
            and last.text.is_(text)
        ):
            return self._resume(last, position)
        candidates = self._usable(position)
        for run in candidates:
            if run.text.is_(text) or _is_part(text, run.text):
                return self._resume(run, position)
        # The text is not known. The same condition and schedule, one step on: the text changed.
        # Of several such runs (halves of guidance that are called one by one) none is known to be
        # the one: a new run.
        fitting = []
        for run in candidates:
            at = run.now.index if run.now is not None else run.completed
            under_way = run.now is not None and position.index == at
            if not under_way and position.index != at + 1:
                continue
            known_cond = cond is None or any(s.cond.is_(cond) for s in run.slots)
            if not known_cond or (cond is None and run.slots and not under_way):
                continue
            if under_way and cond is not None:
                continue
            if under_way:
                return run
            fitting.append(run)
        return fitting[0] if len(fitting) == 1 else None

    def _resume(self, run: Run, position: Position) -> Run | None:
        at = run.completed
        if position.index == at and run.now is None:
            return run  # called twice at one position: the caller marks it
        if position.index < at:
            self.forget(run)  # the loop was started again with the same objects
            return None
        return run


def _holds(held: Held | None, value: Any) -> bool:
    return held is not None and held.value is value


def _is_part(text: Tensor, whole: Held) -> bool:
    """Whether ``text`` is the conditional half of ``whole``, as guess_mode hands it over."""
    held = whole.value
    if held is text or not isinstance(held, Tensor) or held.dim() != text.dim() or held.dim() == 0:
        return False
    if _storage(text) != _storage(held) or _version(text) != whole.version:
        return False
    rows = text.shape[0]
    return 2 * rows == held.shape[0] and same_tensor(text, held[rows:])
