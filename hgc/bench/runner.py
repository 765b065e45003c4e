"""Times a pipeline with and without hgc, one after the other, and compares with the MACs.

Each variant runs eagerly, with fused norms, captured, compiled, or compiled with CUDA graphs,
against the pipeline without hgc in the same mode (in eager mode where without hgc there is no such
mode), with fewer steps, and against other packages. The models have their true sizes;
weights may be random, since speed does not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

import hgc
from hgc.bench.table import Bench, BenchRow, Comparison, Timing, Way, about_device
from hgc.evaluation.candidate import steps_of
from hgc.evaluation.models import ModelShapes
from hgc.evaluation.peers import deepcache, deepcache_class
from hgc.models.supported import controlnets
from hgc.planning.config import Config

if TYPE_CHECKING:
    from hgc.report.macs import Macs

__all__ = ["MODES", "PEERS", "bench"]

Tensor = torch.Tensor

# What torch.compile is asked for, by mode. The others compile nothing.
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "fused": {},
    "captured": {},
    "fused-captured": {},
    "compiled": {"mode": "default"},
    "graphs": {"mode": "reduce-overhead"},
}
_ONLY_OURS = ("fused", "captured", "fused-captured")
_WITHOUT_NETWORKS = ("eager", "fused")
PEERS = ("deepcache-2", "deepcache-3", "deepcache-5")

_GUIDANCE = 5.0
_PROMPT = "a small house under a tall tree"
_GRAPHS = 64  # of all configurations together


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


@dataclasses.dataclass(frozen=True)
class _Variant(Way):
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
            with deepcache(variant.peer, self._pipe):
                yield None
        elif variant.config is None:
            with self._uncached(variant.mode):
                yield None
        else:
            pipe, nets = self._pipe, self._nets
            with hgc.install(
                pipe.unet, nets, config=variant.config, scheduler=pipe.scheduler
            ) as installation:
                if variant.mode.startswith("fused"):
                    installation.fuse()
                if variant.mode not in _WITHOUT_NETWORKS:
                    if variant.mode not in self._made:
                        if variant.mode.endswith("captured"):
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
    return "eager" if mode in _ONLY_OURS else mode


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
    on_round: Callable[[Bench], None] | None = None,
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
        modes: Of "eager", "fused" (:meth:`hgc.Installation.fuse`), "captured"
            (:meth:`hgc.Installation.capture`), "fused-captured" (both), "compiled"
            (``torch.compile``) and "graphs" (the same with CUDA graphs).
        fewer_steps: Also the uncached run of the fewest steps that cost at least as many MACs as
            each configuration.
        peers: Of "deepcache-N", N the interval: DeepCache, which must be installed.
        device: Where ``pipe`` is.
        compile_options: More options for ``torch.compile``, such as a backend.
        count: MACs of so many evaluations under a configuration, or without hgc; default: counted
            on the meta device.
        count_launches: On a GPU, profile one more call of each variant, which takes seconds.
        on_progress: Called with a label, calls done and calls in all.
        on_round: Called after every round with what was measured so far.

    Returns:
        A :class:`Bench`.

    Raises:
        ConfigError: a peer is not installed.
        ValueError: an argument is out of range, or the size or a configuration does not fit.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    if images < 1:
        raise ValueError(f"images must be at least 1; got {images}")
    if not modes or set(modes) - set(MODES):
        raise ValueError(f"modes must be some of {', '.join(MODES)}; got {', '.join(modes)}")
    if set(peers) - set(PEERS):
        raise ValueError(f"peers must be some of {', '.join(PEERS)}; got {', '.join(peers)}")
    cuda = device.startswith("cuda")
    if {"graphs", "captured", "fused-captured"} & set(modes) and not cuda:
        raise ValueError(f"modes: CUDA graphs need a CUDA device; got {device!r}")
    if {"fused", "fused-captured"} & set(modes) and (exact := [c for c in configs if c.is_exact]):
        raise ValueError(f"modes: {exact[0].name} is exact, and fused norms round otherwise")
    if peers:
        deepcache_class()
    nets = list(controlnets(getattr(pipe, "controlnet", None)))
    own = [(config, steps_of(config, steps)) for config in configs]

    if count is None:
        shapes = ModelShapes(type(pipe).__name__, pipe.unet, tuple(nets))
        count = functools.partial(shapes.macs, height=height, width=width, images=images)
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
    eager = [1 if cuda or i == 0 else 0 for i in range(len(variants))]
    warm = [
        {"captured": 2, "fused-captured": 2, "compiled": 1, "graphs": 3}.get(v.mode, eager[i])
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

    about = {
        **about_device(device),
        "pipeline": type(pipe).__name__,
        "dtype": str(next(pipe.unet.parameters()).dtype).removeprefix("torch."),
        "height": height,
        "width": width,
        "steps": steps,
        "repeats": repeats,
        "images": images,
        "scheduler": type(pipe.scheduler).__name__,
        "text_encoder_timed": getattr(pipe, "text_encoder", None) is not None,
    }

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

    def row(i: int) -> BenchRow:
        variant, counted = variants[i], macs[i]
        return BenchRow(
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

    def measured() -> Bench:
        rows = [row(i) for i in range(len(variants))]
        return Bench({**about, "repeats": len(samples[-1])}, tuple(rows))

    try:
        for i, times in enumerate(warm):
            for _ in range(times):
                say("warming up")
                quick = not cuda and variants[i].mode in _WITHOUT_NETWORKS
                run(i, 2 if quick else variants[i].steps)
                done += 1
        for repeat in range(repeats):
            for place in range(len(variants)):
                i = (place + repeat) % len(variants)
                say(variants[i].label)
                samples[i].append(run(i, variants[i].steps))
                done += 1
            if on_round is not None:
                on_round(measured())
        if cuda and count_launches:
            for i, variant in enumerate(variants):
                with runner.state(variant):
                    launches[i] = _launches(functools.partial(call, variant.steps), variant.steps)
    finally:
        clock.remove()
    say("done")
    return measured()
