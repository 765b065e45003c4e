"""Microbenchmarks of the ops at SD1.5 512 and SDXL 1024 shapes.

    pytest benchmarks/ops --benchmark-only                       # CPU, and CUDA where there is a
    GPU pytest benchmarks/ops --benchmark-only -k "cuda and fp16" --benchmark-json out.json

Every op against the same maths in eager PyTorch and under torch.compile, and the whole cached
cross-attention against diffusers' own. `extra_info` carries bytes, FLOPs, GB/s, and on a GPU the
share of the copy bandwidth measured there. The result is checked before it is timed.
"""

import functools

import pytest
import torch
from workloads import (
    CROSS_ATTENTIONS,
    DECODER_INPUTS,
    eager_apply_map,
    eager_apply_map_project,
    eager_attend_and_store,
    eager_gather_blocks,
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


@functools.cache
def copy_bandwidth():
    """Bytes a second of a large copy on the GPU, reads and writes counted."""
    source = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / sorted(times)[len(times) // 2]


def flush_caches(device):
    """A buffer larger than any cache, written between rounds."""
    buffer = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    return lambda: buffer.fill_(1)


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


@pytest.mark.parametrize("variant", ["hgc", "eager"])
@where
@decoder_inputs
def test_scatter_rows(benchmark, shape, device, dtype, variant):
    cache, fresh, _ = shape.tensors(BATCH, DTYPES[dtype], device)
    cache = torch.zeros_like(fresh)
    rows = torch.tensor([1], device=device)

    def eager():
        cache[rows] = fresh[:1]

    function = eager if variant == "eager" else lambda: hk.scatter_rows(cache, fresh[:1], rows)
    function()
    assert torch.equal(cache[1], fresh[0])
    moved = counts.scatter_rows_bytes(1, fresh[0].numel(), fresh.element_size())
    measure(benchmark, function, device, moved=moved)


@variants
@formats
@where
@attentions
def test_apply_map(benchmark, shape, device, dtype, format, variant):
    v, map = shape.values(BATCH, DTYPES[dtype], device), shape.map(BATCH, format, device)
    full = hk.map_probabilities(map, shape.s_kv).to(v.dtype)
    function = pick(variant, lambda: hk.apply_map(map, v), lambda: eager_apply_map(full, v))
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
    measure(benchmark, lambda: attend(q, k, v), device)


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
    measure(benchmark, function, device)


@pytest.mark.parametrize("variant", ["hgc", "diffusers", "diffusers_compiled"])
@where
@attentions
def test_whole_cross_attention(benchmark, shape, device, dtype, variant):
    """A block's cross-attention with fresh values, from hidden states to hidden states.

    diffusers: norm, to_q, to_k, to_v, scaled_dot_product_attention, to_out, residual. hgc: to_v and
    one op; the norm, the queries and the keys are not needed.
    """
    attention_processor = pytest.importorskip("diffusers.models.attention_processor")
    kind = DTYPES[dtype]
    attention = attention_processor.Attention(
        shape.channels, shape.context, heads=shape.heads, dim_head=shape.size
    ).to(device, kind)
    norm = torch.nn.LayerNorm(shape.channels).to(device, kind)
    hidden = torch.randn(BATCH, shape.s_q, shape.channels, device=device).to(kind)
    prompt = torch.randn(BATCH, shape.s_kv, shape.context, device=device).to(kind)
    map = shape.map(BATCH, "fp16", device)
    projection = attention.to_out[0]

    def theirs():
        return attention(norm(hidden), encoder_hidden_states=prompt) + hidden

    def ours():
        v = attention.to_v(prompt).unflatten(-1, (shape.heads, shape.size))
        return hk.apply_map_project(map, v, projection.weight, projection.bias, hidden)

    function = {"hgc": ours, "diffusers": theirs}.get(variant) or torch.compile(theirs)
    measure(benchmark, function, device)
