from __future__ import annotations

import torch

from hgc_kernels.layout import with_fresh_strides
from hgc_kernels.map_format import encode


def attend_and_store(
    q: torch.Tensor,  # [B, S_q, H, D]
    k: torch.Tensor,  # [B, S_kv, H, D]
    v: torch.Tensor,  # [B, S_kv, H, D]
    scale: float,
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16]
) -> torch.Tensor:
    q_heads, k_heads, v_heads = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    scores = torch.matmul(q_heads, k_heads.transpose(-1, -2)).float() * scale  # [B, H, S_q, S_kv]
    probabilities = torch.softmax(scores, -1)
    encode(probabilities.transpose(1, 2), map)
    out = torch.matmul(probabilities.to(v.dtype), v_heads)
    return with_fresh_strides(out.transpose(1, 2))
