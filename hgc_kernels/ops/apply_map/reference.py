from __future__ import annotations

import torch

from hgc_kernels.layout import with_fresh_strides
from hgc_kernels.map_format import decode


def apply_map(
    map: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:  # [B, S_q, H, S_kv_pad], [B, S_kv, H, D]
    probabilities = decode(map, v.shape[1]).transpose(1, 2)  # [B, H, S_q, S_kv]
    out = torch.matmul(probabilities, v.transpose(1, 2).float()).to(v.dtype)
    return with_fresh_strides(out.transpose(1, 2))
