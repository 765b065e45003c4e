"""What the compiled libraries ask of their surroundings, and what the build says of itself."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import hgc_kernels as hk
from hgc_kernels import elf, library, versions

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(hk.__file__).resolve().parent
LIB = PACKAGE / "lib"
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


def run(code, folder=None, **environment):
    """Status and output of a fresh process that takes hgc_kernels from `folder`."""
    # Where the package was installed editable, its finder would find the parts of its checkout.
    ours = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    environment = {**os.environ, "PYTHONWARNINGS": "default", **environment}
    environment.pop("HGC_LIBRARY_FOLDER", None)
    command = [sys.executable, "-c", f"{ours}\n{code}"]
    done = subprocess.run(
        command, cwd=folder or PACKAGE.parent, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def copy(tmp_path):
    """A copy of the installed package, to be damaged."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "hgc_kernels", ignore=ignored)
    return tmp_path


def cut(share):
    def damage(path):
        os.truncate(path, int(share * path.stat().st_size))

    return damage


def of_another_machine(path):
    """In its header an aarch64 library, or on an aarch64 machine an x86_64 one."""
    content = bytearray(path.read_bytes())
    content[18] = 62 if content[18] == 183 else 183
    path.write_bytes(content)


DAMAGES = {
    "deleted": (Path.unlink, "is not there; install the package again"),
    "cut short": (cut(0.5), r"is cut short: \d+ of \d+ bytes; install the package again"),
    "of another machine": (of_another_machine, "is for (aarch64|x86_64), and this process is "),
}
USE = (
    "import json, torch, hgc_kernels as hk\n"
    "x = torch.randn(1, 4, 8, 8)\n"
    "assert torch.equal(hk.gather_blocks(x, x, x), torch.cat([x, x + x], 1))\n"
    "map = hk.new_map(1, 3, 1, 4).zero_()\n"
    "assert torch.equal(hk.apply_map(map, torch.ones(1, 4, 1, 8)), torch.ones(1, 3, 1, 8))\n"
    "print(json.dumps(hk.build_info()))\n"
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_libraries_are_named_and_done_without(copy, damage):
    break_it, expected = DAMAGES[damage]
    parts = {path.stem: path for path in (copy / "hgc_kernels").glob("**/*.so")}
    assert "libhgc_cpu" in parts
    for path in parts.values():
        break_it(path)
    status, out, err = run(USE, copy)
    assert status == 0, err
    info = json.loads(out)
    assert not info["native"]
    # The CPU library is used by every process, the CUDA library where there is a GPU.
    used = {"libhgc_cpu": "cpu", "libhgc_cuda": "cuda" if torch.cuda.is_available() else None}
    for name, path in parts.items():
        named = re.escape(str(path)) if damage != "deleted" else rf"\S*{name.split('.')[0]}\S*"
        part = name.removeprefix("libhgc_") if name.startswith("lib") else "introspection"
        assert re.match(f"{named} {expected}", info["libraries"][part]), info["libraries"]
        if device := used.get(name):
            assert re.search(f"no compiled kernels for {device}: {named} {expected}", err), err
    assert err.count("Warning") == len([name for name in parts if used.get(name)]), err


def test_in_a_checkout_the_remedy_is_another_folder(copy):
    """After "pip install .", where the folder of the source comes first on Python's path."""
    (copy / "setup.py").touch()
    shutil.rmtree(copy / "hgc_kernels" / "lib")
    status, _, err = run(USE, copy)
    assert status == 0, err
    assert re.search(r"libhgc_cpu\.so is not there: this is the source, .* pip install -e \.", err)
    assert "install the package again" not in err


@pytest.mark.parametrize("path", libraries(), ids=lambda path: path.name)
def test_a_library_cut_anywhere_is_noticed(path, tmp_path):
    """Before the loader sees it, which would kill the process."""
    copy, size = tmp_path / path.name, path.stat().st_size
    shutil.copy(path, copy)
    loaded = Path(torch._C.__file__)
    assert elf.fault(copy, loaded) is None
    for length in (size - 1, size * 3 // 4, size // 100, 64, 63, 4, 0):
        os.truncate(copy, length)
        assert re.search(rf"(cut short: |no library \(){length}\b", elf.fault(copy, loaded))


def test_a_whole_install_does_not_warn():
    assert run(USE, PYTHONWARNINGS="error::RuntimeWarning")[0] == 0


def test_what_was_left_out_is_said_once_with_the_remedy(copy):
    folder = copy / "hgc_kernels/lib"
    for file in folder.glob("*.so"):
        file.unlink()
    reason = "HGC_NO_EXT=1 was set; install again without it"
    record = folder / "left_out.json"
    record.write_text(json.dumps(dict.fromkeys(("cpu", "cuda"), reason)))
    status, _, err = run(USE + USE, copy)
    said = "hgc_kernels has no compiled kernels for cpu: libhgc_cpu.so was left out of this install"
    assert status == 0 and err.count("Warning") == 1, err
    assert f"<string>:2: RuntimeWarning: {said} ({reason})" in err  # the line that imported it
    # A record that was cut short says nothing, and does no harm.
    record.write_text(record.read_text()[:10])
    status, _, err = run(USE, copy)
    assert status == 0 and "libhgc_cpu.so is not there" in err, err


def test_the_cuda_library_is_missed_where_there_is_a_gpu(copy):
    (copy / "hgc_kernels/lib/libhgc_cuda.so").unlink(missing_ok=True)
    gpu = "import torch\ntorch.version.cuda = '13.0'\ntorch.cuda.device_count = lambda: 1\n"
    status, _, err = run(gpu + "import hgc_kernels", copy)
    assert status == 0 and err.count("no compiled kernels for cuda: ") == 1, err


@pytest.mark.parametrize(
    ("old", "said"),
    [
        ("import torch; torch.__version__ = '2.9.1+cu128'",
         "torch >= 2.10, and this is torch 2.9.1+cu128"),
        ("import platform; platform.python_version = lambda: '3.10.13'",
         "Python >= 3.11, and this is Python 3.10.13"),
    ],
    ids=["torch", "Python"],
)  # fmt: skip
def test_old_releases_are_refused(old, said):
    status, _, err = run(f"{old}\nimport hgc_kernels")
    assert status == 1 and f"ImportError: hgc_kernels needs {said}" in err


def test_the_metadata_names_the_same_releases():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = {name: ".".join(map(str, found)) for name, found in versions.OLDEST.items()}
    assert project["requires-python"].startswith(f">={oldest['Python']}")
    [torch] = [name for name in project["dependencies"] if name.startswith("torch>")]
    assert re.match(rf"torch>={oldest['torch']}(,|$)", torch)
