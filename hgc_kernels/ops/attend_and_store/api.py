from __future__ import annotations

import torch

from hgc_kernels import backend, checks
from hgc_kernels.map_format import check_map
from hgc_kernels.ops.attend_and_store.reference import attend_and_store as reference


def attend_and_store(
    q: torch.Tensor,  # [B, S_q, H, D]
    k: torch.Tensor,  # [B, S_kv, H, D]
    v: torch.Tensor,  # [B, S_kv, H, D]
    map: torch.Tensor,  # [B, S_q, H, S_kv padded to 16], written in place
    scale: float | None = None,
) -> torch.Tensor:
    """Attention that leaves its probability map behind: [B, S_q, H, D], new and contiguous.

    Equivalent to:
        p = torch.softmax(torch.einsum("bqhd,bkhd->bqhk", q, k) * scale, -1)
        map.copy_(stored form of p)          # see hgc_kernels.map_format
        return torch.einsum("bqhk,bkhd->bqhd", p, v)

    q, k, v: fp32, fp16 or bf16, one dtype, any strides (a projection [B, S, H * D] viewed as heads,
    half of a batch). map: contiguous, from `new_map`, in any of its formats; it is written in full,
    its padding too. `scale` defaults to D ** -0.5. The softmax is done in fp32 and the result uses
    the probabilities before they are stored. Where a gradient is wanted the reference runs.

    Raises TypeError (dtype, type) or ValueError (shape, device, layout of the map).
    """
    checks.tensor("q", q, 4, checks.FLOATS)
    checks.tensor("k", k, 4, checks.FLOATS)
    checks.tensor("v", v, 4, checks.FLOATS)
    batch, s_q, heads, size = q.shape
    s_kv = k.shape[1]
    for name, value in (("k", k), ("v", v)):
        checks.same_dtype(name, value, "q", q)
        checks.same_device(name, value, "q", q)
        checks.shape(name, value, (batch, s_kv, heads, size))
    if size < 1:
        raise ValueError(f"q: expected a head size of at least 1, got shape {tuple(q.shape)}")
    check_map(map, "k", k, s_kv)
    checks.shape("map", map, (batch, s_q, heads, map.shape[3]))
    scale = size**-0.5 if scale is None else checks.number("scale", scale)
    if checks.wants_grad("attend_and_store", q, k, v):
        with backend.autocast_off(q.device.type):
            return reference(q, k, v, scale, map)
    return torch.ops.hgc.attend_and_store.default(q, k, v, scale, map)
