"""Every op through the dispatcher: opcheck, compiled with dynamic shapes, choice of a backend."""

import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import hgc_kernels as hk
from hgc_kernels import backend


def arguments(op, batch=2, tokens=10):
    """Arguments for the op as torch.ops.hgc takes it."""
    q, k = torch.randn(batch, tokens, 3, 8), torch.randn(batch, 7, 3, 8)
    map = hk.new_map(batch, tokens, 3, 7)
    hidden, skip = torch.randn(batch, 6, tokens, 4), torch.randn(batch, 5, tokens, 4)
    return {
        "gather_blocks": (hidden, skip, torch.randn_like(skip), 0.7),
        "attend_and_store": (q, k, k, 0.3, map),
        "apply_map": (map, k),
        "group_norm": (hidden, hidden[:, :, 0, 0], 2, torch.rand(6), torch.rand(6), 1e-5, True),
    }[op]


def public(op, args):
    if op == "attend_and_store":
        q, k, v, scale, map = args
        return hk.attend_and_store(q, k, v, map, scale), map
    if op == "group_norm":
        x, shift, groups, weight, bias, eps, silu = args
        return (hk.group_norm(x, groups, weight, bias, eps, shift=shift, silu=silu),)
    return (getattr(hk, op)(*args),)


OPS = list(hk.backends())


def test_there_are_four():
    assert OPS == ["apply_map", "attend_and_store", "gather_blocks", "group_norm"]


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, choice):
    with hk.use_backend(choice):
        torch.library.opcheck(getattr(torch.ops.hgc, op).default, arguments(op))


def test_opcheck_channels_last_and_no_residual():
    hidden = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    norm = (hidden[:1], None, 3, torch.rand(6), torch.rand(6), 1e-5, False)
    torch.library.opcheck(torch.ops.hgc.group_norm.default, norm)
    op = torch.ops.hgc.gather_blocks.default
    torch.library.opcheck(op, (hidden, hidden, None, 1.0))
    torch.library.opcheck(op, (hidden[:1], hidden[1:], hidden[1:], 1.0))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op, choice, grad):
    """Not the dtype of the result, which compiled graphs rely on, and not a bit of it."""
    args = arguments(op)
    args[1].requires_grad_(grad)
    copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
    with hk.use_backend(choice):
        expected = public(op, copies)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = public(op, args)
    for out, other in zip(found, expected, strict=True):
        assert out.dtype == other.dtype
        if not grad:  # with one, the reference runs whatever was chosen
            assert torch.equal(out, other)


@pytest.mark.parametrize("op", OPS)
def test_compiles_with_dynamic_shapes(op):
    compiled = torch.compile(lambda *args: public(op, args), fullgraph=True, dynamic=True)
    for batch, tokens in ((2, 10), (3, 11), (2, 24)):
        args = arguments(op, batch, tokens)
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        for out, expected in zip(compiled(*args), public(op, tuple(copies)), strict=True):
            assert torch.equal(out, expected)
            assert out.stride() == expected.stride()


def test_first_call_of_a_process_may_be_compiled():
    """No op has run in that process: what a first call sets up must not disturb the tracing."""
    code = (
        "import torch\n"
        "from test_dispatch import OPS, arguments, public\n"
        "for op in OPS:\n"
        "    args = arguments(op)\n"
        "    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]\n"
        "    compiled = torch.compile(lambda *a, op=op: public(op, a), fullgraph=True)\n"
        "    for out, expected in zip(compiled(*args), public(op, copies), strict=True):\n"
        "        assert torch.equal(out, expected), op\n"
    )
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_compiled_graph_obeys_a_later_choice():
    """One graph for all backends: no recompile when the choice changes."""
    ran = []
    real = backend._resolve
    x = torch.randn(2, 3, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: hk.gather_blocks(a, a), fullgraph=True, backend="eager")
    compiled(x)
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(
        error_on_recompile=True
    ):  # fmt: skip
        patch.setattr(backend, "_resolve", lambda *key: ran.append(key[2]) or real(*key))
        with hk.use_backend("reference"):
            compiled(x)
        compiled(x)
        compiled(x)
    # the router hands the second over to the kernel, which runs the third by itself
    assert ran == ["reference", "auto"]


def test_python_stands_between_only_where_a_backend_was_chosen(monkeypatch):
    asked = []
    real = backend._resolve
    monkeypatch.setattr(backend, "_resolve", lambda *key: asked.append(key[2]) or real(*key))
    x, op = torch.randn(1, 2, 3, 3), torch.ops.hgc.gather_blocks.default
    op(x, x, None, 1.0)  # the first call after a choice, perhaps
    asked.clear()

    def call():
        assert torch.equal(op(x, x, None, 1.0), torch.cat([x, x], 1))
        assert torch.equal(hk.gather_blocks(x, x), torch.cat([x, x], 1))

    call()
    assert asked == []
    with hk.use_backend("reference"):
        call()
        # and another thread's calls ask too, and find that they chose nothing
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert asked == ["reference"] * 2 + ["auto"] * 2
    call()
    call()
    assert asked[4:] == ["auto"]
    try:
        hk.set_backend("reference", "apply_map")  # a choice for one op makes all ask
        call()
        assert asked[5:] == ["auto"] * 2
    finally:
        hk.set_backend("auto")


def test_two_threads_choose_and_call_at_once():
    """No call runs another backend than its thread chose, whoever lets go of a choice meanwhile."""
    x, op, wrong = torch.randn(1, 2, 3, 3), torch.ops.hgc.gather_blocks.default, []
    end = time.monotonic() + 0.5

    def choose(choice):
        while time.monotonic() < end:
            with hk.use_backend(choice, "gather_blocks"):
                backend._local.ran = None
                op(x, x, None, 1.0)
                if backend._local.ran != choice:
                    wrong.append((choice, backend._local.ran))
            op(x, x, None, 1.0)

    def noting(key, run):
        def noted(*args):
            backend._local.ran = key[2] if key[2] != "auto" else run[0]
            return run[1](*args)

        return run[0], noted

    with pytest.MonkeyPatch.context() as patch:
        real = backend._resolve
        patch.setattr(backend, "_resolve", lambda *key: noting(key, real(*key)))
        threads = [threading.Thread(target=choose, args=(c,)) for c in ("native", "reference")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_explicit_choices_do_not_fall_back():
    q, k, v, scale, map = arguments("attend_and_store")
    with (
        hk.use_backend("native"),
        pytest.raises(hk.BackendError, match=r"attend_and_store.*native.*cpu"),
    ):
        hk.attend_and_store(q, k, v, map, scale)
    with hk.use_backend("triton"), pytest.raises(hk.BackendError, match=r"gather_blocks.*triton"):
        hk.gather_blocks(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
    x = torch.randn(1, 2, 3, 3)
    with hk.use_backend("triton"), pytest.raises(RuntimeError, match="did not run this call"):
        torch.ops.hgc.gather_blocks.default(x, x, None, 1.0)
    with pytest.raises(ValueError, match="backend"):
        hk.set_backend("fastest")
    with pytest.raises(ValueError, match="ops"):
        hk.set_backend("native", "gather")


def test_head_size_above_the_limit(interpreted):
    """A call that the chosen kernels do not cover is refused."""
    q, k = torch.randn(1, 3, 1, 257), torch.randn(1, 4, 1, 257)
    map = hk.new_map(1, 3, 1, 4)
    with hk.use_backend("triton"), pytest.raises(hk.BackendError, match="head size 257"):
        hk.attend_and_store(q, k, k, map)


def test_auto_says_once_that_a_call_is_not_covered(interpreted, monkeypatch):
    """As on a GPU, where auto takes Triton: here its launcher stands in as the preferred kernel."""
    launcher = "hgc_kernels.ops.attend_and_store.launch:attend_and_store"
    key = ("attend_and_store", "native", "cpu")
    kernel = backend.Implementation(*key[:2], ("cpu",), launcher, lambda device: None)
    monkeypatch.setattr(backend, "_resolved", {})
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr(backend, "_implementations", {**backend._implementations, key: kernel})
    q, k = torch.randn(1, 3, 1, 257), torch.randn(1, 4, 1, 257)
    with pytest.warns(RuntimeWarning, match=r"reference.*head size 257"):
        out = hk.attend_and_store(q, k, k, hk.new_map(1, 3, 1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = hk.attend_and_store(q, k, k, hk.new_map(1, 3, 1, 4))
    with hk.use_backend("reference"):
        expected = hk.attend_and_store(q, k, k, hk.new_map(1, 3, 1, 4))
    assert torch.equal(out, expected) and torch.equal(again, expected)


def test_auto_says_once_that_it_fell_back(monkeypatch):
    monkeypatch.setattr(backend, "_resolved", {})
    monkeypatch.setattr(backend, "_said", set())
    missing = {**backend._implementations}
    key = ("gather_blocks", "native", "cpu")
    missing[key] = backend.Implementation(*key[:2], ("cpu",), "", lambda device: "it was not built")
    monkeypatch.setattr(backend, "_implementations", missing)
    x = torch.randn(1, 2, 3, 3)
    with hk.use_backend("auto"):  # a choice, and so the router is asked
        with pytest.warns(RuntimeWarning, match=r"gather_blocks on cpu.*reference.*not built"):
            hk.gather_blocks(x, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hk.gather_blocks(x, x)
    assert hk.backends()["gather_blocks"]["cpu"][0] == "reference"


def test_choices_of_threads_are_their_own():
    seen = {}

    def work(choice):
        with hk.use_backend(choice):
            barrier.wait()
            seen[choice] = hk.get_backend("apply_map")
            barrier.wait()

    barrier = threading.Barrier(3)
    threads = [
        threading.Thread(target=work, args=(choice,)) for choice in ("native", "reference", "auto")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"native": "native", "reference": "reference", "auto": "auto"}
    assert hk.get_backend("apply_map") == "auto"


def test_set_backend_is_for_the_process_and_use_backend_wins():
    seen = []
    try:
        hk.set_backend("reference", "apply_map")
        thread = threading.Thread(target=lambda: seen.append(hk.get_backend("apply_map")))
        thread.start()
        thread.join()
        assert seen == ["reference"] and hk.get_backend("gather_blocks") == "auto"
        with hk.use_backend("native"):
            assert hk.get_backend("apply_map") == "native"
        assert hk.backends()["apply_map"]["cpu"] == ("reference", "chosen explicitly")
    finally:
        hk.set_backend("auto")


def test_backends_names_every_op_and_says_why():
    for devices in hk.backends().values():
        assert set(devices) == {"cpu", "cuda"}
        for name, why in devices.values():
            assert name in ("native", "triton", "reference") and why


def test_meta_tensors_have_shapes():
    """The fake kernels serve the meta device, so costs can be counted without memory."""
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert hk.gather_blocks(x, x).shape == (2, 6, 4, 4)
