"""setuptools' PEP 517 backend, plus the requirements that a build on this very machine lacks.

pip calls these hooks in its isolated build environment. Nothing is added that is there already, so
a machine with cmake and ninja downloads neither.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

sys.path.insert(0, str(Path(__file__).resolve().parent))
from find_tools import cxx_compiler, torch_include


def _missing_tools():
    if os.environ.get("HGC_NO_EXT") == "1" or cxx_compiler() is None:
        return []
    tools = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    # torch is several GB where no CPU build was asked for, and a build without it still installs:
    # fetch it for the build only where the compiled libraries were demanded.
    if torch_include() is None and os.environ.get("HGC_REQUIRE_EXT") == "1":
        tools.append("torch>=2.10")
    return [*tools, "pybind11>=2.13"]


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _missing_tools()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _missing_tools()
