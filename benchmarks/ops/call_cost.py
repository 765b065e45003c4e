"""What a call of `gather_blocks` costs on tensors of 64 values, beside `torch.cat` in the same
interleaved run.

    OMP_NUM_THREADS=1 python benchmarks/ops/call_cost.py

Ratios are medians over rounds of the ratio within a round. Exits with 1 where a call of the op
costs more than 1.7 times `torch.cat`, about what it costs to call any op by its name.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

import hgc_kernels as hk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from measured import table

ROUNDS, CALLS, GOAL = 400, 50, 1.7


def main() -> int:
    torch.set_num_threads(1)
    assert hk.backends()["gather_blocks"]["cpu"][0] == "native", hk.backends()
    h, s, r = (torch.randn(1, 4, 4, 4) for _ in "hsr")
    op, aten = torch.ops.hgc.gather_blocks.default, torch.ops.aten

    def chosen() -> None:
        with hk.use_backend("native"):
            for _ in range(CALLS):
                op(h, s, None, 1.0)

    def repeated(call):
        def run():
            for _ in range(CALLS):
                call()

        return run

    cat = "`torch.cat([h, s], 1)`"
    functions = {
        cat: repeated(lambda: torch.cat([h, s], 1)),
        "`torch.ops.aten.cat.default([h, s], 1)`": repeated(lambda: aten.cat.default([h, s], 1)),
        "`torch.ops.aten.add.Tensor(h, s)`": repeated(lambda: aten.add.Tensor(h, s)),
        "`torch.ops.hgc.gather_blocks.default(h, s, None, 1.0)`": repeated(
            lambda: op(h, s, None, 1.0)
        ),
        "the same, a backend chosen": chosen,
        "`hgc_kernels.gather_blocks(h, s)`": repeated(lambda: hk.gather_blocks(h, s)),
        "`torch.cat([h, s + 0.7 * r], 1)`": repeated(lambda: torch.cat([h, s + 0.7 * r], 1)),
        "`torch.ops.hgc.gather_blocks.default(h, s, r, 0.7)`": repeated(lambda: op(h, s, r, 0.7)),
    }
    seconds = {name: [] for name in functions}
    with torch.no_grad():
        for k in range(ROUNDS + 20):
            for name, function in functions.items():
                begin = time.perf_counter()
                function()
                if k >= 20:
                    seconds[name].append(time.perf_counter() - begin)
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, seconds[cat], strict=True))
        for name, found in seconds.items()
    }
    rows = [
        [name, f"{statistics.median(found) / CALLS * 1e6:.2f}", f"{ratios[name]:.2f}"]
        for name, found in seconds.items()
    ]
    print(table(["call", "microseconds, median", "over `torch.cat`"], rows))
    return int(ratios["`torch.ops.hgc.gather_blocks.default(h, s, None, 1.0)`"] > GOAL)


if __name__ == "__main__":
    sys.exit(main())
