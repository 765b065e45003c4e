"""Writes docs/compatibility.md from the outcomes of the rows in tests/compatibility.py.

    python scripts/write_compatibility.py

Takes about four minutes on one core. Exits with 1 where a row fails; the page then says which.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import compatibility  # noqa: E402
import torch  # noqa: E402
from measured import section  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"


def main() -> int:
    """Judge every row and write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcomes = {}
    for i, row in enumerate(compatibility.ROWS):
        outcomes[i] = compatibility.outcome(row)
        state = "ok" if outcomes[i].good else "FAILS"
        print(f"{i + 1:>4}/{len(compatibility.ROWS)} {state:<6}{row.group}: {row.name}", flush=True)
    releases = section("releases", PAGE)  # scripts/check_matrix.sh writes it
    PAGE.write_text(f"{compatibility.page(outcomes)}\n{releases}\n")
    return 0 if all(o.good for o in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
