"""What is found about an evaluation, and how much of a run's plan it costs."""

from __future__ import annotations

import dataclasses
import enum

__all__ = ["Cost", "Verdict"]


class Cost(enum.Enum):
    """What a run gives up."""

    STEPS = "fitted steps: the rule that stands beside them in the configuration is followed"
    EVALUATION = "the evaluation is computed in full"
    HISTORY = "so it is, and forecasts begin anew"
    FEATURES = "so it is, and what is cached is dropped"
    RUN = "so is the rest of the run"
    HGC = "the rest of the run is left to diffusers"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Why an evaluation, or what is left of its run, cannot be what was planned.

    Attributes:
        why: For the report: a clause.
        cost: What the run gives up.
        keep_maps: Cross-attention maps stay, and are applied to the values of another text.
    """

    why: str
    cost: Cost = Cost.EVALUATION
    keep_maps: bool = False
