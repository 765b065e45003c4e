"""Published schedules of other caches, as plans of hgc's executor: method against method.

Each is what the method's authors run by default, in the terms of :class:`hgc.Config`. The engine,
the scheduler and the counting are the same for all rows, so what differs is the schedule.

- DeepCache (arXiv 2312.00858): everything every ``N`` evaluations, the outermost decoder layer
  between them. Its ControlNet runs at every evaluation: it knows none to skip.
- Faster Diffusion (arXiv 2312.09608): the encoder and the ControlNet at evaluations 0, 1, 2, 3, 5,
  10, 15, 25 and 35 of 50, the decoder at all of them; in other runs at the same shares of the run.
- T-GATE (arXiv 2404.02747): after evaluation 10 of 25 the cross-attention is not computed again and
  guidance ends. The kept cross-attention is the conditional half's, where T-GATE averages both.
"""

from __future__ import annotations

import re

from hgc.config import Config, StepPlan

__all__ = ["PEERS", "peer"]

# The rows that "peers" stands for.
PEERS = ("deepcache-2", "deepcache-3", "deepcache-5", "faster-diffusion", "t-gate")

_DEEPCACHE = re.compile(r"deepcache-(\d+)")
_ENCODER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
_ENCODER_REFERENCE = 50
# All decoder layers of an SD1.5-shaped UNet.
_DECODER_LAYERS = 12
_GATE = 10 / 25


def peer(name: str, steps: int) -> Config | None:
    """The schedule called ``name`` for a run of ``steps`` evaluations; None: no peer has that name.

    name: "deepcache-N" with an interval of at least 2, "faster-diffusion" or "t-gate".
    """
    interval = _DEEPCACHE.fullmatch(name)
    if interval and int(interval.group(1)) > 1:
        return Config(
            name=name,
            num_evaluations=steps,
            key_steps=tuple(range(0, steps, int(interval.group(1)))),
            control="compute",
        )
    if name == "faster-diffusion":
        scale = steps / _ENCODER_REFERENCE
        keys = tuple(sorted({round(key * scale) for key in _ENCODER_KEYS}))
        return Config(
            name=name,
            num_evaluations=steps,
            key_steps=keys,
            depth=_DECODER_LAYERS,
            encoder="reuse",
        )
    if name == "t-gate":
        gate = max(1, round(_GATE * steps))
        after = StepPlan(attention="reuse", guidance="off")
        plan = (StepPlan(),) * gate + (after,) * (steps - gate)
        return Config(name=name, num_evaluations=steps, steps=plan)
    return None
