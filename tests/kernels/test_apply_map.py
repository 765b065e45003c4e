"""The CPU kernel of apply_map and the references of the attention ops, against fp64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import (
    DTYPES,
    apply64,
    apply_eager,
    assert_within_rule,
    attend64,
    attend_eager,
    decode64,
    guarded,
    heads,
    max_error,
    stored_map,
    text_probabilities,
)

import hgc_kernels as hk

# (B, S_q, H, S_kv, D)
SHAPES = {
    "sd15_level2": (2, 256, 8, 77, 160),
    "sd15_level0": (1, 1024, 8, 77, 40),
    "sdxl": (1, 512, 10, 77, 64),
    "image_prompt": (1, 130, 3, 257, 80),
    "primes": (3, 37, 5, 13, 37),
    "one_key": (2, 25, 2, 1, 40),
    "sixteen_keys": (1, 7, 2, 16, 24),
    "one": (1, 1, 1, 2, 1),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("format", hk.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_apply_map(shape, dtype, format, backend):
    batch, s_q, count, s_kv, size = shape
    v = heads(batch, s_kv, count, size, DTYPES[dtype])
    map = guarded(stored_map(text_probabilities(batch, s_q, count, s_kv), format))
    map[..., :1] = float("nan")  # neither slot 0 nor the padding is to be read
    map[..., s_kv:] = float("nan")
    with hk.use_backend(backend):
        out = hk.apply_map(map, v)
    assert out.is_contiguous() and out.dtype == v.dtype
    assert_within_rule(out, apply64(map, v), apply_eager(map, v), v.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", ["projection", "fused", "half", "transposed", "strided"])
def test_views(view, dtype):
    if view == "strided":  # no dimension of stride one
        v = heads(2, 13, 3, 80, DTYPES[dtype])[..., ::2]
    else:
        v = heads(2, 13, 3, 40, DTYPES[dtype], view)
    map = stored_map(text_probabilities(2, 50, 3, 13), "bf16")
    with hk.use_backend("native"):
        out = hk.apply_map(map, v)
    assert_within_rule(out, apply64(map, v), apply_eager(map, v), v.dtype)


@pytest.mark.parametrize("format", hk.FORMATS)
def test_every_stored_value_is_decoded(format):
    """All bit patterns of the 16- and 8-bit formats, NaN and infinities too, one a query."""
    bits = 8 if format == "e4m3" else 16
    if format == "fp32":
        patterns = torch.tensor([0.0, 1e-45, 1e-30, 0.5, float("inf"), float("nan")])
    else:
        patterns = (
            torch.arange(2**bits)
            .to(torch.uint8 if bits == 8 else torch.uint16)
            .view(hk.FORMATS[format])
        )
    map = hk.new_map(1, patterns.numel(), 1, 2, format=format)
    map.view(torch.uint8 if bits == 8 else map.dtype)[0, :, 0, 1] = patterns.view(
        torch.uint8 if bits == 8 else map.dtype
    )
    v = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)  # so that the output is the weight of token 1
    with hk.use_backend("native"):
        out = hk.apply_map(map, v).flatten()
    expected = hk.map_probabilities(map, 2)[0, :, 0, 1]
    finite = expected.isfinite()  # 1 - inf is -inf, times v_0 = 0 is NaN, in eager too
    assert torch.allclose(out[finite], expected[finite], rtol=2**-22, atol=0)
    assert out[~finite].isnan().all()


@pytest.mark.parametrize("format", hk.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_attend_and_store(dtype, format):
    q, k, v = (heads(2, n, 3, 40, DTYPES[dtype]) for n in (50, 77, 77))
    map = hk.new_map(2, 50, 3, 77, format=format)
    with hk.use_backend("reference"):
        out = hk.attend_and_store(q, k, v, map)
    reference, probabilities = attend64(q, k, v, 40**-0.5)
    eager, eager_probabilities = attend_eager(q, k, v, 40**-0.5)
    assert_within_rule(out, reference, eager, q.dtype)
    stored = decode64(stored_map(eager_probabilities.float(), format), 77)
    assert_within_rule(decode64(map, 77), probabilities, stored, q.dtype)


@pytest.mark.parametrize("format", hk.FORMATS)
def test_what_a_map_stores(format):
    probabilities, unit = text_probabilities(2, 9, 3, 77), 448.0 if format == "e4m3" else 1.0
    map = stored_map(probabilities, format)
    assert (map[..., :1].float() == unit).all() and (map[..., 77:].float() == 0).all()
    stored = (probabilities[..., 1:] * unit).to(hk.FORMATS[format]).float()
    assert torch.equal(map[..., 1:77].float(), stored)
    full = hk.map_probabilities(map, 77)
    assert torch.equal(full[..., 1:], stored / unit)
    assert max_error(full[..., 0], 1 - (stored / unit).double().sum(-1)) < 77 * 2**-24


def test_a_strided_map_is_refused():
    map, v = hk.new_map(2, 9, 3, 20)[:, ::2], heads(2, 20, 3, 8, torch.float32)
    with pytest.raises(ValueError, match="map: expected a contiguous"):
        hk.apply_map(map, v)
    with pytest.raises(ValueError, match="map: expected a contiguous"):
        hk.attend_and_store(v[:, :5], v, v, map)
    with pytest.raises(RuntimeError, match="map: expected a contiguous"):
        torch.ops.hgc_native.apply_map(map, v)


def test_the_rule_catches_a_dropped_key():
    """The tolerance is worth something: attention without its last key fails it, at a length where
    a flat one passes.
    """
    q, k, v = (heads(1, n, 2, 64, torch.bfloat16) for n in (64, 1024, 1024))
    reference, eager = attend64(q, k, v, 0.125)[0], attend_eager(q, k, v, 0.125)[0]
    dropped = attend64(q, k[:, :-1], v[:, :-1], 0.125)[0].to(torch.bfloat16)
    assert max_error(dropped, reference) < 1e-1
    with pytest.raises(AssertionError, match="is above"):
        assert_within_rule(dropped, reference, eager, torch.bfloat16)


def test_new_map_attends_to_the_first_token():
    v = heads(2, 5, 3, 8, torch.float32)
    for format in hk.FORMATS:
        out = hk.apply_map(hk.new_map(2, 4, 3, 5, format=format), v)
        assert torch.equal(out, v[:, :1].expand(2, 4, 3, 8))


def test_map_probabilities_sum_to_one():
    for format in hk.FORMATS:
        map = stored_map(text_probabilities(1, 9, 2, 77), format)
        full = hk.map_probabilities(map, 77)
        assert full.shape == (1, 9, 2, 77) and full.dtype == torch.float32
        assert torch.allclose(full.sum(-1), torch.ones(1, 9, 2), atol=1e-6)


@pytest.mark.parametrize(
    "vectors", ["avx512", pytest.param("avx2", marks=pytest.mark.slow), "baseline"]
)
def test_other_vector_sets(vectors):
    """The kernels of other processors: the CPU tests again, in a process that picks them."""
    folder = Path(__file__).parent
    chosen = (
        "(native and (primes or one or sixteen or sd15_up2)) or special or mixed or every_stored"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            chosen,
            folder / "test_gather_blocks.py",
            folder / "test_apply_map.py",
        ],
        # not the root of the repository, which `-m` would put before the installed package
        cwd=folder,
        env={**os.environ, "HGC_CPU_ISA": vectors},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
