from __future__ import annotations

import torch

from hgc_kernels import backend, checks
from hgc_kernels.ops.gather_blocks.reference import gather_blocks as reference


def gather_blocks(
    hidden: torch.Tensor,  # [B, C_h, H, W]
    skip: torch.Tensor,  # [B, C_s, H, W]
    residual: torch.Tensor | None = None,  # [B, C_s, H, W]
    scale: float = 1.0,
) -> torch.Tensor:
    """The input of a UNet decoder layer in one pass over memory: [B, C_h + C_s, H, W].

    Equivalent to:
        return torch.cat([hidden, skip + scale * residual], dim=1)

    `scale * residual` rounds to the storage dtype before it is added, as in eager PyTorch, so the
    result is the same bits. fp32, fp16 or bf16, one dtype for all; any strides. The result is new
    memory, channels_last where hidden and skip both are and NCHW otherwise. Where a gradient is
    wanted the reference runs.

    Raises TypeError (dtype, type) or ValueError (shape, device).
    """
    checks.tensor("hidden", hidden, 4, checks.FLOATS)
    checks.tensor("skip", skip, 4, checks.FLOATS)
    checks.same_dtype("skip", skip, "hidden", hidden)
    checks.same_device("skip", skip, "hidden", hidden)
    checks.number("scale", scale)
    batch, _, height, width = hidden.shape
    checks.shape("skip", skip, (batch, skip.shape[1], height, width))
    if residual is not None:
        checks.tensor("residual", residual, 4, checks.FLOATS)
        checks.same_dtype("residual", residual, "skip", skip)
        checks.same_device("residual", residual, "skip", skip)
        checks.shape("residual", residual, tuple(skip.shape))
    if checks.wants_grad("gather_blocks", hidden, skip, residual):
        with backend.autocast_off(hidden.device.type):
            return reference(hidden, skip, residual, scale)
    result: torch.Tensor = backend.call("gather_blocks", hidden, skip, residual, scale)
    return result
