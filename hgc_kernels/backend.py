"""Which implementation of an op runs, and why.

An op of `torch.ops.hgc` whose compiled kernel is loaded runs it without a word of Python. It asks
the router here until that has found the kernel to be the best that runs, and while somebody, in any
thread, has chosen a backend. All other ops always do. The choice is read when the op *runs*, not
when it is traced, so a compiled graph obeys a later `set_backend` without a recompile, and each
thread may choose for itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch

BACKENDS = ("auto", "reference", "native", "triton")
DEVICES = ("cpu", "cuda")
_PREFERENCE = ("native", "triton", "reference")


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run the op. Explicit choices never fall back."""


class Unsupported(Exception):
    """Raised by an implementation, before it writes anything, for arguments it does not cover."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op on some device types. `target` is "module:function", imported at first
    use.
    """

    op: str
    backend: str
    devices: tuple[str, ...]
    target: str
    available: Callable[[str], str | None] = field(repr=False)  # device type -> reason it is not


_implementations: dict[tuple[str, str, str], Implementation] = {}
_ops: list[str] = []
_lock = threading.Lock()
_default: Mapping[str, str] = MappingProxyType({})  # replaced whole, so readers need no lock


class _OfThread(threading.local):
    choice: Mapping[str, str] = MappingProxyType({})
    error: Exception | None = None


_local = _OfThread()
_blocks = 0  # of `use_backend`, in all threads
# Of each device whose compiled library is loaded: what makes its ops run directly (1) or ask (0).
libraries: dict[str, Callable[[int], object]] = {}
_resolved: dict[tuple[str, str, str], tuple[str, Callable[..., Any]]] = {}
_said: set[tuple[str, str, str]] = set()
said_at_import: set[str] = set()  # of what `_select` gives as why: not said again an op


def register(
    op: str,
    backend: str,
    target: str,
    *,
    devices: tuple[str, ...] = DEVICES,
    available: Callable[[str], str | None] = lambda device: None,
) -> None:
    """Make `target` ("module:function") the `backend` implementation of `op` on `devices`."""
    if op not in _ops:
        _ops.append(op)
    for device in devices:
        _implementations[op, backend, device] = Implementation(
            op, backend, devices, target, available
        )


def triton_available(device: str) -> str | None:
    """Why Triton kernels cannot run on `device`, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu":
        return None if interpreted else "Triton runs on CPU tensors only with TRITON_INTERPRET=1"
    if interpreted:
        return "TRITON_INTERPRET=1 is set"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    return None


def why_not(op: str, backend: str, device: str) -> str | None:
    """Why `backend` cannot run `op` on `device`, or None where it can."""
    implementation = _implementations.get((op, backend, device))
    if implementation is None:
        return f"there is no {backend} implementation of {op} on {device}"
    return implementation.available(device)


def _validate(choice: str, ops: tuple[str, ...]) -> None:
    if choice not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {choice!r}")
    for op in ops:
        if op not in _ops:
            raise ValueError(f"ops: expected names among {', '.join(_ops)}, got {op!r}")


def set_backend(backend: str, *ops: str) -> None:
    """Choose the backend of `ops` (all ops where none is named) for the whole process.

    "auto" takes the best implementation that is there and says so once when the preferred one is
    missing. "reference", "native" and "triton" never fall back: an op that the chosen backend
    cannot run raises `BackendError`. Raises ValueError for an unknown backend or op.
    """
    global _default
    _validate(backend, ops)
    with _lock:
        _default = MappingProxyType({**_default, **dict.fromkeys(ops or _ops, backend)})
        _ask()


def is_chosen() -> bool:
    """Whether somebody, in any thread, has chosen a backend."""
    return _blocks > 0 or any(choice != "auto" for choice in _default.values())


def _ask() -> None:
    """Make every op ask the router, before a choice is in force."""
    for run_directly in libraries.values():
        run_directly(0)


@contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Like `set_backend`, for the calling thread and the body of the `with` only; it wins over
    `set_backend`.
    """
    global _blocks
    _validate(backend, ops)
    before = _local.choice
    _local.choice = MappingProxyType({**before, **dict.fromkeys(ops or _ops, backend)})
    with _lock:
        _blocks += 1
        _ask()
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
        _local.choice = before


def get_backend(op: str) -> str:
    """The choice in force for `op` in the calling thread: "auto" unless somebody chose."""
    if op not in _ops:
        _validate("auto", (op,))
    return _choice(op)


def _choice(op: str) -> str:
    local = _local.choice
    if op in local:
        return local[op]
    return _default.get(op, "auto")


def _load(implementation: Implementation) -> Callable[..., Any]:
    module, _, name = implementation.target.partition(":")
    found: Callable[..., Any] = attrgetter(name)(importlib.import_module(module))
    return found


def _select(op: str, device: str, choice: str) -> tuple[str, str]:
    """(backend, why) that `choice` means for `op` on `device`. Raises BackendError for an explicit
    one that cannot.
    """
    if choice != "auto":
        reason = why_not(op, choice, device)
        if reason is not None:
            raise BackendError(
                f"hgc_kernels.{op}: backend {choice!r} was asked for on {device}, but {reason}"
            )
        return choice, "chosen explicitly"
    # The interpreter is for tests: hundreds of times slower than the reference, so "auto" never
    # takes it.
    candidates = [
        b
        for b in _PREFERENCE
        if (op, b, device) in _implementations and not (b == "triton" and device == "cpu")
    ]
    missing: list[str] = []
    for candidate in candidates:
        reason = why_not(op, candidate, device)
        if reason is None:
            return candidate, "; ".join(missing) if missing else "the preferred one on this device"
        missing.append(f"no {candidate}: {reason}")
    raise BackendError(f"hgc_kernels.{op}: no implementation on {device}: {'; '.join(missing)}")


def _say_once(op: str, device: str, message: str) -> None:
    with _lock:
        if (op, device, message) in _said:
            return
        _said.add((op, device, message))
    warnings.warn(f"hgc_kernels.{op} on {device}: {message}", RuntimeWarning, stacklevel=4)


def _resolve(op: str, device: str, choice: str) -> tuple[str, Callable[..., Any]]:
    key = (op, device, choice)
    found = _resolved.get(key)
    if found is None:
        name, why = _select(op, device, choice)
        if choice == "auto" and why.startswith("no ") and why not in said_at_import:
            _say_once(op, device, f"running the {name} backend ({why})")
        found = _resolved[key] = (name, _load(_implementations[op, name, device]))
    if found[0] == "native" and device in libraries:
        with _lock:
            if not is_chosen():
                libraries[device](1)
    return found


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """Keeps autocast out of what an implementation computes: its result has the dtype of its
    operands, as the fake says, and the same bits whatever surrounds the call.
    """
    if device in DEVICES and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def call(op: str, *args: Any) -> Any:
    """What a public function calls. An error of the router, which comes out of the compiled library
    as a RuntimeError without its text, is raised as it was.
    """
    run = getattr(torch.ops.hgc, op).default
    if torch.compiler.is_compiling() or not is_chosen():
        return run(*args)
    _local.error = None
    try:
        return run(*args)
    except RuntimeError as error:
        raise (_local.error or error) from None


def keeping_its_error(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with what it raises left for `call`."""

    def routed(*args: Any) -> Any:
        try:
            return run(*args)
        except Exception as error:
            _local.error = error
            raise

    return routed


def route(op: str, device: str) -> Callable[..., Any]:
    """The router of `op` on `device`: it runs whatever backend is chosen at the moment of the
    call.
    """

    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled(device):
            with autocast_off(device):
                return run(*args)
        choice = _choice(op)
        name, implementation = _resolve(op, device, choice)
        try:
            return implementation(*args)
        except Unsupported as error:
            if choice != "auto":
                raise BackendError(
                    f"hgc_kernels.{op}: backend {name!r} does not cover this call: {error}"
                ) from None
            _say_once(
                op,
                device,
                f"running the reference backend ({name} does not cover this call: {error})",
            )
            return _load(_implementations[op, "reference", device])(*args)

    run.__name__ = run.__qualname__ = f"{op}_{device}"
    return run


def backends() -> dict[str, dict[str, tuple[str, str]]]:
    """For every op and device type: the backend that would run now in this thread, and why."""
    table: dict[str, dict[str, tuple[str, str]]] = {}
    for op in _ops:
        table[op] = {}
        for device in DEVICES:
            try:
                table[op][device] = _select(op, device, _choice(op))
            except BackendError as error:
                table[op][device] = ("none", str(error))
    return table
