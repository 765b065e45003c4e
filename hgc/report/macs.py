"""Multiply-accumulates of a run, counted by running its plan on the meta device.

One multiply-accumulate is one MAC. Two conventions: all of them, and without the two matmuls of
scaled dot-product attention (the paper's: 18.22T for 20 steps of SD1.5 + ControlNet at 512x512).
Norms, activations and elementwise work are not counted in either.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import hgc_kernels  # noqa: F401  defines torch.ops.hgc
from hgc.execute.engine import Engine
from hgc.models.structure import UNetStructure
from hgc.models.supported import check_unet, controlnets
from hgc.planning.config import Config, ConfigError, StepPlan
from hgc.planning.rule import plan
from hgc.report.inputs import Inputs, Shapes, text_width
from hgc.run.pair import PairCheck

__all__ = [
    "MacCount",
    "Macs",
    "Parts",
    "count_macs",
    "count_performed",
    "flop_counter",
    "macs_of",
    "pixels_a_latent",
]


@dataclasses.dataclass(frozen=True)
class Macs:
    """MACs in both conventions.

    Attributes:
        total: All multiply-accumulates of convolutions and matmuls.
        paper: The same without the two attention matmuls.
    """

    total: int = 0
    paper: int = 0

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.total + other.total, self.paper + other.paper)

    def __mul__(self, times: int) -> Macs:
        return Macs(self.total * times, self.paper * times)


@dataclasses.dataclass(frozen=True)
class MacCount:
    """MACs of a run under a configuration, and of the same run computed in full.

    Attributes:
        config: Name of the configuration.
        evaluations: One entry an evaluation.
        plan: The plan they follow.
        full_evaluation: One evaluation without hgc.
        num_evaluations: Of the run.
    """

    config: str
    evaluations: tuple[Macs, ...]
    plan: tuple[StepPlan, ...]
    full_evaluation: Macs
    num_evaluations: int

    @property
    def total(self) -> int:
        """MACs of the run, attention matmuls counted."""
        return sum(e.total for e in self.evaluations)

    @property
    def paper(self) -> int:
        """MACs of the run in the paper's convention, attention matmuls left out."""
        return sum(e.paper for e in self.evaluations)

    @property
    def done(self) -> Macs:
        """MACs of the run in both conventions."""
        return Macs(self.total, self.paper)

    @property
    def full(self) -> Macs:
        """MACs of as many evaluations without hgc."""
        return self.full_evaluation * self.num_evaluations


def _sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attend(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    batch, length, heads, dim = q
    return 4 * batch * length * heads * dim * k[1]


def _apply(stored: Any, v: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    batch, length, heads = stored[:3]
    return 2 * batch * length * heads * v[1] * v[3]


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.hgc.attend_and_store: _attend,
    torch.ops.hgc.apply_map: _apply,
}


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, taught the ops of hgc and attention on CPU, which it does not know."""
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


def macs_of(counter: FlopCounterMode) -> Macs:
    """What ``counter`` counted. In UNets and ControlNets only attention uses batched matmuls."""
    counts = counter.get_flop_counts().get("Global", {})
    total = sum(counts.values()) // 2
    attention = sum(
        flops
        for op, flops in counts.items()
        if op in _ATTENTION
        or op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        or "scaled_dot_product" in str(op)
    )
    return Macs(total, total - attention // 2)


# A model's class and its config as JSON: all that its MACs depend on.
_Described = tuple[Any, str]


def _describe(model: Any) -> _Described:
    # diffusers leaves private entries (a local path, for one) and versions out of from_config.
    return type(model), json.dumps(dict(model.config), sort_keys=True, default=str)


@functools.lru_cache(maxsize=16)
def _meta(described: _Described, copy: int = 0) -> Any:
    """The model on the meta device; models of equal shape in one run are different copies."""
    kind, config = described
    with torch.device("meta"):
        return kind.from_config(_as_given(json.loads(config))).eval()


def _as_given(value: Any) -> Any:
    """``value`` with tuples for lists: diffusers refuses some lists of lists that it takes as
    tuples."""
    if isinstance(value, dict):
        return {k: _as_given(v) for k, v in value.items()}
    return tuple(map(_as_given, value)) if isinstance(value, list) else value


_Models = tuple[_Described, tuple[_Described, ...]]
# MACs of an evaluation: of each ControlNet, and the UNet's last.
Parts = tuple[Macs, ...]
# A step without its coefficients, since what is forecast, and how, costs nothing; which of the
# ControlNets are off by their scale; and whether the evaluation keeps what it makes for the run.
_Kind = tuple[StepPlan, tuple[bool, ...], bool]
_FULL, _IDLE = "full", "idle"

# The meta models are kept between counts, and a count installs hgc on them.
_lock = threading.Lock()


@functools.lru_cache(maxsize=64)
def _known(models: _Models, shapes: Shapes, pair: bool) -> dict[Any, Parts]:
    """What was counted so far, by the evaluation's case; `_FULL`: without hgc."""
    (full,) = _run(models, None, shapes, pair)
    # where nothing is run, nothing is counted
    return {_FULL: full, _IDLE: (Macs(),) * len(full)}


def _count(
    models: _Models,
    steps: Sequence[StepPlan],
    shapes: Shapes,
    pair: bool,
    off: Sequence[Sequence[bool]] | None = None,
    keeps: Sequence[bool] | None = None,
) -> tuple[list[Parts], Parts]:
    """MACs of each evaluation of a run that follows ``steps``, and of one without hgc.

    What an evaluation costs depends on what it computes, on whether it may halve a guidance pair,
    which takes two evaluations to know, and on what those before it made for the whole run: the
    first may project the text or embed the condition for all that follow. Each such case is run
    once a model and shape: in a run of the first two evaluations, of those that may make something
    for the others, and of the cases that were not counted yet.

    off: of each evaluation, the ControlNets that are off by their scale; None: none is.
    keeps: whether each evaluation keeps the projected text and the embedded conditions for the
        run; None: all do.
    """
    on = (False,) * len(models[1])
    kinds = [
        (
            dataclasses.replace(
                step.in_output, forecast=(1.0,), guidance_forecast=(1.0,), control_forecast=None,
                output_forecast=(1.0,),
            ),
            on if off is None else tuple(off[i]),
            keeps is None or keeps[i],
        )
        for i, step in enumerate(steps)
    ]  # fmt: skip
    with _lock:
        known = _known(models, shapes, pair)
        cases: list[Any] = []
        chosen: list[int] = []
        made: set[Any] = set()
        own_texts = len({text_width(_meta(model)) for model in (models[0], *models[1])}) > 1
        for i, (step, without, keep) in enumerate(kinds):
            early = i < PairCheck.EVALUATIONS
            unsure = early and step.guidance != "both"
            kind = (dataclasses.replace(step, guidance="both") if unsure else step), without
            before = None if kind in made else frozenset(made)
            case: Any = _IDLE if step.depth == 0 else (unsure, step, without, keep, before)
            # once everything was computed, both halves have nothing more to make
            makes = keep and case != _IDLE and before is not None
            makes &= kind[0].guidance != "both" or (StepPlan(), on) not in made
            if early or makes or not (case in known or case in cases):
                chosen.append(i)
            cases.append(case)
            if makes:
                # the UNet's text is a change from a ControlNet's own, and undoes what that made
                made.add("the UNet's text" if i == 0 and own_texts else kind)
        missing = [i for i, case in enumerate(cases) if case not in known]
        if missing:
            chosen = [i for i in chosen if i <= missing[-1]]
            try:
                counted = _run(models, [kinds[i] for i in chosen], shapes, pair)
            except ConfigError:
                # one that was left out was read by one that stayed
                chosen = list(range(len(kinds)))
                counted = _run(models, kinds, shapes, pair)
            for i, macs in zip(chosen, counted, strict=True):
                known.setdefault(cases[i], macs)
        return [known[case] for case in cases], known[_FULL]


def _run(models: _Models, kinds: Sequence[_Kind] | None, shapes: Shapes, pair: bool) -> list[Parts]:
    """Run meta models through ``kinds``, or once without hgc where there are none."""
    described, all_nets = models
    unet = _meta(described)
    nets = [_meta(net, all_nets[:i].count(net)) for i, net in enumerate(all_nets)]
    inputs = Inputs(unet, nets, shapes)
    count = 1 if kinds is None else len(kinds)
    schedule = torch.arange(max(count, 2))
    engine = None
    if kinds is not None:
        padded = (*(step for step, *_ in kinds), *([StepPlan()] * (len(schedule) - count)))
        config = Config(name="counted", num_evaluations=len(padded), steps=padded)
        engine = Engine(unet, tuple(nets), config, assume_pair=pair)
        # an evaluation that records gradients is to do what its plan says
        engine.watch.look_for_gradients = lambda run, *inputs: []  # type: ignore[method-assign]
        engine.attach(engine)
    counted = []
    try:
        for i in range(count):
            _, off, keep = (StepPlan(), (False,) * len(nets), True) if kinds is None else kinds[i]
            parts: list[Macs] = []
            down, mid = None, None
            # hgc keeps nothing that a graph of autograd may hang on
            with torch.set_grad_enabled(not keep):
                for j, net in enumerate(nets):
                    sample, arguments = inputs.controlnet(j)
                    counter = flop_counter()
                    with counter:
                        outputs = net(
                            sample, schedule[i], conditioning_scale=0.0 if off[j] else 1.0,
                            return_dict=False, **arguments,
                        )  # fmt: skip
                    parts.append(macs_of(counter))
                    if down is None:
                        down, mid = outputs
                    else:
                        down = [a + b for a, b in zip(down, outputs[0], strict=True)]
                        mid = mid + outputs[1]
                sample, arguments = inputs.unet()
                counter = flop_counter()
                with counter:
                    unet(
                        sample, schedule[i], return_dict=False,
                        down_block_additional_residuals=down, mid_block_additional_residual=mid,
                        **arguments,
                    )  # fmt: skip
                parts.append(macs_of(counter))
            counted.append(tuple(parts))
    finally:
        if engine is not None:
            engine.detach()
    return counted


def pixels_a_latent(nets: Sequence[Any]) -> int:
    """Pixels along a side of the picture for one of the latents, as the first of ``nets`` has
    it; 8 where there is none."""
    if not nets:
        return 8
    return 2 ** (len(nets[0].config.conditioning_embedding_out_channels) - 1)


def count_macs(
    unet: UNet2DConditionModel,
    controlnet: Any = None,
    config: Config | str = "balanced",
    *,
    num_evaluations: int | None = None,
    height: int | None = None,
    width: int | None = None,
    images: int = 1,
    guidance: bool = True,
    tokens: int = 77,
) -> MacCount:
    """Count the MACs of a run, before any weight is loaded: only the models' configs are read.

    Args:
        unet: The UNet; on the meta device will do. LoRA and the like are not counted.
        controlnet: As :func:`hgc.install` takes it.
        config: As :func:`hgc.install` takes it.
        num_evaluations: Evaluations of the run; default: the number the configuration is meant for.
        height: Of the image, pixels; default: the size of the UNet's config.
        width: Of the image, pixels; default: the same as ``height``.
        images: Images of the batch.
        guidance: Classifier-free guidance: a batch of two rows an image.
        tokens: Length of the text.

    Returns:
        A :class:`MacCount`.

    Raises:
        TypeError: a model is not supported.
        ValueError: ``config`` does not fit, or the size is no multiple of the latents' pixel; or
            ``config.adaptive`` leaves the plan to each run, whose report counts what it did.
    """
    config = Config.of(config)
    check_unet(unet)
    config.check_depth(UNetStructure.of(unet).num_layers)
    nets = controlnets(controlnet)
    factor = pixels_a_latent(nets)
    size = unet.config.sample_size
    default = (size if isinstance(size, int) else size[0]) * factor if size else 512
    height = default if height is None else height
    width = height if width is None else width
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % factor:
            raise ValueError(f"{name} must be a positive multiple of {factor}; got {value}")
    count = config.num_evaluations if num_evaluations is None else num_evaluations
    steps = plan(config, count)
    shapes = Shapes(
        images * (2 if guidance else 1), height // factor, width // factor, tokens, factor
    )
    models = _describe(unet), tuple(_describe(net) for net in nets)
    done, full = _count(models, steps, shapes, guidance)
    each = tuple(sum(parts, Macs()) for parts in done)
    return MacCount(config.name, each, tuple(steps), sum(full, Macs()), count)


def count_performed(
    nets: Sequence[Any],
    unet: Any,
    steps: Sequence[StepPlan],
    shapes: Shapes,
    off: Sequence[Sequence[bool]],
    keeps: Sequence[bool],
) -> tuple[list[Parts], Parts]:
    """MACs of evaluations that were performed, and of one without hgc, for the report.

    Args:
        nets: The ControlNets.
        unet: The UNet.
        steps: What each evaluation did.
        shapes: Of what the models were given.
        off: Of each evaluation, the ControlNets that were off by their scale.
        keeps: Whether each evaluation kept the projected text and the embedded conditions.

    Returns:
        Of each evaluation, and of the one without hgc: the MACs of each ControlNet, and the UNet's
        last.
    """
    models = _describe(unet), tuple(_describe(net) for net in nets)
    return _count(models, steps, shapes, True, off, keeps)
