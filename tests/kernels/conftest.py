import os

import pytest
import torch

os.environ["HGC_POISON"] = "1"  # what the compiled library allocates, as below for torch


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that an op allocates holds NaN (the largest integer) until the op writes it."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)
