"""A run: the evaluations of one pipeline call, what each does, and everything kept for them."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from hgc.run.adaptive import AdaptiveSchedule
from hgc.run.cache import Cache, conditional_half
from hgc.run.evaluation import ControlSlot, Evaluation
from hgc.run.maps import MapSums
from hgc.run.noise import NoiseLevels, to_host
from hgc.run.pair import PairCheck
from hgc.run.position import Position
from hgc.run.schedule import FULL_STEP, Schedule, Schedules
from hgc.run.snapshot import Signature, TensorSnapshot
from hgc.run.verdict import Cost, Verdict

__all__ = ["LastSeen", "Run"]

Tensor = torch.Tensor


@dataclasses.dataclass(slots=True)
class LastSeen:
    """What a run knows of the models: as they were when its evaluations last looked.

    Attributes:
        weights: Of each model, by its id: which weights make keys and values, and how often they
            were written to.
        freeu: Of each up block, by its name: the factors of FreeU; None where it is off.
        looked: Of each model at a depth: the state of all that was seen there.
        processors: Goes up where other attention processors are in place.
        trains: Whether weights want gradients; None: not asked.
    """

    weights: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    freeu: dict[str, tuple[float, ...] | None] = dataclasses.field(default_factory=dict)
    looked: dict[tuple[int, Any], int] = dataclasses.field(default_factory=dict)
    processors: int = 0
    trains: bool | None = None


class Run:
    """The evaluations of one pipeline call, and everything kept for them."""

    # more attributes than Python looks up quickly in a dictionary
    __slots__ = (
        "__weakref__", "_assume", "_by_rule", "_called", "_changed_at", "_in_x0", "_schedules",
        "_timesteps", "broken", "by_diffusers", "cache", "changed", "changes_in_a_row",
        "completed", "config", "ended", "finished", "gaps_in_a_row", "last_seen", "latent_size",
        "maps", "mean_maps", "noise", "now", "output_dtype", "pair", "pixels_a_latent",
        "plain_text", "position", "report", "schedule", "slots", "text", "time_tables", "tokens",
        "unet_signature", "was_pair",
    )  # fmt: skip

    def __init__(
        self,
        schedules: Schedules,
        text: Tensor,
        position: Position,
        assume: bool | None,
        noise: NoiseLevels | None = None,
        by_rule: Schedules | None = None,
    ) -> None:
        config = schedules.config
        self.config = config
        self._schedules, self._by_rule = schedules, by_rule
        self.text = TensorSnapshot(text)
        self.position = position
        self.cache = Cache(config.max_cache_bytes)
        self.maps = MapSums(self.cache.reserve) if config.fresh_values else None
        self.mean_maps: Tensor | None = None  # of the finished run
        self.was_pair = False  # before a change, which starts the check of the pair again
        self._assume = assume
        self.pair = PairCheck(assume)
        self.slots: list[ControlSlot] = []
        self.report: list[Evaluation] = []
        self.unet_signature: Signature | None = None
        self._called: list[int] | None = None  # slots of the ControlNets, before the UNet
        self.last_seen = LastSeen()
        self.plain_text: dict[str, Any] = {}  # by the prefix of the network
        self.time_tables: dict[str, Any] = {}  # the same
        self._timesteps: tuple[Tensor, Any] | None = None  # on their way to the host
        self.noise = noise  # where outputs are forecast in x0
        self._in_x0 = noise is not None
        self.output_dtype = torch.float32  # of the UNet's
        self.broken: str | None = None
        self.completed = -1  # last index whose UNet evaluation was finished
        self.now: Evaluation | None = None  # the evaluation under way
        self.changes_in_a_row = 0
        self.gaps_in_a_row = 0  # before evaluations, of others that were left out
        self.changed = ""  # what did last
        self._changed_at = -1
        self.by_diffusers = False  # what is left of it, untouched
        self.finished = False
        self.ended: Any = lambda: None  # of a run that ended: its text, where that is still held
        # for the report, which is asked for when the tensors are gone
        self.latent_size = (0, 0)
        self.tokens = text.shape[1]
        self.pixels_a_latent = 8
        self.schedule: Schedule | AdaptiveSchedule
        if not config.plans(position.total):
            self.schedule = schedules.full(position.total)
            self.broken = (
                f"the plan {config.name!r} is for {config.num_evaluations} evaluations and this "
                f"run has {position.total}"
            )
        else:
            self.schedule = schedules.of(position.total, in_x0=self._in_x0)

    # -- what an evaluation does ------------------------------------------------------------

    def continues(self, position: Position) -> bool:
        """Whether ``position`` is the next one of a run of which nothing else has to be seen to."""
        index, before = position.index, self.position
        return (
            self.now is None
            and 0 < index == self.completed + 1 == before.index + 1
            and position.storage == before.storage
            and before.timestep is not None
            and not self.finished
            and self.broken is None
            and self.changes_in_a_row <= 2
            and self._timesteps is None
        )

    def begin(self, position: Position) -> None:
        """Start the evaluation at ``position``, unless it is under way."""
        now, index = self.now, position.index
        if now is not None and now.index == index:
            self.position = position
            return
        previous = self.position.index if now is not None or self.completed >= 0 else None
        self.position = position
        why = self.schedule.place(index, self.report)
        now = self.now = Evaluation(index, self.schedule.plan[index], self.broken or why)
        verdict, gaps, self.gaps_in_a_row = None, self.gaps_in_a_row, 0
        if previous is None:
            verdict = Verdict("first evaluation")
        elif index != previous + 1:
            self.gaps_in_a_row = gaps + 1
            verdict = Verdict("evaluations were left out", Cost.HISTORY)
        elif self.completed != previous:
            # it never reached its UNet: an exception, or a ControlNet on its own
            verdict = Verdict("the evaluation before this one did not end", Cost.HISTORY)
        elif now.plan is not FULL_STEP:
            verdict = self._settle(now)
        if verdict is not None:
            self.decide(verdict)

    def _settle(self, now: Evaluation) -> Verdict | None:
        """Fit the planned step to what is known of the pair; a verdict where the cache lacks
        something that it reads."""
        step, index = now.plan, now.index
        now.half = step.guidance != "both"
        now.is_pair = step.tells_halves and self.pair.confirmed()
        if now.half and not now.is_pair:
            step = now.plan = self.schedule.whole(index)
            now.half = False
            if not self.pair.wants:
                now.why = "the batch is not known to be a guidance pair"
        for name in self.schedule.needed[index]:
            if not self.cache.has(name, half=now.half):
                return Verdict(f"{name} is not cached")
        if step.guidance == "reuse" and not self.cache.has("guidance", half=False):
            return Verdict("guidance is not cached")
        return None

    def decide(self, verdict: Verdict) -> None:
        """Give up what ``verdict`` costs: the only place where a plan is departed from, but for a
        half that cannot be had (`_settle`)."""
        why, cost, now = verdict.why, verdict.cost, self.now
        if cost is Cost.STEPS:
            self._schedules = self._by_rule or self._schedules
            if self.broken is None:
                self.schedule = self._schedules.of(self.position.total, in_x0=self._in_x0)
            return
        if cost is Cost.FEATURES:
            self.changed = why
            self._drop_features(keep_maps=verdict.keep_maps)
        elif cost is not Cost.EVALUATION:
            self.cache.drop_history()
        if cost in (Cost.RUN, Cost.LEAVE):
            self.broken = why
            self.schedule = self._schedules.full(self.position.total)
        if cost is Cost.LEAVE:
            self.cache.clear()
            self.by_diffusers = True
        if now is None:
            return
        step = FULL_STEP
        if verdict.keep_maps and self.schedule.plan[now.index].attention == "reuse":
            step = dataclasses.replace(step, attention="reuse")
        always = cost in (Cost.FEATURES, Cost.LEAVE) or (cost is Cost.HISTORY and not self.broken)
        if always or now.plan != step or now.half:
            now.plan, now.half, now.why = step, False, why

    def _drop_features(self, *, keep_maps: bool) -> None:
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

    def describe(self, sample: Tensor) -> None:
        """Take note of the batch and the size of what the UNet is given, for the report."""
        assert self.now is not None
        self.now.batch = sample.shape[0]
        self.latent_size = (sample.shape[-2], sample.shape[-1])

    def describe_condition(self, pixels_a_latent: int) -> None:
        """Take note of the size of the conditions, for the report."""
        self.pixels_a_latent = pixels_a_latent

    def look_at_arguments(self, found: tuple[Any, ...]) -> list[Verdict]:
        """What follows where the UNet is given other things than ``found`` before: all that its
        output depends on beside the sample, the timestep and the text; and where other ControlNets
        were called before it."""
        assert self.now is not None
        verdicts, known = [], self.unet_signature
        called = [slot.index for slot in self.slots if slot.called_at == self.now.index]
        if self._called is not None and self._called != called:
            why = "other ControlNets or conditions were called"
            verdicts.append(Verdict(why, Cost.FEATURES))
        self._called = called
        if known is None or not known.same(found):
            if known is not None:
                verdicts.append(Verdict("the UNet's arguments changed", Cost.FEATURES))
            self.unet_signature = Signature(found)
        return verdicts

    def fetch_timesteps(self) -> None:
        """Begin to copy the timesteps of the run to the host."""
        timesteps = self.position.timestep
        assert timesteps is not None
        self._timesteps = to_host(timesteps.as_strided((self.position.total,), (1,), 0))

    def fetched_timesteps(self) -> list[float] | None:
        """The timesteps that were fetched, once; None where there is nothing, or not yet.

        On a GPU they are there at the second evaluation: the copy was asked for before the first
        one, most of which the device has still to do, so that waiting for the copy does not leave
        it idle.
        """
        if self._timesteps is None:
            return None
        values, event = self._timesteps
        if event is not None:
            if not self.report:
                return None
            event.synchronize()
        self._timesteps = None
        found: list[float] = values.tolist()
        return found

    def take_text(self, text: Tensor) -> None:
        """The text is ``text`` from now on."""
        self.text = TensorSnapshot(text)

    def record_residuals(self, slot: ControlSlot, outputs: Sequence[Tensor], half: bool) -> None:
        """Keep what later evaluations read of the residuals of ``slot``, before their scale.

        half: They are of the conditional half of the batch.
        """
        assert self.now is not None
        index = self.now.index
        wanted, half_only = self.schedule.will_read(after=index)
        cond = slot.cond.value
        rows = cond.shape[0] if isinstance(cond, Tensor) else cond[0].shape[0]
        is_whole_condition = rows != self.text.value.shape[0]
        halved = half_only and not half and not is_whole_condition and self.pair.confirmed()
        for name, value in zip(slot.names, outputs, strict=True):
            if name in wanted:
                self.cache.write(
                    slot.prefix + name,
                    conditional_half(value) if halved else value,
                    evaluation=index,
                    history=self.schedule.history,
                    half=half or halved,
                )
            else:
                self.cache.drop([slot.prefix + name])

    def record(self, captured: dict[str, Tensor], sample: Tensor, out: Tensor) -> None:
        """Keep what later evaluations read of a key evaluation of the UNet.

        captured: Intermediate tensors, by their names in the cache.
        sample, out: What the UNet was given, and its output for the whole batch.
        """
        now = self.now
        assert now is not None
        half = now.half
        wanted, half_only = self.schedule.will_read(after=now.index)
        x0 = None
        if "x0" in wanted:
            assert self.noise is not None
            x0 = self.noise.x0(sample, out, now.index)
            self.output_dtype = out.dtype
        if isinstance(self.schedule, AdaptiveSchedule):
            computed = {**captured, "output": out, **({} if x0 is None else {"x0": x0})}
            self.schedule.measure(
                now, computed, self.cache, is_pair=self.pair.wants, noise=self.noise
            )
        halved = half_only and not half and self.pair.confirmed()
        index, history = now.index, self.schedule.history
        for name, value in captured.items():
            if name not in wanted:
                continue
            value = conditional_half(value) if halved else value
            self.cache.write(name, value, evaluation=index, history=history, half=half or halved)
        if "output" in wanted:
            self.cache.write("output", out, evaluation=index, history=history, half=False)
        if x0 is not None:
            self.cache.write("x0", x0, evaluation=index, history=history, half=False)
        if "guidance" in wanted and not half and out.shape[0] % 2 == 0:
            unconditional, conditional = out.chunk(2)
            self.cache.write(
                "guidance", conditional - unconditional, evaluation=index, history=history,
                half=False,
            )  # fmt: skip
        stale = [
            n
            for n in self.cache.names()
            if n.startswith(("feature/", "skip/", "guidance", "output", "x0")) and n not in wanted
        ]
        self.cache.drop(stale)

    def close(self) -> None:
        """The pipeline call is over."""
        self.finished = True
        self.free()

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
        self.time_tables.clear()
        self.noise = None
        self.cache.clear()
        self.unet_signature = None
        self._timesteps = None
        self.text = TensorSnapshot(None)
        for slot in self.slots:
            slot.signature = slot.embedding = None
            slot.zeros, slot.promises = None, []
            slot.cond = TensorSnapshot(None)
            slot.text = None

    def is_abandoned(self) -> bool:
        """Whether nobody but this run holds its text: the pipeline call that made it is gone, by
        an exception perhaps."""
        text = self.text.value
        for slot in self.slots:
            slot.promises = [found for found in slot.promises if found.is_held]
        holders = {id(h) for h in (self.text, *(s.text for s in self.slots)) if _holds(h, text)}
        return sys.getrefcount(text) <= len(holders) + 2  # `text`, and the argument

    # -- ControlNets ------------------------------------------------------------------------

    def slot(self, net: Any, cond: Any) -> ControlSlot:
        """The slot of ``net`` with the condition ``cond``, made at its first call."""
        for slot in self.slots:
            if slot.net is net and slot.cond.is_(cond):
                return slot
        slot = ControlSlot(net, TensorSnapshot(cond), len(self.slots))
        self.slots.append(slot)
        return slot


def _holds(held: TensorSnapshot | None, value: Any) -> bool:
    return held is not None and held.value is value
