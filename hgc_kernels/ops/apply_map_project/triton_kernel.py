import triton
import triton.language as tl

from hgc_kernels.map_codec import load_weights


@triton.jit
def apply_map_project_fold_kernel(
    v_ptr,  # [B, S_kv, H, D]
    weight_ptr,  # [C, H * D]
    folded_ptr,  # [B, H * S_KV_PAD, C] contiguous
    S_kv,
    H,
    C,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_wc,
    stride_wk,
    D: tl.constexpr,
    S_KV_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The projection folded into the values: row h * S_KV_PAD + i is U_i W_h (map_format)."""
    pid = tl.program_id(0)
    c_blocks = tl.cdiv(C, BLOCK_C)
    n_blocks = tl.cdiv(S_KV_PAD, BLOCK_N)
    c = pid % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i = (pid // c_blocks) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    h = (pid // c_blocks // n_blocks) % H
    b = (pid // c_blocks // n_blocks // H).to(tl.int64)
    v_ptr += b * stride_vb + h.to(tl.int64) * stride_vh
    weight_ptr += h.to(tl.int64) * D * stride_wk

    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    first = tl.load(v_ptr + d * stride_vd, mask=in_head, other=0.0).to(tl.float32)
    v = tl.load(
        v_ptr + i[:, None].to(tl.int64) * stride_vs + d[None, :] * stride_vd,
        mask=(i[:, None] < S_kv) & in_head[None, :],
        other=0.0,
    ).to(tl.float32)
    u = tl.where((i[:, None] > 0) & (i[:, None] < S_kv), v - first[None, :], v)
    w = tl.load(
        weight_ptr + c[None, :].to(tl.int64) * stride_wc + d[:, None] * stride_wk,
        mask=(c[None, :] < C) & in_head[:, None],
        other=0.0,
    )
    acc = tl.dot(u.to(w.dtype), w, input_precision=PRECISION)
    row = (b * H + h) * S_KV_PAD + i[:, None]
    mask = (i[:, None] < S_KV_PAD) & (c[None, :] < C)
    tl.store(folded_ptr + row * C + c[None, :], acc.to(folded_ptr.dtype.element_ty), mask=mask)


@triton.jit
def apply_map_project_main_kernel(
    left_ptr,  # [B, M, K]: a map [M, H * S_KV_PAD], or attended values [M, H * D]
    right_ptr,  # [B, K, C]: folded values, or the projection (stride 0 over the batch)
    bias_ptr,  # [C]
    residual_ptr,  # [B, M, C]
    out_ptr,  # [B, M, C] contiguous
    unit,  # what a loaded weight must be multiplied by
    M,
    K,
    C,
    stride_lb,
    stride_lm,
    stride_rb,
    stride_rk,
    stride_rc,
    stride_bias,
    stride_sb,
    stride_sm,
    stride_sc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_E4M3: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left @ right * unit + bias + residual, rounded once."""
    # Columns vary fastest: the programs that share a block of the map, the largest operand, run
    # together and find it in the cache.
    pid = tl.program_id(0)
    c_blocks = tl.cdiv(C, BLOCK_N)
    m_blocks = tl.cdiv(M, BLOCK_M)
    c = pid % c_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (pid // c_blocks) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (pid // c_blocks // m_blocks).to(tl.int64)
    left_ptr += b * stride_lb
    right_ptr += b * stride_rb
    left_row = m[:, None].to(tl.int64) * stride_lm

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_left = (m[:, None] < M) & (k[None, :] < K)
        left = load_weights(
            left_ptr, left_row + k[None, :], in_left, IS_E4M3, right_ptr.dtype.element_ty
        )
        right = tl.load(
            right_ptr + k[:, None].to(tl.int64) * stride_rk + c[None, :] * stride_rc,
            mask=(k[:, None] < K) & (c[None, :] < C),
            other=0.0,
        )
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    acc = acc * unit
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c * stride_bias, mask=c < C, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    mask = (m[:, None] < M) & (c[None, :] < C)
    if HAS_RESIDUAL:
        residual_ptr += b * stride_sb
        at = m[:, None].to(tl.int64) * stride_sm + c[None, :] * stride_sc
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    row = b * M + m[:, None]
    tl.store(out_ptr + row * C + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
