"""The prompt grain of an evaluation: what its cross-attentions reuse, keep and write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hgc.models import attention as prompt_grain
from hgc.models.structure import UNetStructure
from hgc.planning.config import Config
from hgc.run.cache import Cache
from hgc.run.run import Run
from hgc.watch.watch import Watch

__all__ = ["PromptGrain", "may_be_kept"]

Tensor = torch.Tensor


def may_be_kept(source: Tensor) -> bool:
    """Whether what is computed from ``source`` may stand for the run: a write to it would be seen,
    and no graph of autograd hangs on it."""
    return not source.is_inference() and not torch.is_grad_enabled()


class PromptGrain:
    """Makes the text of a network carry what its cross-attentions read and write."""

    def __init__(self, unet: Any, structure: UNetStructure, config: Config, watch: Watch) -> None:
        self._structure, self._config = structure, config
        self._processors, self._watched = watch.processors, watch.layers
        self._names = tuple(prompt_grain.cross_attentions(unet))
        self._layers: dict[int, frozenset[str]] = {}

    def mode(self, run: Run, prefix: str, half: bool) -> str:
        """What the evaluation of ``run`` under way does for the outputs of cross-attentions in the
        network whose cache entries begin with ``prefix``: ``"output"``, cached ones are reused;
        ``"map"``, cached maps are applied to the values; ``"compute"``. ``half``: of the
        conditional half of the batch alone."""
        if run.now is None or run.now.plan.attention != "reuse" or not self._processors.wraps:
            return "compute"
        for kind, mode in (("attention/", "output"), ("map/", "map")):
            held = (name for name in run.cache.names() if name.startswith(prefix + kind))
            if any(run.cache.has(name, half=half) for name in held):
                return mode
        return "compute"

    def keeps(self, net: torch.nn.Module, text: Tensor) -> bool:
        """Whether keys and values that ``net`` makes of ``text`` may stand for the run."""
        return may_be_kept(text) and not self._watched.draws(net)

    def wrapper(
        self, run: Run, net: torch.nn.Module, prefix: str, half: bool, mode: str
    ) -> Callable[[Any], Any] | None:
        """What wraps the text of ``net``, whose cache entries begin with ``prefix``, in the
        evaluation of ``run`` under way; None where it is passed as it is. ``mode``: :meth:`mode`'s
        answer."""
        now = run.now
        if not self._processors.wraps or now is None:
            return None
        step = now.plan
        if half and not step.is_key and step.attention == "compute":
            plain = run.plain_text.get(prefix)
            if plain is None:
                keeps = functools.partial(self.keeps, net)
                plain = run.plain_text[prefix] = _PlainText(run.cache, prefix, keeps)
            return plain
        store, map_format = None, None
        schedule = run.schedule
        reads_attention = step.is_key and "attention" in schedule.will_read(after=now.index)[0]
        if mode != "output" and reads_attention:
            layers = self._layers_read(run, now.index) if prefix == "unet/" else None
            store = (lambda name: True) if layers is None else layers.__contains__
        keeps_maps = step.is_key and mode == "compute" and self._config.fresh_values
        if keeps_maps and schedule.keeps_attention[now.index]:
            map_format = self._config.map_format
        watch = run.maps.add if run.maps and step.is_key and prefix == "unet/" else None

        def wrap(text: Any) -> Any:
            if not isinstance(text, Tensor):
                return text
            return prompt_grain.Text(
                hidden=text,
                cache=run.cache,
                prefix=prefix,
                evaluation=now.index,
                half=half,
                keep_projections=self.keeps(net, text),
                mode=mode,
                store=store,
                map_format=map_format,
                watch=watch,
            )

        return wrap

    def _layers_read(self, run: Run, index: int) -> frozenset[str] | None:
        """UNet cross-attentions whose output an evaluation after ``index`` reads; None: all."""
        depths: set[int] = set()
        for step in run.schedule.plan[index + 1 :]:
            if step.attention == "reuse":
                if not isinstance(step.depth, int):
                    return None
                depths.add(step.depth)
            if step.is_key and step.attention == "compute":
                break
        depth = max(depths, default=0)
        if depth not in self._layers:
            blocks = self._structure.attention_blocks(depth)
            self._layers[depth] = frozenset(n for n in self._names if n.startswith(blocks))
        return self._layers[depth]


class _PlainText:
    """What makes the conditional half of a text carry the projections that a run keeps, and nothing
    else: the same for every evaluation that neither stores nor reuses cross-attention."""

    def __init__(self, cache: Cache, prefix: str, keeps: Callable[[Tensor], bool]) -> None:
        self._cache, self._prefix, self._keeps = cache, prefix, keeps
        self._last: prompt_grain.Text | None = None

    def __call__(self, text: Any) -> Any:
        if not isinstance(text, Tensor):
            return text
        keep, last = self._keeps(text), self._last
        if last is None or last.hidden is not text or last.keep_projections is not keep:
            last = self._last = prompt_grain.Text(
                text, self._cache, self._prefix, evaluation=-1, half=True, keep_projections=keep
            )
        return last
