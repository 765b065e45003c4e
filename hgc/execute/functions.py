"""What computes an evaluation: the pure functions, or what was compiled or captured of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from hgc.models.controlnet import control_function
from hgc.models.graphs import Networks
from hgc.models.structure import UNetStructure
from hgc.models.undivided import factors_of, undivided
from hgc.models.unet import run_unet

__all__ = ["Functions"]


class Functions:
    """The functions of one UNet and its ControlNets.

    Attributes:
        networks: What stands in for the pure functions; None where they are called.
        fused: Group norms take in what stands around them (:mod:`hgc.models.layer_calls`), where
            what computes them is not compiled.
    """

    def __init__(self, unet: Any, structure: UNetStructure) -> None:
        self._unet, self._structure = unet, structure
        self.networks: Networks | None = None
        self.fused = False
        self._factors: dict[Any, Any] = {}  # of what was run in this run

    def begin_run(self) -> None:
        """A run begins."""
        self._factors = {}
        if self.networks is not None:
            self.networks.begin_run()

    def undivided(
        self, module: Any, depth: int | None = None, *, encodes: bool = True
    ) -> contextlib.AbstractContextManager[None]:
        """Within it layers do not divide by 1, where what computes them is not compiled."""
        if not self.hands_over:
            return contextlib.nullcontext()
        factors, key = self._factors, (id(module), depth, encodes)
        if key not in factors:
            factors[key] = factors_of(module, self._structure, depth, encodes=encodes)
        return undivided(factors[key])

    def stand_in(self, networks: Networks | None) -> None:
        """Compute by ``networks`` from now on, None: by the pure functions."""
        self.clear()
        self.networks = networks

    def fuse(self) -> None:
        """Fuse from now on."""
        self.clear()
        self.fused = True

    def clear(self) -> None:
        """Free what can be made again."""
        self._factors = {}
        if self.networks is not None:
            self.networks.clear()

    @property
    def hands_over(self) -> bool:
        """Whether what is computed is in memory that nobody else holds."""
        return self.networks is None or self.networks.hands_over

    @property
    def fuses(self) -> bool:
        """Whether what computes is asked to fuse."""
        return self.fused and self.hands_over

    def of(self, module: Any, half: bool) -> Callable[..., Any]:
        """What computes ``module``; ``half``: its rows are the conditional half of a batch."""
        is_unet = module is self._unet
        run: Callable[..., Any] = run_unet if is_unet else control_function(module)
        if self.networks is not None:
            run = self.networks.run_unet if is_unet else self.networks.run_controlnet
            run = functools.partial(run, half)
        return functools.partial(run, fused=True) if self.fuses else run
