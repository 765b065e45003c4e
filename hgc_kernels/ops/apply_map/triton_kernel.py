import triton
import triton.language as tl

from hgc_kernels.map_codec import load_weights


@triton.jit
def apply_map_kernel(
    map_ptr,  # [B, S_q, H, S_KV_PAD] contiguous
    v_ptr,  # [B, S_kv, H, D]
    out_ptr,  # [B, S_q, H, D] contiguous
    unit,  # what a loaded weight must be multiplied by
    S_q,
    S_kv,
    H,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    D: tl.constexpr,
    S_KV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_E4M3: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):
    if PACKED:
        stride_vh = D  # as in attend_and_store
    # As in attend_and_store: offsets inside a tile in 32 bits, all else in the pointers.
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    blocks = tl.cdiv(S_q, BLOCK_M)
    m_first = (pid // H) % blocks * BLOCK_M
    b = (pid // H // blocks).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    rows_left = S_q - m_first

    row = (b * S_q + m_first) * H + h
    map_ptr += row * S_KV_PAD
    out_ptr += row * D
    v_ptr += b * stride_vb + h * stride_vh
    v_tile = v_ptr

    others = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, S_kv, BLOCK_N):
        # Loaded by the padded length, whose masks cut no 16 bytes in two, and slot 0 dropped here.
        in_map = (m[:, None] < rows_left) & (start + n < S_KV_PAD)[None, :]
        offsets = m[:, None] * (H * S_KV_PAD) + n[None, :]
        p = load_weights(map_ptr + start, offsets, in_map, IS_E4M3, v_ptr.dtype.element_ty)
        in_keys = start + n < S_kv
        p = tl.where((in_keys & (start + n > 0))[None, :], p, 0.0)
        # Summed as the product sees them, so that the weights add up to one whatever was rounded.
        others += tl.sum(p.to(tl.float32), 1)
        in_v = in_keys[:, None] & (d[None, :] < D)
        offsets = n[:, None] * stride_vs + d[None, :] * stride_vd
        v = tl.load(v_tile + offsets, mask=in_v, other=0.0)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
        v_tile += tl.full((), BLOCK_N, tl.int64) * stride_vs

    first = tl.load(v_ptr + d * stride_vd, mask=d < D, other=0.0).to(tl.float32)
    result = acc * unit + (1.0 - others * unit)[:, None] * first[None, :]
    mask = (m[:, None] < rows_left) & (d[None, :] < D)
    offsets = m[:, None] * (H * D) + d[None, :]
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)
