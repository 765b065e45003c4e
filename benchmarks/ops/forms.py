"""The estimates behind the choice between the folded and the two-stage apply_map_project.

python benchmarks/ops/forms.py --write
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from workloads import CROSS_ATTENTIONS

from hgc_kernels import counts
from hgc_kernels.ops.apply_map_project import launch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from measured import table, write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write the table into docs/measured.md"
    )
    options = parser.parse_args()
    rows = []
    for shape in CROSS_ATTENTIONS:
        for format in ("fp16", "e4m3"):
            sizes = (2, shape.s_q, shape.s_kv, shape.heads, shape.size)
            costs = launch.estimate(*sizes, shape.channels, 2, format)
            stored = torch.float16 if format == "fp16" else torch.float8_e4m3fn
            chosen = launch.heuristic(torch.float16, stored, *sizes, shape.channels).form
            fold = counts.fold_flops(2, shape.s_kv, shape.heads, shape.size, shape.channels)
            main = counts.folded_main_flops(2, shape.s_q, shape.s_kv, shape.heads, shape.channels)
            first = counts.apply_map_flops(*sizes)
            second = counts.project_flops(2 * shape.s_q, shape.channels, shape.channels)
            rows.append(
                [shape.name, format, f"{fold / 1e9:.2f} + {main / 1e9:.2f}",
                 f"{first / 1e9:.2f} + {second / 1e9:.2f}", f"{costs['folded'] * 1e6:.1f}",
                 f"{costs['two_stage'] * 1e6:.1f}", chosen]
            )  # fmt: skip
    header = [
        "shape",
        "map",
        "folded GFLOP",
        "two-stage GFLOP",
        "folded us",
        "two-stage us",
        "chosen",
    ]
    text = table(header, rows)
    print(text)
    if options.write:
        note = (
            "## Folded or two stages\n\n"
            "Estimates, not measurements: counted FLOPs and bytes over one "
            "data-centre GPU's rates (see `apply_map_project.launch`), fp16, batch 2, 77 keys.\n\n"
        )
        write_section("forms", "python benchmarks/ops/forms.py --write", note + text)


if __name__ == "__main__":
    main()
