from __future__ import annotations

from typing import Any

import torch

from hgc_kernels import backend, checks
from hgc_kernels.ops.gather_blocks.reference import gather_blocks as reference


def _is_right(hidden: Any, skip: Any, residual: Any, rows: Any, scale: Any) -> bool:
    """Whether a call without rows is right: the common case in one look, since with caches cold
    each check of its own costs microseconds. What it does not know goes through `_check`."""
    if not (
        isinstance(hidden, torch.Tensor)
        and isinstance(skip, torch.Tensor)
        and rows is None
        and isinstance(scale, float)
    ):
        return False
    shape, skip_shape, dtype = hidden.shape, skip.shape, hidden.dtype
    return (
        len(shape) == len(skip_shape) == 4
        and shape[0] == skip_shape[0]
        and shape[2] == skip_shape[2]
        and shape[3] == skip_shape[3]
        and dtype in checks.FLOATS
        and skip.dtype == dtype
        and skip.device == hidden.device
        and hidden.layout == skip.layout == torch.strided
        and (
            residual is None
            or (
                isinstance(residual, torch.Tensor)
                and residual.shape == skip_shape
                and residual.dtype == dtype
                and residual.device == hidden.device
                and residual.layout == torch.strided
            )
        )
    )


def _check(hidden: Any, skip: Any, residual: Any, rows: Any, scale: Any) -> None:
    """Raise what :func:`gather_blocks` says, naming the argument."""
    checks.tensor("hidden", hidden, 4, checks.FLOATS)
    checks.tensor("skip", skip, 4, checks.FLOATS)
    checks.same_dtype("skip", skip, "hidden", hidden)
    checks.same_device("skip", skip, "hidden", hidden)
    checks.number("scale", scale)
    batch, _, height, width = hidden.shape
    if skip.shape[2] != height or skip.shape[3] != width:
        raise ValueError(
            f"skip: expected the height and width of hidden {tuple(hidden.shape)}, "
            f"got shape {tuple(skip.shape)}"
        )
    if residual is not None:
        checks.tensor("residual", residual, 4, checks.FLOATS)
        checks.same_dtype("residual", residual, "skip", skip)
        checks.same_device("residual", residual, "skip", skip)
        checks.shape("residual", residual, tuple(skip.shape))
    if rows is not None:
        checks.rows("rows", rows, hidden, batch, skip.shape[0])
    elif skip.shape[0] != batch:
        raise ValueError(
            f"skip: expected {batch} samples as in hidden, or rows; got shape {tuple(skip.shape)}"
        )


def gather_blocks(
    hidden: torch.Tensor,  # [B, C_h, H, W]
    skip: torch.Tensor,  # [N, C_s, H, W]
    residual: torch.Tensor | None = None,  # [N, C_s, H, W]
    rows: torch.Tensor | None = None,  # [B] int64
    scale: float = 1.0,
) -> torch.Tensor:
    """The input of a UNet decoder layer in one pass over memory: [B, C_h + C_s, H, W].

    Equivalent to:
        if rows is not None:
            skip, residual = skip[rows], residual[rows]
        return torch.cat([hidden, skip + scale * residual], dim=1)

    `scale * residual` rounds to the storage dtype before it is added, as in eager PyTorch, so the
    result is the same bits. `rows` picks the sample of `skip` and `residual` that goes with each
    sample of `hidden`; without it N == B.

    fp32, fp16 or bf16, one dtype for all; any strides. The result is new memory, channels_last
    where hidden and skip both are and NCHW otherwise. Where a gradient is wanted the reference
    runs.

    Raises TypeError (dtype, type), ValueError (shape, device) or IndexError (a row outside [0, N),
    seen on CPU). On a GPU rows are not looked at by the host: a sample whose row is out of range
    comes back as NaN, nothing is read for it.
    """
    if not _is_right(hidden, skip, residual, rows, scale):
        _check(hidden, skip, residual, rows, scale)
    if checks.wants_grad("gather_blocks", hidden, skip, residual):
        with backend.autocast_off(hidden.device.type):
            return reference(hidden, skip, residual, rows, scale)
    return torch.ops.hgc.gather_blocks.default(hidden, skip, residual, rows, scale)
