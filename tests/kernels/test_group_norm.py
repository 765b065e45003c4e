"""group_norm: the reference, and the kernels in Triton's interpreter, against fp64 by the error
rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    DTYPES,
    assert_guards_intact,
    assert_within_rule,
    guarded,
)

import hgc_kernels as hk
from hgc_kernels import backend
from hgc_kernels.ops.group_norm import launch

# (B, C, H, W), groups
SHAPES = {
    "sd15_level0": ((2, 320, 9, 7), 32),
    "joined": ((1, 960, 4, 4), 32),
    "widest": ((2, 2560, 2, 3), 32),
    "several_chunks": ((2, 64, 33, 17), 4),  # of several tiles each, in channels_last
    "many_pixels": ((1, 20, 80, 130), 2),  # the same in NCHW
    "one_group": ((2, 33, 5, 3), 1),
    "a_channel_a_group": ((2, 13, 5, 3), 13),
    "one_pixel": ((2, 12, 1, 1), 4),
    "odd": ((3, 21, 3, 1), 7),
}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def operands(shape, dtype, memory_format=torch.contiguous_format, mean=0.0):
    """x, weight, bias and shift."""
    batch, channels, *_ = shape
    x = torch.randn(shape) * 2 + torch.randn(1, channels, 1, 1) + mean
    x = guarded(x.to(dtype).contiguous(memory_format=memory_format))
    made = (torch.randn(n) for n in ((channels,), (channels,), (batch, channels)))
    return (x, *(guarded(value.to(dtype)) for value in made))


def plain(x, groups, weight, bias, shift, silu):
    """The same by torch, every op in the dtype of its operands."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    out = F.group_norm(x, groups, weight, bias, 1e-5)
    return F.silu(out) if silu else out


def plain64(x, groups, weight, bias, shift, silu):
    """In fp64, but for the sum with the shift, which is rounded as eager rounds it."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    return plain(x.double(), groups, weight.double(), bias.double(), None, silu)


@pytest.mark.parametrize("around", [(True, True), (False, False)], ids=["shift-silu", "norm"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", ["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm(shape, choice, dtype, memory_format, around, request):
    if choice == "triton":
        request.getfixturevalue("interpreted")
    (sizes, groups), (shifted, silu) = SHAPES[shape], around
    x, weight, bias, shift = operands(sizes, DTYPES[dtype], FORMATS[memory_format])
    shift = shift if shifted else None
    with hk.use_backend(choice):
        out = hk.group_norm(x, groups, weight, bias, 1e-5, shift=shift, silu=silu)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=FORMATS[memory_format])
    arguments = (x, groups, weight, bias, shift, silu)
    assert_within_rule(out, plain64(*arguments), plain(*arguments), x.dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_on_a_cpu_auto_has_the_bits_of_torch(memory_format):
    x, weight, bias, shift = operands((2, 16, 5, 4), torch.bfloat16, FORMATS[memory_format])
    out = hk.group_norm(x, 4, weight, bias, 1e-5, shift=shift, silu=True)
    assert torch.equal(out, plain(x, 4, weight, bias, shift, True))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_large_mean_costs_no_digits(memory_format):
    """A sum of squares less the square of the sum would have none left."""
    x, weight, bias, _ = operands((1, 20, 40, 30), torch.float32, FORMATS[memory_format], 3e4)
    with hk.use_backend("triton"):
        out = hk.group_norm(x, 2, weight, bias)
    arguments = (x, 2, weight, bias, None, False)
    assert_within_rule(out, plain64(*arguments), plain(*arguments), x.dtype)
    naive = (x.square().mean() - x.mean().square()).abs()
    assert not 0.5 < float(naive / x.double().var()) < 2  # what such a sum gives here


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nan_stays_in_its_group_and_nothing_is_written_beside(memory_format):
    x, weight, bias, shift = operands((2, 24, 6, 5), torch.float16, FORMATS[memory_format])
    x[0, 7, 3, 2] = float("nan")
    made, empty = [], torch.empty

    def guarded_empty(*sizes, **options):
        out = empty(*sizes, **options)
        if out.dim() == 4:
            out = guarded(out.fill_(float("nan")), fill=7.0)
            made.append(out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.torch, "empty", guarded_empty)
        out = launch.group_norm(x, shift, 6, weight, bias, 1e-5, True)
    assert len(made) == 1
    assert_guards_intact(made[0])
    bad = out.isnan().unflatten(1, (6, 4)).flatten(2).any(-1)
    expected = torch.zeros(2, 6, dtype=torch.bool)
    expected[0, 1] = True
    assert torch.equal(bad, expected)
    assert out[0, 4:8].isnan().all()


@pytest.mark.usefixtures("interpreted")
def test_views():
    """Half a batch, a slice of channels, a shift that is a half of something, and one row of it."""
    x, weight, bias, _ = operands((4, 32, 6, 5), torch.float16, torch.channels_last)
    half = guarded(torch.randn(2, 64).half())[:, 32:]
    with hk.use_backend("triton"):
        out = hk.group_norm(x[2:], 4, weight, bias, shift=half, silu=True)
        sliced = hk.group_norm(x.contiguous()[:, 8:24], 4, weight[8:24], bias[8:24])
        one = hk.group_norm(x[2:], 4, weight, bias, shift=half[:1].expand(2, -1), silu=True)
    for found, shift in ((out, half), (one, half[:1].expand(2, -1))):
        arguments = (x[2:], 4, weight, bias, shift, True)
        assert_within_rule(found, plain64(*arguments), plain(*arguments), x.dtype)
    arguments = (x[:, 8:24], 4, weight[8:24], bias[8:24], None, False)
    assert_within_rule(sliced, plain64(*arguments), plain(*arguments), x.dtype)


def test_what_the_kernels_do_not_cover_is_left_to_the_reference():
    x, weight, bias, _ = operands((1, 8, 6, 10), torch.float32)
    with pytest.raises(backend.Unsupported, match="pixels of an image have gaps"):
        launch.group_norm(x[..., ::2], None, 2, weight, bias, 1e-5, False)
    wide = torch.ones(1, 16)
    with pytest.raises(backend.Unsupported, match="shift has gaps"):
        launch.group_norm(x, wide[:, ::2], 2, weight, bias, 1e-5, False)
    with pytest.raises(backend.Unsupported, match="weight has gaps"):
        launch.group_norm(x, None, 2, wide[0, ::2], bias, 1e-5, False)
    with pytest.raises(backend.Unsupported, match="5000 channels a group"):
        launch.heuristic(4, 5000, 1, False)
    out = hk.group_norm(x[..., ::2], 2, weight, bias)
    assert torch.equal(out, F.group_norm(x[..., ::2], 2, weight, bias))


def test_a_gradient_goes_through_the_reference():
    x, weight, bias, shift = operands((2, 8, 3, 3), torch.float32)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias, shift)]
    hk.group_norm(leaves[0], 2, *leaves[1:3], shift=leaves[3], silu=True).square().sum().backward()
    others = [value.clone().requires_grad_() for value in (x, weight, bias, shift)]
    plain(others[0], 2, *others[1:], True).square().sum().backward()
    for mine, other in zip(leaves, others, strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_nothing_at_all_is_nothing():
    for shape in ((0, 8, 3, 3), (2, 8, 0, 3)):
        x = torch.empty(shape)
        for run in (hk.group_norm, lambda *a: launch.group_norm(a[0], None, *a[1:], 1e-5, False)):
            assert run(x, 2, torch.ones(8), torch.zeros(8)).shape == shape
