"""Every op on a GPU, in every dtype, against fp64. Run with `pytest -m gpu`;
scripts/check_memory.sh runs these under compute-sanitizer.
"""

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
    stored_map,
    text_probabilities,
)

import hgc_kernels as hk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DECODER = {
    "sd15_up3_0": (2, 640, 320, 64, 64),
    "sdxl_up2_0": (1, 640, 320, 128, 128),
    "odd_pixels": (3, 7, 13, 11, 5),
    "one_pixel": (2, 5, 3, 1, 1),
}
# (B, S_q, H, S_kv, D)
ATTENTION = {
    "sd15_level0": (2, 4096, 8, 77, 40),
    "sd15_level1": (2, 1024, 8, 77, 80),
    "sd15_level2": (2, 256, 8, 77, 160),
    "sd15_mid": (2, 64, 8, 77, 160),
    "sdxl": (2, 1024, 20, 77, 64),
    "image_prompt": (1, 300, 4, 257, 64),
    "primes": (3, 37, 5, 13, 37),
    "four_keys": (1, 129, 2, 4, 40),
}
NORMS = {
    "sd15_level0": ((2, 320, 64, 64), 32),
    "sd15_up3_0": ((2, 960, 64, 64), 32),
    "sd15_mid": ((2, 1280, 8, 8), 32),
    "sdxl": ((1, 640, 64, 64), 32),
    "odd": ((3, 21, 7, 5), 7),
    "one_pixel": ((2, 12, 1, 1), 4),
}
KINDS = pytest.mark.parametrize("dtype", DTYPES)


def on_gpu(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@KINDS
@pytest.mark.parametrize("shape", DECODER.values(), ids=DECODER)
def test_gather_blocks_is_eager(shape, dtype, offset, channels_last):
    batch, hidden_channels, skip_channels, height, width = shape
    kind = DTYPES[dtype]

    def make(samples, channels):
        raw = on_gpu(samples * channels * height * width + offset, dtype=kind)[offset:]
        if channels_last:
            return raw.view(samples, height, width, channels).permute(0, 3, 1, 2)
        return raw.view(samples, channels, height, width)

    hidden, skip, residual = (
        make(batch, hidden_channels),
        make(batch, skip_channels),
        make(batch, skip_channels),
    )
    with hk.use_backend("native"):
        assert torch.equal(
            hk.gather_blocks(hidden, skip, residual, scale=0.7),
            torch.cat([hidden, skip + 0.7 * residual], 1),
        )
        assert torch.equal(hk.gather_blocks(hidden, skip), torch.cat([hidden, skip], 1))


@KINDS
def test_gather_blocks_mixed_layouts(dtype):
    hidden, skip, residual = (on_gpu(2, 6, 7, 9, dtype=DTYPES[dtype]) for _ in range(3))
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    residual = residual[:1, :1].expand_as(residual)
    with hk.use_backend("native"):
        assert torch.equal(
            hk.gather_blocks(hidden, skip, residual), torch.cat([hidden, skip + residual], 1)
        )


def projected(batch, tokens, count, size, kind):
    return on_gpu(batch, tokens, count * size, dtype=kind).view(batch, tokens, count, size)


@pytest.mark.parametrize("format", hk.FORMATS)
@KINDS
@pytest.mark.parametrize("shape", ATTENTION.values(), ids=ATTENTION)
def test_attention_ops(shape, dtype, format):
    batch, s_q, count, s_kv, size = shape
    kind = DTYPES[dtype]
    q = projected(batch, s_q, count, size, kind)
    k, v = (projected(batch, s_kv, count, size, kind) for _ in "kv")
    map = hk.new_map(batch, s_q, count, s_kv, format=format, device="cuda")
    map.view(torch.uint8).fill_(0x7F)  # poisoned
    with hk.use_backend("triton"):
        out = hk.attend_and_store(q, k, v, map)
    scale = size**-0.5
    reference, probabilities = attend64(q, k, v, scale)
    eager, eager_probabilities = attend_eager(q, k, v, scale)
    assert_within_rule(out, reference, eager, kind)
    eager_map = stored_map(eager_probabilities.float().cpu(), format)
    assert_within_rule(
        decode64(map, s_kv).cpu(), probabilities.cpu(), decode64(eager_map, s_kv), kind
    )

    peaked = stored_map(text_probabilities(batch, s_q, count, s_kv), format).cuda()
    with hk.use_backend("triton"):
        applied = hk.apply_map(peaked, v)
    assert_within_rule(applied, apply64(peaked, v), apply_eager(peaked, v), kind)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("around", [(True, True), (False, False)], ids=["shift-silu", "norm"])
@KINDS
@pytest.mark.parametrize("shape", NORMS.values(), ids=NORMS)
def test_group_norm(shape, dtype, around, memory_format):
    (sizes, groups), kind, (shifted, silu) = shape, DTYPES[dtype], around
    x = on_gpu(*sizes, dtype=kind).contiguous(memory_format=memory_format)
    weight, bias = (on_gpu(sizes[1], dtype=kind) for _ in "wb")
    shift = on_gpu(*sizes[:2], dtype=kind) if shifted else None
    with hk.use_backend("triton"):
        out = hk.group_norm(x, groups, weight, bias, shift=shift, silu=silu)
    assert out.stride() == x.stride()
    shifted = x if shift is None else x + shift[:, :, None, None]
    found = []
    for of in (torch.Tensor.double, torch.Tensor.contiguous):
        y = torch.nn.functional.group_norm(of(shifted), groups, of(weight), of(bias))
        found.append(torch.nn.functional.silu(y) if silu else y)
    assert_within_rule(out, *found, kind)


def test_backends_and_kernel_attributes():
    table = hk.backends()
    assert {op: devices["cuda"][0] for op, devices in table.items()} == {
        "gather_blocks": "native",
        "apply_map": "triton",
        "attend_and_store": "triton",
        "group_norm": "triton",
    }
    kernels = hk.build_info()["kernels"]
    assert len(kernels) == 30
    assert all(kernel["local_bytes"] == 0 for kernel in kernels)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_of_another_gpu_than_the_current_one():
    q, v = (projected(2, 64, 4, 40, torch.float16).to("cuda:1") for _ in range(2))
    map = hk.new_map(2, 64, 4, 64, device="cuda:1")
    x = torch.randn(2, 8, 16, 16).to("cuda:1")

    def results():
        return (
            hk.attend_and_store(q, v, v, map),
            hk.apply_map(map, v),
            hk.gather_blocks(x, x, x, 0.3),
            hk.group_norm(x, 2, x[0, :, 0, 0], x[0, :, 0, 1], shift=x[:, :, 0, 0], silu=True),
        )

    with torch.cuda.device(0):
        found = results()
    with torch.cuda.device(1):
        expected = results()
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@KINDS
def test_empty_tensors_launch_nothing(dtype):
    kind = DTYPES[dtype]
    none = on_gpu(0, 3, 4, 4, dtype=kind)
    assert hk.gather_blocks(none, none, none).shape == (0, 6, 4, 4)
    map, v = hk.new_map(0, 3, 2, 5, device="cuda"), on_gpu(0, 5, 2, 8, dtype=kind)
    assert hk.apply_map(map, v).shape == (0, 3, 2, 8)
    assert hk.attend_and_store(v[:, :3], v, v, map).shape == (0, 3, 2, 8)
    ones = on_gpu(3, dtype=kind)
    assert hk.group_norm(none, 3, ones, ones).shape == (0, 3, 4, 4)


def test_compiled_on_the_gpu():
    x = on_gpu(2, 8, 16, 16, dtype=torch.float16)
    compiled = torch.compile(lambda a: hk.gather_blocks(a, a, a, scale=0.5) * 2, fullgraph=True)
    assert torch.equal(compiled(x), torch.cat([x, x + 0.5 * x], 1) * 2)


def test_a_cuda_graph_captures_every_op():
    """Nothing in an op waits for the device or allocates outside torch's pool."""
    q, v = projected(2, 64, 4, 40, torch.float16), projected(2, 77, 4, 40, torch.float16)
    map = hk.new_map(2, 64, 4, 77, device="cuda")
    x = on_gpu(2, 8, 16, 16, dtype=torch.float16)

    def step():
        return (
            hk.attend_and_store(q, v, v, map),
            hk.apply_map(map, v),
            hk.gather_blocks(x, x, x, 0.3),
            hk.group_norm(x, 2, x[0, :, 0, 0], x[0, :, 0, 1], shift=x[:, :, 0, 0], silu=True),
        )

    expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for mine, other in zip(captured, expected, strict=True):
        assert torch.equal(mine, other)
