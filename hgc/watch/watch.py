"""What features depend on beside the arguments of a call, and whether it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers.models.attention import GatedSelfAttentionDense

from hgc.models.structure import UNetStructure
from hgc.run.run import Run
from hgc.run.verdict import Cost, Verdict
from hgc.warn import WarnOnce
from hgc.watch.adapters import Adapters
from hgc.watch.layers import Layers
from hgc.watch.processors import Processors
from hgc.watch.trust import Trust

__all__ = ["Watch"]

_any_autocast = torch._C._is_any_autocast_enabled


class Watch:
    """All that is watched in a UNet and its ControlNets.

    It changes no plan: what it finds are verdicts, on which :meth:`hgc.run.run.Run.decide` acts.

    Args:
        models: The UNet first.
        structure: Of the UNet.
        depths: Of evaluations that run a part of it.
        vouched: Classes and functions that the user trusts.
        warn: Says what is found about processors.
        reuse_attention: Whether plans reuse cross-attention.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        structure: UNetStructure,
        depths: Iterable[int],
        vouched: tuple[Any, ...],
        warn: WarnOnce,
        *,
        reuse_attention: bool,
    ) -> None:
        self._models = models
        self.trust = Trust(models, _in_part(models[0], structure, depths), vouched)
        self.processors = Processors(
            models, structure, self.trust, warn, reuse_attention=reuse_attention
        )
        self.adapters = Adapters(models)
        self.layers = Layers(models[0], models, structure, self.processors)
        self._fusers = [m for m in models[0].modules() if isinstance(m, GatedSelfAttentionDense)]

    def adopt_processors(self) -> None:
        """Take the attention processors for what they are now."""
        generation = self.processors.generation
        self.adapters.set_processors(self.processors.adopt())
        if self.processors.generation != generation:
            self.layers.changed()

    def look_for_unknown_code(self) -> list[Verdict]:
        """Whether there is code in the models that hgc does not know."""
        stranger = self.trust.stranger()
        return [Verdict(stranger, Cost.LEAVE)] if stranger else []

    def look_at_processors(self, run: Run) -> list[Verdict]:
        """Whether processors were replaced since ``run`` looked, by it or by another one."""
        if self.processors.were_set:
            self.adopt_processors()
        if run.last_seen.processors == self.processors.generation:
            return []
        run.last_seen.processors = self.processors.generation
        return [
            Verdict("the attention processors changed", Cost.FEATURES),
            *self.look_for_unknown_code(),
        ]

    def look_at_layers(
        self, run: Run, model: torch.nn.Module, depth: Any = "full"
    ) -> list[Verdict]:
        """Whether the layers of ``model`` that are computed at ``depth`` changed."""
        found = self.layers.look(run, model, depth)
        if self.processors.were_set:
            found += [*self.look_at_processors(run), *self.layers.look(run, model, depth)]
        return found

    def look_for_gradients(self, run: Run, *inputs: Any) -> list[Verdict]:
        """Compute in full where gradients are recorded: those of a cached value are lost."""
        if not torch.is_grad_enabled() or run.config.is_exact or run.broken is not None:
            return []
        seen = run.last_seen
        if seen.trains is None:
            seen.trains = any(p.requires_grad for m in self._models for p in m.parameters())
        if seen.trains or any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            why = "gradients are recorded (use torch.no_grad() where none are wanted)"
            return [Verdict(why, Cost.RUN)]
        return []

    def settings(self, model: torch.nn.Module, device: torch.device) -> tuple[Any, ...]:
        """What the output of ``model`` depends on beside its arguments and its layers."""
        fusers = self._fusers if model is self._models[0] else ()
        return (
            self.adapters.state(model),
            _autocast(device) if _any_autocast() else None,
            *(fuser.enabled for fuser in fusers),
        )

    def noticed(self, name: str) -> Callable[[], None]:
        """What is to be done where the method ``name`` of a model was called, see
        :class:`hgc.watch.adapters.Notice`."""

        def rewritten() -> None:
            self.adapters.rewritten += 1

        def were_set() -> None:
            self.processors.were_set = True

        return were_set if name == "set_attn_processor" else rewritten


def _autocast(device: torch.device) -> torch.dtype | None:
    """What ``torch.autocast`` computes in now."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _in_part(unet: Any, structure: UNetStructure, depths: Iterable[int]) -> list[torch.nn.Module]:
    """The blocks that evaluations of ``depths`` run in part."""
    found = []
    for depth in depths:
        if depth == 0:
            continue
        up, layer = structure.boundary(depth)
        if layer > 0:
            found.append(unet.up_blocks[up])
        down, _ = structure.encoder[depth - 1]
        whole = depth == len(structure.encoder) or structure.encoder[depth][0] != down
        if down >= 0 and not whole:
            found.append(unet.down_blocks[down])
    return found
