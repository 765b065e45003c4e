"""What the compiled libraries ask of their surroundings, and what the build says of itself."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import hgc_kernels as hk
from hgc_kernels import library

ROOT = Path(__file__).resolve().parents[2]
LIB = Path(hk.__file__).resolve().parent / "lib"
KNOWN = ROOT / "csrc" / "binding" / "torch_2_10_symbols.txt"


def libraries():
    found = sorted(LIB.glob("libhgc_*.so"))
    assert found, "no library was built: HGC_REQUIRE_EXT=1 pip install -e . says why"
    return found


def undefined(path):
    assert shutil.which("nm"), "binutils are needed"
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}


@pytest.mark.parametrize("path", libraries(), ids=lambda path: path.name)
def test_only_torch_2_10_is_asked_for(path):
    wanted = {name for name in undefined(path) if name.startswith(("torch_", "aoti_"))}
    assert wanted
    assert wanted <= set(KNOWN.read_text().split())


@pytest.mark.parametrize("path", libraries(), ids=lambda path: path.name)
def test_neither_python_nor_c10_nor_a_driver(path):
    names = undefined(path)
    assert not [name for name in names if name.startswith(("Py", "_Py", "cu", "cuda"))]
    assert not [name for name in names if re.search(r"c10|at6Tensor", name)]
    needed = subprocess.run(
        ["readelf", "-d", path], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", needed))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not [name for name in needed if "cuda" in name or "python" in name]


def test_build_info_names_everything():
    info = hk.build_info()
    assert set(info) == {"torch", "libraries", "vector_set", "native", "kernels", "left_out"}
    assert info["libraries"]["cpu"] == "loaded"
    assert info["vector_set"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    native = info["native"]
    assert native["cpu"]["compiler"] and native["cpu"]["flags"] and native["cpu"]["commit"]
    if "cuda" in native:
        assert native["cuda"]["cuda_compiler"] and native["cuda"]["architectures"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.skipif(not (LIB / "libhgc_cuda.so").exists(), reason="the CUDA library was not built")
def test_a_gpu_that_cannot_run_the_kernels_is_noticed():
    """Asked of the CUDA runtime, so that "auto" leaves a GPU that the library has no code for."""
    reason = library.gpu_refuses(LIB / "libhgc_cuda.so")
    assert reason.startswith("the GPU does not take its kernels: ")
