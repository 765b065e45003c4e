"""The shapes and the rivals of the op benchmarks, and the bytes that an op must move: each operand
counted once, as if caches were perfect, padding where the format has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import hgc_kernels as hk
from hgc_kernels.map_format import encode


@dataclass(frozen=True)
class DecoderInput:
    """One concatenation of a UNet's decoder: [B, hidden, side, side] with [B, skip, side, side]."""

    name: str
    hidden: int
    skip: int
    side: int

    def tensors(self, batch, dtype, device, channels_last=False):
        """hidden, skip, residual."""
        found = [
            torch.randn(batch, channels, self.side, self.side, device=device).to(dtype)
            for channels in (self.hidden, self.skip, self.skip)
        ]
        if channels_last:
            found = [x.contiguous(memory_format=torch.channels_last) for x in found]
        return found

    def bytes(self, batch, dtype):
        """hidden, skip and residual read, the result written."""
        return batch * self.side**2 * dtype.itemsize * (2 * self.hidden + 3 * self.skip)

    def eager_bytes(self, batch, dtype):
        """cat([hidden, skip + scale * residual]) as three ops: the product and the sum are written
        and read again.
        """
        return batch * self.side**2 * dtype.itemsize * (2 * self.hidden + 7 * self.skip)


# The three largest of SD1.5 at 512 come first.
DECODER_INPUTS = (
    DecoderInput("sd15_up3_0", 640, 320, 64),
    DecoderInput("sd15_up3_1", 320, 320, 64),
    DecoderInput("sd15_up2_0", 1280, 640, 32),
    DecoderInput("sd15_up1_0", 1280, 1280, 16),
    DecoderInput("sdxl_up2_0", 640, 320, 128),
    DecoderInput("sdxl_up1_0", 1280, 640, 64),
)


@dataclass(frozen=True)
class CrossAttention:
    """One cross-attention: queries, heads and head size; 77 keys of `context` channels."""

    name: str
    s_q: int
    heads: int
    size: int
    context: int
    s_kv: int = 77

    @property
    def channels(self):
        return self.heads * self.size

    def values(self, batch, dtype, device):
        """[B, S_kv, H, D], a projection viewed as heads."""
        x = torch.randn(batch, self.s_kv, self.channels, device=device).to(dtype)
        return x.view(batch, self.s_kv, self.heads, self.size)

    def queries(self, batch, dtype, device):
        x = torch.randn(batch, self.s_q, self.channels, device=device).to(dtype)
        return x.view(batch, self.s_q, self.heads, self.size)

    def map(self, batch, format, device):
        """A stored map peaked at the first token."""
        map = hk.new_map(batch, self.s_q, self.heads, self.s_kv, format=format, device=device)
        scores = torch.randn(batch, self.s_q, self.heads, self.s_kv, device=device)
        scores[..., 0] += 5
        encode(torch.softmax(scores, -1), map)
        return map

    def apply_bytes(self, batch, dtype, format):
        """The map and the values read, the result written."""
        tokens = (self.s_q + self.s_kv) * self.channels * dtype.itemsize
        return batch * tokens + hk.map_bytes(batch, self.s_q, self.heads, self.s_kv, format)

    def attend_bytes(self, batch, dtype, format):
        """The queries, keys and values read, the result and the map written."""
        return self.apply_bytes(batch, dtype, format) + (
            batch * (self.s_q + self.s_kv) * self.channels * dtype.itemsize
        )


CROSS_ATTENTIONS = (
    CrossAttention("sd15_level0", 4096, 8, 40, 768),
    CrossAttention("sd15_level1", 1024, 8, 80, 768),
    CrossAttention("sd15_level2", 256, 8, 160, 768),
    CrossAttention("sd15_mid", 64, 8, 160, 768),
    CrossAttention("sdxl_level1", 4096, 10, 64, 2048),
    CrossAttention("sdxl_level2", 1024, 20, 64, 2048),
)


def eager_gather_blocks(hidden, skip, residual, scale):
    return torch.cat([hidden, skip + scale * residual], 1)


def eager_apply_map(probabilities, v):
    """Map times values in eager PyTorch: the full map [B, S_q, H, S_kv] in the dtype of the values,
    nothing to decode.
    """
    out = torch.matmul(probabilities.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).contiguous()


def whole_cross_attention(
    shape: CrossAttention, batch: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """(hgc's, diffusers'): a block's cross-attention with fresh values, from hidden states to
    hidden states.

    diffusers: norm, to_q, to_k, to_v, scaled_dot_product_attention, to_out, residual. hgc: to_v,
    apply_map, to_out, residual; the norm, the queries and the keys are not needed. The map is the
    one that diffusers' would compute, so both give the same result.
    """
    from diffusers.models.attention_processor import Attention

    attention = Attention(shape.channels, shape.context, heads=shape.heads, dim_head=shape.size)
    attention = attention.to(device, dtype).eval()
    norm = torch.nn.LayerNorm(shape.channels).to(device, dtype)
    hidden = torch.randn(batch, shape.s_q, shape.channels, device=device).to(dtype)
    prompt = torch.randn(batch, shape.s_kv, shape.context, device=device).to(dtype)
    map = hk.new_map(batch, shape.s_q, shape.heads, shape.s_kv, device=device)
    heads = (shape.heads, shape.size)
    q, k = attention.to_q(norm(hidden)).unflatten(-1, heads), attention.to_k(prompt)
    hk.attend_and_store(q, k.unflatten(-1, heads), attention.to_v(prompt).unflatten(-1, heads), map)
    projection = attention.to_out[0]

    def theirs() -> torch.Tensor:
        return attention(norm(hidden), encoder_hidden_states=prompt) + hidden

    def ours() -> torch.Tensor:
        v = attention.to_v(prompt).unflatten(-1, heads)
        return projection(hk.apply_map(map, v).flatten(2)) + hidden

    return ours, theirs
