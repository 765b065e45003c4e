"""The `torch.ops.hgc` library, and the compiled libraries that serve it where they were built."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hgc_kernels import backend

# HGC_LIBRARY_FOLDER: libraries built elsewhere, as the sanitizers' build is.
_FOLDER = Path(os.environ.get("HGC_LIBRARY_FOLDER") or Path(__file__).resolve().parent / "lib")
_hgc = torch.library.Library("hgc", "DEF")
# The compiled libraries register under a namespace of their own: the router picks among backends by
# name, and an op in `hgc` keeps one kernel a device whatever is loaded.
_native = torch.library.Library("hgc_native", "DEF")

_NATIVE_OPS = {
    "cpu": ("gather_blocks", "scatter_rows", "apply_map"),
    "cuda": ("gather_blocks", "scatter_rows"),
}


def define(
    op: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Define `hgc::<op>` with its fake and reference, and route CPU and CUDA calls to the chosen
    backend.
    """
    _hgc.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _hgc.impl(op, reference, "CompositeExplicitAutograd")
    backend.register(op, "reference", f"{reference.__module__}:{reference.__name__}")
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        _hgc.impl(op, backend.route(op, device), key)
    torch.library.register_fake(f"hgc::{op}", fake, lib=_hgc)
    if any(op in ops for ops in _NATIVE_OPS.values()):
        _native.define(op + schema)
        devices = tuple(device for device, ops in _NATIVE_OPS.items() if op in ops)
        backend.register(
            op,
            "native",
            f"hgc_kernels.library:native_{op}",
            devices=devices,
            available=native_missing,
        )


def _load_libraries() -> dict[str, str | None]:
    """Load what was built. Returns, a device type, None where loaded or the reason it is not."""
    reasons: dict[str, str | None] = {}
    for device in backend.DEVICES:
        path = _FOLDER / f"libhgc_{device}.so"
        if not path.exists():
            reasons[device] = f"{path.name} was not built with this install"
        elif device == "cuda" and torch.version.cuda is None:
            reasons[device] = "this torch has no CUDA"
        else:
            try:
                torch.ops.load_library(str(path))
                reasons[device] = None
            except OSError as error:
                reasons[device] = f"{path.name} does not load: {error.__cause__ or error}"
    return reasons


_missing = _load_libraries()


def native_missing(device: str) -> str | None:
    """Why the compiled library of a device type cannot run here, or None where it can."""
    reason = _missing[device]
    if reason is None and device == "cuda":
        return gpu_refuses(_FOLDER / "libhgc_cuda.so")
    return reason


def gpu_refuses(library: Path) -> str | None:
    """Why the kernels of a CUDA library cannot run on the current GPU, or None where they can: no
    driver, no GPU, or one that they were not compiled for.
    """
    try:
        introspection = importlib.import_module("hgc_kernels._native")
        introspection.kernel_attributes(str(library))
    except ImportError:  # nobody to ask: a launch will say
        return None
    except RuntimeError as error:
        return f"the GPU does not take its kernels: {error}"
    return None


def native_gather_blocks(*args: Any) -> torch.Tensor:
    return torch.ops.hgc_native.gather_blocks.default(*args)


def native_scatter_rows(*args: Any) -> None:
    torch.ops.hgc_native.scatter_rows.default(*args)


def native_apply_map(*args: Any) -> torch.Tensor:
    return torch.ops.hgc_native.apply_map.default(*args)


def build_info() -> dict[str, Any]:
    """What was compiled into this install, and what is loaded in this process.

    Keys: "torch"; "libraries" (device type -> "loaded", or the reason it is not); "vector_set" (the
    CPU kernels' instruction set here); "native" (part -> compilers, flags, CUDA architectures and
    commit it was built with); "kernels" (on a GPU: name, registers, shared and local bytes and
    threads of each CUDA kernel; else the reason there are none); "left_out" (part of the build ->
    why it was not made).
    """
    record = _FOLDER / "left_out.json"
    left_out = json.loads(record.read_text()) if record.exists() else {}
    info: dict[str, Any] = {
        "torch": torch.__version__,
        "libraries": {device: reason or "loaded" for device, reason in _missing.items()},
        "vector_set": None,
        "native": {},
        "kernels": "the CUDA library is not loaded",
        "left_out": left_out,
    }
    try:
        introspection = importlib.import_module("hgc_kernels._native")
    except ImportError as error:
        left_out.setdefault("introspection", str(error))
        return info
    info["native"]["introspection"] = introspection.build_info()
    for device in backend.DEVICES:
        path = _FOLDER / f"libhgc_{device}.so"
        if path.exists():
            info["native"][device] = _built(introspection, path)
    if _missing["cpu"] is None:
        info["vector_set"] = introspection.cpu_vector_set(str(_FOLDER / "libhgc_cpu.so"))
    if _missing["cuda"] is None:
        try:
            info["kernels"] = introspection.kernel_attributes(str(_FOLDER / "libhgc_cuda.so"))
        except RuntimeError as error:
            info["kernels"] = str(error)
    return info


def _built(introspection: Any, path: Path) -> dict[str, str]:
    try:
        return dict(introspection.library_info(str(path)))
    except ImportError as error:  # a CUDA library beside a CPU torch need not load
        return {"error": str(error)}
