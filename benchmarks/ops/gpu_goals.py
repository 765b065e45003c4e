"""The goals of the ops on a GPU, measured in one run: variants interleaved, caches cold, times by
the device's clock.

    python benchmarks/ops/gpu_goals.py --write

gather_blocks: 85% of the measured copy bandwidth where 64 MiB or more move, and 0.85 of the byte
ratio to eager. A whole cached cross-attention: 2 times as fast as diffusers in eager mode, 1.2
times as fast as diffusers compiled. attend_and_store: at most 1.25 times the time of attention that
stores nothing. Exits with 1 where one fails. The figures are goals for an H200.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from timing import copy_bandwidth, device_seconds, percentile
from workloads import (
    CROSS_ATTENTIONS,
    DECODER_INPUTS,
    eager_gather_blocks,
    whole_cross_attention,
)

import hgc_kernels as hk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from measured import commit, table, write_section

BATCH = 2
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LARGE_BYTES = 64 * 2**20
Row = tuple[str, float, float, float, float, str]  # case, ours, other, reached, goal, of what


def middle(seconds: list[float]) -> float:
    return percentile(seconds, 0.5)


def gather_rows() -> Iterator[Row]:
    for shape in DECODER_INPUTS:
        for name, dtype in DTYPES.items():
            operands = shape.tensors(BATCH, dtype, "cuda")
            moved = shape.bytes(BATCH, dtype)
            if moved < LARGE_BYTES:
                continue
            ours, eager = map(
                middle,
                device_seconds(
                    [
                        partial(hk.gather_blocks, *operands, scale=0.7),
                        partial(eager_gather_blocks, *operands, 0.7),
                    ]
                ),
            )
            case = f"gather_blocks {shape.name} {name}"
            reached = moved / ours / copy_bandwidth()
            yield case, ours, moved / copy_bandwidth(), reached, 0.85, "copy bandwidth"
            ratio = shape.eager_bytes(BATCH, dtype) / moved
            yield case, ours, eager, eager / ours / ratio, 0.85, f"byte ratio {ratio:.2f}"


def attention_rows() -> Iterator[Row]:
    for shape in CROSS_ATTENTIONS:
        for name in ("fp16", "bf16"):
            dtype = DTYPES[name]
            ours, theirs = whole_cross_attention(shape, BATCH, dtype, "cuda")
            found = device_seconds([ours, theirs, torch.compile(theirs)])
            mine, eager, compiled = map(middle, found)
            case = f"cached cross-attention {shape.name} {name}"
            yield case, mine, eager, eager / mine, 2.0, "diffusers, eager"
            yield case, mine, compiled, compiled / mine, 1.2, "diffusers, compiled"
            q = shape.queries(BATCH, dtype, "cuda")
            k, v = (shape.values(BATCH, dtype, "cuda") for _ in "kv")
            map_ = shape.map(BATCH, "fp16", "cuda")
            sdpa = torch.nn.functional.scaled_dot_product_attention
            mine, plain = map(
                middle,
                device_seconds(
                    [
                        partial(hk.attend_and_store, q, k, v, map_),
                        partial(sdpa, *(x.transpose(1, 2) for x in (q, k, v))),
                    ]
                ),
            )
            case = f"attend_and_store {shape.name} {name}"
            yield case, mine, plain, plain / mine, 1 / 1.25, "attention alone"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="write the table into docs/measured.md"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible to torch", file=sys.stderr)
        return 2
    rows, failed = [], []
    with torch.no_grad():
        for measured in (gather_rows(), attention_rows()):
            for case, ours, other, reached, goal, what in measured:
                rows.append(
                    [case, what, f"{ours * 1e6:.1f}", f"{other * 1e6:.1f}", f"{reached:.2f}",
                     f"{goal:.2f}"]
                )  # fmt: skip
                print(rows[-1], flush=True)
                if reached < goal:
                    failed.append(f"{case}: {reached:.2f} of {what}, {goal:.2f} wanted")
    text = table(["case", "against", "hgc us", "other us", "reached", "goal"], rows)
    print(text)
    if options.write:
        head = (
            "## GPU goals of the ops\n\n"
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit "
            f"{commit()}, batch {BATCH}; copy bandwidth "
            f"{copy_bandwidth() / 1e9:.0f} GB/s. Medians of 50 interleaved rounds with caches "
            "cold, by CUDA events. Reached: the other's time over hgc's; against the copy "
            "bandwidth and the byte ratio, the share of them.\n\n"
        )
        write_section("gpu-goals", "python benchmarks/ops/gpu_goals.py --write", head + text)
    for line in failed:
        print(f"BELOW GOAL {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
