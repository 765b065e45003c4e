"""gather_blocks against eager PyTorch: the same bits, the same memory format."""

import pytest
import torch
from kernel_checks import DTYPES, guarded

import hgc_kernels as hk
from hgc_kernels.layout import gathered_format, is_channels_last

# The decoder inputs of SD1.5 at 512 (two of them) and SDXL at 1024, then primes and single sizes.
SHAPES = {
    "sd15_up3_0": (2, 640, 320, 64, 64),
    "sd15_up2_2": (2, 640, 320, 32, 32),
    "sdxl_up1_2": (1, 640, 320, 64, 64),
    "sd15_up0": (2, 1280, 1280, 8, 8),
    "large_odd": (1, 641, 321, 47, 53),  # past the caches, with ends that fill no line
    "primes": (3, 7, 13, 11, 5),
    "one_pixel": (2, 5, 3, 1, 1),
    "one_channel": (2, 1, 1, 6, 4),
    "one_line": (2, 3, 2, 1, 37),
}
BACKENDS = ("native", "reference")


def inputs(shape, dtype, channels_last):
    batch, hidden_channels, skip_channels, height, width = shape
    found = [
        torch.randn(batch, channels, height, width).to(DTYPES[dtype])
        for channels in (hidden_channels, skip_channels, skip_channels)
    ]
    if channels_last:
        found = [x.contiguous(memory_format=torch.channels_last) for x in found]
    return [guarded(x) for x in found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_eager(shape, dtype, channels_last, backend):
    hidden, skip, residual = inputs(shape, dtype, channels_last)
    with hk.use_backend(backend):
        for scale in (1.0, 0.7):
            out = hk.gather_blocks(hidden, skip, residual, scale=scale)
            eager = torch.cat([hidden, skip + scale * residual], 1)
            assert torch.equal(out, eager)
            if not (
                hidden.shape[1] == 1 or shape[3] * shape[4] == 1
            ):  # else both formats are the same strides
                assert out.stride() == eager.stride()
            # what the fake promises a compiled graph, for single sizes too
            format = gathered_format(hidden, skip)
            promised = torch.empty(out.shape, device="meta", memory_format=format)
            assert out.stride() == promised.stride()
        assert torch.equal(hk.gather_blocks(hidden, skip), torch.cat([hidden, skip], 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_of_a_batch(dtype):
    """What CFG gives: the conditional half is a view with the strides of the whole."""
    hidden, skip, residual = (x.chunk(2)[1] for x in inputs((4, 6, 5, 8, 8), dtype, False))
    with hk.use_backend("native"):
        assert torch.equal(
            hk.gather_blocks(hidden, skip, residual), torch.cat([hidden, skip + residual], 1)
        )
        every_second = [x[::2] for x in inputs((4, 6, 5, 8, 8), dtype, True)]
        out = hk.gather_blocks(*every_second)
    assert torch.equal(out, torch.cat([every_second[0], every_second[1] + every_second[2]], 1))
    assert is_channels_last(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mix", ["hidden", "skip", "residual", "others", "channels", "transposed", "expanded"]
)
def test_mixed_layouts(mix, dtype):
    """No two operands alike: the path for any strides."""
    hidden, skip, residual = inputs((2, 6, 5, 7, 9), dtype, False)
    if mix == "hidden":
        hidden = guarded(hidden.contiguous(memory_format=torch.channels_last))
    elif mix == "skip":
        skip = guarded(skip.contiguous(memory_format=torch.channels_last))
    elif mix == "residual":
        residual = guarded(residual.contiguous(memory_format=torch.channels_last))
    elif mix == "others":
        hidden, skip = (
            guarded(x.contiguous(memory_format=torch.channels_last)) for x in (hidden, skip)
        )
    elif mix == "channels":
        skip = torch.cat([skip, skip], 1)[:, ::2]
    elif mix == "transposed":
        residual = guarded(residual.transpose(2, 3).contiguous()).transpose(2, 3)
    else:
        residual = residual[:1, :1].expand_as(residual)
    with hk.use_backend("native"):
        out = hk.gather_blocks(hidden, skip, residual, scale=0.9)
    assert torch.equal(out, torch.cat([hidden, skip + 0.9 * residual], 1))
    assert is_channels_last(out) == (mix == "others")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operand", ["hidden", "skip", "residual"])
def test_a_channel_of_wider_lines(operand, dtype):
    """With one channel only the strides of lines tell a crop from a whole picture."""
    names, kind = ("hidden", "skip", "residual"), DTYPES[dtype]
    found = {name: torch.randn(2, 1, 7, 9).to(kind) for name in names}
    found[operand] = torch.randn(2, 1, 7, 12).to(kind)[..., :9]
    with hk.use_backend("native"):
        out = hk.gather_blocks(**found)
    assert torch.equal(out, torch.cat([found["hidden"], found["skip"] + found["residual"]], 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_round_as_eager(dtype):
    """Infinities, NaN, subnormals, the largest values, and ties: the roundings of every lane and of
    the tails.
    """
    kind = DTYPES[dtype]
    if dtype == "fp32":
        values = torch.tensor(
            [0.0, -0.0, 1e-45, 1e-38, 3e38, float("inf"), float("nan"), 1.0, 1 / 3]
        )
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind)
    n = values.numel()
    skip = values.reshape(1, 1, 1, n)
    for scale in (1.0, 0.7, 1e-3, -3.0):
        residual = values.flip(0).reshape(1, 1, 1, n)
        with hk.use_backend("native"):
            out = hk.gather_blocks(skip, skip, residual, scale=scale)
        eager = torch.cat([skip, skip + scale * residual], 1)
        assert torch.equal(out.isnan(), eager.isnan())
        assert torch.equal(out.nan_to_num(0), eager.nan_to_num(0))
        # again in runs of three, which no vector takes: the scalar code
        whole = n // 3 * 3
        few = skip[..., :whole].reshape(-1, 1, 3, 1), residual[..., :whole].reshape(-1, 1, 3, 1)
        with hk.use_backend("native"):
            out = hk.gather_blocks(few[0], few[0], few[1], scale=scale)[:, 1].flatten()
        assert torch.equal(out.nan_to_num(0), eager[0, 1].flatten()[:whole].nan_to_num(0))


def test_empty():
    for shape in [
        (0, 3, 2, 4, 4),
        (2, 0, 2, 4, 4),
        (2, 3, 0, 4, 4),
        (2, 3, 2, 0, 4),
        (2, 3, 2, 4, 0),
    ]:
        hidden, skip, residual = inputs(shape, "fp32", False)
        with hk.use_backend("native"):
            assert torch.equal(
                hk.gather_blocks(hidden, skip, residual), torch.cat([hidden, skip + residual], 1)
            )


@pytest.mark.parametrize("name", ["skip", "residual"])
def test_other_samples_are_refused(name):
    """By the function, and by the kernel itself, which has only its own check before memory."""
    found = inputs((2, 3, 2, 4, 4), "fp32", False)
    given = dict(zip(("hidden", "skip", "residual"), found, strict=True))
    given[name] = given[name][:1]
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        hk.gather_blocks(**given)
    with pytest.raises(RuntimeError, match=f"{name}: expected the s"):
        torch.ops.hgc_native.gather_blocks(*given.values(), 1.0)


def test_gradients_flow_through_the_reference():
    hidden, skip, residual = (
        x.clone().requires_grad_() for x in inputs((2, 3, 2, 4, 4), "fp32", False)
    )
    hk.gather_blocks(hidden, skip, residual, scale=0.5).sum().backward()
    assert torch.equal(residual.grad, torch.full_like(residual, 0.5))
    with hk.use_backend("native"), pytest.raises(hk.BackendError, match="no backward"):
        hk.gather_blocks(hidden, skip, residual)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """64-bit indices: the last elements of a result of 4.3 GB in bf16."""
    pixels = 2**15
    hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, 2**15, 2**8, 2**8)
    skip = torch.arange(pixels, dtype=torch.float32).to(torch.bfloat16).reshape(1, 1, 2**7, 2**8)
    skip = skip.repeat(1, 1, 2, 1)
    with hk.use_backend("native"):
        out = hk.gather_blocks(hidden, skip)
    assert out.numel() > 2**31
    assert torch.equal(out[:, -1:], skip)
