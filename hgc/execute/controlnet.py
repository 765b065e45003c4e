"""What a ControlNet is asked for in an evaluation: computed, reused, off; whole or by half."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from diffusers import ControlNetUnionModel

from hgc.execute.call import ControlCall, cut
from hgc.execute.functions import Functions
from hgc.execute.prompt import PromptGrain, may_be_kept
from hgc.execute.time_path import TimePath
from hgc.models.controlnet import embed_condition, scale_residuals
from hgc.run.cache import conditional_half
from hgc.run.evaluation import ControlSlot, Evaluation
from hgc.run.residuals import PromiseSet, Terms, Zeros
from hgc.run.run import Run
from hgc.run.snapshot import Signature
from hgc.watch.adapters import lora_scaled, scales_lora, take_lora_scale
from hgc.watch.weights import draws, module_state

__all__ = ["ControlExecutor"]

Tensor = torch.Tensor


class ControlExecutor:
    """Computes and hands out residuals.

    fresh: Computes all residuals of the whole batch of a call, by diffusers.
    """

    def __init__(
        self,
        functions: Functions,
        prompt: PromptGrain,
        time: TimePath,
        fresh: Callable[[ControlCall], list[Tensor]],
    ) -> None:
        self._functions, self._prompt, self._time = functions, prompt, time
        self._fresh = fresh

    def zeros(self, slot: ControlSlot, call: ControlCall) -> Sequence[Tensor]:
        """Zeros, for a ControlNet whose scale is 0."""
        # constants, which may be handed out until somebody adds something to them
        if slot.zeros is None or slot.zeros.is_touched:
            made = slot.shapes, call.sample.dtype, call.sample.device
            slot.zeros = PromiseSet(*made, Zeros(*made))
        return slot.zeros.hand_out()

    def promised(
        self, run: Run, now: Evaluation, slot: ControlSlot, call: ControlCall
    ) -> Sequence[Tensor]:
        """Promises of residuals that are reused: those of an earlier evaluation where nobody holds
        them any more."""
        for found in slot.promises:
            if not found.is_held:
                found.source.now, found.source.call = now, call
                break
        else:
            source = _Residuals(self._fresh, run, slot, now, call)
            found = PromiseSet(slot.shapes, call.sample.dtype, call.sample.device, source)
            # a pipeline holds those of one evaluation until it has those of the next
            slot.promises = [*slot.promises[-1:], found]
        return found.hand_out()

    def scaled(
        self,
        run: Run,
        now: Evaluation,
        slot: ControlSlot,
        call: ControlCall,
        outputs: list[Tensor],
        half: bool,
    ) -> Sequence[Tensor]:
        """What was computed, with its scale; of the conditional half promises of the whole batch.
        ``outputs`` may be written to."""
        owned, scale = self._functions.hands_over, call.scale_of(half)
        scaled = scale_residuals(slot.net, outputs, scale, call.guess_mode, owned=owned)
        if not half:
            return scaled
        source = _Residuals(self._fresh, run, slot, now, call)
        source.values = dict(zip(slot.names, scaled, strict=True))
        return PromiseSet(slot.shapes, call.sample.dtype, call.sample.device, source).promises

    def compute(self, run: Run, slot: ControlSlot, call: ControlCall, half: bool) -> list[Tensor]:
        """The residuals before their scale, the middle block's last; ``half``: of the conditional
        half of the batch."""
        net, sample, text, arguments = call.net, call.sample, call.text, call.arguments
        made_by = module_state(net.controlnet_cond_embedding)
        if slot.embedding is None or not slot.embedding.same(made_by):
            run.cache.drop_kept(f"{slot.prefix}hint")
            slot.embedding = Signature(made_by)
        hints = []
        for i, cond in enumerate(call.conditions):
            hint = run.cache.kept(f"{slot.prefix}hint{i}")
            if hint is None:
                hint = embed_condition(net, cond)
                if may_be_kept(cond) and not draws(net.controlnet_cond_embedding):
                    hint = run.cache.keep(f"{slot.prefix}hint{i}", hint)
            hints.append(hint)
        if half:
            batch = sample.shape[0]
            sample = conditional_half(sample)
            text = run.text.half() if run.text.value is text else conditional_half(text).detach()
            hints = [conditional_half(hint) for hint in hints]
            arguments = cut(arguments, batch)
        lora_scale = 1.0
        if scales_lora(net):
            arguments, lora_scale = take_lora_scale(arguments)
        mode = self._prompt.mode(run, slot.prefix, half)
        wrap = self._prompt.wrapper(run, net, slot.prefix, half, mode)
        with lora_scaled(net, lora_scale), self._functions.undivided(net):
            return self._functions.of(net, half)(
                net, sample, call.timestep, text,
                hints if isinstance(net, ControlNetUnionModel) else hints[0], wrap,
                time=self._time.row(run, net, call, slot.prefix, half),
                **call.constants, **arguments,
            )  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Residuals:
    """One call of a ControlNet, for the promises that stand for its residuals.

    Attributes:
        compute_fresh: Computes all residuals of the whole batch of a call.
        values: Those of the conditional half, where they were computed in this call.
        held: What ``compute_fresh`` returned, once it was called.
    """

    compute_fresh: Callable[[ControlCall], list[Tensor]]
    run: Run
    slot: ControlSlot
    now: Evaluation
    call: ControlCall
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    held: list[Tensor] = dataclasses.field(default_factory=list)

    def fresh(self, j: int) -> Tensor:
        """The value of residual ``j``, computed now."""
        if not self.held:
            # what is computed goes when the promises do: they are not handed out again
            self.slot.promises = [each for each in self.slot.promises if each.source is not self]
            self.held.extend(self.compute_fresh(self.call))
            self.now.control[self.slot.index] = "computed"
            self.now.fresh[self.slot.index] = bool(self.values)
        return self.held[j]

    def planned(self, j: int, half: bool) -> Terms | None:
        """What the plan means by residual ``j``."""
        slot, plan, cache = self.slot, self.now.plan, self.run.cache
        if self.values:
            return [(self.values[slot.names[j]], 1.0)] if half else None
        if plan.control == "off":
            return []
        entry = slot.entries[j]
        # promoted after the ControlNet's turn: what was reused then is not wanted any more
        if plan.control != "reuse" or not cache.has(entry, half=half):
            return None
        value, call = cache.read(entry, plan.of_residuals, half=half), self.call
        count = len(slot.entries)
        return [_scaled(slot.pooled, value, j, count, call.scale_of(half), call.guess_mode)]


def _scaled(
    pooled: bool,
    value: Tensor,
    j: int,
    count: int,
    scale: float | Tensor,
    guess_mode: bool,
) -> tuple[Tensor, float]:
    """A cached residual with its scale, as `scale_residuals` scales it."""
    if pooled:
        return torch.mean(value * scale, dim=(2, 3), keepdim=True), 1.0
    factor = 10.0 ** (-1.0 + j / (count - 1)) if guess_mode else 1.0
    if isinstance(scale, (int, float)):
        return value, float(scale) * factor
    return value * (scale * factor), 1.0
