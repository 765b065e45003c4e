"""One evaluation of a run, and the ControlNets that are called in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hgc.planning.config import StepPlan
from hgc.run.residuals import PromiseSet
from hgc.run.snapshot import Signature, TensorSnapshot

__all__ = ["ControlSlot", "Evaluation"]


@dataclasses.dataclass(slots=True)
class ControlSlot:
    """One ControlNet with one condition, in a run."""

    net: Any
    cond: TensorSnapshot
    index: int
    text: TensorSnapshot | None = None
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

    def describe(self, signature: Signature, shapes: list[tuple[int, ...]]) -> None:
        """Take note of what the residuals depend on, and of their shapes, the middle block's
        last."""
        self.signature, self.shapes = signature, shapes
        self.names = (*(f"residual/{j}" for j in range(len(shapes) - 1)), "residual/mid")
        self.entries = tuple(self.prefix + name for name in self.names)
        self.zeros, self.promises = None, []
        self.pooled = bool(self.net.config.global_pool_conditions)


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
        attention: What the UNet's cross-attentions did: ``"compute"`` or ``"reuse"``, which a plan
            cannot have its way with where they are left to diffusers.
        is_pair: Whether the batch is known to be a guidance pair, where the plan asks for it.
        held_bytes: What the run held when it ended.
        by_diffusers: Whether the UNet was left to diffusers.
        keeps: Whether the text that it projected, and the conditions that it embedded, may stand
            for the run.
        fresh: ControlNets that diffusers computed, the whole batch, by the index of their slot:
            whether hgc had computed the conditional half before.
    """

    index: int
    plan: StepPlan
    why: str = "plan"
    control: dict[int, str] = dataclasses.field(default_factory=dict)
    milliseconds: float = 0.0
    batch: int = 0
    half: bool = False
    attention: str = "compute"
    is_pair: bool = False
    held_bytes: int = 0
    by_diffusers: bool = False
    keeps: bool = True
    fresh: dict[int, bool] = dataclasses.field(default_factory=dict)
