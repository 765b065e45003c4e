"""Random calls: each either equals the reference or raises TypeError or ValueError naming an
argument.

HGC_RANDOM_CALLS sets how many an op (150 by default; 2000 before a release). The sanitizer build
runs this file too.
"""

import os
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hgc_kernels as hk

CALLS = int(os.environ.get("HGC_RANDOM_CALLS", "150"))
random_calls = settings(
    max_examples=CALLS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33])
small = st.sampled_from([0, 1, 2, 3])
# One call in some is spoilt in one place, so that most others reach the kernels.
spoils = st.sampled_from(
    [None] * 6 + ["dtype", "mixed", "shape", "device", "dims", "kind", "empty", "layout"]
)
layouts = st.sampled_from(
    ["plain", "plain", "channels_last", "sliced", "transposed", "expanded", "offset"]
)


def tensor(shape, dtype, layout, seed):
    """Random values of a shape in some memory layout."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(shape)
    ndim = len(shape)
    if layout == "channels_last" and ndim == 4:
        permuted = torch.randn(shape[0], *shape[2:], shape[1], generator=generator)
        return permuted.to(dtype).movedim(-1, 1)
    if layout == "sliced" and ndim:
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator).to(dtype)[..., 1::2]
    if layout == "transposed" and ndim > 1:
        return (
            torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator)
            .to(dtype)
            .transpose(-1, -2)
        )
    if layout == "expanded" and ndim:
        return torch.randn(1, *shape[1:], generator=generator).to(dtype).expand(shape)
    if layout == "offset":  # an address that is no multiple of 16
        count = int(torch.Size(shape).numel())
        return torch.randn(count + 1, generator=generator).to(dtype)[1:].view(shape)
    return torch.randn(shape, generator=generator).to(dtype)


def spoil(x, how):
    if how == "dtype":
        return x.to(torch.float64)
    if how == "mixed":  # a dtype that the ops know, but not the others'
        return x.to(torch.float16 if x.dtype != torch.float16 else torch.bfloat16)
    if how == "shape":
        return torch.cat([x, x[:1]]) if x.ndim and x.shape[0] else torch.ones(2, 3)
    if how == "device":
        return x.to("meta")
    if how == "dims":
        return x.unsqueeze(0)
    if how == "kind":
        return x.tolist()
    if how == "empty":
        return x[:0] if x.ndim else x
    if how == "layout":
        return x.to_sparse() if x.dtype == torch.float32 else x
    return x


def check(op, arguments, names, run_reference, *, valid):
    """Run the op; compare with the reference, or read the error, which no valid call may raise."""
    try:
        out = getattr(hk, op)(**arguments)
    except (TypeError, ValueError) as error:
        assert not valid, f"a valid call was refused: {error!r}"
        assert re.match(rf"({'|'.join(names)}): ", str(error)), f"no argument is named in {error!r}"
        return
    expected = run_reference(arguments)
    assert (
        out.shape == expected.shape
        and out.dtype == expected.dtype
        and out.stride() == expected.stride()
    )
    if op == "gather_blocks":
        assert torch.equal(out.float(), expected.float())
    elif out.numel():
        # Two orders of summation over at most 33 unit-scale terms, or one rounding of the dtype.
        step = torch.finfo(out.dtype).eps * 8 * float(expected.abs().max().clamp(min=1))
        assert float((out.float() - expected.float()).abs().max()) <= step


@random_calls
@given(
    small, sizes, sizes, sizes, sizes, st.sampled_from(FLOATS),
    st.tuples(layouts, layouts, layouts), st.booleans(),
    st.sampled_from([1.0, 0.0, 0.7, -2.5]), spoils, st.integers(0, 2), st.integers(0, 2**31),
)  # fmt: skip
def test_gather_blocks(
    batch, c_h, c_s, height, width, dtype, layout, use_residual, scale, how, which, seed
):
    arguments = {
        "hidden": tensor((batch, c_h, height, width), dtype, layout[0], seed),
        "skip": tensor((batch, c_s, height, width), dtype, layout[1], seed + 1),
    }
    if use_residual:
        arguments["residual"] = tensor(arguments["skip"].shape, dtype, layout[2], seed + 2)
    names = list(arguments)
    target = names[which % len(names)]
    arguments[target] = spoil(arguments[target], how)
    from hgc_kernels.ops.gather_blocks.reference import gather_blocks as reference

    def run_reference(a):
        return reference(a["hidden"], a["skip"], a.get("residual"), scale)

    arguments["scale"] = scale
    check("gather_blocks", arguments, names, run_reference, valid=how is None)


@random_calls
@given(
    small, st.integers(1, 4), st.integers(1, 5), sizes, sizes, st.sampled_from(FLOATS),
    st.tuples(layouts, layouts, layouts), st.booleans(), st.booleans(), spoils, st.integers(0, 3),
    st.integers(0, 2**31),
)  # fmt: skip
def test_group_norm(
    batch, groups, group, height, width, dtype, layout, shifted, silu, how, which, seed
):
    channels = groups * group
    arguments = {
        "x": tensor((batch, channels, height, width), dtype, layout[0], seed),
        "weight": tensor((channels,), dtype, layout[1], seed + 1),
        "bias": tensor((channels,), dtype, layout[2], seed + 2),
    }
    if shifted:
        arguments["shift"] = tensor((batch, channels), dtype, layout[1], seed + 3)
    names = list(arguments)
    target = names[which % len(names)]
    arguments[target] = spoil(arguments[target], how)
    from hgc_kernels.ops.group_norm.reference import group_norm as reference

    def run_reference(a):
        return reference(a["x"], a.get("shift"), groups, a["weight"], a["bias"], 1e-5, silu)

    arguments |= {"groups": groups, "silu": silu}
    check("group_norm", arguments, [*names, "groups"], run_reference, valid=how is None)


def map_of(batch, s_q, count, s_kv, format, seed):
    from hgc_kernels.map_format import encode

    map = hk.new_map(batch, s_q, count, s_kv, format=format)
    scores = torch.randn(batch, s_q, count, s_kv, generator=torch.Generator().manual_seed(seed))
    encode(torch.softmax(scores, -1), map)
    return map


attention = (
    small, sizes, st.integers(1, 3), sizes, sizes, st.sampled_from(FLOATS),
    st.sampled_from(list(hk.FORMATS)),
    layouts, spoils, st.integers(0, 4), st.integers(0, 2**31),
)  # fmt: skip


@random_calls
@given(*attention)
def test_apply_map(batch, s_q, count, s_kv, size, dtype, format, layout, how, which, seed):
    arguments = {
        "map": map_of(batch, s_q, count, s_kv, format, seed),
        "v": tensor((batch, s_kv, count, size), dtype, layout, seed + 1),
    }
    names = list(arguments)
    arguments[names[which % 2]] = spoil(arguments[names[which % 2]], how)
    from hgc_kernels.ops.apply_map.reference import apply_map as reference

    def run_reference(a):
        return reference(a["map"], a["v"])

    check("apply_map", arguments, names, run_reference, valid=how is None)


@random_calls
@given(*attention)
def test_attend_and_store(batch, s_q, count, s_kv, size, dtype, format, layout, how, which, seed):
    arguments = {
        "q": tensor((batch, s_q, count, size), dtype, layout, seed),
        "k": tensor((batch, s_kv, count, size), dtype, layout, seed + 1),
        "v": tensor((batch, s_kv, count, size), dtype, "plain", seed + 2),
        "map": hk.new_map(batch, s_q, count, s_kv, format=format),
    }
    names = list(arguments)
    arguments[names[which % 4]] = spoil(arguments[names[which % 4]], how)

    def run_reference(a):
        from kernel_checks import attend64

        return attend64(a["q"], a["k"], a["v"], size**-0.5)[0].to(dtype)

    before = arguments["map"]
    try:
        out = hk.attend_and_store(**arguments)
    except (TypeError, ValueError) as error:
        assert how is not None, f"a valid call was refused: {error!r}"
        assert re.match(rf"({'|'.join(names)}): ", str(error)), f"no argument is named in {error!r}"
        return
    expected = run_reference(arguments)
    assert out.shape == expected.shape and out.dtype == expected.dtype and out.is_contiguous()
    if out.numel():
        # Scores of up to 33 products are rounded to the dtype once in the reference of the op.
        step = torch.finfo(out.dtype).eps * 64 * float(expected.abs().max().clamp(min=1))
        assert float((out.float() - expected.float()).abs().max()) <= step
        assert torch.isfinite(before.float()).all()


@pytest.mark.parametrize("op", ["gather_blocks", "apply_map", "attend_and_store", "group_norm"])
def test_nothing_at_all(op):
    with pytest.raises(TypeError):
        getattr(hk, op)()


def test_numbers_must_be_numbers():
    x = torch.zeros(1, 2, 3, 3)
    for scale in ("1", None, [1.0], True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="scale: "):
            hk.gather_blocks(x, x, x, scale=scale)
    for s_kv, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="s_kv: "):
            hk.map_probabilities(hk.new_map(1, 1, 1, 1), s_kv)
    for bad in ({"format": "int8"}, {"batch": -1}, {"s_kv": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            hk.new_map(**{"batch": 1, "s_q": 1, "heads": 1, "s_kv": 1, **bad})
