"""Runs of pipelines on inputs, measured against the uncached runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hgc.installation import install
from hgc.planning.config import Config

__all__ = ["Trial"]


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the uncached run showed: everything a count of MACs needs."""

    evaluations: int
    guidance: bool
    images: int
    height: int
    width: int
    tokens: int


class Trial:
    """Runs pipelines on inputs, and measures latents against those of the uncached runs.

    Args:
        items: Each a pipeline and the arguments of one call of it.
        steps: Steps of the uncached runs.
        seed: Input ``i`` gets a generator with ``seed + i`` where it has none.
        output: ``output_type`` of the calls: what is measured.
    """

    def __init__(
        self,
        items: Sequence[tuple[Any, Mapping[str, Any]]],
        steps: int,
        seed: int = 0,
        output: str = "latent",
    ) -> None:
        self.items, self.steps, self.seed, self.output = items, steps, seed, output
        self.facts = self._facts()
        self.references = [self._draw(i, steps) for i in range(len(items))]

    def _facts(self) -> _Facts:
        calls: list[tuple[torch.Size, torch.Size]] = []

        def count(module: Any, args: Any, kwargs: Any) -> None:
            sample = args[0] if args else kwargs["sample"]
            calls.append((sample.shape, kwargs["encoder_hidden_states"].shape))

        hook = self.items[0][0].unet.register_forward_pre_hook(count, with_kwargs=True)
        try:
            images = len(self._draw(0, self.steps))
        finally:
            hook.remove()
        (rows, _, height, width), text = calls[0]
        return _Facts(len(calls), rows == 2 * images, images, height, width, text[1])

    def _draw(self, index: int, steps: int) -> torch.Tensor:
        pipe, arguments = self.items[index]
        several = [torch.Generator().manual_seed(self.seed + index)]
        prompts = arguments.get("prompt")
        if isinstance(prompts, list):
            several = [
                torch.Generator().manual_seed(1000 * (self.seed + index) + i)
                for i in range(len(prompts) * arguments.get("num_images_per_prompt", 1))
            ]
        latents = pipe(
            **{
                "generator": several if len(several) > 1 else several[0],
                **arguments,
                "num_inference_steps": steps,
                "output_type": self.output,
            }
        ).images
        return latents.detach().float()

    def errors(self, config: Config | None, steps: int, which: Sequence[int]) -> list[torch.Tensor]:
        """The error of each picture's latents, flat, over the norm of the uncached ones: with
        ``config``, or without hgc at ``steps``."""
        found: list[torch.Tensor] = []
        for i in which:
            pipe = self.items[i][0]
            if config is None:
                latents = self._draw(i, steps)
            else:
                with install(pipe, config=config):
                    latents = self._draw(i, steps)
            reference = self.references[i].flatten(1)
            found += ((latents.flatten(1) - reference) / reference.norm(dim=1, keepdim=True)).cpu()
        return found

    def distances(self, config: Config | None, steps: int, which: Sequence[int]) -> list[float]:
        """Relative L2 of each picture's latents: norms of :meth:`errors`."""
        return [float(error.norm()) for error in self.errors(config, steps, which)]
