"""Times a pipeline with and without hgc, one after the other, and compares with the MACs.

The models have their true sizes; weights may be random, since speed does not depend on them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hgc
from hgc.config import Config
from hgc.evaluation.models import KNOWN, ModelError
from hgc.structure import controlnets

if TYPE_CHECKING:
    from hgc.macs import Macs

__all__ = [
    "Bench",
    "BenchRow",
    "Comparison",
    "Timing",
    "about_device",
    "bench",
    "load_pipeline",
    "random_weights",
]

Tensor = torch.Tensor

_GUIDANCE = 5.0
_PROMPT = "a small house under a tall tree"
_POOL = 1 << 20


def random_weights(model: Any, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Give a model on the meta device random weights, in seconds.

    Weights of rank 2 and more are normal with the variance that keeps activations in range; they
    repeat after a million values. Norms are the identity, biases are 0.
    """
    # not the diffusers override, which warns of modules that checkpoints keep in float32
    model = torch.nn.Module.to(model, dtype=dtype).to_empty(device=device)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    offset = 0
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            scale = 1.0 / math.sqrt(weight[0].numel())
            flat = weight.view(-1)
            done = 0
            while done < flat.numel():
                count = min(flat.numel() - done, _POOL - offset)
                torch.mul(pool[offset : offset + count], scale, out=flat[done : done + count])
                done += count
                offset = (offset + count) % _POOL
    return model.eval().requires_grad_(False)


def _random_pipeline(model: str, device: str, dtype: torch.dtype) -> Any:
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        StableDiffusionControlNetPipeline,
        StableDiffusionXLControlNetPipeline,
        UNet2DConditionModel,
        UniPCMultistepScheduler,
    )

    with torch.device("meta"):
        unet = UNet2DConditionModel(**KNOWN[model]["unet"])
        net = ControlNetModel(**KNOWN[model]["controlnet"])
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            # SDXL's decoder overflows in half precision, and its pipelines upcast where this is set
            force_upcast=False,
        )
    parts = {
        "unet": random_weights(unet, device, dtype, 0),
        "controlnet": random_weights(net, device, dtype, 1),
        "vae": random_weights(vae, device, dtype, 2),
        "scheduler": UniPCMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        "text_encoder": None,
        "tokenizer": None,
    }
    if model == "sdxl":
        return StableDiffusionXLControlNetPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
    return StableDiffusionControlNetPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def load_pipeline(
    model: str,
    controlnet: Sequence[Path] = (),
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The pipeline of ``model``: "sd15" or "sdxl" with random weights, "testbed", or the folder of
    a diffusers pipeline, with the ControlNets in the folders ``controlnet`` where some are given.

    Raises ModelError where there is no such model or the folder holds none.
    """
    from diffusers import (
        ControlNetModel,
        DiffusionPipeline,
        StableDiffusionControlNetPipeline,
        StableDiffusionXLControlNetPipeline,
    )

    if model in KNOWN:
        if controlnet:
            raise ModelError(f"{model} has random weights and a ControlNet of its own")
        pipe = _random_pipeline(model, device, dtype)
    elif model == "testbed":
        from hgc import testbed

        pipe = testbed.load_pipeline("segmentation", torch_dtype=dtype)
    else:
        folder = Path(model)
        index = folder / "model_index.json"
        if not index.exists():
            raise ModelError(
                f"no model named {model!r}, and no folder of that name with a model_index.json; "
                f"models: {', '.join(KNOWN)}, testbed, or the folder of a diffusers pipeline"
            )
        more: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
        cls: Any = DiffusionPipeline
        parts = json.loads(index.read_text())
        if controlnet:
            nets = [
                ControlNetModel.from_pretrained(place, dtype=dtype, local_files_only=True)
                for place in controlnet
            ]
            more["controlnet"] = nets[0] if len(nets) == 1 else nets
            xl = "XL" in str(parts["_class_name"])
            cls = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
        # a pipeline saved without a text encoder loads only where the gap is named
        more.update({name: None for name, kind in parts.items() if kind == [None, None]})
        if "safety_checker" in parts:
            more["safety_checker"] = None
        try:
            pipe = cls.from_pretrained(folder, **more)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{folder} could not be loaded: {str(error).splitlines()[0]}"
            ) from None
        if not hasattr(pipe, "unet"):
            raise ModelError(f"{folder} holds a {type(pipe).__name__}, which has no UNet")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of several repeats.

    Attributes:
        samples: In the order they were taken.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """p50."""
        return statistics.median(self.samples)

    def percentile(self, share: float) -> float:
        """By linear interpolation between the samples."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A candidate against one uncached run.

    Attributes:
        steps: Of the uncached run.
        promised: MACs of the uncached run over the candidate's, attention counted.
        loop: Speedup of the denoising loop: the median over repeats of the uncached time over
            the candidate's in the same repeat.
        whole: The same of the whole pipeline call.
    """

    steps: int
    promised: float
    loop: float
    whole: float

    @property
    def arrived(self) -> float:
        """The loop's speedup over the promised one."""
        return self.loop / self.promised


@dataclasses.dataclass(frozen=True)
class BenchRow:
    """One way to run the pipeline.

    Attributes:
        name: "uncached" or the configuration's.
        steps: Denoising steps.
        loop: From the start of the first ControlNet or UNet call to the end of the last UNet call.
        whole: The pipeline call, with the picture decoded.
        macs: Of one call's loop, all multiply-accumulates.
        macs_paper: The same without the two attention matmuls.
        held_bytes: The most the cache held.
        against: The uncached run of the reference steps.
        against_equal: The uncached run at the candidate's own steps.
    """

    name: str
    steps: int
    loop: Timing
    whole: Timing
    macs: int
    macs_paper: int
    held_bytes: int
    against: Comparison | None
    against_equal: Comparison | None


@dataclasses.dataclass(frozen=True)
class Bench:
    """What :func:`bench` measured.

    Attributes:
        about: Device, versions and settings.
        rows: One a way to run the pipeline, the uncached ones first.
    """

    about: dict[str, Any]
    rows: tuple[BenchRow, ...]

    def to_json(self) -> str:
        """Everything, with each sample."""
        rows = []
        for row in self.rows:
            data = dataclasses.asdict(row)
            for name in ("loop", "whole"):
                timing = getattr(row, name)
                data[name] = {
                    "samples": list(timing.samples),
                    "p20": timing.percentile(0.2),
                    "p50": timing.median,
                    "p80": timing.percentile(0.8),
                }
            for name in ("against", "against_equal"):
                comparison = getattr(row, name)
                if comparison is not None:
                    data[name]["arrived"] = comparison.arrived
            rows.append(data)
        return json.dumps({"about": self.about, "rows": rows}, indent=1) + "\n"


class _Clock:
    """Times the denoising loop of a pipeline call through hooks on its models.

    On a GPU the ends are events on its stream, so nothing waits for the device within the loop.
    """

    def __init__(self, pipe: Any, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._begin: Any = None
        self._end: Any = None
        nets = controlnets(getattr(pipe, "controlnet", None))
        self._handles = [
            module.register_forward_pre_hook(self._enter) for module in (pipe.unet, *nets)
        ]
        self._handles.append(pipe.unet.register_forward_hook(self._leave))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, module: torch.nn.Module, arguments: Any) -> None:
        if self._begin is None:
            self._begin = self._now()

    def _leave(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        self._end = self._now()

    def time(self, call: Callable[[], Any]) -> tuple[float, float]:
        """(seconds of the loop, seconds of the whole call)."""
        self._begin = self._end = None
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if self._cuda:
            torch.cuda.synchronize()
        whole = time.perf_counter() - start
        if self._begin is None or self._end is None:
            raise RuntimeError("the pipeline called neither its ControlNet nor its UNet")
        if self._cuda:
            return self._begin.elapsed_time(self._end) / 1e3, whole
        return self._end - self._begin, whole

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _inputs(pipe: Any, height: int, width: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call: a prompt where there is a text encoder, else random embeddings."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    config = pipe.unet.config
    arguments: dict[str, Any] = {"height": height, "width": width, "guidance_scale": _GUIDANCE}
    if getattr(pipe, "text_encoder", None) is not None:
        arguments["prompt"] = _PROMPT
    else:
        arguments["prompt_embeds"] = normal(1, 77, config.cross_attention_dim)
        arguments["negative_prompt_embeds"] = normal(1, 77, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":
            wide = config.projection_class_embeddings_input_dim - (
                6 * config.addition_time_embed_dim
            )
            arguments["pooled_prompt_embeds"] = normal(1, wide)
            arguments["negative_pooled_prompt_embeds"] = normal(1, wide)
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is not None:
        picture = torch.rand(1, 3, height, width, generator=random).to(device, dtype)
        several = not hasattr(controlnet, "controlnet_cond_embedding")
        arguments["image"] = [picture] * len(controlnets(controlnet)) if several else picture
    return arguments


def about_device(device: str) -> dict[str, Any]:
    """Device, threads and versions: what a figure must be quoted with."""
    import diffusers

    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            lines = cpuinfo.read_text(errors="replace").splitlines()
            found = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
            name = found[0] if found else name
    return {
        "device": device,
        "device_name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "hgc": hgc.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def bench(
    pipe: Any,
    configs: Sequence[Config],
    *,
    height: int,
    width: int,
    steps: int = 20,
    repeats: int = 5,
    device: str = "cpu",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Bench:
    """Time ``pipe`` without hgc and with each of ``configs``, interleaved.

    A configuration runs at the steps it is meant for where ``steps`` is 20, and at its share of
    ``steps`` otherwise. It is compared with the uncached run of ``steps``, and with the uncached
    run of its own steps, which is timed too.

    Args:
        pipe: A Stable Diffusion pipeline with a UNet, on ``device``; hgc is not installed on it.
        configs: What to install.
        height: Pixels.
        width: Pixels.
        steps: Of the uncached run.
        repeats: Rounds; each runs every variant once, starting one variant later than the last.
        device: Where ``pipe`` is.
        on_progress: Called with a label, calls done and calls in all.

    Returns:
        A :class:`Bench`.

    Raises:
        ValueError: the size or a configuration does not fit the model.
    """
    from hgc.evaluation.candidate import steps_of

    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    nets = list(controlnets(getattr(pipe, "controlnet", None)))
    runs: list[tuple[Config | None, int]] = [(None, steps)]
    own = [(config, steps_of(config, steps)) for config in configs]
    runs += [(None, count) for count in dict.fromkeys(c for _, c in own) if count != steps]
    runs += own

    counted: list[Macs] = []
    for config, count in runs:
        full = hgc.count_macs(
            pipe.unet, nets, config or "exact", num_evaluations=count if config else 1,
            height=height, width=width,
        )  # fmt: skip
        counted.append(
            full.full_evaluation * count
            if config is None
            else type(full.full_evaluation)(full.total, full.paper)
        )

    arguments = _inputs(pipe, height, width, device, next(pipe.unet.parameters()).dtype)
    clock = _Clock(pipe, device)
    held = [0] * len(runs)
    samples: list[list[tuple[float, float]]] = [[] for _ in runs]
    # On a GPU kernels are chosen at their first use, so every variant makes a whole run first.
    warm = len(runs) if device.startswith("cuda") else 1
    total, done = repeats * len(runs) + warm, 0

    def say(label: str) -> None:
        if on_progress is not None:
            on_progress(label, done, total)

    def run(i: int, count: int) -> tuple[float, float]:
        config = runs[i][0]
        generator = torch.Generator().manual_seed(0)

        def call() -> None:
            pipe(**arguments, num_inference_steps=count, generator=generator, output_type="np")

        if config is None:
            return clock.time(call)
        with hgc.install(pipe.unet, nets, config=config) as installation:
            timed = clock.time(call)
            last = installation._runs.last
            held[i] = 0 if last is None else last.cache.peak_bytes
        return timed

    try:
        for i in range(warm):
            say("warming up")
            run(i, runs[i][1] if warm > 1 else 2)
            done += 1
        for repeat in range(repeats):
            for place in range(len(runs)):
                i = (place + repeat) % len(runs)
                config, count = runs[i]
                say(f"{config.name if config else 'uncached'}, {count} steps")
                samples[i].append(run(i, count))
                done += 1
    finally:
        clock.remove()
    say("done")

    def compare(i: int, j: int) -> Comparison:
        ratios = [
            statistics.median(b[k] / a[k] for a, b in zip(samples[i], samples[j], strict=True))
            for k in (0, 1)
        ]
        return Comparison(runs[j][1], counted[j].total / counted[i].total, *ratios)

    rows = []
    for i, (config, count) in enumerate(runs):
        same = next(j for j, (c, n) in enumerate(runs) if c is None and n == count)
        rows.append(
            BenchRow(
                name=config.name if config else "uncached",
                steps=count,
                loop=Timing(tuple(a for a, _ in samples[i])),
                whole=Timing(tuple(b for _, b in samples[i])),
                macs=counted[i].total,
                macs_paper=counted[i].paper,
                held_bytes=held[i],
                against=compare(i, 0) if i else None,
                against_equal=compare(i, same) if config else None,
            )
        )
    about = {
        **about_device(device),
        "pipeline": type(pipe).__name__,
        "dtype": str(next(pipe.unet.parameters()).dtype).removeprefix("torch."),
        "height": height,
        "width": width,
        "steps": steps,
        "repeats": repeats,
        "text_encoder_timed": getattr(pipe, "text_encoder", None) is not None,
    }
    return Bench(about, tuple(rows))
