"""The `torch.ops.hgc` library, and the compiled libraries that serve it where they were built."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hgc_kernels import backend, elf

# HGC_LIBRARY_FOLDER: libraries built elsewhere, as the sanitizers' build is.
_FOLDER = Path(os.environ.get("HGC_LIBRARY_FOLDER") or Path(__file__).resolve().parent / "lib")
_hgc = torch.library.Library("hgc", "DEF")
# The compiled libraries register their kernels under the public ops, and those go to `hgc_routed`
# where a backend was chosen; and under `hgc_native`, where the router picks them by name.
_native = torch.library.Library("hgc_native", "DEF")
_routed = torch.library.Library("hgc_routed", "DEF")

_NATIVE_OPS = {
    "cpu": ("gather_blocks", "apply_map"),
    "cuda": ("gather_blocks",),
}


def define(
    op: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Define `hgc::<op>` with its fake and reference. What no loaded library runs on a device goes
    to the router in Python.
    """
    _hgc.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _hgc.impl(op, reference, "CompositeExplicitAutograd")
    backend.register(op, "reference", f"{reference.__module__}:{reference.__name__}")
    _routed.define(op + schema)
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        run = backend.route(op, device)
        _routed.impl(op, backend.keeping_its_error(run), key)
        if op not in _NATIVE_OPS[device] or _missing[device] is not None:
            _hgc.impl(op, run, key)
    torch.library.register_fake(f"hgc::{op}", fake, lib=_hgc)
    if any(op in ops for ops in _NATIVE_OPS.values()):
        _native.define(op + schema)
        devices = tuple(device for device, ops in _NATIVE_OPS.items() if op in ops)
        backend.register(
            op,
            "native",
            f"torch:ops.hgc_native.{op}.default",
            devices=devices,
            available=native_missing,
        )


def _library(device: str) -> Path:
    return _FOLDER / f"libhgc_{device}.so"


def _left_out() -> dict[str, str]:
    """What the build recorded: part -> why it was not made, and the remedy."""
    try:
        return dict(json.loads((_FOLDER / "left_out.json").read_text()))
    except (OSError, ValueError):  # no build, or one that was cut short
        return {}


def _fault(part: str, path: Path) -> str | None:
    """Why the file of a part cannot be loaded, and the remedy; None where it can be tried."""
    if not path.exists():
        reason = _left_out().get(part)
        if reason is not None:
            return f"{path.name} was left out of this install ({reason})"
        here = Path(__file__).resolve().parent
        if here / "lib" == _FOLDER and (here.parent / "setup.py").exists():
            # "pip install ." put them elsewhere, and Python reads this folder first
            return (
                f"{path} is not there: this is the source, not what was installed; start Python in "
                "another folder, or run: pip install -e ."
            )
        return f"{path} is not there; install the package again"
    try:
        fault = elf.fault(path, Path(torch._C.__file__))
    except OSError as error:
        fault = f"{path} cannot be read: {error}"
    return fault and f"{fault}; install the package again"


def _load_libraries() -> dict[str, str | None]:
    """Load what was built. Returns, a device type, None where loaded or the reason it is not."""
    reasons: dict[str, str | None] = {}
    for device in backend.DEVICES:
        path = _library(device)
        reasons[device] = _fault(device, path)
        if reasons[device] is not None:
            continue
        if device == "cuda" and torch.version.cuda is None:
            reasons[device] = "this torch has no CUDA"
        else:
            try:
                torch.ops.load_library(str(path))
                backend.libraries[device] = ctypes.CDLL(str(path)).hgc_run_directly
            except OSError as error:
                reasons[device] = f"{path} does not load: {error.__cause__ or error}"
    return reasons


_missing = _load_libraries()


def say_what_is_missing() -> None:
    """Warn of compiled libraries that this process would use and has not; once, at the import."""
    devices = ["cpu"]
    if torch.version.cuda is not None and torch.cuda.device_count():
        devices.append("cuda")
    for device in devices:
        reason = _missing[device]
        if reason is not None:
            backend.said_at_import.add(f"no native: {reason}")
            message = f"hgc_kernels has no compiled kernels for {device}: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def native_missing(device: str) -> str | None:
    """Why the compiled library of a device type cannot run here, or None where it can."""
    reason = _missing[device]
    if reason is None and device == "cuda":
        return gpu_refuses(_library("cuda"))
    return reason


def _introspection() -> Any:
    """hgc_kernels._native. Raises ImportError that names the file, or why there is none."""
    spec = importlib.util.find_spec("hgc_kernels._native")
    path = Path(spec.origin if spec and spec.origin else Path(__file__).with_name("_native"))
    if fault := _fault("introspection", path):
        raise ImportError(fault)
    return importlib.import_module("hgc_kernels._native")


def gpu_refuses(library: Path) -> str | None:
    """Why the kernels of a CUDA library cannot run on the current GPU, or None where they can: no
    driver, no GPU, or one that they were not compiled for.
    """
    try:
        introspection = _introspection()
        introspection.kernel_attributes(str(library))
    except ImportError:  # nobody to ask: a launch will say
        return None
    except RuntimeError as error:
        return f"the GPU does not take its kernels: {error}"
    return None


def build_info() -> dict[str, Any]:
    """What was compiled into this install, and what is loaded in this process.

    Keys: "torch"; "libraries" (device type, or "introspection" -> "loaded", or the reason it is
    not); "vector_set" (the CPU kernels' instruction set here); "native" (part -> compilers, flags,
    CUDA architectures and commit it was built with); "kernels" (on a GPU: name, registers, shared
    and local bytes and threads of each CUDA kernel; else the reason there are none); "left_out"
    (part of the build -> why it was not made).
    """
    info: dict[str, Any] = {
        "torch": torch.__version__,
        "libraries": {device: reason or "loaded" for device, reason in _missing.items()},
        "vector_set": None,
        "native": {},
        "kernels": "the CUDA library is not loaded",
        "left_out": _left_out(),
    }
    try:
        introspection = _introspection()
    except ImportError as error:
        info["libraries"]["introspection"] = str(error)
        return info
    info["libraries"]["introspection"] = "loaded"
    info["native"]["introspection"] = introspection.build_info()
    for device in backend.DEVICES:
        path = _library(device)
        if _fault(device, path) is None:
            info["native"][device] = _built(introspection, path)
    if _missing["cpu"] is None:
        info["vector_set"] = introspection.cpu_vector_set(str(_library("cpu")))
    if _missing["cuda"] is None:
        try:
            info["kernels"] = introspection.kernel_attributes(str(_library("cuda")))
        except RuntimeError as error:
            info["kernels"] = str(error)
    return info


def _built(introspection: Any, path: Path) -> dict[str, str]:
    try:
        return dict(introspection.library_info(str(path)))
    except ImportError as error:  # a CUDA library beside a CPU torch need not load
        return {"error": str(error)}
