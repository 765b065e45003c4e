"""Times a pipeline with and without hgc, one after the other, and compares with the MACs.

Each variant runs eagerly, captured, compiled, or compiled with CUDA graphs, against the pipeline
without hgc in the same mode (in eager mode where that is captured: without hgc there is no such
thing), with fewer steps, and against other packages. The models have their true sizes;
weights may be random, since speed does not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hgc
from hgc.evaluation.models import KNOWN, ModelError
from hgc.models.supported import controlnets, in_dtype
from hgc.planning.config import Config

if TYPE_CHECKING:
    from hgc.report.macs import MacCount, Macs

__all__ = [
    "MODES",
    "PEERS",
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

# What torch.compile is asked for, by mode. Eager and captured runs compile nothing.
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "captured": {},
    "compiled": {"mode": "default"},
    "graphs": {"mode": "reduce-overhead"},
}
PEERS = ("deepcache-2", "deepcache-3", "deepcache-5")

_GUIDANCE = 5.0
_PROMPT = "a small house under a tall tree"
_POOL = 1 << 20
_GRAPHS = 64  # of all configurations together
_EXACT = Config.preset("exact")
# Counting takes seconds, and reads the models' configurations only.
_COUNTED: dict[Any, MacCount] = {}


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
        more: dict[str, Any] = {"local_files_only": True, **in_dtype(dtype)}
        cls: Any = DiffusionPipeline
        parts = json.loads(index.read_text())
        if controlnet:
            nets = [ControlNetModel.from_pretrained(place, **more) for place in controlnet]
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
        mode: Of the uncached run.
        promised: MACs of the uncached run over the candidate's, attention counted; None where the
            candidate's are not counted (another package).
        loop: Speedup of the denoising loop: the median over repeats of the uncached time over
            the candidate's in the same repeat.
        whole: The same of the whole pipeline call.
    """

    steps: int
    mode: str
    promised: float | None
    loop: float
    whole: float

    @property
    def arrived(self) -> float | None:
        """The loop's speedup over the promised one."""
        return None if self.promised is None else self.loop / self.promised


@dataclasses.dataclass(frozen=True)
class BenchRow:
    """One way to run the pipeline.

    Attributes:
        name: "uncached", the configuration's, or the other package's.
        steps: Denoising steps.
        mode: "eager", "captured", "compiled" or "graphs".
        loop: From the start of the first ControlNet or UNet call to the end of the last UNet call.
        whole: The pipeline call, with the picture decoded.
        macs: Of one call's loop, all multiply-accumulates; None where they are not counted.
        macs_paper: The same without the two attention matmuls.
        held_bytes: The most the cache held.
        peak_bytes: The most the device's allocator held during a call; None on a CPU.
        launches: Kernels and graphs launched an evaluation, in a call of its own; None on a CPU.
        against: The uncached run of the reference steps in the same mode; eager where it is
            "captured".
        against_equal: The same at the candidate's own steps.
        against_eager: The uncached eager run of the reference steps.
    """

    name: str
    steps: int
    mode: str
    loop: Timing
    whole: Timing
    macs: int | None
    macs_paper: int | None
    held_bytes: int
    peak_bytes: int | None
    launches: float | None
    against: Comparison | None
    against_equal: Comparison | None
    against_eager: Comparison | None

    @property
    def label(self) -> str:
        """Name, steps and mode."""
        mode = "" if self.mode == "eager" else f", {self.mode}"
        return f"{self.name}, {self.steps} steps{mode}"


_COMPARISONS = ("against", "against_equal", "against_eager")


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
            for name in _COMPARISONS:
                comparison = getattr(row, name)
                if comparison is not None:
                    data[name]["arrived"] = comparison.arrived
            rows.append(data)
        return json.dumps({"about": self.about, "rows": rows}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """A table with a row a way to run the pipeline, and what it was measured on."""
        about = self.about
        lines = [
            f"{about['pipeline']}, {about['height']} x {about['width']}, batch {about['images']}, "
            f"{about['dtype']}, {about['device_name']}, torch {about['torch']}, diffusers "
            f"{about['diffusers']}, hgc {about['hgc']}, {about['repeats']} interleaved repeats. "
            "Speedups: of the loop, medians of ratios within a repeat. Arrived: the speedup over "
            "the same mode, over what the MACs promise.",
            "",
            "| | TMACs | loop s, p50 [p20, p80] | pipeline s | over its mode | arrived "
            "| at its own steps | over eager | peak MiB | launches |",
            "|---|" + "---:|" * 9,
        ]
        for row in self.rows:
            own, equal, eager = (getattr(row, name) for name in _COMPARISONS)
            loop = row.loop
            cells = [
                row.label,
                "" if row.macs is None else f"{row.macs / 1e12:.4g}",
                f"{loop.median:.3f} [{loop.percentile(0.2):.3f}, {loop.percentile(0.8):.3f}]",
                f"{row.whole.median:.3f}",
                "" if own is None else f"{own.loop:.2f}x",
                "" if own is None or own.arrived is None else f"{own.arrived:.0%}",
                "" if equal is None else f"{equal.loop:.2f}x",
                "" if eager is None else f"{eager.loop:.2f}x",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
                "" if row.launches is None else f"{row.launches:.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def save_chart(self, path: Path) -> None:
        """A bar a row: the loop's median time, with the 20th and 80th percentile, to ``path``.

        Raises ModelError where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ModelError(
                'a chart needs matplotlib: pip install "hybrid-grained-cache[demo]"'
            ) from None
        rows = self.rows[::-1]
        middle = [row.loop.median for row in rows]
        spread = [
            [m - row.loop.percentile(0.2) for m, row in zip(middle, rows, strict=True)],
            [row.loop.percentile(0.8) - m for m, row in zip(middle, rows, strict=True)],
        ]
        colours = {
            "eager": "#8da0cb", "captured": "#e78ac3", "compiled": "#66c2a5", "graphs": "#fc8d62"
        }  # fmt: skip
        figure = Figure(figsize=(8, 0.8 + 0.32 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(
            [row.label for row in rows], middle, xerr=spread,
            color=[colours[row.mode] for row in rows],
        )  # fmt: skip
        axes.set_xlabel("denoising loop, seconds")
        about = self.about
        axes.set_title(
            f"{about['device_name']}, {about['height']} x {about['width']}, batch "
            f"{about['images']}, {about['dtype']}", fontsize=9,
        )  # fmt: skip
        figure.savefig(path, dpi=150)


class _Clock:
    """Times the denoising loop of a pipeline call through hooks on its models.

    On a GPU the ends are events on its stream, so nothing waits for the device within the loop.
    """

    def __init__(self, pipe: Any, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._begin: Any = None
        self._marks: list[tuple[Any, Any]] = []  # begin and end of each evaluation
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
        self._marks.append((self._begin, self._now()))
        self._begin = None

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._cuda else end - begin

    def evaluations(self) -> list[float]:
        """Seconds of each evaluation of the last call: from the first ControlNet's start to the
        UNet's end."""
        return [self._seconds(begin, end) for begin, end in self._marks]

    def time(self, call: Callable[[], Any]) -> tuple[float, float]:
        """(seconds of the loop, seconds of the whole call)."""
        self._begin = None
        self._marks.clear()
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if self._cuda:
            torch.cuda.synchronize()
        whole = time.perf_counter() - start
        if not self._marks:
            raise RuntimeError("the pipeline called neither its ControlNet nor its UNet")
        return self._seconds(self._marks[0][0], self._marks[-1][1]), whole

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _inputs(
    pipe: Any, height: int, width: int, images: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of a call: a prompt where there is a text encoder, else random embeddings."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    config = pipe.unet.config
    arguments: dict[str, Any] = {"height": height, "width": width, "guidance_scale": _GUIDANCE}
    if images > 1:
        arguments["num_images_per_prompt"] = images
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


@dataclasses.dataclass(frozen=True)
class _Variant:
    """A way to run the pipeline."""

    name: str
    steps: int
    mode: str = "eager"
    config: Config | None = None
    peer: int = 0  # DeepCache's interval

    @property
    def is_uncached(self) -> bool:
        return self.config is None and not self.peer


class _Runner:
    """Puts a pipeline into the state of a variant, keeping what was compiled for it."""

    def __init__(self, pipe: Any, nets: list[Any], options: dict[str, Any]) -> None:
        self._pipe, self._nets, self._options = pipe, nets, options
        self._forwards: dict[str, dict[Any, Any]] = {}
        # one set of networks a mode: kinds of evaluations are the same in all configurations
        self._made: dict[str, Any] = {}

    def _compile(self, mode: str) -> dict[str, Any]:
        return {**MODES[mode], **self._options}

    @contextlib.contextmanager
    def state(self, variant: _Variant) -> Iterator[hgc.Installation | None]:
        """The pipeline as ``variant`` wants it."""
        if variant.peer:
            with self._deepcache(variant.peer):
                yield None
        elif variant.config is None:
            with self._uncached(variant.mode):
                yield None
        else:
            pipe, nets = self._pipe, self._nets
            with hgc.install(
                pipe.unet, nets, config=variant.config, scheduler=pipe.scheduler
            ) as installation:
                if variant.mode != "eager":
                    if variant.mode not in self._made:
                        if variant.mode == "captured":
                            installation.capture(graphs=_GRAPHS)
                        else:
                            installation.compile(**self._compile(variant.mode))
                        self._made[variant.mode] = installation._engine.functions.networks
                    installation._engine.functions.networks = self._made[variant.mode]
                try:
                    yield installation
                finally:
                    installation._engine.functions.networks = None  # to be used again

    @contextlib.contextmanager
    def _uncached(self, mode: str) -> Iterator[None]:
        if mode == "eager":
            yield
            return
        if mode not in self._forwards:
            # the forward, not the module: hooks that measure must stay outside of the graph
            self._forwards[mode] = {
                module: torch.compile(module.forward, **self._compile(mode))
                for module in (self._pipe.unet, *self._nets)
            }
        handles = []
        if mode == "graphs":
            # the ControlNet's outputs must live until the UNet has read them
            first = self._nets[0] if self._nets else self._pipe.unet
            handles.append(
                first.register_forward_pre_hook(
                    lambda module, args: torch.compiler.cudagraph_mark_step_begin()
                )
            )
        try:
            for module, forward in self._forwards[mode].items():
                module.forward = forward
            yield
        finally:
            for module in self._forwards[mode]:
                module.__dict__.pop("forward", None)
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _deepcache(self, interval: int) -> Iterator[None]:
        helper = _deepcache_class()(pipe=self._pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()


def _deepcache_class() -> Any:
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        raise ModelError(
            'the rows of DeepCache need it: pip install "hybrid-grained-cache[peers]"'
        ) from None
    return DeepCacheSDHelper


def _launches(call: Callable[[], Any], evaluations: int) -> float:
    """Kernels and graphs that a call launches on a GPU, an evaluation; the whole call's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    names = ("LaunchKernel", "GraphLaunch", "LaunchCooperative")
    count = sum(e.count for e in profiled.key_averages() if any(n in e.key for n in names))
    return count / evaluations


def _mode_of_reference(mode: str) -> str:
    """That of the uncached run beside one in ``mode``."""
    return "eager" if mode == "captured" else mode


def _variants(
    steps: int,
    own: Sequence[tuple[Config, int]],
    fewer: Sequence[int],
    modes: Sequence[str],
    peers: Sequence[str],
) -> list[_Variant]:
    """Uncached ones first, each mode's by itself, the reference of every mode foremost."""
    counts = dict.fromkeys([steps, *(c for _, c in own), *fewer])
    variants = [
        _Variant("uncached", count, mode) for mode in dict.fromkeys(map(_mode_of_reference, modes))
        for count in counts
    ]  # fmt: skip
    if not any(v.mode == "eager" for v in variants):
        variants.insert(0, _Variant("uncached", steps))
    for peer in peers:
        interval = int(peer.rpartition("-")[2])
        variants.append(_Variant(f"DeepCache, interval {interval}", steps, peer=interval))
    variants += [_Variant(c.name, n, mode, config=c) for mode in modes for c, n in own]
    return variants


def count_macs_of(
    unet: Any, nets: Sequence[Any], height: int, width: int, images: int
) -> Callable[[Config | None, int], Macs]:
    """Counts MACs of evaluations under a configuration, or without hgc (None), at one size."""

    size: dict[str, Any] = {"height": height, "width": width, "images": images}

    def count(config: Config | None, evaluations: int) -> Macs:
        key = (
            *(model.to_json_string() for model in (unet, *nets)),
            (config or _EXACT).to_json(), evaluations, *size.values(),
        )  # fmt: skip
        if key not in _COUNTED:
            _COUNTED[key] = hgc.count_macs(
                unet, list(nets), config or _EXACT, num_evaluations=evaluations, **size
            )
        counted = _COUNTED[key]
        if config is None:
            return counted.full_evaluation * evaluations
        return type(counted.full_evaluation)(counted.total, counted.paper)

    return count


def bench(
    pipe: Any,
    configs: Sequence[Config],
    *,
    height: int,
    width: int,
    steps: int = 20,
    repeats: int = 5,
    images: int = 1,
    modes: Sequence[str] = ("eager",),
    fewer_steps: bool = False,
    peers: Sequence[str] = (),
    device: str = "cpu",
    compile_options: dict[str, Any] | None = None,
    count: Callable[[Config | None, int], Macs] | None = None,
    count_launches: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Bench:
    """Time ``pipe`` without hgc and with each of ``configs``, interleaved.

    A configuration runs at the steps it is meant for where ``steps`` is 20, and at its share of
    ``steps`` otherwise. In each mode it is compared with the uncached run of ``steps``, and with
    the uncached run of its own steps, which is timed too; and with the eager uncached run.

    Args:
        pipe: A Stable Diffusion pipeline with a UNet, on ``device``; hgc is not installed on it.
        configs: What to install.
        height: Pixels.
        width: Pixels.
        steps: Of the uncached run.
        repeats: Rounds; each runs every variant once, starting one variant later than the last.
        images: Images a call.
        modes: Of "eager", "captured" (:meth:`hgc.Installation.capture`), "compiled"
            (``torch.compile``) and "graphs" (the same with CUDA graphs).
        fewer_steps: Also the uncached run of the fewest steps that cost at least as many MACs as
            each configuration.
        peers: Of "deepcache-N", N the interval: DeepCache, which must be installed.
        device: Where ``pipe`` is.
        compile_options: More options for ``torch.compile``, such as a backend.
        count: MACs of so many evaluations under a configuration, or without hgc; default: counted
            on the meta device, see :func:`count_macs_of`.
        count_launches: On a GPU, profile one more call of each variant, which takes seconds.
        on_progress: Called with a label, calls done and calls in all.

    Returns:
        A :class:`Bench`.

    Raises:
        ModelError: a peer is not installed.
        ValueError: an argument is out of range, or the size or a configuration does not fit.
    """
    from hgc.evaluation.candidate import steps_of

    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    if images < 1:
        raise ValueError(f"images must be at least 1; got {images}")
    if not modes or set(modes) - set(MODES):
        raise ValueError(f"modes must be some of {', '.join(MODES)}; got {', '.join(modes)}")
    if set(peers) - set(PEERS):
        raise ValueError(f"peers must be some of {', '.join(PEERS)}; got {', '.join(peers)}")
    cuda = device.startswith("cuda")
    if {"graphs", "captured"} & set(modes) and not cuda:
        raise ValueError(f"modes: CUDA graphs need a CUDA device; got {device!r}")
    if peers:
        _deepcache_class()
    nets = list(controlnets(getattr(pipe, "controlnet", None)))
    own = [(config, steps_of(config, steps)) for config in configs]

    if count is None:
        count = count_macs_of(pipe.unet, nets, height, width, images)
    evaluation = count(None, 1)
    own_macs = {config.name: count(config, n) for config, n in own}
    fewer = [math.ceil(macs.total / evaluation.total) for macs in own_macs.values()]
    variants = _variants(steps, own, fewer if fewer_steps else (), modes, peers)
    macs = [
        None if v.peer else evaluation * v.steps if v.config is None else own_macs[v.name]
        for v in variants
    ]

    arguments = _inputs(pipe, height, width, images, device, next(pipe.unet.parameters()).dtype)
    runner = _Runner(pipe, nets, compile_options or {})
    clock = _Clock(pipe, device)
    held, peak = [0] * len(variants), [0] * len(variants)
    launches: list[float | None] = [None] * len(variants)
    samples: list[list[tuple[float, float]]] = [[] for _ in variants]
    # On a GPU kernels are chosen at their first use, and a graph is recorded at its second.
    warm = [
        {"eager": 1 if cuda or i == 0 else 0, "captured": 2, "compiled": 1, "graphs": 3}[v.mode]
        for i, v in enumerate(variants)
    ]
    total, done = repeats * len(variants) + sum(warm), 0

    def say(label: str) -> None:
        if on_progress is not None:
            on_progress(label, done, total)

    def call(steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        pipe(**arguments, num_inference_steps=steps, generator=generator, output_type="np")

    def run(i: int, steps: int) -> tuple[float, float]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with runner.state(variants[i]) as installation:
            timed = clock.time(lambda: call(steps))
            if installation is not None:
                last = installation._engine.registry.last
                held[i] = 0 if last is None else last.cache.peak_bytes
        if cuda:
            peak[i] = torch.cuda.max_memory_allocated()
        return timed

    def label(variant: _Variant) -> str:
        mode = "" if variant.mode == "eager" else f", {variant.mode}"
        return f"{variant.name}, {variant.steps} steps{mode}"

    try:
        for i, times in enumerate(warm):
            for _ in range(times):
                say("warming up")
                quick = not cuda and variants[i].mode == "eager"
                run(i, 2 if quick else variants[i].steps)
                done += 1
        for repeat in range(repeats):
            for place in range(len(variants)):
                i = (place + repeat) % len(variants)
                say(label(variants[i]))
                samples[i].append(run(i, variants[i].steps))
                done += 1
        if cuda and count_launches:
            for i, variant in enumerate(variants):
                with runner.state(variant):
                    launches[i] = _launches(functools.partial(call, variant.steps), variant.steps)
    finally:
        clock.remove()
    say("done")

    def compare(i: int, mode: str, count: int) -> Comparison | None:
        j = next(
            (
                j
                for j, v in enumerate(variants)
                if v.is_uncached and (v.mode, v.steps) == (mode, count)
            ),
            i,
        )
        if j == i:
            return None
        ratios = [
            statistics.median(b[k] / a[k] for a, b in zip(samples[i], samples[j], strict=True))
            for k in (0, 1)
        ]
        here, there = macs[i], macs[j]
        promised = None if here is None or there is None else there.total / here.total
        return Comparison(count, mode, promised, *ratios)

    rows = []
    for i, variant in enumerate(variants):
        counted = macs[i]
        rows.append(
            BenchRow(
                name=variant.name,
                steps=variant.steps,
                mode=variant.mode,
                loop=Timing(tuple(a for a, _ in samples[i])),
                whole=Timing(tuple(b for _, b in samples[i])),
                macs=None if counted is None else counted.total,
                macs_paper=None if counted is None else counted.paper,
                held_bytes=held[i],
                peak_bytes=peak[i] if cuda else None,
                launches=launches[i],
                against=compare(i, _mode_of_reference(variant.mode), steps),
                against_equal=None
                if variant.is_uncached
                else compare(i, _mode_of_reference(variant.mode), variant.steps),
                against_eager=compare(i, "eager", steps),
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
        "images": images,
        "text_encoder_timed": getattr(pipe, "text_encoder", None) is not None,
    }
    return Bench(about, tuple(rows))
