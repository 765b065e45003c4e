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


def dense_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last where x is; NCHW otherwise."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def gathered_format(hidden: torch.Tensor, skip: torch.Tensor) -> torch.memory_format:
    """channels_last where both inputs are, as `torch.cat` would give; NCHW otherwise."""
    return dense_format(skip) if is_channels_last(hidden) else torch.contiguous_format


def with_fresh_strides(
    x: torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """x with exactly the strides that a new tensor of this format would have.

    `contiguous` leaves any strides on a dimension of size one, and those of an empty tensor; the
    fake kernels, which compiled graphs believe, do not.
    """
    fresh = torch.empty(x.shape, device="meta", memory_format=memory_format).stride()
    return x if x.stride() == fresh else x.clone(memory_format=memory_format)
