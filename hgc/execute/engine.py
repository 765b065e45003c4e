"""One evaluation: which run it is of, what changed, what is decided, computed and kept."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import ControlNetUnionModel

from hgc.execute.call import ControlCall, UNetCall, UnionCall
from hgc.execute.controlnet import ControlExecutor
from hgc.execute.fitted import FittedSteps
from hgc.execute.functions import Functions
from hgc.execute.levels import Levels
from hgc.execute.patch import PatchedModels
from hgc.execute.prompt import PromptGrain
from hgc.execute.time_path import TimePath
from hgc.execute.unet import UNetExecutor
from hgc.models.structure import UNetStructure
from hgc.models.supported import untested
from hgc.planning.config import Config
from hgc.run.evaluation import ControlSlot, Evaluation
from hgc.run.position import Position, position_of
from hgc.run.registry import RunRegistry
from hgc.run.run import Run
from hgc.run.schedule import FULL_STEP, Schedules
from hgc.run.snapshot import Signature, TensorSnapshot, is_conditional_half
from hgc.run.verdict import Cost, Verdict
from hgc.warn import WarnOnce
from hgc.watch.watch import Watch

__all__ = ["Engine"]

Tensor = torch.Tensor


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.registry = RunRegistry()


class Engine:
    """Evaluates calls of a UNet and its ControlNets by a configuration.

    Each call goes the same way: :meth:`_enter` finds its run and begins its evaluation, the watch
    and the cache are asked what has changed, ``Run.decide`` acts on what they found, an executor
    computes, and the run records. In a call nothing is decided once computing has begun.

    Args:
        unet, controlnets: The models; what they are patched with is :attr:`patched`.
        config: What is planned.
        scheduler: That of the pipeline, as it is now; None where it is not known.
        assume_pair: Whether batches are guidance pairs; None: it is found out.
        trust: Classes and functions that may be skipped.

    Raises:
        ConfigError: ``config`` reuses deeper layers than the UNet has, or its plan reads what
            nothing wrote.
        TypeError: ``trust`` is no tuple of classes and functions.
    """

    def __init__(
        self,
        unet: Any,
        controlnets: tuple[Any, ...],
        config: Config,
        *,
        scheduler: Callable[[], Any] = lambda: None,
        assume_pair: bool | None = None,
        trust: tuple[Any, ...] = (),
    ) -> None:
        self.unet, self.controlnets, self.config = unet, controlnets, config
        self.warn = WarnOnce()
        self.structure = structure = UNetStructure.of(unet)
        config.check_depth(structure.num_layers)
        self.watch = Watch(
            (unet, *controlnets), structure, config.depths, trust, self.warn,
            reuse_attention=config.reuses_attention,
        )  # fmt: skip
        self.functions = Functions(unet, structure)
        prompt = PromptGrain(unet, structure, config, self.watch)
        time_path = TimePath(self.functions)
        self._unet = UNetExecutor(structure, self.functions, prompt, time_path)
        self._control = ControlExecutor(self.functions, prompt, time_path, self._fresh_residuals)
        self._fitted = FittedSteps(config, scheduler, self.warn)
        self._schedules = Schedules(config, structure.num_layers)
        self._schedules.of(config.num_evaluations)
        # of the rule, where the plan is one of fitted steps with a rule
        rule = None if config.steps is None else config.rule
        self._by_rule = None if rule is None else Schedules(rule, structure.num_layers)
        self._levels = Levels(scheduler, self.warn)
        self._assume_pair = assume_pair
        self._of_thread = _OfThread()
        self.untested = untested()
        self.is_active = "diffusers" not in self.untested
        self.patched: PatchedModels | None = None

    @property
    def registry(self) -> RunRegistry:
        """The runs of the calling thread."""
        return self._of_thread.registry

    def attach(self, owner: Any) -> None:
        """Take the calls of the models from now on."""
        if self._fitted.warn_of_another_model(self.unet) and self._by_rule is not None:
            self._schedules = self._by_rule
        for name, what in self.untested.items():
            self.warn(name, what)
        calls: list[tuple[Any, Callable[..., Any]]] = [(self.unet, self.evaluate)]
        calls += [(net, self.control) for net in self.controlnets]
        self.patched = PatchedModels(owner, calls, self.watch.noticed, self._end_of_call)
        self.watch.adopt_processors()

    def detach(self) -> None:
        """Give the models back as they were found; reports and maps of the last run stay."""
        assert self.patched is not None
        self.patched.remove()
        self.patched = None
        self.watch.processors.close()
        last = self.registry.last
        self.registry.clear()
        self.registry.last = last
        self.functions.stand_in(None)
        self.functions.fused = False

    def reset(self) -> None:
        """Forget the calling thread's runs, and what can be made again."""
        self.registry.clear()
        self.functions.clear()

    def _end_of_call(self) -> None:
        registry = self.registry
        # a call of which hgc evaluated nothing ends no run: another one's may be under way
        if registry.last is not None and not registry.passed:
            registry.last.close()

    def _original(self, module: Any) -> Callable[..., Any]:
        # uninstalled meanwhile by another thread: the model has it back
        patched = self.patched
        return module.forward if patched is None else patched.of(module).original

    # -- which run ----------------------------------------------------------------------------

    def _position(self, registry: RunRegistry, timestep: Any, text: Any) -> Position | None:
        """Where an evaluation stands in its run; None where it is of no run, and diffusers'."""
        registry.passed = True
        if not self.is_active:
            return None
        last, position = registry.last, None
        if last is not None and timestep is not None and last.position.timestep is timestep:
            position = last.position
        else:
            position = position_of(timestep, None if last is None else last.position)
        if position is None:
            if not registry.is_one_step(timestep, text):
                self.warn(
                    "timestep",
                    "the timestep is not one of several in a tensor of timesteps, so where an "
                    "evaluation stands in its run is not known: evaluations are computed in full",
                )
        elif not isinstance(text, Tensor):
            self.warn(
                "text",
                "a model is called without encoder_hidden_states, by which runs are told apart: "
                "evaluations are computed in full",
            )
            return None
        elif registry.is_past_end(text, position):
            registry.passed = False  # the report is of the run that ended
            return None
        return position

    def _enter(
        self, registry: RunRegistry, text: Tensor, position: Position, cond: Any = None
    ) -> Run:
        """The run that a call of a model belongs to, with its evaluation begun."""
        run = registry.last
        registry.passed = False
        known = run is not None and run.text.value is text and run.text.is_(text)
        if run is None or not known or run.now is None or run.position is not position:
            if run is not None and known and not registry.short and run.continues(position):
                run.begin(position)
            else:
                run = self._begin(registry, registry.find(text, position, cond), text, position)
                # the run that was found may be one with another text
                known = run.text.is_(text) or is_conditional_half(text, run.text)
        self._decide(run, self.watch.look_at_processors(run))
        if run.broken is not None and not run.by_diffusers and not self.config.is_exact:
            self.warn(run.broken, f"{run.broken}: the rest of this run is computed in full")
        if not known:
            # a ControlNet may have a text of its own
            slots = [] if cond is None else [slot for slot in run.slots if slot.cond.is_(cond)]
            if not any(slot.text is not None and slot.text.is_(text) for slot in slots):
                if not is_conditional_half(run.text.value, TensorSnapshot(text)):
                    self._change_text(run, text)
                run.take_text(text)
        return run

    def _begin(
        self, registry: RunRegistry, run: Run | None, text: Tensor, position: Position
    ) -> Run:
        """Begin an evaluation of ``run``, or of a new one."""
        if run is None:
            run = self._new_run(registry, text, position)
        else:
            registry.use(run)
            if run.now is None and run.completed == position.index and run.broken is None:
                run.decide(Verdict("one timestep was evaluated more than once", Cost.RUN))
            if run.changes_in_a_row > 2 and run.broken is None and not self.config.is_exact:
                self.warn(
                    "changing",
                    f"{run.changed}, at {run.changes_in_a_row} evaluations in a row, which reuse "
                    "nothing: build what is constant once, before the loop, and call each "
                    "ControlNet at every evaluation or at none",
                )
        self._decide(run, self._fitted.look_at_timesteps(run))
        run.begin(position)
        if run.gaps_in_a_row > 2 and run.broken is None and not self.config.is_exact:
            assert run.now is not None
            self.warn(
                "order",
                f"{run.now.why}, before {run.gaps_in_a_row} evaluations in a row, which reuse "
                "nothing: evaluate every timestep of one tensor, in their order, in one thread",
            )
        return run

    def _new_run(self, registry: RunRegistry, text: Tensor, position: Position) -> Run:
        self.watch.adopt_processors()
        self.watch.adapters.collect()
        self.functions.begin_run()
        unknown = self.watch.look_for_unknown_code()
        noise = None if unknown else self._levels.of(self._schedules, position)
        run = registry.add(
            Run(self._schedules, text, position, self._assume_pair, noise, self._by_rule)
        )
        run.last_seen.processors = self.watch.processors.generation
        try:
            self._decide(run, unknown)
            if run.by_diffusers:
                return run
            self._decide(run, self._fitted.begin_run(run))
            self._decide(run, self._levels.look_at_length(run))
            if registry.short >= RunRegistry.LIMIT and not self.config.is_exact:
                self.warn(
                    "short",
                    "runs end at once, so nothing is reused: the text or the timesteps are built "
                    "anew for each, or timesteps are not taken in their order. Build them once, "
                    "before the loop, in the order in which they are evaluated",
                )
            if registry.crowded and not self.config.is_exact:
                self.warn(
                    "crowded",
                    f"more than {RunRegistry.LIMIT} runs are under way in this thread at once, and "
                    "of the others what was cached is dropped: make fewer at once, or batches",
                )
        except BaseException:  # a warning that is an error: nobody goes on with half a look
            registry.forget(run)
            raise
        return run

    # -- what is decided ----------------------------------------------------------------------

    def _decide(self, run: Run, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            run.decide(verdict)
            if verdict.cost is Cost.LEAVE:
                self.warn(
                    "trust",
                    f"{verdict.why}. hgc does not know what it does and leaves runs to diffusers, "
                    "as if it were not installed. Classes that may be skipped and treat each row "
                    "of a batch by itself can be named: hgc.install(..., trust=(TheClass,))",
                )

    def _change_text(self, run: Run, text: Tensor) -> None:
        assert run.now is not None
        reuses = run.schedule.plan[run.now.index].attention == "reuse"
        applies = self.config.fresh_values and self.watch.processors.wraps
        keeps = applies and text.shape == run.text.value.shape
        if run.maps is not None:
            run.maps.close()
        run.decide(Verdict("the text changed", Cost.FEATURES, keep_maps=keeps))
        if reuses and not self.config.fresh_values:
            self.warn(
                "fresh_values",
                "the text changed within a run: its cross-attention is computed; "
                "Config(fresh_values=True) keeps the maps and applies them to the new values",
            )

    # -- ControlNet ---------------------------------------------------------------------------

    def control(self, net: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of a ControlNet of either kind, with the arguments of diffusers' forward."""
        kind = UnionCall if isinstance(net, ControlNetUnionModel) else ControlCall
        call = kind.of(net, *args, **kwargs)
        registry = self._of_thread.registry
        position = self._position(registry, call.timestep, call.text)
        if position is None:
            return call.by(self._original(net))
        start = time.perf_counter()
        run = self._enter(registry, call.text, position, call.cond)
        now = run.now
        assert now is not None
        try:
            slot = run.slot(net, call.cond)
            self._observe_control(run, now, slot, call)
            if run.by_diffusers:
                now.fresh[slot.index] = False
                out = call.by(self._original(net))
            else:
                out = call.output(self._residuals(run, now, slot, call))
        except BaseException:
            registry.forget(run)
            raise
        now.milliseconds += (time.perf_counter() - start) * 1e3
        return out

    def _observe_control(
        self, run: Run, now: Evaluation, slot: ControlSlot, call: ControlCall
    ) -> None:
        """Decide what a call of a ControlNet is by what changed since the one before."""
        sample, again = call.sample, slot.called_at == now.index
        slot.called_at, now.control[slot.index] = now.index, "computed"
        if run.by_diffusers:
            run.describe_condition(call.pixels_a_latent)
            return
        inputs = sample, call.text, *call.conditions
        self._decide(run, self.watch.look_for_gradients(run, *inputs))
        if again:
            run.decide(Verdict("a ControlNet was called twice in one evaluation", Cost.RUN))
        # that of the run was compared by `_enter`
        if run.text.value is call.text:
            slot.text = run.text
        else:  # detached: a view holds what it is a view of, see `Run.is_abandoned`
            is_view = call.text._base is not None
            slot.text = TensorSnapshot(call.text.detach() if is_view else call.text)
        found = (
            *call.settings(), sample.shape, sample.dtype, sample.device,
            *self.watch.settings(slot.net, sample.device),
        )  # fmt: skip
        if slot.signature is None or not slot.signature.same(found):
            if slot.signature is not None:
                why = "a ControlNet's scale or arguments changed"
                run.decide(Verdict(why, Cost.FEATURES))
            elif now.plan != FULL_STEP:
                run.decide(Verdict("a ControlNet joined the run", Cost.FEATURES))
            slot.describe(Signature(found), call.residual_shapes())
            run.describe_condition(call.pixels_a_latent)
        if now.plan.control == "reuse" and not call.is_off:
            half = _takes_half(run, now, call)
            if not all(
                run.cache.has(slot.prefix + name, half=half)
                for name in run.schedule.residuals[now.index]
            ):
                run.decide(Verdict("residuals are not cached"))
        if (now.plan.control == "compute" or now.plan.is_key) and not call.is_off:
            self._decide(run, self.watch.look_at_layers(run, slot.net))

    def _residuals(
        self, run: Run, now: Evaluation, slot: ControlSlot, call: ControlCall
    ) -> Sequence[Tensor]:
        done = "off" if call.is_off else _DONE[now.plan.control]
        now.control[slot.index] = done
        if call.is_off:
            return self._control.zeros(slot, call)
        if done == "computed":
            half = _takes_half(run, now, call)
            outputs = self._control.compute(run, slot, call, half)
            run.record_residuals(slot, outputs, half)
            return self._control.scaled(run, now, slot, call, outputs, half)
        return self._control.promised(run, now, slot, call)

    def _fresh_residuals(self, call: ControlCall) -> list[Tensor]:
        """The residuals of the whole batch, by diffusers, with the hooks that stand before its
        forward."""
        patched = self.patched
        # None: uninstalled since they were promised
        passing = contextlib.nullcontext() if patched is None else patched.of(call.net).passing()
        with passing:
            down, mid = call.by(call.net, return_dict=False)
        return [*down, mid]

    # -- UNet ---------------------------------------------------------------------------------

    def evaluate(self, unet: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the UNet, with the arguments of diffusers' forward."""
        call = UNetCall.of(unet, *args, **kwargs)
        registry = self._of_thread.registry
        position = self._position(registry, call.timestep, call.text)
        if position is None or call.is_t2i_adapter:
            return call.by(self._original(unet))
        start = time.perf_counter()
        run = self._enter(registry, call.text, position)
        assert run.now is not None
        try:
            halves = self._observe_unet(run, run.now, call)
            if run.by_diffusers:
                run.now.by_diffusers = True
                out = call.by(self._original(unet))
            elif run.now.plan.depth == 0:
                out = call.output(self._unet.forecast(run, call.sample))
            else:
                out, whole, captured = self._unet.compute(run, call, halves)
                if run.now.plan.is_key:
                    assert whole is not None
                    run.record(captured, call.sample, whole)
                out = call.output(out)
            if run.cache.refused and not self.config.is_exact:
                self.warn(
                    "max_cache_bytes",
                    f"Config.max_cache_bytes={self.config.max_cache_bytes} is too small for this "
                    "plan: evaluations are computed instead of reused",
                )
        except BaseException:
            registry.forget(run)
            raise
        run.end((time.perf_counter() - start) * 1e3)
        return out

    def _observe_unet(self, run: Run, now: Evaluation, call: UNetCall) -> Sequence[Tensor] | None:
        """Decide what a call of the UNet is by what changed since the one before. Returns the
        halves of its sample where it was cut to be compared."""
        sample = call.sample
        run.describe(sample)
        if run.by_diffusers:
            return None
        with_residuals = call.down is not None
        if with_residuals and not run.slots and not self.config.is_exact:
            self.warn(
                "foreign",
                "the UNet gets residuals for which no ControlNet of this installation was called "
                "in this thread's run: what makes them runs at every step, and changes of its "
                "scale show at key steps only. Pass it too, hgc.install(pipe.unet, "
                "pipe.controlnet), and call it in the same thread with the same timesteps. Where "
                "two UNets share it, give each a copy of its own (copy.deepcopy)",
            )
        self._decide(run, self.watch.look_for_gradients(run, sample, call.text))
        found = (
            sample.shape, sample.dtype, sample.device, *call.settings(),
            with_residuals, call.intrablock is not None,
            *self.watch.settings(call.unet, sample.device),
        )  # fmt: skip
        self._decide(run, run.look_at_arguments(found))
        latents = self.unet.config.out_channels
        self._decide(run, self._levels.look_at_channels(run, sample, latents))
        looked, halves = now.plan.depth, None
        self._decide(run, self.watch.look_at_layers(run, call.unet, looked))
        # an evaluation that computes nothing does not compare either
        if (run.schedule.halves or run.maps is not None) and looked != 0:
            halves = self._look_for_pair(run, now, call)
        if now.plan.depth != looked:
            self._decide(run, self.watch.look_at_layers(run, call.unet, now.plan.depth))
        return halves

    def _look_for_pair(self, run: Run, now: Evaluation, call: UNetCall) -> Sequence[Tensor] | None:
        """See whether the batch is one sample twice, and can be cut into halves. Returns the halves
        of the sample where it was cut to be compared."""
        assert run.unet_signature is not None
        plain = run.unet_signature.is_plain and call.text.shape[0] == call.sample.shape[0]
        if not self.watch.processors.treat_rows_alike or not (plain or call.can_be_halved()):
            run.pair.refute()
            if now.half:
                run.decide(Verdict("an argument cannot be cut into halves"))
        elif run.pair.wants:
            halves = run.pair.compare(call.sample, call.text)
            if now.half and not run.pair.wants:
                run.decide(Verdict("the batch is no pair any more"))
            return halves
        return None


_DONE = {"compute": "computed", "reuse": "reused", "off": "off"}


def _takes_half(run: Run, now: Evaluation, call: ControlCall) -> bool:
    """Whether the conditional half of a ControlNet's batch is all that is wanted."""
    # guess_mode hands over the conditional half itself: there is nothing to cut
    text = call.text
    return now.half and (text is run.text.value or not is_conditional_half(text, run.text))
