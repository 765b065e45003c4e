"""Measures launch configurations of the Triton kernels and writes hgc_kernels/launch/<device>.json.

    python benchmarks/ops/tune.py                    # all ops
    python benchmarks/ops/tune.py --ops apply_map
    python benchmarks/ops/tune.py --dry-run          # print what was found, write nothing

From the heuristic's configuration, one field after another is set to the value that is quickest at
the shapes of the op benchmarks, each candidate timed beside the one to beat, by the device's clock
and with cold caches. A candidate whose result differs is not taken. What is not at least 3% quicker
than the heuristic is left to it. Without a GPU nothing is measured or written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
# the sources that the file is written into, not an installed copy of them
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from measured import commit
from timing import device_seconds, percentile
from workloads import CROSS_ATTENTIONS

from hgc_kernels import launch_table
from hgc_kernels.map_format import FORMATS, new_map
from hgc_kernels.ops.apply_map import launch as apply_map
from hgc_kernels.ops.apply_map_project import launch as apply_map_project
from hgc_kernels.ops.attend_and_store import launch as attend_and_store

MARGIN = 0.97  # of the heuristic's time: at most this is worth an entry
STEP = 0.98  # of the time to beat: at most this is better and not noise
BATCH = 2  # one image, both halves of guidance
DTYPES = (torch.float16, torch.bfloat16)

Config = dict[str, int]
# for each configuration its time over that of the first; None where it does not run
Seconds = Callable[[Sequence[Config]], Sequence[float | None]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op: `run` computes it with a configuration."""

    bucket: str
    start: Any  # the heuristic's configuration
    run: Callable[[Any], torch.Tensor]


def cases(op: str, device: str) -> Iterator[Case]:
    """The calls that the op benchmarks make."""
    for shape in CROSS_ATTENTIONS:
        for dtype in DTYPES:
            v = shape.values(BATCH, dtype, device)
            if op == "attend_and_store":
                call: tuple[Any, ...] = (dtype, shape.s_q, shape.s_kv, shape.size)
                start, name = attend_and_store.heuristic(*call), attend_and_store.bucket(*call)
                q, k = shape.queries(BATCH, dtype, device), shape.values(BATCH, dtype, device)
                map = new_map(
                    BATCH, shape.s_q, shape.heads, shape.s_kv, format="fp16", device=device
                )

                def attend(config, q=q, k=k, v=v, map=map):
                    return attend_and_store.attend_and_store(
                        q, k, v, q.shape[-1] ** -0.5, map, config
                    )

                yield Case(launch_table.name_of(name), start, attend)
                continue
            for format in ("fp16", "e4m3"):
                map, stored = shape.map(BATCH, format, device), FORMATS[format]
                if op == "apply_map":
                    call = (dtype, stored, shape.s_q, shape.s_kv, shape.size)
                    start, name = apply_map.heuristic(*call), apply_map.bucket(*call)

                    def apply(config, map=map, v=v):
                        return apply_map.apply_map(map, v, config)

                    yield Case(launch_table.name_of(name), start, apply)
                    continue
                sizes = (BATCH, shape.s_q, shape.s_kv, shape.heads, shape.size, shape.channels)
                start = apply_map_project.heuristic(dtype, stored, *sizes)
                name = apply_map_project.bucket(start, dtype, stored, shape.s_q)
                weight = torch.randn(shape.channels, shape.channels, device=device).to(dtype)
                residual = torch.randn(BATCH, shape.s_q, shape.channels, device=device).to(dtype)

                def project(config, map=map, v=v, weight=weight, residual=residual):
                    return apply_map_project.apply_map_project(
                        map, v, weight, weight[0], residual, config
                    )

                yield Case(launch_table.name_of(name), start, project)


def is_close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results are apart by no more than the order of summation makes them."""
    error = (out.float() - expected.float()).abs().max()
    bound = 8 * torch.finfo(out.dtype).eps * float(expected.float().abs().max())
    return bool(error <= bound)


def on_the_device(found: Sequence[Case]) -> Seconds:
    """Times of configurations at all calls of a bucket: the geometric mean."""
    expected = [case.run(case.start) for case in found]

    def runs(config: Config) -> bool:
        try:
            return all(
                is_close(case.run(dataclasses.replace(case.start, **config)), out)
                for case, out in zip(found, expected, strict=True)
            )
        except Exception as error:  # Triton says in many ways that a tile does not fit
            print(f"  {config}: {type(error).__name__}", flush=True)
            return False

    def seconds(configs: Sequence[Config]) -> list[float | None]:
        able = [config for config in configs if runs(config)]
        logs = [0.0] * len(able)
        for case in found:
            functions = [
                lambda case=case, config=config: case.run(dataclasses.replace(case.start, **config))
                for config in able
            ]
            times = [percentile(ordered, 0.5) for ordered in device_seconds(functions, rounds=20)]
            logs = [log + math.log(time / times[0]) for log, time in zip(logs, times, strict=True)]
        by_config = [math.exp(log / len(found)) for log in logs]
        return [by_config[able.index(c)] if c in able else None for c in configs]

    return seconds


def search(
    start: Config, axes: dict[str, Sequence[int]], seconds: Seconds
) -> tuple[Config, float | None]:
    """The fields in which the quickest configuration differs from `start`, and its time over that
    of `start`; nothing and None where none is quicker by the margin.
    """
    best = dict(start)
    for _ in range(2):
        before = dict(best)
        for field, values in axes.items():
            tried = [best, *({**best, field: v} for v in values if v != best[field])]
            times = seconds(tried)
            if times[0] is None:
                return {}, None
            quickest = min((t, i) for i, t in enumerate(times) if t is not None)
            if quickest[0] <= STEP * times[0]:
                best = tried[quickest[1]]
        if best == before:
            break
    if best == start:
        return {}, None
    first, last = seconds([start, best])
    if first is None or last is None or last > MARGIN * first:
        return {}, None
    return {k: v for k, v in best.items() if v != start[k]}, last / first


def axes_of(op: str) -> dict[str, Sequence[int]]:
    """The values that are tried of each field, those that change most first."""
    tried: dict[str, Sequence[int]] = {
        "block_m": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4), "block_k": (16, 32, 64), "fold_block_n": (16, 32),
        "fold_block_c": (32, 64, 128),
    }  # fmt: skip
    return {field: values for field, values in tried.items() if field in launch_table.FIELDS[op]}


def tune(op: str, device: str) -> dict[str, dict[str, Any]]:
    """For each bucket of `op` with a configuration quicker than the heuristic's: the fields, and
    its time over the heuristic's.
    """
    buckets: dict[str, list[Case]] = {}
    for case in cases(op, device):
        buckets.setdefault(case.bucket, []).append(case)
    found = {}
    for bucket, calls in buckets.items():
        axes = axes_of(op)
        start = {field: getattr(calls[0].start, field) for field in axes}
        fields, ratio = search(start, axes, on_the_device(calls))
        print(f"{op}, {bucket}: {fields or 'the heuristic'}", flush=True)
        if ratio is not None:
            found[bucket] = {"fields": fields, "over_heuristic": round(ratio, 3)}
    return found


def merge(path: Path, device: str, about: dict[str, Any], found: dict[str, Any]) -> None:
    """Write what was found into `path`: other ops that it holds are kept."""
    configs = launch_table.read(path) if path.exists() else {}
    known = json.loads(path.read_text()).get("about", {}) if path.exists() else {}
    for op, buckets in found.items():
        configs[op] = {bucket: one["fields"] for bucket, one in buckets.items()}
        known[op] = about
    data = {"device": device, "about": known, "configs": configs}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    launch_table.read(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", default=",".join(launch_table.FIELDS), help="with commas between")
    parser.add_argument("--dry-run", action="store_true", help="write no configurations")
    parser.add_argument("--json", type=Path, help="also write what was found, with ratios, here")
    options = parser.parse_args(arguments)
    ops = options.ops.split(",")
    for op in ops:
        if op not in launch_table.FIELDS:
            parser.error(f"--ops: expected names among {', '.join(launch_table.FIELDS)}, got {op}")
    if not torch.cuda.is_available():
        print("tune: torch sees no CUDA GPU, so nothing was measured and nothing written")
        return 0
    device = torch.cuda.get_device_name()
    with torch.no_grad():
        found = {op: tune(op, "cuda") for op in ops}
    about = {"torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit()}
    if options.json is not None:
        options.json.write_text(json.dumps({"tuned": found, "about": about}, indent=1) + "\n")
    path = launch_table.path_of(device)
    if options.dry_run:
        print(json.dumps(found, indent=1))
        return 0
    merge(path, device, about, found)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
