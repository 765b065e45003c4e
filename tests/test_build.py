"""What the build asks for and leaves out, in Pythons that lack a part of what it needs."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python with setuptools and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", symlinks=True)
    packages = folder / "packages"
    packages.mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for part in ("setuptools", "_distutils_hack", *installed.glob("setuptools-*")):
        (packages / Path(part).name).symlink_to(installed / part)
    return folder


def run(bare, code, *, compiler=True, **environment):
    path = os.environ["PATH"] if compiler else "/nonexistent"
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [bare / "venv/bin/python", "-c", code],
        cwd=ROOT / "scripts",
        env={**kept, "PATH": path, "PYTHONPATH": str(bare / "packages"), **environment},
        capture_output=True,
        text=True,
    )


def requirements(bare, before="", **options):
    code = (
        # setuptools first: it would look at the platform's name, and then at the whole project
        "import json, sys, setuptools.build_meta as s\n"
        "s.get_requires_for_build_wheel = s.get_requires_for_build_editable = lambda settings: []\n"
        f"{before}\nimport build_backend as b\n"
        "print(json.dumps([b.get_requires_for_build_wheel(), b.get_requires_for_build_editable()]))"
    )
    done = run(bare, code, **options)
    assert done.returncode == 0, done.stderr
    wheel, editable = json.loads(done.stdout)
    assert wheel == editable
    return wheel


def torch_in(names):
    return [name for name in names if name.startswith("torch")]


def test_torch_is_asked_for_where_its_headers_are_missing(bare, tmp_path):
    [torch] = torch_in(requirements(bare))
    assert torch.startswith("torch>=2.10")
    headers = tmp_path / "torch/csrc/stable"
    headers.mkdir(parents=True)
    assert torch_in(requirements(bare, HGC_TORCH_INCLUDE=str(tmp_path)))  # those of an older torch
    (headers / "macros.h").touch()
    assert not torch_in(requirements(bare, HGC_TORCH_INCLUDE=str(tmp_path)))


NOTHING = {
    "HGC_NO_EXT": ({"HGC_NO_EXT": "1"}, "HGC_NO_EXT=1 was set; install again without it"),
    "no compiler": (
        {"compiler": False},
        "no C++ compiler was found; install g++ or clang++, then this package again",
    ),
    "macOS": (
        {"before": "import sys; sys.platform = 'darwin'"},
        "compiled kernels are for Linux, and this is darwin",
    ),
    "Windows": (
        {"before": "import sys; sys.platform = 'win32'"},
        "compiled kernels are for Linux, and this is win32",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_is_asked_for_where_nothing_can_be_compiled(bare, case):
    options, _ = NOTHING[case]
    assert requirements(bare, **options) == []


@pytest.mark.parametrize("case", NOTHING)
def test_what_cannot_be_compiled_is_left_out_and_recorded(bare, tmp_path, case):
    """By setup.py itself, with the platform's name patched once setuptools has looked at it."""
    options, reason = NOTHING[case]
    before = options.get("before", "")
    code = (
        f"import os, runpy, sys, setuptools\nfrom setuptools.command.build_py import build_py\n"
        f"os.chdir({str(ROOT)!r})\n"
        f"build_py.run = lambda self: None\n"  # the Python files: not looked at here
        f"sys.argv = ['setup.py', '-q', 'build_py', '--build-lib', {str(tmp_path)!r}]\n"
        f"{before}\nrunpy.run_path('setup.py', run_name='__main__')"
    )
    done = run(bare, code, **{key: value for key, value in options.items() if key != "before"})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "hgc_kernels/lib/left_out.json").read_text())
    assert record == dict.fromkeys(("cpu", "cuda", "introspection"), reason)
    assert done.stderr.count(reason) == 3
    assert not list(tmp_path.glob("**/*.so"))


def test_an_old_python_is_refused_by_the_build(bare):
    done = run(bare, "import sys; sys.version_info = (3, 10)\nimport build_backend")
    assert done.returncode == 1 and "hgc needs Python >= 3.11, and this is Python" in done.stderr


def test_the_bare_python_is_this_one_without_torch(bare):
    done = run(bare, "import sys; print(sys.version_info[:2])\nimport torch")
    assert done.stdout.strip() == str(sys.version_info[:2]) and "No module named" in done.stderr
