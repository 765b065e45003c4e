"""What the UNet computes in an evaluation, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hgc.execute.call import UNetCall, cut
from hgc.execute.functions import Functions
from hgc.execute.prompt import PromptGrain
from hgc.execute.time_path import TimePath
from hgc.models.structure import UNetStructure
from hgc.models.unet import Residuals
from hgc.run.cache import conditional_half
from hgc.run.residuals import Promise, Terms
from hgc.run.run import Run
from hgc.watch.adapters import lora_scaled, take_lora_scale

__all__ = ["UNetExecutor"]

Tensor = torch.Tensor


class UNetExecutor:
    """Computes and forecasts outputs of the UNet."""

    def __init__(
        self, structure: UNetStructure, functions: Functions, prompt: PromptGrain, time: TimePath
    ) -> None:
        self._structure, self._functions, self._prompt = structure, functions, prompt
        self._time = time

    def forecast(self, run: Run, sample: Tensor) -> Tensor:
        """The output of an evaluation that computes nothing; new."""
        assert run.now is not None
        step = run.now.plan
        if step.damping is None:
            # what is read may be the cache's own buffer
            return run.cache.read("output", step.forecast).clone()
        return self._forecast_in_x0(run, sample).to(run.output_dtype)

    def _forecast_in_x0(self, run: Run, sample: Tensor, weight: float = 1.0) -> Tensor:
        """``weight`` times the output that says of ``sample`` the x0 that is forecast, in float32
        at least; new."""
        now = run.now
        assert now is not None and run.noise is not None
        step = now.plan
        assert step.damping is not None
        x0 = run.noise.forecast(
            run.cache, now.index, step.damping, step.guidance_damping, step.x0_correction,
            is_pair=now.is_pair,
        )  # fmt: skip
        return run.noise.output(sample, x0, now.index, weight)

    def _correct(self, run: Run, sample: Tensor, out: Tensor) -> Tensor:
        """The forecast in x0 plus a gain times what ``out``, of the half that was computed or of
        the whole batch, says beyond it; new."""
        now = run.now
        assert now is not None and run.noise is not None
        step, cache = now.plan, run.cache
        gain = step.gain * run.noise.spacing
        total = self._forecast_in_x0(run, sample, 1.0 - gain)
        own, *others = step.output_forecast
        if len(cache.values("output")) < len(others):
            own, others = 1.0, []
        halves = total.unflatten(0, (2, -1)) if now.half else total
        halves.add_(out, alpha=gain * own)
        if now.half and step.guidance == "reuse":
            cache.add_to(halves[0], "guidance", step.guidance_forecast, -gain * own)
        for value, coefficient in zip(cache.values("output"), others, strict=False):
            total.add_(value, alpha=gain * coefficient)
        return total.to(out.dtype)

    def compute(
        self, run: Run, call: UNetCall, halves: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The output of an evaluation that computes the UNet, in part or in full; what the networks
        say of the whole batch, None where that corrects a forecast; and the intermediate tensors
        that are kept.

        halves: Those of the sample, where it was cut already.
        """
        now = run.now
        assert now is not None and run.unet_signature is not None
        now.keeps = self._prompt.keeps(call.unet, call.text)
        mode = self._prompt.mode(run, "unet/", now.half)
        now.attention = "compute" if mode == "compute" else "reuse"
        step, half, sample, text = now.plan, now.half, call.sample, call.text
        down, arguments, intrablock = call.down, call.arguments, call.intrablock
        depth = step.depth if isinstance(step.depth, int) else None
        count = self._structure.num_layers if depth is None else depth
        residuals = None
        if down is not None:
            residuals = Residuals(
                [_terms(value, half) for value in down[:count]],
                _terms(call.mid, half) if depth is None else [],
            )
        hidden = skips = None
        if depth is not None:
            hidden = run.cache.read(f"feature/{depth}", step.forecast, half=half)
            if run.last_seen.freeu[str(self._structure.boundary(depth)[0])]:
                hidden = hidden.clone()  # FreeU writes into its input
            if step.encoder == "reuse":
                skips = [
                    run.cache.read(f"skip/{j}", step.forecast, half=half) for j in range(count)
                ]
        capture = run.schedule.captures if step.is_key else ()
        plain, lora_scale = run.unet_signature.is_plain, 1.0
        if half:
            batch = sample.shape[0]
            sample = conditional_half(sample) if halves is None else halves[1]
            text = run.text.half() if run.text.value is text else conditional_half(text)
            if not plain:
                arguments = cut(arguments, batch)
            if intrablock is not None:
                intrablock = cut(intrablock, batch)
        if not plain:
            arguments, lora_scale = take_lora_scale(arguments)
        layers = self._functions.undivided(call.unet, depth, encodes=skips is None)
        with lora_scaled(call.unet, lora_scale), layers:
            out, captured = self._functions.of(call.unet, half)(
                call.unet, self._structure, sample, call.timestep, text,
                self._prompt.wrapper(run, call.unet, "unet/", half, mode),
                depth=depth, hidden=hidden, skips=skips, residuals=residuals, capture=capture,
                intrablock_residuals=intrablock,
                time=self._time.row(run, call.unet, call, "unet/", half), **arguments,
            )  # fmt: skip
        if step.gain != 1.0:
            return self._correct(run, call.sample, out), None, captured
        whole = out
        if half and step.guidance == "off":
            whole = torch.cat([out, out])
        elif half:
            whole = run.cache.subtract("guidance", step.guidance_forecast, out)
        blend = whole
        if step.output_forecast != (1.0,):
            blend = run.cache.blend(whole, "output", step.output_forecast)
        return blend, whole, captured


def _terms(value: Any, half: bool) -> Terms:
    """What to add to a skip for the residual ``value``."""
    if isinstance(value, Promise):
        terms = value.planned(half)
        if terms is not None:
            return terms
        value = value.fresh()
    return [(conditional_half(value) if half else value, 1.0)]
