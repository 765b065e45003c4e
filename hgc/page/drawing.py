"""One picture of a pipeline, with the cache or without, and what it cost."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

import hgc

__all__ = ["Asked", "Drawn", "draw", "fewer_steps"]


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What a picture is made from, cached or not.

    Attributes:
        prompt: The text.
        condition: What the ControlNet sees, RGB; its size is the picture's.
        seed: Of the noise.
        guidance: Guidance scale.
        scheduler: A diffusers scheduler; None: the pipeline's own.
    """

    prompt: str
    condition: Image.Image
    seed: int
    guidance: float
    scheduler: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A picture and what it cost.

    Attributes:
        name: What made it.
        image: RGB.
        steps: Of the run.
        seconds: Of the pipeline call, with the text encoder and the VAE.
        macs: Of the run's evaluations, as :class:`hgc.Report` counts them.
        report: What each evaluation did; None where hgc was not installed.
        maps: Where each token looked, [1, tokens, h, w]; None where no maps were kept.
        warned: What hgc warned of.
    """

    name: str
    image: Image.Image
    steps: int
    seconds: float
    macs: Any
    report: hgc.Report | None
    maps: Any
    warned: tuple[str, ...]

    @property
    def pixels(self) -> np.ndarray:
        """The picture as float32 [H, W, 3] in [0, 1]."""
        return np.asarray(self.image, np.float32) / 255


def draw(
    pipe: Any,
    asked: Asked,
    steps: int,
    config: hgc.Config | None = None,
    *,
    name: str = "",
    on_step: Callable[[int, int], None] = lambda done, steps: None,
    prompts: Mapping[int, Any] | None = None,
) -> Drawn:
    """Make one picture with ``pipe``, which is left as it was.

    config: what hgc is installed with; None: without hgc.
    on_step: called with (steps done, steps) after each. What it raises ends the run.
    prompts: embeddings, as the pipeline passes them on, that take the prompt's place after so many
        steps.
    """
    prompts = prompts or {}

    def after(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(index + 1, steps)
        changed = prompts.get(index + 1)
        return {} if changed is None else {"prompt_embeds": changed}

    import torch

    own = pipe.scheduler
    pipe.scheduler = own if asked.scheduler is None else asked.scheduler
    without = contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, pipe, "scheduler", own)
        said = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always", hgc.HgcWarning)
        installed = stack.enter_context(
            without if config is None else hgc.install(pipe, config=config)
        )
        start = time.perf_counter()
        image = pipe(
            asked.prompt,
            image=asked.condition,
            height=asked.condition.height,
            width=asked.condition.width,
            num_inference_steps=steps,
            guidance_scale=asked.guidance,
            generator=torch.Generator().manual_seed(asked.seed),
            callback_on_step_end=after,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        ).images[0]
        seconds = time.perf_counter() - start
        report = None if installed is None else installed.report()
        keeps_maps = config is not None and config.fresh_values
        maps = installed.maps() if installed is not None and keeps_maps else None
    macs = _full(pipe, asked) * steps if report is None else report.macs
    warned = tuple(str(one.message) for one in said if issubclass(one.category, hgc.HgcWarning))
    return Drawn(name, image, steps, seconds, macs, report, maps, warned)


def _full(pipe: Any, asked: Asked) -> Any:
    """MACs of one evaluation without hgc."""
    return _count(pipe, asked, "exact", 1).full_evaluation


def _count(pipe: Any, asked: Asked, config: hgc.Config | str, steps: int) -> hgc.MacCount:
    return hgc.count_macs(
        pipe.unet, pipe.controlnet, config, num_evaluations=steps,
        height=asked.condition.height, width=asked.condition.width, guidance=asked.guidance > 1,
        tokens=pipe.tokenizer.model_max_length,
    )  # fmt: skip


def fewer_steps(pipe: Any, asked: Asked, config: hgc.Config, steps: int) -> int:
    """The fewest uncached steps that cost at least as many MACs as ``config`` does at ``steps``, in
    both conventions."""
    count = _count(pipe, asked, config, steps)
    one = count.full_evaluation
    return max(1, -(-count.total // one.total), -(-count.paper // one.paper))
