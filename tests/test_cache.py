"""The cache by itself, and the promises that stand for residuals."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from hgc.run.cache import Cache, conditional_half
from hgc.run.residuals import Promise, PromiseSet, fresh, zero_promise
from hgc.run.snapshot import Signature


def write(cache, name, tensor, evaluation=0, history=2, half=False):
    cache.write(name, tensor, evaluation=evaluation, history=history, half=half)


def test_a_value_is_a_copy():
    cache, x = Cache(), torch.ones(4)
    write(cache, "x", x)
    x.zero_()
    assert torch.equal(cache.read("x"), torch.ones(4))


def test_buffers_are_reused_and_bytes_counted():
    cache = Cache()
    for i in range(5):
        write(cache, "x", torch.full((8,), float(i)), evaluation=i)
    assert cache.bytes == cache.peak_bytes == 2 * 8 * 4
    assert torch.equal(cache.read("x", (0.0, 1.0)), torch.full((8,), 3.0))
    cache.drop(["x"])
    assert cache.bytes == 0 and not cache.names()


def test_linear_combination():
    cache = Cache()
    for i, value in enumerate((1.0, 2.0, 4.0)):
        write(cache, "x", torch.tensor([value], dtype=torch.float16), evaluation=i, history=3)
    assert cache.read("x", (1.5, -0.5)).item() == 5.0
    assert cache.read("x", (1.0, 1.0, 1.0)).item() == 7.0
    assert cache.read("x", (1.0, 1.0, 1.0, 1.0)).item() == 4.0  # too few held: the newest


def test_the_guidance_difference_is_subtracted():
    cache, x = Cache(), torch.randn(2, 4)
    for i in range(2):
        write(cache, "guidance", torch.randn(2, 4), evaluation=i)
    difference = cache.read("guidance", (1.3, -0.3))
    out = cache.subtract("guidance", (1.3, -0.3), x)
    assert torch.equal(out, torch.cat([x - difference, x]))


def test_halves():
    cache, x = Cache(), torch.arange(4.0).reshape(4, 1)
    write(cache, "x", x)
    assert torch.equal(cache.read("x", half=True), conditional_half(x))
    write(cache, "x", 10 * conditional_half(x), half=True, evaluation=1)
    assert cache.has("x", half=True) and not cache.has("x", half=False)
    expected = 2 * 10 * conditional_half(x) - conditional_half(x)
    assert torch.equal(cache.read("x", (2.0, -1.0), half=True), expected)
    with pytest.raises(KeyError, match="conditional half only"):
        cache.read("x")


def test_the_byte_limit_holds():
    cache = Cache(max_bytes=40)
    write(cache, "x", torch.zeros(8))
    write(cache, "y", torch.zeros(8))
    assert cache.has("x", half=False) and not cache.has("y", half=False)
    assert cache.refused and cache.bytes == 32
    kept = torch.zeros(8)
    assert cache.keep("z", kept) is kept and cache.kept("z") is None


def test_checksums_notice_a_write():
    cache = Cache()
    write(cache, "x", torch.ones(3, 3))
    before = cache.checksums()
    cache.read("x")[1, 2] += 1e-3
    assert cache.checksums() != before


# -- promises ---------------------------------------------------------------------------------


class Source:
    """A residual with a planned and a fresh value, counting how often the fresh one is made."""

    def __init__(self, planned, value):
        self.made = 0
        self.value = value

        def compute():
            self.made += 1
            return value

        self.promise = Promise(
            value.shape,
            value.dtype,
            value.device,
            lambda half: None if planned is None else [(planned, 1.0)],
            compute,
        )


def total(terms):
    return sum(value * scale for value, scale in terms)


def test_adding_and_scaling_computes_nothing():
    a = Source(torch.full((2, 3), 1.0), torch.full((2, 3), 10.0))
    b = Source(torch.full((2, 3), 2.0), torch.full((2, 3), 20.0))
    x = a.promise + b.promise * 0.5
    x += a.promise
    x = 2 * x
    assert isinstance(x, Promise) and x.shape == (2, 3) and x.dtype == torch.float32
    assert torch.equal(total(x.planned(False)), torch.full((2, 3), 6.0))
    assert a.made == b.made == 0
    assert torch.equal(x.fresh(), torch.full((2, 3), 60.0))


def test_zeros_before_the_conditional_half():
    a = Source(torch.ones(1, 2), torch.full((1, 2), 5.0))
    x = torch.cat([torch.zeros_like(a.promise), a.promise])
    assert isinstance(x, Promise) and x.shape == (2, 2)
    assert torch.equal(total(x.planned(False)), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(total(x.planned(True)), torch.ones(1, 2))
    assert a.made == 0
    assert torch.equal(x.fresh(), torch.tensor([[0.0, 0.0], [5.0, 5.0]]))


def test_zero_promises_add_nothing():
    zero = zero_promise((2, 3), torch.float32, torch.device("cpu"))
    a = Source(torch.ones(2, 3), torch.full((2, 3), 5.0))
    x = zero + a.promise
    assert len(x.planned(False)) == 1
    assert zero.planned(True) == []
    assert torch.equal(fresh([zero])[0], torch.zeros(2, 3))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum(),
        lambda x: x[0],
        lambda x: torch.relu(x),
        lambda x: x.half(),
        lambda x: x - 1,
        lambda x: torch.stack([x, x]),
        lambda x: torch.nn.functional.interpolate(x[None, None], scale_factor=2.0),
        lambda x: x.numpy(),
        lambda x: x.clone(),
        lambda x: x + 1.0,
        lambda x: torch.add(input=x, other=x),
        lambda x: torch.cat([x, x], axis=0),
        lambda x: torch.mul(x, 2, out=torch.empty(2, 3)),
        lambda x: x.mean(dim=0, keepdim=True),
    ],
)
def test_any_other_reader_gets_the_fresh_value(read):
    """Code outside of hgc never sees the planned value."""
    a = Source(torch.full((2, 3), 7.0), torch.randn(2, 3))
    found, expected = read(a.promise), read(a.value)
    if not isinstance(found, torch.Tensor):
        found, expected = torch.from_numpy(found), torch.from_numpy(expected)
    assert not isinstance(found, Promise)
    assert torch.equal(found, expected)
    assert a.made >= 1


class Numbers:
    """A source whose residual ``j`` is ``start + j``."""

    def __init__(self, start):
        self.start = start

    def planned(self, j, half):
        return None

    def fresh(self, j):
        return torch.full((2, 3), float(self.start + j))


def promise_set(start=0):
    return PromiseSet([(2, 3)] * 4, torch.float32, torch.device("cpu"), Numbers(start))


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x,
        lambda x: [{"residual": x}],
        lambda x: x.detach(),
        lambda x: x.to("cpu"),
        lambda x: x + x,
        lambda x: 0.5 * x,
        lambda x: torch.cat([torch.zeros_like(zero_promise((2, 3), x.dtype, x.device)), x]),
        lambda x: lambda: x,
        lambda x: (x, x.sum())[:1],
        weakref.ref,
    ],
)
def test_promises_that_somebody_holds_are_known(made):
    """They must not be handed out again for another evaluation."""
    promises = promise_set()
    assert not promises.is_held
    down, mid = promises.promises[:-1], promises.promises[-1]
    assert promises.is_held
    del down, mid
    assert not promises.is_held
    kept = made(promises.promises[2])
    assert promises.is_held
    del kept
    assert not promises.is_held


def test_what_was_read_of_a_promise_does_not_hold_it():
    promises = promise_set(5)
    kept = promises.promises[1] * torch.ones(2, 3)
    assert not promises.is_held
    promises.source.start = 50
    again = promises.hand_out()
    assert torch.equal(kept, torch.full((2, 3), 6.0))
    assert torch.equal(again[1].fresh(), torch.full((2, 3), 51.0))


def doubled(x):
    x *= 2


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x.add_(1, alpha=3),
        lambda x: x.add_(torch.ones(3)),
        lambda x: x.copy_(torch.ones(2, 3)),
        lambda x: x[:1].zero_(),
        lambda x: x.view(-1).sub_(1),
        lambda x: x.__setitem__(0, 8.0),
        lambda x: torch.mul(x, 3, out=x),
        lambda x: torch._foreach_mul_([x], 0.5),
        lambda x: x.numpy().fill(9.0) or x.mul_(1),
        doubled,
    ],
)
@pytest.mark.parametrize("derived", [False, True])
def test_what_is_written_to_a_promise_counts(write, derived):
    value = torch.randn(2, 3)
    a = Source(torch.full((2, 3), 7.0), value.clone())
    x, expected = (0.5 * a.promise, 0.5 * value) if derived else (a.promise, value)
    assert x.planned(False) is not None
    write(x)
    write(expected)
    assert x.planned(False) is None and x.planned(True) is None
    assert torch.equal(x.fresh(), expected)
    assert torch.equal((x + torch.ones(2, 3)).fresh(), expected + 1)
    assert torch.equal(total((2 * x).planned(False)), 2 * expected)


@pytest.mark.parametrize("add", [lambda x, y: x.add_(y), lambda x, y: x.__iadd__(y)])
def test_what_is_added_in_place_counts_for_everybody(add):
    promises = promise_set(5)
    (x, *_, y), more = promises.hand_out(), torch.ones(2, 3)
    before = 2 * x
    assert add(x, more) is x
    assert torch.equal(x.fresh(), torch.full((2, 3), 6.0))
    assert torch.equal(before.fresh(), torch.full((2, 3), 10.0))
    assert add(y, 0.5 * y) is y and add(y, y) is y
    assert torch.equal(y.fresh(), torch.full((2, 3), 24.0))
    assert promises.is_touched
    assert torch.equal(promises.hand_out()[0].fresh(), torch.full((2, 3), 5.0))


def test_a_copy_is_another_tensor():
    a = Source(torch.ones(2), torch.ones(2))
    a.promise.to("cpu", copy=True).zero_()
    assert torch.equal(a.promise.fresh(), torch.ones(2))
    assert a.promise.planned(False) is not None


# -- what features depend on -------------------------------------------------------------------


def test_values_are_the_same_only_where_nothing_was_written_to_or_exchanged():
    x, y = torch.ones(2), object()
    values = (1.0, None, torch.Size([2, 3]), {"a": [x, 2], "b": y}, (x, "s"))
    taken = Signature(values)
    assert taken.same((1.0, None, torch.Size([2, 3]), {"b": y, "a": [x, 2]}, (x.view(2), "s")))
    for i, other in enumerate([2.0, 0, torch.Size([3, 3]), {"a": [x, 2], "b": object()}, (x, "t")]):
        assert not taken.same((*values[:i], other, *values[i + 1 :]))
    assert not taken.same((True, *values[1:])) and not taken.same(values[:-1])
    values[3]["c"] = 1
    assert not taken.same(values)
    del values[3]["c"]
    assert taken.same(values)
    values[3]["a"].append(3)
    assert not taken.same(values)
    values[3]["a"].pop()
    x.add_(1)
    assert not taken.same(values)


def test_settings_alone_are_compared_by_type_too():
    taken = Signature((1, False, "a", torch.float32, None))
    assert taken.same((1, False, "a", torch.float32, None))
    assert not taken.same((1.0, False, "a", torch.float32, None))
    assert not taken.same((True, False, "a", torch.float32, None))
    assert not taken.same((1, False, "a", torch.float32, torch.ones(1)))
    assert not taken.same((1, False, "a", torch.float32))
    taken = Signature((np.float64(0.5), None))  # a scale that was computed with numpy
    assert taken.same((np.float64(0.25) * 2, None)) and not taken.same((np.float64(0.75), None))


def test_moves_to_where_it_is_are_free():
    a = Source(torch.ones(2), torch.ones(2))
    assert a.promise.to("cpu") is a.promise
    assert a.promise.to(torch.float32) is a.promise
    assert a.promise.to(torch.float64).dtype == torch.float64
    assert a.made == 1
