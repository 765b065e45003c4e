"""Builds the compiled kernels with CMake, and installs without them where they cannot be built.

HGC_NO_EXT=1 builds none; HGC_REQUIRE_EXT=1 makes any part left out an error; HGC_CUDA=0 or 1 leaves
the CUDA library out or demands it; HGC_CUDA_ARCHITECTURES, MAX_JOBS and HGC_TORCH_INCLUDE override
what is found.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "scripts"))
from find_tools import cxx_compiler, nvcc, obstacle, pybind11_include, torch_include  # noqa: E402


class LeftOut(Exception):
    """A part of the build that this machine cannot make."""


def run_cmake(name, definitions):
    folder = ROOT / "build" / f"cmake-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "CMakeCache.txt").unlink(missing_ok=True)  # it may name another environment's headers
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    commands = [
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        + [f"-D{key}={value}" for key, value in definitions.items()],
        ["cmake", "--build", str(folder), "-j", jobs],
    ]
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        sys.stdout.write(done.stdout)
        if done.returncode:
            reason = [line for line in done.stdout.splitlines() if "error" in line.lower()] or [
                "see the build log"
            ]
            raise LeftOut(f"{' '.join(command[:2])} failed: {reason[0].strip()[:300]}")


def common_definitions(package):
    if reason := obstacle():
        raise LeftOut(reason)
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            raise LeftOut(f"{tool} was not found; install it, then this package again")
    include = torch_include()
    if include is None:
        raise LeftOut(
            "no headers of torch >= 2.10 were found; install torch, then this package again"
        )
    return {
        "CMAKE_CXX_COMPILER": cxx_compiler(),
        "HGC_TORCH_INCLUDE": include,
        "HGC_LIBRARY_FOLDER": package / "lib",
    }


def build_cpu(package):
    run_cmake("cpu", {**common_definitions(package), "HGC_TARGET": "cpu"})


def build_cuda(package):
    if os.environ.get("HGC_CUDA") == "0":
        raise LeftOut("HGC_CUDA=0 was set; install again without it")
    definitions = common_definitions(package)
    compiler = nvcc()
    if compiler is None:
        raise LeftOut("nvcc was not found; install the CUDA toolkit, then this package again")
    if architectures := os.environ.get("HGC_CUDA_ARCHITECTURES"):
        definitions["HGC_CUDA_ARCHITECTURES"] = architectures
    run_cmake("cuda", {**definitions, "HGC_TARGET": "cuda", "CMAKE_CUDA_COMPILER": compiler})


def build_introspection(package):
    include = pybind11_include()
    definitions = common_definitions(package)
    if include is None:
        raise LeftOut("pybind11 was not found; install it, then this package again")
    definitions |= {
        "HGC_TARGET": "introspection",
        "HGC_PACKAGE_FOLDER": package,
        "HGC_PYBIND11_INCLUDE": include,
        "HGC_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "HGC_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }
    run_cmake("introspection", definitions)


PARTS = {"cpu": build_cpu, "cuda": build_cuda, "introspection": build_introspection}


class BuildKernels(build_py):
    def run(self):
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "hgc_kernels"
        # A library left from an earlier build must not be packaged as if this build had made it.
        shutil.rmtree(package / "lib", ignore_errors=True)
        for stale in package.glob("_native*.so"):
            stale.unlink()
        (package / "lib").mkdir(parents=True)
        left_out = {}
        for name, build in PARTS.items():
            try:
                build(package)
            except LeftOut as reason:
                demanded = os.environ.get("HGC_REQUIRE_EXT") == "1" and not (
                    name == "cuda" and os.environ.get("HGC_CUDA") == "0"
                )
                if demanded or (name == "cuda" and os.environ.get("HGC_CUDA") == "1"):
                    raise SystemExit(
                        f"hgc_kernels: the {name} part was demanded, but {reason}"
                    ) from None
                left_out[name] = str(reason)
                print(f"hgc_kernels: the {name} part is left out: {reason}", file=sys.stderr)
        (package / "lib" / "left_out.json").write_text(json.dumps(left_out, indent=2) + "\n")


class CompiledDistribution(Distribution):
    def has_ext_modules(self):  # the wheel belongs to one platform and one Python
        return True


setup(distclass=CompiledDistribution, cmdclass={"build_py": BuildKernels})
