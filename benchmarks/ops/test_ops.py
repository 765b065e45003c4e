"""Microbenchmarks of the ops at SD1.5 512 and SDXL 1024 shapes.

    pytest benchmarks/ops --benchmark-only          # CPU, and CUDA where there is a GPU
    pytest benchmarks/ops --benchmark-only -k "cuda and fp16" --benchmark-json out.json

Every op against the same maths in eager PyTorch and under torch.compile, and the whole cached
cross-attention against diffusers' own. `extra_info` carries bytes and FLOPs as the functions of
`hgc_kernels.counts` count them, GB/s and GFLOP/s, and on a GPU the device's own times (p20, p50,
p80), which the rates are of, and the share of the copy bandwidth measured there. The result is
checked before it is timed.
"""

import functools

import pytest
import torch
from timing import copy_bandwidth, device_seconds, flush_caches, percentile
from workloads import (
    CROSS_ATTENTIONS,
    DECODER_INPUTS,
    eager_apply_map,
    eager_apply_map_project,
    eager_attend_and_store,
    eager_gather_blocks,
    whole_cross_attention,
)

import hgc_kernels as hk
from hgc_kernels import counts

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BATCH = 2  # one image, both halves of guidance
VARIANTS = ("hgc", "eager", "compiled")


def cases():
    for device in DEVICES:
        for dtype in ("fp32", "bf16") if device == "cpu" else ("fp16", "bf16"):
            yield pytest.param(device, dtype, id=f"{device}-{dtype}")


where = pytest.mark.parametrize("device, dtype", list(cases()))
variants = pytest.mark.parametrize("variant", VARIANTS)
decoder_inputs = pytest.mark.parametrize("shape", DECODER_INPUTS, ids=lambda s: s.name)
attentions = pytest.mark.parametrize("shape", CROSS_ATTENTIONS, ids=lambda s: s.name)
formats = pytest.mark.parametrize("format", ["fp16", "e4m3"])


def measure(benchmark, run, device, *, moved=0, flops=0):
    flush = flush_caches(device)

    def setup():
        flush()
        if device == "cuda":
            torch.cuda.synchronize()

    def timed():
        out = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    with torch.no_grad():
        timed()
        benchmark.pedantic(timed, setup=setup, rounds=30 if device == "cuda" else 10)
        seconds = benchmark.stats.stats.median
        if device == "cuda":
            (found,) = device_seconds([run])
            spread = {f"device_p{p}_us": percentile(found, p / 100) * 1e6 for p in (20, 50, 80)}
            benchmark.extra_info.update(spread)
            seconds = percentile(found, 0.5)
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        bytes=moved,
        flops=flops,
        gb_per_s=moved / seconds / 1e9,
        gflop_per_s=flops / seconds / 1e9,
    )
    if device == "cuda" and moved:
        benchmark.extra_info["share_of_copy"] = moved / seconds / copy_bandwidth()


def pick(variant, ours, eager):
    if variant == "hgc":
        return ours
    return torch.compile(eager) if variant == "compiled" else eager


def assert_close(out, expected, format=None):
    """The same maths: apart by no more than roundings of the dtype, or of the map's format, which
    the kernel tests bound by the error rule.
    """
    step = {"fp16": 2**-11, "e4m3": 2**-4, None: 0.0}[format] + torch.finfo(out.dtype).eps
    error = (out.float() - expected.float()).abs().max()
    assert float(error) <= 16 * step * float(expected.float().abs().max())


@variants
@where
@decoder_inputs
def test_gather_blocks(benchmark, shape, device, dtype, variant):
    hidden, skip, residual = shape.tensors(BATCH, DTYPES[dtype], device)
    ours = functools.partial(hk.gather_blocks, scale=0.7)
    function = pick(variant, ours, functools.partial(eager_gather_blocks, scale=0.7))
    if variant == "hgc":
        assert torch.equal(
            ours(hidden, skip, residual), eager_gather_blocks(hidden, skip, residual, 0.7)
        )
    moved = shape.bytes(BATCH, DTYPES[dtype])
    measure(benchmark, lambda: function(hidden, skip, residual), device, moved=moved)


@variants
@where
@decoder_inputs
def test_scatter_rows(benchmark, shape, device, dtype, variant):
    _, fresh, _ = shape.tensors(BATCH, DTYPES[dtype], device)
    cache = torch.zeros_like(fresh)
    rows = torch.tensor([1], device=device)

    def eager(cache, fresh, rows):
        cache[rows] = fresh

    function = pick(variant, hk.scatter_rows, eager)
    function(cache, fresh[:1], rows)
    assert torch.equal(cache[1], fresh[0])
    moved = counts.scatter_rows_bytes(1, fresh[0].numel(), fresh.element_size())
    measure(benchmark, lambda: function(cache, fresh[:1], rows), device, moved=moved)


@variants
@formats
@where
@attentions
def test_apply_map(benchmark, shape, device, dtype, format, variant):
    v, map = shape.values(BATCH, DTYPES[dtype], device), shape.map(BATCH, format, device)
    full = hk.map_probabilities(map, shape.s_kv).to(v.dtype)
    function = pick(variant, lambda: hk.apply_map(map, v), lambda: eager_apply_map(full, v))
    assert_close(function(), eager_apply_map(full, v))
    sizes = (BATCH, shape.s_q, shape.s_kv, shape.heads, shape.size)
    moved = counts.apply_map_bytes(*sizes, v.element_size(), format)
    measure(benchmark, function, device, moved=moved, flops=counts.apply_map_flops(*sizes))


@variants
@formats
@where
@attentions
def test_attend_and_store(benchmark, shape, device, dtype, format, variant):
    q, map = shape.queries(BATCH, DTYPES[dtype], device), shape.map(BATCH, format, device)
    k, v = (shape.values(BATCH, DTYPES[dtype], device) for _ in "kv")
    scale = shape.size**-0.5
    function = pick(
        variant,
        lambda: hk.attend_and_store(q, k, v, map),
        lambda: eager_attend_and_store(q, k, v, scale),
    )
    out, probabilities = eager_attend_and_store(q, k, v, scale)
    if variant == "hgc":
        assert_close(function(), out)
        assert_close(hk.map_probabilities(map, shape.s_kv).to(q.dtype), probabilities, format)
    sizes = (BATCH, shape.s_q, shape.s_kv, shape.heads, shape.size)
    moved = counts.attend_and_store_bytes(*sizes, q.element_size(), format)
    measure(benchmark, function, device, moved=moved, flops=counts.attend_and_store_flops(*sizes))


@where
@attentions
def test_attention_without_storing(benchmark, shape, device, dtype):
    """What storing the map is measured against: scaled_dot_product_attention on the same inputs."""
    q = shape.queries(BATCH, DTYPES[dtype], device).transpose(1, 2)
    k, v = (shape.values(BATCH, DTYPES[dtype], device).transpose(1, 2) for _ in "kv")
    attend = torch.nn.functional.scaled_dot_product_attention
    flops = counts.attend_and_store_flops(BATCH, shape.s_q, shape.s_kv, shape.heads, shape.size)
    measure(benchmark, lambda: attend(q, k, v), device, flops=flops)


@pytest.mark.parametrize("variant", [*VARIANTS, "baddbmm"])
@formats
@where
@attentions
def test_apply_map_project(benchmark, shape, device, dtype, format, variant):
    """baddbmm: the folded form with the fold done beforehand, the least any folding could cost."""
    kind = DTYPES[dtype]
    v, map = shape.values(BATCH, kind, device), shape.map(BATCH, format, device)
    full = hk.map_probabilities(map, shape.s_kv).to(kind)
    weight = (
        torch.randn(shape.channels, shape.channels, device=device).to(kind) * shape.channels**-0.5
    )
    bias = torch.randn(shape.channels, device=device).to(kind)
    residual = torch.randn(BATCH, shape.s_q, shape.channels, device=device).to(kind)
    if variant == "baddbmm":
        flat = map.flatten(2).to(kind)
        folded = torch.randn(BATCH, flat.shape[2], shape.channels, device=device).to(kind)
        function = functools.partial(torch.baddbmm, residual, flat, folded)
    else:
        function = pick(
            variant,
            lambda: hk.apply_map_project(map, v, weight, bias, residual),
            lambda: eager_apply_map_project(full, v, weight, bias, residual),
        )
        assert_close(function(), eager_apply_map_project(full, v, weight, bias, residual))
    sizes = (BATCH, shape.s_q, shape.s_kv, shape.heads, shape.size, shape.channels)
    moved = counts.apply_map_project_bytes(*sizes, kind.itemsize, format)
    flops = counts.apply_map_project_flops(*sizes)
    measure(benchmark, function, device, moved=moved, flops=flops)


@pytest.mark.parametrize("variant", ["hgc", "diffusers", "diffusers_compiled"])
@where
@attentions
def test_whole_cross_attention(benchmark, shape, device, dtype, variant):
    """From hidden states to hidden states; see `workloads.whole_cross_attention`."""
    pytest.importorskip("diffusers")
    with torch.no_grad():
        ours, theirs = whole_cross_attention(shape, BATCH, DTYPES[dtype], device)
        assert_close(ours(), theirs(), "fp16")
    function = {"hgc": ours, "diffusers": theirs}.get(variant) or torch.compile(theirs)
    sizes = (BATCH, shape.s_q, shape.s_kv, shape.heads, shape.size, shape.channels)
    if variant == "hgc":
        flops = counts.apply_map_project_flops(*sizes) + counts.project_flops(
            BATCH * shape.s_kv, shape.context, shape.channels
        )
    else:
        flops = counts.cross_attention_flops(*sizes, shape.context)
    measure(benchmark, function, device, flops=flops)
