"""setuptools' PEP 517 backend, plus the requirements that a build on this very machine lacks.

pip calls these hooks in its isolated build environment. Nothing is added that is there already, so
a machine with cmake and ninja downloads neither, and one with torch installed no torch.
"""

import platform
import re
import shutil
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036
    # pip would look for the dependencies first, and name one that such a Python cannot have.
    raise SystemExit(f"hgc needs Python >= 3.11, and this is Python {platform.python_version()}")

import tomllib

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from find_tools import obstacle, torch_include  # noqa: E402


def _missing_tools():
    if obstacle():
        return []
    tools = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if torch_include() is None:
        # The package's own requirement, so that pip takes the same release for the build and for
        # the environment, and downloads it once.
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        tools += [name for name in project["dependencies"] if re.match(r"torch\s*[<>=~!]", name)]
    return [*tools, "pybind11>=2.13"]


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _missing_tools()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _missing_tools()
