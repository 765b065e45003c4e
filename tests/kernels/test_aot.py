"""What the compilers make of the kernels, on a machine without a GPU: a subset of what
`python scripts/aot_table.py` prints.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import hgc_kernels as hk

pytest.importorskip("triton")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_no_kernel_spills_or_reads_single_values_and_the_matrix_units_are_used():
    command = [sys.executable, SCRIPTS / "aot_table.py", "--quick"]
    built = "cuda" not in hk.build_info()["left_out"]
    if not built:
        command.append("--no-cuda")
    # not the root of the repository, whose packages would hide the installed ones
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "attend_and_store_kernel" in done.stdout
    assert ("gather_blocks_dense_kernel" in done.stdout) == built
