"""Coefficients of forecasts, fitted by least squares to an uncached run.

A cached feature at evaluation ``i`` is forecast as ``sum_j c_j f(k_j)`` from its values at the last
key evaluations ``k_j``. The ``c`` that minimise ``sum |f(i) - sum_j c_j f(k_j)|^2`` over inputs and
pixels solve ``A[k, k] c = A[k, i]``, where ``A[i, j] = sum f(i) f(j)``: so the inner products
between evaluations are all that is kept of a run, whichever key evaluations are tried afterwards.
Reuse, a damped extrapolation and higher orders are special cases (L2P, arXiv 2604.26365).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hgc.models.structure import UNetStructure
from hgc.models.supported import controlnets
from hgc.planning.config import Config, StepPlan
from hgc.planning.rule import plan

__all__ = ["Products", "fit"]

Tensor = torch.Tensor

# Added to the diagonal, in parts of its mean: values of neighbouring key evaluations are alike.
_RIDGE = 1e-6


class Products:
    """Inner products, between the evaluations of uncached runs, of what plans cache.

    Names are those of the cache: ``feature/k``, ``residual/j`` (summed over ControlNets, the
    middle block's the last) and ``guidance``. Of a classifier-free guidance batch the conditional
    half is taken.
    """

    def __init__(self, depths: Iterable[int]) -> None:
        self._depths = sorted(depths)
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def recording(self, unet: Any, controlnet: Any, *, pair_rows: int | None) -> Iterator[None]:
        """Take in the one run made inside, of models on which hgc is not installed.

        Args:
            unet: The UNet.
            controlnet: Its ControlNets, as :func:`hgc.install` takes them.
            pair_rows: Rows of its batches where they are classifier-free guidance pairs.
        """
        seen: dict[str, list[Tensor]] = defaultdict(list)
        hooks: list[Any] = []
        structure = UNetStructure.of(unet)
        depths = [d for d in self._depths if d <= structure.num_layers]

        def half(x: Tensor) -> Tensor:
            # guess_mode hands over the conditional half by itself
            return x.chunk(2)[1] if x.shape[0] == pair_rows else x

        def keep(name: str, x: Tensor) -> None:
            seen[name].append(x.detach().float().flatten())

        def feature(module: Any, args: Any, *, depth: int, of_skip: int) -> None:
            # a decoder layer's input is the feature, and the skip behind it
            keep(f"feature/{depth}", half(args[0][:, : args[0].shape[1] - of_skip]))

        calls: Counter[int] = Counter()  # a network may be called with several conditions

        def residual(module: Any, args: Any, out: Any, *, net: int) -> None:
            for j, value in enumerate((*out[0], out[1])):
                keep(f"residual/{j}/{net}.{calls[net]}", half(value))
            calls[net] += 1

        def difference(module: Any, args: Any, out: Any) -> None:
            calls.clear()
            if pair_rows is not None:
                unconditional, conditional = out[0].chunk(2)
                keep("guidance", conditional - unconditional)

        widths = unet.config.block_out_channels
        for depth in depths:
            block, layer = structure.boundary(depth)
            resnet = unet.up_blocks[block].resnets[layer]
            of_skip = widths[max(structure.encoder[depth - 1][0], 0)]
            hook = functools.partial(feature, depth=depth, of_skip=of_skip)
            hooks.append(resnet.register_forward_pre_hook(hook))
        for n, net in enumerate(controlnets(controlnet)):
            hooks.append(net.register_forward_hook(functools.partial(residual, net=n)))
        hooks.append(unet.register_forward_hook(difference))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        evaluations = max(map(len, seen.values()), default=0)
        for name, values in seen.items():
            if len(values) != evaluations:
                continue  # of a network that was not called at every evaluation
            stacked = torch.stack(values).double()
            name = "/".join(name.split("/")[:2])
            self._sums[name] = self._sums.get(name, 0) + (stacked @ stacked.T).cpu()

    def residuals(self) -> list[str]:
        """Names of all residuals that were seen, the middle block's last."""
        return [name for name in self._sums if name.startswith("residual/")]

    def of(self, names: Sequence[str]) -> Tensor | None:
        """[evaluations, evaluations], float64: the sum over ``names``, each of equal weight."""
        known = [self._sums[name] for name in names if name in self._sums]
        # a ControlNet at scale 0, or one that is not trained yet, gives zeros
        known = [products for products in known if products.diagonal().mean() > 0]
        if not known:
            return None
        return torch.stack([products / products.diagonal().mean() for products in known]).sum(0)


def _solved(
    products: Tensor, at: int, past: Sequence[int], otherwise: tuple[float, ...]
) -> tuple[float, ...]:
    """The coefficients; ``otherwise`` where the past is zero (guidance of a ControlNet that starts
    late)."""
    keys = list(past)
    matrix = products[keys][:, keys]
    if not keys or not matrix.diagonal().mean() > 0:
        return otherwise
    matrix = matrix + _RIDGE * matrix.diagonal().mean() * torch.eye(len(keys), dtype=matrix.dtype)
    return tuple(round(c, 4) for c in torch.linalg.solve(matrix, products[keys, at]).tolist())


def fit(rule: Config, products: Products, *, order: int = 2) -> Config:
    """``rule`` with a plan whose coefficients are fitted, for its own number of evaluations.

    Args:
        rule: A configuration without ``steps``.
        products: Of uncached runs of ``rule.num_evaluations`` evaluations.
        order: Key values that a forecast takes in, at most.

    Returns:
        ``rule`` with ``steps``. A run of another length follows the rule.
    """
    steps = plan(rule, rule.num_evaluations)
    keys = [i for i, step in enumerate(steps) if step.is_key]
    pairs = [i for i in keys if steps[i].guidance == "both"]
    computed = [i for i, step in enumerate(steps) if step.control == "compute"]
    residuals = products.residuals()
    fitted: list[StepPlan] = []
    for i, step in enumerate(steps):
        changes: dict[str, Any] = {}
        last = [k for k in keys if k < i][::-1][:order]
        if not step.is_key and step.depth != 0:
            feature = products.of([f"feature/{step.depth}"])
            if feature is not None:
                changes["forecast"] = _solved(feature, i, last, step.forecast)
        if step.control == "reuse":
            read = residuals if step.is_key else residuals[: int(step.depth)]
            residual = products.of(read)
            if residual is not None:
                past = [k for k in computed if k < i][::-1][:order]
                changes["control_forecast"] = _solved(residual, i, past, step.of_residuals)
        difference = products.of(["guidance"])
        if step.guidance == "reuse" and difference is not None:
            both = [k for k in pairs if k < i][::-1][:order]
            changes["guidance_forecast"] = _solved(difference, i, both, step.guidance_forecast)
        fitted.append(dataclasses.replace(step, **changes))
    return rule.replace(steps=tuple(fitted))
