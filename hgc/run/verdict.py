"""What is found about an evaluation, and how much of a run's plan it costs."""

from __future__ import annotations

import dataclasses
import enum

__all__ = ["Cost", "Verdict"]


class Cost(enum.Enum):
    """What a run gives up."""

    STEPS = "fitted steps: the rule beside them in the configuration, where one is, is followed"
    EVALUATION = "the evaluation is computed in full"
    HISTORY = "the evaluation is computed in full, and forecasts begin anew"
    FEATURES = "the evaluation is computed in full, and what is cached is dropped"
    RUN = "the rest of the run is computed in full"
    LEAVE = "the rest of the run is left to diffusers"


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
