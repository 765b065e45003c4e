"""The goals of the ops on a GPU, measured in one run: variants interleaved, caches cold, times by
the device's clock.

    python benchmarks/ops/gpu_goals.py --json goals.json
    python benchmarks/ops/gpu_goals.py --ceilings rates.json    # is the library there; the GPU

gather_blocks: 85% of the measured copy bandwidth where 64 MiB or more move, and 0.85 of the byte
ratio to eager. A whole cached cross-attention: 2 times as fast as diffusers in eager mode, 1.2
times as fast as diffusers compiled. attend_and_store: at most 1.25 times the time of attention that
stores nothing, or the time in which its bytes move at 70% of the copy bandwidth where that is
longer: a map that is written cannot take less. group_norm: as fast as eager in either memory
format. Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from workloads import CROSS_ATTENTIONS, DECODER_INPUTS, eager_gather_blocks, whole_cross_attention

import hgc_kernels as hk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from measured import table

BATCH = 2
FP16 = torch.float16
LARGE_BYTES = 64 * 2**20
COMPILED = ("sd15_level0", "sd15_level1", "sdxl_level2")  # each takes seconds to compile
Row = tuple[str, float, float, float, float, str]  # case, ours, other, reached, goal, of what


def device_seconds(functions: Sequence[Callable[[], object]], rounds: int = 50) -> list[float]:
    """Median seconds of each function on the GPU: interleaved, caches cold, by CUDA events."""
    # larger than any cache, and long enough to write that the work behind it is queued by then
    flush = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    for function in functions:
        for _ in range(3):  # compiles, and fills the allocator's pool
            function()
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, found in zip(functions, events, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.fill_(1)
            begin.record()
            function()
            end.record()
            found.append((begin, end))
    torch.cuda.synchronize()
    return [statistics.median_low(a.elapsed_time(b) / 1e3 for a, b in found) for found in events]


@cache
def copy_bandwidth() -> float:
    """Bytes a second of a 256 MiB copy on the GPU, reads and writes counted."""
    source = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    (seconds,) = device_seconds([lambda: target.copy_(source)], rounds=20)
    return 2 * source.numel() / seconds


def gather_rows() -> Iterator[Row]:
    for shape in DECODER_INPUTS:
        operands = shape.tensors(BATCH, FP16, "cuda")
        moved = shape.bytes(BATCH, FP16)
        functions = [
            partial(hk.gather_blocks, *operands, scale=0.7),
            partial(eager_gather_blocks, *operands, 0.7),
        ]
        ours, eager = device_seconds(functions)
        case = f"gather_blocks {shape.name}"
        goal = 0.85 if moved >= LARGE_BYTES else 0.0
        floor = moved / copy_bandwidth()
        yield case, ours, floor, floor / ours, goal, "copy bandwidth"
        ratio = shape.eager_bytes(BATCH, FP16) / moved
        yield case, ours, eager, eager / ours / ratio, goal, f"byte ratio {ratio:.2f}"


def attention_rows() -> Iterator[Row]:
    for shape in CROSS_ATTENTIONS:
        ours, theirs = whole_cross_attention(shape, BATCH, FP16, "cuda")
        with_compiled = shape.name in COMPILED
        more = [torch.compile(theirs)] if with_compiled else []
        mine, eager, *compiled = device_seconds([ours, theirs, *more])
        case = f"cached cross-attention {shape.name}"
        yield case, mine, eager, eager / mine, 2.0, "diffusers, eager"
        if compiled:
            yield case, mine, compiled[0], compiled[0] / mine, 1.2, "diffusers, compiled"
        q = shape.queries(BATCH, FP16, "cuda")
        k, v = (shape.values(BATCH, FP16, "cuda") for _ in "kv")
        attend = torch.nn.functional.scaled_dot_product_attention
        for format in ("fp16", "e4m3"):
            map_ = shape.map(BATCH, format, "cuda")
            functions = [
                partial(hk.attend_and_store, q, k, v, map_),
                partial(attend, *(x.transpose(1, 2) for x in (q, k, v))),
                partial(hk.apply_map, map_, v),
            ]
            mine, plain, applied = device_seconds(functions)
            floor = shape.attend_bytes(BATCH, FP16, format) / copy_bandwidth()
            allowed = max(1.25 * plain, floor / 0.7)
            case = f"attend_and_store {shape.name} {format}"
            yield case, mine, allowed, allowed / mine, 1.0, "1.25 times attention, or its bytes"
            floor = shape.apply_bytes(BATCH, FP16, format) / copy_bandwidth()
            case = f"apply_map {shape.name} {format}"
            yield case, applied, plain, plain / applied, 0.0, "attention alone"
            yield case, applied, floor, floor / applied, 0.0, "copy bandwidth"


def eager_norm(
    x: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, layout: torch.memory_format
) -> torch.Tensor:
    y = torch.nn.functional.group_norm(x + shift[:, :, None, None], 32, weight, weight)
    return torch.nn.functional.silu(y).contiguous(memory_format=layout)


def norm_rows() -> Iterator[Row]:
    """x + shift, group norm and SiLU of SD1.5's resnets, in both memory formats. torch's result is
    taken back to the format of x, as the convolution behind it does."""
    for channels, side in ((320, 64), (960, 64), (640, 32), (1280, 16), (2560, 8)):
        x = torch.randn(BATCH, channels, side, side, device="cuda").to(FP16)
        shift, weight = torch.randn_like(x[:, :, 0, 0]), torch.randn_like(x[0, :, 0, 0])
        for layout in (torch.contiguous_format, torch.channels_last):
            of = x.contiguous(memory_format=layout)
            ours, other = device_seconds(
                [
                    partial(hk.group_norm, of, 32, weight, weight, shift=shift, silu=True),
                    partial(eager_norm, of, shift, weight, layout),
                ]
            )
            case = f"group_norm {channels} x {side} x {side} {str(layout).removeprefix('torch.')}"
            yield case, ours, other, other / ours, 1.0, "eager"
            floor = 3 * x.nbytes / copy_bandwidth()
            yield case, ours, floor, floor / ours, 0.0, "copy bandwidth, three passes"


def matmul_rate() -> float:
    """FLOP a second of an 8192-cubed fp16 product on random data."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").half() for _ in "ab")
    out = torch.empty_like(a)
    (seconds,) = device_seconds([lambda: torch.mm(a, b, out=out)], rounds=10)
    return 2 * size**3 / seconds


def ceilings(path: Path) -> int:
    """Write how fast the GPU copies and multiplies; 1 where the CUDA library is not loaded."""
    chosen = {op: devices["cuda"] for op, devices in hk.backends().items()}
    loaded = hk.build_info()["libraries"]["cuda"]
    if loaded != "loaded" or chosen["gather_blocks"][0] != "native":
        print(f"CUDA library: {loaded}; {chosen['gather_blocks'][1]}", file=sys.stderr)
        return 1
    rows = [
        ["copy, 256 MiB, read and written", f"{copy_bandwidth() / 1e12:.2f} TB/s"],
        ["fp16 product, 8192 cubed, random data", f"{matmul_rate() / 1e12:.0f} TFLOP/s"],
        *([f"`{op}`", backend] for op, (backend, _) in chosen.items()),
    ]
    text = table(["", ""], rows)
    print(text)
    path.write_text(json.dumps({"ceilings": dict(rows), "markdown": text}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the table is written")
    parser.add_argument("--ceilings", type=Path, help="write the GPU's rates here, and end")
    parser.add_argument("--tiny", action="store_true", help="end here, where there is no GPU")
    options = parser.parse_args()
    if options.tiny:
        return 0
    if not torch.cuda.is_available():
        print("no GPU is visible to torch", file=sys.stderr)
        return 2
    if options.ceilings:
        return ceilings(options.ceilings)
    rows, cells, failed = [], [], []
    head = ["case", "against", "hgc us", "other us", "reached", "goal"]
    intro = (
        f"fp16, batch {BATCH}; medians of 50 interleaved rounds with caches cold, by CUDA events; "
        f"copy bandwidth {copy_bandwidth() / 1e9:.0f} GB/s. Reached: the other's time over hgc's; "
        "against the copy bandwidth and the byte ratio, the share of them. A goal of 0 is none.\n\n"
    )
    with torch.no_grad():
        for measured in (gather_rows(), attention_rows(), norm_rows()):
            for case, ours, other, reached, goal, what in measured:
                rows.append([case, what, ours * 1e6, other * 1e6, reached, goal])
                cells.append([case, what, f"{ours * 1e6:.1f}", f"{other * 1e6:.1f}",
                              f"{reached:.2f}", f"{goal:g}"])  # fmt: skip
                if reached < goal:
                    failed.append(f"{case}: {reached:.2f} of {what}, {goal:g} wanted")
                if options.json:
                    found = {"rows": rows, "markdown": intro + table(head, cells)}
                    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(head, cells))
    for line in failed:
        print(f"BELOW GOAL {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
