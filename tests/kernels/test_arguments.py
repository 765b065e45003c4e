"""What the ops say of arguments that they refuse: the argument, what was expected, what came; and
that the call beside it, with nothing wrong, is taken."""

from __future__ import annotations

import re

import pytest
import torch

import hgc_kernels as hk

HEADS, SIZE, KEYS = 2, 4, 5


def good(op):
    """Arguments that the op takes."""

    def heads(tokens):
        return torch.randn(1, tokens, HEADS, SIZE)

    if op == "gather_blocks":
        return {name: torch.randn(1, 3, 4, 4) for name in ("hidden", "skip", "residual")}
    if op == "group_norm":
        x, shift, ones = torch.randn(1, 6, 4, 4), torch.randn(1, 6), torch.ones(6)
        return {"x": x, "groups": 2, "weight": ones, "bias": ones, "shift": shift, "silu": True}
    map = hk.new_map(1, 6, HEADS, KEYS)
    if op == "apply_map":
        return {"map": map, "v": heads(KEYS)}
    if op == "map_probabilities":
        return {"map": map, "s_kv": KEYS}
    if op == "new_map":
        return {"batch": 1, "s_q": 6, "heads": HEADS, "s_kv": KEYS}
    return {"q": heads(6), "k": heads(KEYS), "v": heads(KEYS), "map": map, "scale": 1.0}


FAULTS = [
    (
        "gather_blocks",
        lambda: {"hidden": [1.0]},
        TypeError,
        "hidden: expected a torch.Tensor, got list",
    ),
    (
        "gather_blocks",
        lambda: {"skip": torch.zeros(1, 3, 4, 4).to_sparse()},
        TypeError,
        "skip: expected a dense (strided) tensor, got layout torch.sparse_coo",
    ),
    (
        "gather_blocks",
        lambda: {"hidden": torch.zeros(1, 3, 4, 4, dtype=torch.float64)},
        TypeError,
        "hidden: expected dtype torch.float32 or torch.float16 or torch.bfloat16, "
        "got torch.float64",
    ),
    (
        "gather_blocks",
        lambda: {"residual": torch.zeros(3, 4, 4)},
        ValueError,
        "residual: expected 4 dimensions, got shape (3, 4, 4)",
    ),
    (
        "gather_blocks",
        lambda: {"skip": torch.zeros(1, 3, 4, 4, dtype=torch.float16)},
        TypeError,
        "skip: expected the dtype of hidden (torch.float32), got torch.float16",
    ),
    (
        "gather_blocks",
        lambda: {"residual": torch.zeros(1, 3, 4, 4, device="meta")},
        ValueError,
        "residual: expected the device of skip (cpu), got meta",
    ),
    (
        "gather_blocks",
        lambda: {"skip": torch.zeros(1, 3, 4, 5)},
        ValueError,
        "skip: expected shape (1, 3, 4, 4), got (1, 3, 4, 5)",
    ),
    ("gather_blocks", lambda: {"scale": "1"}, TypeError, "scale: expected a float, got str"),
    (
        "attend_and_store",
        lambda: {
            "q": torch.zeros(1, 6, HEADS, 0),
            "k": torch.zeros(1, KEYS, HEADS, 0),
            "v": torch.zeros(1, KEYS, HEADS, 0),
        },
        ValueError,
        "q: expected a head size of at least 1, got shape (1, 6, 2, 0)",
    ),
    (
        "attend_and_store",
        lambda: {"v": torch.zeros(1, KEYS + 1, HEADS, SIZE)},
        ValueError,
        "v: expected shape (1, 5, 2, 4), got (1, 6, 2, 4)",
    ),
    ("attend_and_store", lambda: {"scale": True}, TypeError, "scale: expected a float, got bool"),
    (
        "apply_map",
        lambda: {"v": torch.zeros(1, KEYS, HEADS, 0)},
        ValueError,
        "v: expected a head size of at least 1, got shape (1, 5, 2, 0)",
    ),
    (
        "apply_map",
        lambda: {"v": torch.zeros(1, 0, HEADS, SIZE)},
        ValueError,
        "v: expected at least one key, got shape (1, 0, 2, 4)",
    ),
    (
        "apply_map",
        lambda: {"v": torch.zeros(1, 17, HEADS, SIZE)},
        ValueError,
        "map: expected a last size of 32 (17 keys padded to 16), got shape (1, 6, 2, 16)",
    ),
    (
        "apply_map",
        lambda: {"map": hk.new_map(1, HEADS, 6, KEYS).transpose(1, 2)},
        ValueError,
        "map: expected a contiguous tensor, got strides (192, 16, 96, 1)",
    ),
    (
        "group_norm",
        lambda: {"x": torch.zeros(6, 4, 4)},
        ValueError,
        "x: expected 4 dimensions, got shape (6, 4, 4)",
    ),
    ("group_norm", lambda: {"groups": 2.0}, TypeError, "groups: expected an int, got float"),
    (
        "group_norm",
        lambda: {"groups": 4},
        ValueError,
        "groups: expected a divisor of 6 channels, got 4",
    ),
    (
        "group_norm",
        lambda: {"weight": torch.ones(6).half()},
        TypeError,
        "weight: expected the dtype of x (torch.float32), got torch.float16",
    ),
    (
        "group_norm",
        lambda: {"bias": torch.ones(5)},
        ValueError,
        "bias: expected shape (6,), got (5,)",
    ),
    (
        "group_norm",
        lambda: {"shift": torch.ones(6)},
        ValueError,
        "shift: expected 2 dimensions, got shape (6,)",
    ),
    ("group_norm", lambda: {"eps": "1"}, TypeError, "eps: expected a float, got str"),
    ("group_norm", lambda: {"silu": 1}, TypeError, "silu: expected a bool, got int"),
    (
        "map_probabilities",
        lambda: {"map": torch.zeros(1, 6, HEADS, 16, dtype=torch.int8)},
        TypeError,
        "map: expected dtype ",
    ),
    ("map_probabilities", lambda: {"s_kv": 5.0}, TypeError, "s_kv: expected an int, got float"),
    ("map_probabilities", lambda: {"s_kv": 0}, ValueError, "s_kv: expected at least 1, got 0"),
    ("new_map", lambda: {"format": "fp8"}, ValueError, "format: expected one of fp32, fp16, "),
    ("new_map", lambda: {"batch": -1}, ValueError, "batch: expected at least 0, got -1"),
    ("new_map", lambda: {"s_kv": 0}, ValueError, "s_kv: expected at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("op", "wrong", "error", "text"), FAULTS, ids=[f"{f[0]}-{i}" for i, f in enumerate(FAULTS)]
)
def test_what_is_refused_is_named(op, wrong, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        getattr(hk, op)(**{**good(op), **wrong()})
    getattr(hk, op)(**good(op))


@pytest.mark.parametrize(
    ("choice", "op", "text"),
    [
        ("fast", None, "backend: expected one of "),
        ("reference", "gather", "ops: expected names among "),
    ],
)
def test_a_backend_that_is_none_is_named(choice, op, text):
    ops = () if op is None else (op,)
    with pytest.raises(ValueError, match="^" + re.escape(text)), hk.use_backend(choice, *ops):
        pass
    with hk.use_backend("reference", *(() if op is None else ("gather_blocks",))):
        pass
