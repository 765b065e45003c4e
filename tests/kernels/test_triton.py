"""Every Triton kernel in Triton's interpreter, against fp64, by the error rule."""

import itertools

import pytest
import torch
from kernel_checks import (
    DTYPES,
    apply64,
    apply_eager,
    assert_guards_intact,
    assert_within_rule,
    attend64,
    attend_eager,
    decode64,
    guarded,
    guarded_allocations,
    heads,
    stored_map,
    text_probabilities,
)

import hgc_kernels as hk

pytestmark = pytest.mark.usefixtures("interpreted")

SIZES = (40, 64, 80, 160, 37)
KEYS = (77, 4, 16, 257, 13)


def _grid():
    """(dtype, format, D, S_kv): every size with every key count, and every dtype with every format;
    the rest is slow.
    """
    every = itertools.product(DTYPES, hk.FORMATS, SIZES, KEYS)
    for case in every:
        dtype, format, size, keys = case
        quick = (
            ((dtype, format) == ("fp16", "fp16"))
            or ((size, keys) == (40, 77))
            or case == ("bf16", "e4m3", 37, 13)
        )
        yield pytest.param(
            *case, id=f"{dtype}-{format}-D{size}-Skv{keys}", marks=() if quick else pytest.mark.slow
        )


def _sizes(dtype):
    # fp32 tiles are small, so the interpreter walks many of them.
    return (1, 19, 2) if dtype == "fp32" else (2, 37, 2)


@pytest.mark.parametrize("dtype, format, size, s_kv", list(_grid()))
def test_attend_and_store(dtype, format, size, s_kv):
    from hgc_kernels.ops.attend_and_store import launch

    batch, s_q, count = _sizes(dtype)
    kind = DTYPES[dtype]
    q = heads(batch, s_q, count, size, kind)
    k, v = heads(batch, s_kv, count, size, kind), heads(batch, s_kv, count, size, kind, "fused")
    map = guarded(
        torch.full((batch, s_q, count, hk.padded(s_kv)), float("nan")).to(hk.FORMATS[format]),
        fill=7.0,
    )
    scale = size**-0.5
    with guarded_allocations():
        out = launch.attend_and_store(q, k, v, scale, map)
    assert_guards_intact(map)
    reference, probabilities = attend64(q, k, v, scale)
    eager, eager_probabilities = attend_eager(q, k, v, scale)
    assert out.is_contiguous() and out.dtype == kind
    assert_within_rule(out, reference, eager, kind)
    eager_map = decode64(stored_map(eager_probabilities.float(), format), s_kv)
    assert_within_rule(decode64(map, s_kv), probabilities, eager_map, kind)
    unit = 448.0 if format == "e4m3" else 1.0
    assert (map[..., :1].float() == unit).all()
    assert (map[..., s_kv:].float() == 0).all()


@pytest.mark.parametrize("dtype, format, size, s_kv", list(_grid()))
def test_apply_map(dtype, format, size, s_kv):
    from hgc_kernels.ops.apply_map import launch

    batch, s_q, count = _sizes(dtype)
    v = heads(batch, s_kv, count, size, DTYPES[dtype])
    map = guarded(stored_map(text_probabilities(batch, s_q, count, s_kv), format))
    # Slot 0 and the padding are not to be read here.
    map[..., :1] = float("nan")
    map[..., s_kv:] = float("nan")
    with guarded_allocations():
        out = launch.apply_map(map, v)
    assert out.is_contiguous() and out.dtype == v.dtype
    assert_within_rule(out, apply64(map, v), apply_eager(map, v), v.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", ["projection", "fused", "half", "transposed"])
def test_views(view, dtype):
    """Strided inputs as diffusers makes them, one view for all operands."""
    kind = DTYPES[dtype]
    q = heads(2, 21, 3, 40, kind, view)
    k, v = (heads(2, 13, 3, 40, kind, view) for _ in "kv")
    map = hk.new_map(2, 21, 3, 13)
    with hk.use_backend("triton"):
        out = hk.attend_and_store(q, k, v, map, scale=0.3)
        applied = hk.apply_map(map, v)
    assert_within_rule(out, attend64(q, k, v, 0.3)[0], attend_eager(q, k, v, 0.3)[0], kind)
    assert_within_rule(applied, apply64(map, v), apply_eager(map, v), kind)


def test_large_scores_do_not_overflow():
    """The maximum is taken out before the powers: scores in the hundreds give a map of ones and
    zeros, not of NaN.
    """
    q, k, v = (heads(1, 20, 2, 40, torch.float16) * 30 for _ in "qkv")
    for s_kv in (20, 300):
        keys, values = (x[:, :20].repeat(1, s_kv // 20, 1, 1) for x in (k, v))
        map = hk.new_map(1, 20, 2, s_kv)
        with hk.use_backend("triton"):
            out = hk.attend_and_store(q, keys, values, map)
        reference, eager = (
            attend64(q, keys, values, 40**-0.5)[0],
            attend_eager(q, keys, values, 40**-0.5)[0],
        )
        assert_within_rule(out, reference, eager, torch.float16)


@pytest.mark.parametrize("format", hk.FORMATS)
def test_nan_is_not_lost(format):
    """A NaN in a query is a NaN in its row of the map, and in what the map is applied to, in every
    format.
    """
    q, k, v = (
        heads(1, 18, 2, 40, torch.float16),
        *(heads(1, 13, 2, 40, torch.float16) for _ in "kv"),
    )
    q[0, 3] = float("nan")
    map = hk.new_map(1, 18, 2, 13, format=format)
    with hk.use_backend("triton"):
        out = hk.attend_and_store(q, k, v, map)
        rows = [out, hk.apply_map(map, v)]
    for row in rows:
        assert row[0, 3].isnan().all()
        assert not row[0, 4].isnan().any()


def test_e4m3_codec_is_torchs():
    """Every code, every midpoint between codes, and values around the ends."""
    from codec_kernels import run_decode, run_encode

    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    decoded = torch.empty(128)
    run_decode[(1,)](codes, decoded, N=128)
    assert torch.equal(decoded[:127] * 256, values[:127])
    assert decoded[127].isnan()

    middles = (values[:126] + values[1:127]) / 2
    x = torch.cat(
        [
            values[:127],
            middles,
            middles * 1.0001,
            middles * 0.9999,
            torch.tensor([float("nan"), 448.001]),
        ]
    )
    x = torch.cat([x, torch.rand(4096 - len(x)) * 448])
    encoded = torch.empty(4096, dtype=torch.uint8)
    run_encode[(1,)](x, encoded, N=4096)
    assert torch.equal(encoded, x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_a_head_is_one_tile():
    """Two tiles a head gave wrong results on Hopper: docs/decisions/016-one-head-tile.md."""
    from hgc_kernels.backend import Unsupported
    from hgc_kernels.launch_config import head_block

    sizes = (1, 16, 17, 40, 64, 80, 128, 160, 256)
    assert [head_block(size) for size in sizes] == [16, 16, 32, 64, 64, 128, 128, 256, 256]
    with pytest.raises(Unsupported, match="head size 257 is above 256"):
        head_block(257)
