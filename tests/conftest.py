"""Shared by all tests: no network, fixed threads, the small models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Without a GPU the Triton kernels are tested in Triton's interpreter, which has to be asked for
# before its own library is imported. It changes nothing else: "auto" never picks it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))

import models
import pytest


@pytest.fixture(scope="session", autouse=True)
def _threads():
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, torch.get_num_threads()) // workers))


@pytest.fixture(scope="session")
def sd15():
    """A pipeline of SD1.5's topology. Tests leave it as they found it."""
    return models.sd15_pipeline()


@pytest.fixture(scope="session")
def sdxl():
    """A pipeline of SDXL's topology. Tests leave it as they found it."""
    return models.sdxl_pipeline()


@pytest.fixture(autouse=True)
def grad_mode_is_left_alone():
    """No test, and nothing it calls, may leave gradients off for those that follow."""
    before = torch.is_grad_enabled()
    yield
    after = torch.is_grad_enabled()
    torch.set_grad_enabled(before)
    assert after == before


@pytest.fixture(scope="session")
def interpreted():
    """Triton's interpreter, repaired. Fails rather than skips where the test extra is not
    installed.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "a GPU is here, where the gpu tests run the kernels; set TRITON_INTERPRET=1 for these"
        )
    import triton_interpreter

    triton_interpreter.repair()
