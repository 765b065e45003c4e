"""Runs before any other conftest: what must be decided before triton is first imported, by
whomever.
"""

import os

import torch

# Without a GPU the Triton kernels are tested in Triton's interpreter, which has to be asked for
# before its own library is imported. It changes nothing else: "auto" never picks it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
