"""How attention maps are stored: layout, formats and the complement form.

A map M is a contiguous tensor [B, S_q, H, S_kv padded to a multiple of 16]. Slots 1 .. S_kv - 1
hold the probabilities of those tokens, slot 0 holds one, the padding zero. The first token, which
takes most of the probability in text attention, is the complement, p_0 = 1 - sum_{i>=1} p_i, so
that

    out = v_0 + sum_{i>=1} p_i (v_i - v_0) = M U,   U_0 = v_0,  U_i = v_i - v_0

Whatever rounding the storage does, the weights of the values sum to one: nothing needs
renormalising, neither here nor in a matrix product that sums over heads. Format "e4m3" holds 448
times all this (torch.float8_e4m3fn, whose largest value is 448); the others hold it as it is.
"""

from __future__ import annotations

import torch

from hgc_kernels import checks

PAD = 16
E4M3_SCALE = 448.0
FORMATS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
}
MAP_DTYPES = tuple(FORMATS.values())


def padded(s_kv: int) -> int:
    """S_kv rounded up to a multiple of 16, the last size of a map."""
    return (s_kv + PAD - 1) // PAD * PAD


def scale_of(dtype: torch.dtype) -> float:
    """What a stored value must be divided by to be a probability."""
    return E4M3_SCALE if dtype == torch.float8_e4m3fn else 1.0


def map_bytes(batch: int, s_q: int, heads: int, s_kv: int, format: str) -> int:
    """Bytes that a map of this size holds."""
    return batch * s_q * heads * padded(s_kv) * FORMATS[format].itemsize


def new_map(
    batch: int,
    s_q: int,
    heads: int,
    s_kv: int,
    *,
    format: str = "fp16",
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Allocate a map [batch, s_q, heads, s_kv padded to 16] for `attend_and_store` to fill.

    A fresh map lets every query attend to token 0. Raises ValueError for an unknown format
    or a size below zero (s_kv below one). The caller owns the memory.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    for name, size, least in (
        ("batch", batch, 0),
        ("s_q", s_q, 0),
        ("heads", heads, 0),
        ("s_kv", s_kv, 1),
    ):
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    map = torch.zeros(batch, s_q, heads, padded(s_kv), dtype=FORMATS[format], device=device)
    map[..., :1] = scale_of(map.dtype)
    return map


def check_map(map: object, like_name: str, like: torch.Tensor, s_kv: int) -> torch.Tensor:
    stored = checks.tensor("map", map, 4, MAP_DTYPES)
    checks.same_device("map", stored, like_name, like)
    if s_kv < 1:
        raise ValueError(f"{like_name}: expected at least one key, got shape {tuple(like.shape)}")
    if stored.shape[3] != padded(s_kv):
        raise ValueError(
            f"map: expected a last size of {padded(s_kv)} ({s_kv} keys padded to {PAD}), "
            f"got shape {tuple(stored.shape)}"
        )
    if not stored.is_contiguous():
        raise ValueError(f"map: expected a contiguous tensor, got strides {stored.stride()}")
    return stored


def encode(probabilities: torch.Tensor, map: torch.Tensor) -> None:
    """Write fp32 probabilities [B, S_q, H, S_kv] into `map` in its storage format."""
    s_kv = probabilities.shape[3]
    map.zero_()
    map[..., :1] = scale_of(map.dtype)
    map[..., 1:s_kv] = probabilities.detach()[..., 1:] * scale_of(map.dtype)


def decode(map: torch.Tensor, s_kv: int) -> torch.Tensor:
    """The full fp32 probabilities [B, S_q, H, S_kv] that a map stands for, token 0 included."""
    others = map[..., 1:s_kv].float() / scale_of(map.dtype)
    return torch.cat([1.0 - others.sum(-1, keepdim=True), others], -1)


def map_probabilities(map: torch.Tensor, s_kv: int) -> torch.Tensor:
    """The probabilities a map stands for, [B, S_q, H, s_kv] in fp32, for looking at them.

    map: [B, S_q, H, s_kv padded to 16] as `new_map` allocates it. Raises TypeError or ValueError
    for anything else.
    """
    if isinstance(s_kv, bool) or not isinstance(s_kv, (int, torch.SymInt)):
        raise TypeError(f"s_kv: expected an int, got {type(s_kv).__name__}")
    if s_kv < 1:
        raise ValueError(f"s_kv: expected at least 1, got {s_kv}")
    stored = checks.tensor("map", map, 4, MAP_DTYPES)
    return decode(check_map(stored, "map", stored, s_kv), s_kv)
