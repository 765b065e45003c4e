"""Bytes a token and output error of each way to store an attention map.

    python scripts/map_formats.py --write

The maps are peaked at the first token as text attention is: it takes a share of about `first`, a
few other tokens most of the rest. Errors are relative, ||out - exact|| / ||exact||, in fp64
arithmetic, so that they are the storage's alone.
"""

from __future__ import annotations

import argparse

import torch
from measured import table, write_section

from hgc_kernels.map_format import E4M3_SCALE, FORMATS, map_bytes

S_Q, HEADS, S_KV, SIZE = 1024, 8, 77, 40


def probabilities(first: float, generator: torch.Generator) -> torch.Tensor:
    """[S_q, H, S_kv] in fp64. `first` 0: no token stands out."""
    scores = 2 * torch.randn(S_Q, HEADS, S_KV, generator=generator, dtype=torch.float64)
    if first == 0:
        return torch.softmax(scores / 8, -1)
    others = torch.softmax(scores[..., 1:], -1)
    share = first + 0.1 * torch.randn(S_Q, HEADS, 1, generator=generator, dtype=torch.float64)
    share = share.clamp(0.02, 0.99)
    return torch.cat([share, (1 - share) * others], -1)


def stored(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = E4M3_SCALE if dtype == torch.float8_e4m3fn else 1.0
    return (p * scale).float().to(dtype).double() / scale


def renormalised(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    q = stored(p, dtype)
    return q / q.sum(-1, keepdim=True)


def complement(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    q = stored(p[..., 1:], dtype)
    return torch.cat([1 - q.sum(-1, keepdim=True), q], -1)


FORMS = {"as it is": stored, "renormalised": renormalised, "complement": complement}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="write the table into docs/measured.md"
    )
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(S_KV, HEADS, SIZE, generator=generator, dtype=torch.float64)
    shares = {0.8: [], 0.34: [], 0.0: []}
    maps = {first: probabilities(first, generator) for first in shares}
    exact = {first: torch.einsum("qhk,khd->qhd", p, v) for first, p in maps.items()}
    rows = []
    for name, dtype in FORMATS.items():
        for form, store in FORMS.items():
            row: list[object] = [name, form, map_bytes(1, 1, HEADS, S_KV, name)]
            for first, p in maps.items():
                out = torch.einsum("qhk,khd->qhd", store(p, dtype), v)
                error = (out - exact[first]).norm() / exact[first].norm()
                row.append(f"{100 * float(error):.2g}%")
            rows.append(row)
    header = ["format", "form", "bytes a token", "error, first ~0.8", "first ~0.34", "flat"]
    text = table(header, rows)
    print(text)
    if options.write:
        note = (
            f"## Map formats\n\n{S_Q} queries, {HEADS} heads of {SIZE}, {S_KV} keys, seed 0. A "
            "token is one query of all heads. Equal bytes a format, so the forms differ by their "
            "error alone; the complement form is the one used.\n\n"
        )
        write_section("map-formats", "python scripts/map_formats.py --write", note + text)


if __name__ == "__main__":
    main()
