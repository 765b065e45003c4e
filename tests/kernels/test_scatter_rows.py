import pytest
import torch
from kernel_checks import assert_guards_intact, guarded

import hgc_kernels as hk
from hgc_kernels.map_format import MAP_DTYPES

SHAPES = {
    "feature": (4, 320, 32, 32),
    "map": (4, 64, 8, 80),
    "vector": (4, 7),
    "scalar": (5,),
    "primes": (3, 5, 7, 11, 2),
    "one": (3, 1, 1),
    "empty_row": (3, 0, 2),
}


def as_bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_writes_rows_and_nothing_else(shape, dtype, backend):
    before = torch.randn(shape).to(dtype)
    fresh = guarded(torch.randn(2, *shape[1:]).to(dtype))
    rows = torch.tensor([shape[0] - 1, 0])
    cache = guarded(before, fill=7.0)
    with hk.use_backend(backend):
        assert hk.scatter_rows(cache, fresh, rows) is None
    assert_guards_intact(cache)
    expected = before.clone()
    for i, row in enumerate(rows.tolist()):
        expected[row] = fresh[i]
    assert torch.equal(as_bits(cache), as_bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["both", "cache", "fresh", "sliced", "transposed"])
def test_layouts(layout, dtype):
    cache, fresh = torch.randn(4, 6, 5, 8).to(dtype), torch.randn(2, 6, 5, 8).to(dtype)
    if layout in ("both", "cache"):
        cache = cache.contiguous(memory_format=torch.channels_last)
    if layout in ("both", "fresh"):
        fresh = fresh.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        cache = torch.randn(4, 6, 5, 16).to(dtype)[..., ::2]
    if layout == "transposed":
        fresh = torch.randn(2, 8, 5, 6).to(dtype).transpose(1, 3)
    rows, expected = torch.tensor([1, 3]), cache.clone()
    expected[rows] = fresh
    with hk.use_backend("native"):
        hk.scatter_rows(cache, fresh, rows)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize(
    "rows, error", [([0, 4], IndexError), ([-1, 0], IndexError), ([2, 2], ValueError)]
)
def test_bad_rows_write_nothing(rows, error):
    cache = torch.zeros(4, 3)
    with pytest.raises(error, match="rows"):
        hk.scatter_rows(cache, torch.ones(2, 3), torch.tensor(rows))
    if error is IndexError:
        with hk.use_backend("native"), pytest.raises(RuntimeError, match="rows"):
            torch.ops.hgc.scatter_rows(cache, torch.ones(2, 3), torch.tensor(rows))
    assert not cache.any()


def test_cache_that_shares_memory_with_itself_is_refused():
    with pytest.raises(ValueError, match="cache"):
        hk.scatter_rows(torch.zeros(1, 3).expand(4, 3), torch.ones(1, 3), torch.tensor([0]))
