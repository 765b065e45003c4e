"""Memory formats of [B, C, H, W] tensors, decided the same way in the fake, the reference and the
kernels.
"""

from __future__ import annotations

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a [B, C, H, W] tensor is dense in channels_last order and not just as well NCHW (one
    channel, one pixel).

    The batch stride is left out, so half of a batch, or every second sample, counts as what it is.
    """
    _, channels, height, width = x.shape
    if channels == 1 or height * width == 1:
        return False
    return (
        x.stride(1) == 1
        and (width == 1 or x.stride(3) == channels)
        and (height == 1 or x.stride(2) == channels * width)
    )


def gathered_format(hidden: torch.Tensor, skip: torch.Tensor) -> torch.memory_format:
    """channels_last where both inputs are, as `torch.cat` would give; NCHW otherwise."""
    return (
        torch.channels_last
        if is_channels_last(hidden) and is_channels_last(skip)
        else torch.contiguous_format
    )
