"""What the kernel tests share: the error rule, guarded memory, inputs as diffusers makes them, fp64
references.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hgc_kernels as hk
from hgc_kernels.map_format import encode, scale_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GUARD = 64


def max_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference; infinite where one is NaN and the other is not."""
    difference = (out.double() - reference.double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def assert_within_rule(
    out: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype
) -> None:
    """The error against an fp64 reference is at most twice that of unfused eager PyTorch in the
    same dtype, plus twice what the dtype itself cannot hold at the scale of the result.
    """
    assert out.shape == reference.shape
    rounded = reference.to(dtype)
    step = float((rounded + 0.3 - 0.3 - rounded).abs().max()) if rounded.numel() else 0.0
    bound = 2 * max_error(eager, reference) + 2 * step
    error = max_error(out, reference)
    assert error <= bound, f"error {error:.3e} is above {bound:.3e}"


def guarded(x: torch.Tensor, fill: float = float("nan")) -> torch.Tensor:
    """The same values and strides inside a larger buffer of `fill`: whatever is read beside them
    shows.
    """
    span = (
        1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if x.numel()
        else 0
    )
    raw = torch.empty(span + 2 * GUARD, dtype=torch.float32).fill_(fill).to(x.dtype)
    view = raw[GUARD:].as_strided(x.shape, x.stride())
    if x.numel():
        view.copy_(x)
    view._guards = (raw[:GUARD], raw[GUARD + span :], raw[:1].clone())
    return view


def assert_guards_intact(x: torch.Tensor) -> None:
    before, after, fill = x._guards
    assert before.numel() == after.numel() == GUARD
    for guard in (before, after):
        assert torch.equal(
            guard.float().nan_to_num(nan=-1.0), fill.float().nan_to_num(nan=-1.0).expand(GUARD)
        )


class _GuardedAllocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # the interpreter, too, makes tensors this way: of no elements, to point elsewhere
        if func is not torch.ops.aten.new_empty.default or not out.numel():
            return out
        self.made.append(guarded(torch.full_like(out, float("nan")), fill=7.0))
        return self.made[-1]


@contextmanager
def guarded_allocations() -> Iterator[list[torch.Tensor]]:
    """What a launcher allocates in the body is NaN, and nothing is written beside it. For direct
    calls of a launcher: the dispatcher hides what an op does. Gives what was allocated.
    """
    with _GuardedAllocations() as mode:
        yield mode.made
    assert mode.made
    for x in mode.made:
        assert_guards_intact(x)


def heads(
    batch: int, tokens: int, count: int, size: int, dtype: torch.dtype, view: str = "projection"
) -> torch.Tensor:
    """[B, S, H, D] as diffusers makes it.

    projection: a linear layer's [B, S, H * D] viewed as heads. fused: one chunk of a fused
    projection. half: the second half of a CFG batch. transposed: [B, H, S, D] as
    `scaled_dot_product_attention` takes it, transposed back.
    """
    channels = count * size
    if view == "projection":
        x = torch.randn(batch, tokens, channels).to(dtype)
        return guarded(x).view(batch, tokens, count, size)
    if view == "fused":
        return (
            guarded(torch.randn(batch, tokens, 2 * channels).to(dtype))
            .chunk(2, -1)[1]
            .unflatten(-1, (count, size))
        )
    if view == "half":
        return (
            guarded(torch.randn(2 * batch, tokens, channels).to(dtype))
            .chunk(2)[1]
            .unflatten(-1, (count, size))
        )
    assert view == "transposed"
    return guarded(torch.randn(batch, count, tokens, size).to(dtype)).transpose(1, 2)


def text_probabilities(
    batch: int, s_q: int, heads: int, s_kv: int, first: float = 0.8
) -> torch.Tensor:
    """Maps peaked as text attention is: token 0 takes about `first`, a few tokens most of the rest.
    fp32.
    """
    scores = torch.randn(batch, s_q, heads, s_kv) * 2
    others = torch.softmax(scores[..., 1:], -1)
    share = (first + 0.1 * torch.randn(batch, s_q, heads, 1)).clamp(0.02, 0.99)
    return (
        torch.cat([share, (1 - share) * others], -1)
        if s_kv > 1
        else torch.ones(batch, s_q, heads, 1)
    )


def stored_map(probabilities: torch.Tensor, format: str) -> torch.Tensor:
    batch, s_q, count, s_kv = probabilities.shape
    map = hk.new_map(batch, s_q, count, s_kv, format=format)
    encode(probabilities, map)
    return map


def decode64(map: torch.Tensor, s_kv: int) -> torch.Tensor:
    others = map[..., 1:s_kv].float().double() / scale_of(map.dtype)
    return torch.cat([1 - others.sum(-1, keepdim=True), others], -1)


def attend64(q, k, v, scale):
    """(output, probabilities) of attention in fp64, both with the layout of the op."""
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) * scale
    probabilities = torch.softmax(scores, -1)
    return torch.einsum("bqhk,bkhd->bqhd", probabilities, v.double()), probabilities


def attend_eager(q, k, v, scale):
    """The same unfused, every op in the dtype of the inputs."""
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * scale
    probabilities = torch.softmax(scores, -1)
    return torch.einsum("bqhk,bkhd->bqhd", probabilities, v), probabilities


def apply64(map, v):
    return torch.einsum("bqhk,bkhd->bqhd", decode64(map, v.shape[1]), v.double())


def apply_eager(map, v):
    # decoded here, not by the code under test, whose faults would widen the rule's bound
    return torch.einsum("bqhk,bkhd->bqhd", decode64(map, v.shape[1]).to(v.dtype), v)
