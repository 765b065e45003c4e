import triton
import triton.language as tl

from hgc_kernels.map_codec import load_weights


@triton.jit
def _finish(
    acc, first_weight, v_ptr, out_ptr, m, columns, S_q, H, stride_vd, unit, D: tl.constexpr
):
    first = tl.load(v_ptr + columns * stride_vd, mask=columns < D, other=0.0).to(tl.float32)
    result = acc * unit + first_weight[:, None] * first[None, :]
    mask = (m[:, None] < S_q) & (columns[None, :] < D)
    row = m[:, None].to(tl.int64) * (H * D)
    tl.store(out_ptr + row + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


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
    BLOCK_REST: tl.constexpr,
    IS_E4M3: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % H
    blocks = tl.cdiv(S_q, BLOCK_M)
    m = (pid // H) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (pid // H // blocks).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    rest = BLOCK_D + tl.arange(0, BLOCK_REST if BLOCK_REST > 0 else 16)

    map_ptr += (b * S_q * H + h) * S_KV_PAD
    v_ptr += b * stride_vb + h.to(tl.int64) * stride_vh
    out_ptr += (b * S_q * H + h) * D
    map_row = m[:, None].to(tl.int64) * (H * S_KV_PAD)

    others = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if BLOCK_REST > 0:
        acc_rest = tl.zeros((BLOCK_M, BLOCK_REST), tl.float32)
    for start in range(0, S_kv, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = n.to(tl.int64)
        in_map = (m[:, None] < S_q) & (n[None, :] > 0) & (n[None, :] < S_kv)
        p = load_weights(map_ptr, map_row + n[None, :], in_map, IS_E4M3, v_ptr.dtype.element_ty)
        # Summed as the product sees them, so that the weights add up to one whatever was rounded.
        others += tl.sum(p.to(tl.float32), 1)
        in_v = (n[:, None] < S_kv) & (d[None, :] < D)
        v = tl.load(v_ptr + key[:, None] * stride_vs + d[None, :] * stride_vd, mask=in_v, other=0.0)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
        if BLOCK_REST > 0:
            in_v = (n[:, None] < S_kv) & (rest[None, :] < D)
            v = tl.load(
                v_ptr + key[:, None] * stride_vs + rest[None, :] * stride_vd, mask=in_v, other=0.0
            )
            acc_rest = tl.dot(p, v, acc_rest, input_precision=PRECISION)

    first_weight = 1.0 - others * unit
    _finish(acc, first_weight, v_ptr, out_ptr, m, d, S_q, H, stride_vd, unit, D)
    if BLOCK_REST > 0:
        _finish(acc_rest, first_weight, v_ptr, out_ptr, m, rest, S_q, H, stride_vd, unit, D)
