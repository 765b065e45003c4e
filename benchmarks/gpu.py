"""Whole pipelines on a GPU at their true sizes, with random weights, all in one process.

    python benchmarks/gpu.py --count macs.json                     # MACs, on any machine
    python benchmarks/gpu.py --macs macs.json --json out.json --seconds 300 [--parts sdxl,sd15]

Each part is written to the JSON file when it is done, and none is begun after `--seconds`. MACs are
counted on the meta device, which takes longer than some parts: count them before.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hgc
from hgc.benchmarking import (
    MODES,
    _Clock,
    _inputs,
    _launches,
    bench,
    count_macs_of,
    load_pipeline,
)
from hgc.evaluation.candidate import steps_of
from hgc.macs import Macs
from hgc.structure import controlnets

DEVICE, DTYPE = "cuda", torch.float16
PRESETS = ("exact", "paper", "balanced", "fast", "turbo")
STEPS = {"sd15": 20, "sdxl": 30}
SIZE = {"sd15": 512, "sdxl": 1024}


def count(model: str) -> dict[str, list[int]]:
    """MACs [all, the paper's] of one evaluation without hgc, and of a run of each preset."""
    from hgc.evaluation.models import load_shapes

    shapes = load_shapes(model, ())
    of = count_macs_of(shapes.unet, shapes.controlnets, SIZE[model], SIZE[model], 1)
    found = {"": of(None, 1)}
    for name in PRESETS:
        config = hgc.Config.preset(name)
        found[name] = of(config, steps_of(config, STEPS[model]))
    return {name: [macs.total, macs.paper] for name, macs in found.items()}


class Machine:
    """Pipelines on the GPU, one at a time, and what was counted for them."""

    def __init__(self, macs: dict[str, dict[str, list[int]]]) -> None:
        self._macs = macs
        self._model, self._pipe = "", None

    def pipe(self, model: str, scheduler: str) -> Any:
        import diffusers

        if model != self._model:
            self._pipe = None
            torch.cuda.empty_cache()
            self._pipe = load_pipeline(model, device=DEVICE, dtype=DTYPE)
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
        layout: torch.memory_format = torch.contiguous_format, **arguments: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """One table of :func:`hgc.benchmarking.bench`."""
        pipe = self.pipe(model, scheduler)
        for module in (pipe.unet, pipe.controlnet):
            module.to(memory_format=layout)
        configs = [hgc.Config.preset(name) for name in presets.split(",")]
        measured = bench(
            pipe, configs, height=SIZE[model], width=SIZE[model], steps=STEPS[model],
            images=images, device=DEVICE, count=self.counted(model, images),
            count_launches=False, **arguments,
        )  # fmt: skip
        found = json.loads(measured.to_json())
        name = str(layout).removeprefix("torch.")
        text = f"{scheduler}, {name}. {measured.to_markdown()}"
        return {**found, "scheduler": scheduler, "layout": name, "markdown": text}

    def kinds(self, model: str, presets: str, mode: str) -> dict[str, Any]:
        """Milliseconds on the device's clock of each kind of evaluation, and whether the latents
        are the eager ones bit for bit."""
        pipe = self.pipe(model, "EulerDiscrete")
        size = SIZE[model]
        arguments = _inputs(pipe, size, size, 1, DEVICE, DTYPE)
        nets = list(controlnets(pipe.controlnet))

        def latents(steps: int) -> torch.Tensor:
            return pipe(
                **arguments, num_inference_steps=steps, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip

        rows = []
        for name in presets.split(","):
            config = hgc.Config.preset(name)
            steps = steps_of(config, STEPS[model])
            with hgc.install(pipe.unet, nets, config=config) as installation:
                eager = latents(steps)
                if mode == "captured":
                    installation.capture()
                found = [latents(steps) for _ in range(3)]
                times: dict[Any, list[float]] = defaultdict(list)
                clock = _Clock(pipe, DEVICE, every=True)
                try:
                    for _ in range(3):
                        latents(steps)
                        torch.cuda.synchronize()
                        for row, ms in zip(
                            installation.report().rows, clock.evaluations(), strict=True
                        ):
                            kind = (",".join(row.control), str(row.depth), row.guidance)
                            times[kind].append(ms)
                finally:
                    clock.remove()
                launches = _launches(functools.partial(latents, steps), steps)
            same = all(torch.equal(eager, one) for one in found)
            rows += [
                {"preset": name, "control": k[0], "depth": k[1], "guidance": k[2],
                 "count": len(ms), "ms": statistics.median(ms), "bitwise_eager": same,
                 "launches_of_all": launches}
                for k, ms in times.items()
            ]  # fmt: skip
        lines = [
            f"{model}, {mode}: an evaluation by CUDA events, Euler, one image, fp16; bits of three "
            "runs against eager.", "",
            "| preset | launches an evaluation | ControlNet | depth | guidance | evaluations | ms "
            "| bitwise eager |",
            "|---|---:|---|---|---|---:|---:|---|",
        ]  # fmt: skip
        for r in rows:
            ms = f"{r['ms']:.2f}"
            launches = f"{r['launches_of_all']:.0f}"
            cells = (r["preset"], launches, r["control"], r["depth"], r["guidance"], r["count"], ms,
                     "yes" if r["bitwise_eager"] else "NO")  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return {"kinds": rows, "mode": mode, "markdown": "\n".join(lines) + "\n"}


def parts(m: Machine, peers: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """In the order of worth."""
    lossy = "paper,balanced,fast,turbo"
    yield "sdxl", lambda: m.bench("sdxl", lossy, repeats=3, fewer_steps=True)
    yield "sdxl-kinds", lambda: m.kinds("sdxl", "balanced", "eager")
    if "captured" in MODES:
        yield "sdxl-captured-kinds", lambda: m.kinds("sdxl", "balanced,fast", "captured")
        yield (
            "sdxl-captured",
            lambda: m.bench("sdxl", "paper,fast", repeats=3, modes=("eager", "captured")),
        )
    yield (
        "sd15",
        lambda: m.bench("sd15", f"exact,{lossy}", repeats=5, fewer_steps=True, peers=peers),
    )
    yield "sd15-kinds", lambda: m.kinds("sd15", "paper,balanced,turbo", "eager")
    if "captured" in MODES:
        yield "sd15-captured-kinds", lambda: m.kinds("sd15", lossy, "captured")
        yield (
            "sd15-captured",
            lambda: m.bench("sd15", lossy, repeats=5, modes=("eager", "captured")),
        )
    yield "sd15-unipc", lambda: m.bench("sd15", "paper,fast", "UniPCMultistep", repeats=5)
    yield "sd15-batch8", lambda: m.bench("sd15", "paper,fast", images=8, repeats=3)
    yield (
        "sd15-batch8-channels-last",
        lambda: m.bench(
            "sd15", "paper,fast", images=8, layout=torch.channels_last, repeats=3
        ),
    )  # fmt: skip
    yield (
        "sd15-compiled",
        lambda: m.bench("sd15", "paper,fast", repeats=5, modes=("eager", "compiled")),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=Path, help="write the models' MACs here, and end")
    parser.add_argument("--macs", type=Path, help="MACs that --count wrote")
    parser.add_argument("--json", type=Path, help="where results are written")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no part after these")
    parser.add_argument("--parts", default="", help="names, with commas between; default: all")
    parser.add_argument("--peers", default="", help="deepcache-3, ...: must be installed")
    options = parser.parse_args()
    begun = time.monotonic()
    if options.count:
        counted = {model: count(model) for model in STEPS}
        options.count.write_text(json.dumps(counted, indent=1) + "\n")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA GPU; --count needs none", file=sys.stderr)
        return 2
    macs = json.loads(options.macs.read_text()) if options.macs else {}
    peers = tuple(options.peers.split(",")) if options.peers else ()
    todo = dict(parts(Machine(macs), peers))
    chosen = options.parts.split(",") if options.parts else list(todo)
    if unknown := set(chosen) - set(todo):
        print(
            f"--parts: no {', '.join(sorted(unknown))}; parts: {', '.join(todo)}", file=sys.stderr
        )
        return 2
    found: dict[str, Any] = {}
    failed = False
    for name in chosen:
        start = time.monotonic()
        if start - begun > options.seconds:
            found[name] = {"left": f"after {options.seconds:.0f} s"}
        else:
            try:
                found[name] = todo[name]()
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
