"""Whole pipelines on a GPU at their true sizes, with random weights, all in one process.

    python benchmarks/gpu.py --count macs.json                     # MACs, on any machine
    python benchmarks/gpu.py --macs macs.json --json out.json --seconds 300 [--parts NAME,NAME]
    python benchmarks/gpu.py --tiny                                # every part, on a CPU

Each part is written to the JSON file when it is done, and none is begun after `--seconds`. MACs are
counted on the meta device, which takes longer than some parts: count them before.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import hgc
from hgc.bench.pipelines import load_pipeline
from hgc.bench.runner import _Clock, _inputs, _launches, bench
from hgc.evaluation.candidate import steps_of
from hgc.report.macs import Macs

PRESETS = ("exact", "paper", "balanced", "fast", "turbo")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is: of a GPU, or so small that a CPU runs it.

    Attributes:
        device: Of the pipelines.
        dtype: Of the pipelines.
        models: Model by the name that the parts give it.
        size: Pixels, by that name.
        steps: Of the uncached run, by that name.
        repeats: At most so many.
        modes: Of :data:`hgc.bench.runner.MODES`, those that run there.
    """

    device: str
    dtype: torch.dtype
    models: dict[str, str]
    size: dict[str, int]
    steps: dict[str, int]
    repeats: int
    modes: tuple[str, ...]


FULL = Scale(
    "cuda", torch.float16, {"sd15": "sd15", "sdxl": "sdxl"}, {"sd15": 512, "sdxl": 1024},
    {"sd15": 20, "sdxl": 30}, 5, ("eager", "captured", "compiled", "fused", "fused-captured"),
)  # fmt: skip
TINY = Scale(
    "cpu", torch.float32, {"sd15": "testbed", "sdxl": "testbed"}, {"sd15": 64, "sdxl": 64},
    {"sd15": 5, "sdxl": 5}, 1, ("eager", "fused"),
)  # fmt: skip


def count(scale: Scale, model: str) -> dict[str, list[int]]:
    """MACs [all, the paper's] of one evaluation without hgc, and of a run of each preset."""
    from hgc.evaluation.models import load_shapes

    shapes = load_shapes(scale.models[model], ())
    size = scale.size[model]
    found = {"": shapes.macs(None, 1, height=size)}
    for name in PRESETS:
        config = hgc.Config.preset(name)
        found[name] = shapes.macs(config, steps_of(config, scale.steps[model]), height=size)
    return {name: [macs.total, macs.paper] for name, macs in found.items()}


class Machine:
    """Pipelines on the device, one at a time, and what was counted for them."""

    def __init__(self, scale: Scale, macs: dict[str, dict[str, list[int]]]) -> None:
        self._scale, self._macs = scale, macs
        self._model, self._pipe = "", None

    def pipe(self, model: str, scheduler: str) -> Any:
        import diffusers

        if model != self._model:
            self._pipe = None
            torch.cuda.empty_cache()
            scale = self._scale
            self._pipe = load_pipeline(scale.models[model], device=scale.device, dtype=scale.dtype)
            self._model = model
        pipe: Any = self._pipe
        kind = getattr(diffusers, scheduler + "Scheduler")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        return pipe

    def counted(self, model: str, images: int) -> Callable[..., Any] | None:
        known = self._macs.get(model)
        if known is None:
            return None

        def of(config: hgc.Config | None, evaluations: int) -> Any:
            pair = known[config.name if config else ""]
            return Macs(*pair) * (images if config else images * evaluations)

        return of

    def bench(
        self, model: str, presets: str, scheduler: str = "EulerDiscrete", images: int = 1,
        layout: torch.memory_format = torch.contiguous_format, repeats: int = 5,
        modes: Sequence[str] = ("eager",), **arguments: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """One table of :func:`hgc.bench.runner.bench`."""
        scale, pipe = self._scale, self.pipe(model, scheduler)
        for module in (pipe.unet, pipe.controlnet):
            module.to(memory_format=layout)
        configs = [hgc.Config.preset(name) for name in presets.split(",")]
        measured = bench(
            pipe, configs, height=scale.size[model], width=scale.size[model],
            steps=scale.steps[model], images=images, repeats=min(repeats, scale.repeats),
            modes=[mode for mode in modes if mode in scale.modes], device=scale.device,
            count=self.counted(model, images), count_launches=False, **arguments,
        )  # fmt: skip
        found = json.loads(measured.to_json())
        name = str(layout).removeprefix("torch.")
        text = f"{scheduler}, {name}. {measured.to_markdown()}"
        return {**found, "scheduler": scheduler, "layout": name, "markdown": text}

    def kinds(self, model: str, presets: str, mode: str) -> dict[str, Any]:
        """Milliseconds on the device's clock of each kind of evaluation, and whether the latents
        are the eager ones bit for bit."""
        scale, pipe = self._scale, self.pipe(model, "EulerDiscrete")
        size, cuda = scale.size[model], scale.device == "cuda"
        mode = mode if mode in scale.modes else "eager"
        arguments = _inputs(pipe, size, size, 1, scale.device, scale.dtype)

        def latents(steps: int) -> torch.Tensor:
            return pipe(
                **arguments, num_inference_steps=steps, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip

        rows = []
        for name in presets.split(","):
            config = hgc.Config.preset(name)
            steps = steps_of(config, scale.steps[model])
            with hgc.install(pipe, config=config) as installation:
                eager = latents(steps)
                if mode == "captured":
                    installation.capture()
                found = [latents(steps) for _ in range(3)]
                times: dict[Any, list[float]] = defaultdict(list)
                clock = _Clock(pipe, scale.device)
                try:
                    for _ in range(3):
                        clock.time(functools.partial(latents, steps))
                        rows_of = installation.report().rows
                        for row, seconds in zip(rows_of, clock.evaluations(), strict=True):
                            kind = (",".join(row.control), str(row.depth), row.guidance)
                            times[kind].append(seconds * 1e3)
                finally:
                    clock.remove()
                launches = None
                if cuda:
                    launches = _launches(functools.partial(latents, steps), steps)
            same = all(torch.equal(eager, one) for one in found)
            rows += [
                {"preset": name, "control": k[0], "depth": k[1], "guidance": k[2],
                 "count": len(ms), "ms": statistics.median(ms), "bitwise_eager": same,
                 "launches_of_all": launches}
                for k, ms in times.items()
            ]  # fmt: skip
        lines = [
            f"{scale.models[model]}, {mode}, {str(scale.dtype).removeprefix('torch.')}, Euler, one "
            "image: ms of an evaluation, and the bits of three runs against eager.", "",
            "| preset | launches an evaluation | ControlNet | depth | guidance | evaluations | ms "
            "| bitwise eager |",
            "|---|---:|---|---|---|---:|---:|---|",
        ]  # fmt: skip
        for r in rows:
            ms = f"{r['ms']:.2f}"
            launches = "" if r["launches_of_all"] is None else f"{r['launches_of_all']:.0f}"
            cells = (r["preset"], launches, r["control"], r["depth"], r["guidance"], r["count"], ms,
                     "yes" if r["bitwise_eager"] else "NO")  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return {"kinds": rows, "mode": mode, "markdown": "\n".join(lines) + "\n"}


# In the order of worth.
LOSSY = "paper,balanced,fast,turbo"
BOTH = ("eager", "captured")
FUSED = (*BOTH, "fused", "fused-captured")
PARTS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "sdxl": lambda m: m.bench("sdxl", "paper,fast", repeats=3, modes=BOTH, fewer_steps=True),
    "sdxl-kinds": lambda m: m.kinds("sdxl", "balanced", "captured"),
    "sd15": lambda m: m.bench("sd15", LOSSY, modes=BOTH),
    "sd15-fused": lambda m: m.bench(
        "sd15", "fast", layout=torch.channels_last, repeats=3, modes=FUSED
    ),
    "sd15-kinds": lambda m: m.kinds("sd15", "balanced,turbo", "captured"),
    "sd15-batch8": lambda m: m.bench("sd15", "paper,fast", images=8, repeats=3, modes=BOTH),
    "sd15-batch8-channels-last": lambda m: m.bench(
        "sd15", "fast", images=8, layout=torch.channels_last, repeats=3, modes=FUSED
    ),
    "sd15-batch8-fused": lambda m: m.bench("sd15", "fast", images=8, repeats=3, modes=FUSED),
    "sdxl-fused": lambda m: m.bench(
        "sdxl", "fast", layout=torch.channels_last, repeats=3, modes=FUSED
    ),
    "sd15-compiled": lambda m: m.bench(
        "sd15", "fast", repeats=3, modes=("eager", "captured", "compiled")
    ),
    "sd15-rivals": lambda m: m.bench(
        "sd15", f"exact,{LOSSY}", fewer_steps=True, peers=("deepcache-3",)
    ),
    "sd15-eager-kinds": lambda m: m.kinds("sd15", "paper,balanced,turbo", "eager"),
    "sdxl-eager-kinds": lambda m: m.kinds("sdxl", "balanced", "eager"),
    "sd15-unipc": lambda m: m.bench("sd15", "paper,fast", "UniPCMultistep", modes=BOTH),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=Path, help="write the models' MACs here, and end")
    parser.add_argument("--macs", type=Path, help="MACs that --count wrote")
    parser.add_argument("--json", type=Path, help="where results are written")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no part after these")
    parser.add_argument("--parts", default="", help="names, with commas between; default: all")
    parser.add_argument("--tiny", action="store_true", help="the testbed, few steps, on a CPU")
    options = parser.parse_args()
    begun = time.monotonic()
    scale = TINY if options.tiny else FULL
    if options.count:
        counted = {model: count(scale, model) for model in scale.models}
        options.count.write_text(json.dumps(counted, indent=1) + "\n")
        return 0
    if not (options.tiny or torch.cuda.is_available()):
        print("gpu.py: torch sees no CUDA GPU; --count and --tiny need none", file=sys.stderr)
        return 2
    # the part that counts them may have run out of time; then they are counted here
    known = options.macs is not None and options.macs.exists()
    machine = Machine(scale, json.loads(options.macs.read_text()) if known else {})
    chosen = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--parts: no {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    found: dict[str, Any] = {}
    failed = False
    for name in chosen:
        start = time.monotonic()
        if start - begun > options.seconds:
            found[name] = {"left": f"after {options.seconds:.0f} s"}
        else:
            try:
                found[name] = PARTS[name](machine)
            except Exception as error:
                # the others are worth the machine's time all the same; the exit status says it
                found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
                failed = True
            torch.cuda.empty_cache()
            found[name]["seconds"] = round(time.monotonic() - start, 1)
        print(name, found[name].get("error", ""), found[name].get("seconds", "left"), flush=True)
        print(found[name].get("markdown", ""), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"pipelines": found}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
