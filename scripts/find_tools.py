"""Where the compilers and headers of a build are. Used by setup.py and the build backend; imports
nothing but the stdlib.
"""

import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path


def _site_folders():
    # In pip's isolated build environment only sys.path is cut: sysconfig still names the target
    # environment's folders.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return [Path(folder) for folder in folders if folder]


def torch_include():
    """The include folder of a torch >= 2.10, found without importing torch, or None.

    The libraries use torch's stable ABI, so which torch gives the headers makes no difference to
    the result.
    """
    candidates = [folder / "torch" / "include" for folder in _site_folders()]
    if given := os.environ.get("HGC_TORCH_INCLUDE"):
        candidates.insert(0, Path(given))
    for candidate in candidates:
        if (candidate / "torch/csrc/stable/macros.h").exists():  # came with 2.10
            return candidate
    return None


def pybind11_include():
    """The include folder of pybind11, or None."""
    for folder in _site_folders():
        if (folder / "pybind11/include/pybind11/pybind11.h").exists():
            return folder / "pybind11/include"
    return None


def cxx_compiler():
    """The C++ compiler, or None."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def obstacle():
    """Why nothing at all can be compiled here, and the remedy; None where it can."""
    if os.environ.get("HGC_NO_EXT") == "1":
        return "HGC_NO_EXT=1 was set; install again without it"
    if sys.platform != "linux":
        return f"compiled kernels are for Linux, and this is {sys.platform}"
    if cxx_compiler() is None:
        return "no C++ compiler was found; install g++ or clang++, then this package again"
    return None


def nvcc():
    """The CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    given = os.environ.get("CUDACXX")
    return (
        (given and shutil.which(given))
        or shutil.which("nvcc")
        or shutil.which("nvcc", path=os.path.join(home, "bin"))
    )
