"""The CPU goals of the ops, measured in one run: variants interleaved, caches cold, medians of
ratios.

    python benchmarks/ops/cpu_goals.py --write

gather_blocks: at least 0.9 of the byte ratio to eager `cat([hidden, skip + scale * residual])` on
the three largest decoder inputs of SD1.5. apply_map: not slower than eager. Exits with 1 where one
fails.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import random
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from workloads import CROSS_ATTENTIONS, DECODER_INPUTS, eager_apply_map, eager_gather_blocks

import hgc_kernels as hk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from measured import commit, table, write_section

BATCH = 2
LAYOUTS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def keep_freed_memory():
    """Tell glibc's allocator to keep what is freed.

    It returns the top of its heap to the system once 64 MiB are free there, and a result of 31 MB
    then costs 7,680 page faults, 6 to 8 ms. Which of two interleaved functions pays for them
    depends on the layout of the heap alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        assert libc.mallopt(m_trim_threshold, 2**30) == 1
        libc.mallopt(m_mmap_threshold, 2**30)
        torch.ones(2**27)  # pages for all that follows


def interleave(layouts, rounds):
    """Median milliseconds of ours and of eager, and the 20th, 50th and 80th percentile of eager
    over ours, in `rounds` rounds spread evenly over `layouts`: pairs of functions on the same
    numbers at other addresses, by which the speed of either changes.
    """
    cold = torch.empty(2**26, dtype=torch.uint8)
    times = ([], [])
    faults = 0
    for k, functions in enumerate(layouts):
        for _ in range(3):  # pages that no call before had
            for function in functions:
                function()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds * (k + 1) // LAYOUTS - rounds * k // LAYOUTS):
            for function, seconds in zip(functions, times, strict=True):
                cold.fill_(1)
                begin = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - begin)
        faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    if faults > 100 * rounds:
        print(f"{faults} page faults: the times are of the allocator too", file=sys.stderr)
    ratios = sorted(theirs / mine for mine, theirs in zip(*times, strict=True))
    spread = [ratios[int(share * (len(ratios) - 1))] for share in (0.2, 0.5, 0.8)]
    return [statistics.median(seconds) * 1e3 for seconds in times], spread


def elsewhere(operands):
    """`operands` again and again, each time at other addresses; `LAYOUTS` times."""
    chance = random.Random(0)
    for _ in range(LAYOUTS):
        gaps = []
        for x in operands:
            gaps.append(torch.empty(64 * chance.randrange(1, 2**14), dtype=torch.uint8))
            gaps.append(x.clone(memory_format=torch.preserve_format))
        yield gaps[1::2]


def gather_rows(rounds):
    for shape in DECODER_INPUTS[:3]:
        for name, dtype in DTYPES.items():
            for order in ("NCHW", "channels_last"):
                operands = shape.tensors(BATCH, dtype, "cpu", order == "channels_last")
                ours, eager = hk.gather_blocks, eager_gather_blocks
                assert torch.equal(ours(*operands, 0.7), eager(*operands, 0.7))
                layouts = (
                    (partial(ours, *x, 0.7), partial(eager, *x, 0.7)) for x in elsewhere(operands)
                )
                times, (low, middle, high) = interleave(layouts, rounds)
                ratio = shape.eager_bytes(BATCH, dtype) / shape.bytes(BATCH, dtype)
                speed = shape.bytes(BATCH, dtype) / times[0] / 1e6
                figures = [*times, low, middle, high, ratio, speed]
                yield f"gather_blocks {shape.name} {name} {order}", figures, middle / ratio, 0.9


def apply_rows(rounds):
    for shape in CROSS_ATTENTIONS[:4]:
        for name, dtype in DTYPES.items():
            format = "fp32" if name == "fp32" else "bf16"
            v, map = shape.values(BATCH, dtype, "cpu"), shape.map(BATCH, format, "cpu")
            full = hk.map_probabilities(map, shape.s_kv).to(dtype)
            layouts = (
                (partial(hk.apply_map, map, v), partial(eager_apply_map, f, v))
                for v, map, f in elsewhere((v, map, full))
            )
            times, (low, middle, high) = interleave(layouts, rounds)
            figures = [*times, low, middle, high, 1.0, 0.0]
            yield f"apply_map {shape.name} {name}", figures, middle, 1.0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--write", action="store_true", help="write the table into docs/measured.md"
    )
    options = parser.parse_args()
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    for op in ("gather_blocks", "apply_map"):
        assert hk.backends()[op]["cpu"][0] == "native", hk.backends()[op]["cpu"]
    rows, failed = [], []
    with torch.no_grad():
        for measured in (gather_rows(options.rounds), apply_rows(options.rounds)):
            for name, (ours, eager, low, middle, high, ratio, speed), reached, goal in measured:
                rows.append(
                    [name, f"{ours:.2f}", f"{eager:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})",
                     f"{ratio:.2f}", f"{reached:.2f}", goal, f"{speed:.1f}" if speed else ""]
                )  # fmt: skip
                print(rows[-1], flush=True)
                if reached < goal:
                    failed.append(name)
    header = ["case", "hgc ms", "eager ms", "speedup (p20 to p80)", "byte ratio", "share reached"]
    text = table([*header, "goal", "GB/s"], rows)
    print(text)
    if options.write:
        head = (
            "## CPU goals of the ops\n\n"
            f"{platform.machine()}, vector set {hk.build_info()['vector_set']}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit "
            f"{commit()}, batch {BATCH}, {options.rounds} interleaved rounds with "
            "caches cold. The byte ratio is `DecoderInput.eager_bytes` over "
            "`DecoderInput.bytes` of benchmarks/ops/workloads.py; the share reached is the median "
            "speedup over it.\n\n"
        )
        write_section("cpu-goals", f"python {' '.join(sys.argv)}", head + text)
    for name in failed:
        print(f"BELOW GOAL {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
