from __future__ import annotations

import torch

from hgc_kernels import backend, checks
from hgc_kernels.ops.group_norm.reference import group_norm as reference


def group_norm(
    x: torch.Tensor,  # [B, C, H, W]
    groups: int,
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    eps: float = 1e-5,
    *,
    shift: torch.Tensor | None = None,  # [B, C]
    silu: bool = False,
) -> torch.Tensor:
    """A group norm with what stands around it in a resnet: [B, C, H, W] in x's dtype, new.

    Equivalent to:
        y = torch.nn.functional.group_norm(x + shift[:, :, None, None], groups, weight, bias, eps)
        return torch.nn.functional.silu(y) if silu else y

    `x + shift` rounds to the dtype, as in eager PyTorch; the norm's result is not rounded before
    the SiLU. fp32, fp16 or bf16, one dtype for all; any strides. The result is channels_last where
    x is and NCHW otherwise, on a GPU too, where PyTorch gives NCHW. Where a gradient is wanted the
    reference runs.

    Raises TypeError (dtype, type) or ValueError (shape, device, groups that do not divide C).
    """
    checks.tensor("x", x, 4, checks.FLOATS)
    batch, channels, _, _ = x.shape
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups: expected an int, got {type(groups).__name__}")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
    operands: tuple[tuple[str, torch.Tensor | None, tuple[int, ...]], ...] = (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("shift", shift, (batch, channels)),
    )
    for name, value, expected in operands:
        if value is None and name == "shift":
            continue
        value = checks.tensor(name, value, len(expected), checks.FLOATS)
        checks.same_dtype(name, value, "x", x)
        checks.same_device(name, value, "x", x)
        checks.shape(name, value, expected)
    checks.number("eps", eps)
    if not isinstance(silu, bool):
        raise TypeError(f"silu: expected a bool, got {type(silu).__name__}")
    if checks.wants_grad("group_norm", x, weight, bias, shift):
        with backend.autocast_off(x.device.type):
            return reference(x, shift, groups, weight, bias, eps, silu)
    result: torch.Tensor = backend.call("group_norm", x, shift, groups, weight, bias, eps, silu)
    return result
