"""Argument checks of the public functions. Every message names the argument, what was expected and
what came.
"""

from __future__ import annotations

import torch

from hgc_kernels import backend

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def tensor(name: str, value: object, ndim: int, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}"
        )
    if value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")
    return value


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name} ({other.device}), got {value.device}"
        )


def same_dtype(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected the dtype of {other_name} ({other.dtype}), got {value.dtype}"
        )


def shape(name: str, value: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")


def number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    return value  # type: ignore[return-value]


def wants_grad(op: str, *operands: torch.Tensor | None) -> bool:
    """Whether a gradient is wanted through this call. The kernels have none, so such a call runs
    the reference.

    An explicit choice of a kernel is refused instead, as explicit choices never fall back.
    """
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in operands):
        return False
    if not torch.compiler.is_compiling() and (choice := backend.get_backend(op)) not in (
        "auto",
        "reference",
    ):
        raise backend.BackendError(
            f"hgc_kernels.{op}: backend {choice!r} has no backward; use torch.no_grad()"
        )
    return True
