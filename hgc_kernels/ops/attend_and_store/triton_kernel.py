import triton
import triton.language as tl

from hgc_kernels.map_codec import encode_e4m3

# Offsets inside a tile are 32-bit, to spare registers; whatever can pass 2^31 elements is added to
# the pointers once, in 64 bits.


@triton.jit
def _load_tile(ptr, rows, columns, stride_row, stride_column, n_rows, n_columns):
    mask = (rows < n_rows) & (columns < n_columns)
    return tl.load(ptr + rows * stride_row + columns * stride_column, mask=mask, other=0.0)


@triton.jit
def _scores(
    q,
    k_ptr,
    n,
    keys_left,
    scale_log2,
    stride_ks,
    stride_kd,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    k = _load_tile(k_ptr, n[None, :], d[:, None], stride_ks, stride_kd, keys_left, D)
    scores = tl.dot(q, k, input_precision=PRECISION)
    return tl.where(n[None, :] < keys_left, scores * scale_log2, float("-inf"))


@triton.jit
def _store_map(
    map_ptr, p, m, n, start, rows_left, stride_map, S_KV_PAD: tl.constexpr, IS_E4M3: tl.constexpr
):
    # Slot 0 holds one and the padding, where p is zero already, zero: see hgc_kernels.map_format.
    p = tl.where(start + n[None, :] == 0, 1.0, p)
    mask = (m[:, None] < rows_left) & (start + n[None, :] < S_KV_PAD)
    offsets = m[:, None] * stride_map + n[None, :]
    if IS_E4M3:
        tl.store(map_ptr + start + offsets, encode_e4m3(p * 448.0), mask=mask)
    else:
        tl.store(map_ptr + start + offsets, p.to(map_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attend_and_store_kernel(
    q_ptr,  # [B, S_q, H, D]
    k_ptr,  # [B, S_kv, H, D]
    v_ptr,  # [B, S_kv, H, D]
    map_ptr,  # [B, S_q, H, S_KV_PAD] contiguous
    out_ptr,  # [B, S_q, H, D] contiguous
    scale_log2,  # scale / ln 2: the softmax is taken in powers of two
    S_q,
    S_kv,
    H,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
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
        # One head after the other, as a projection leaves them. The compiler must see the head size
        # here to know that each head begins where 16 bytes can be read at once.
        stride_qh = D
        stride_kh = D
        stride_vh = D
    # Heads vary fastest: neighbouring programs read neighbouring parts of the same lines of q.
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
    q_ptr += b * stride_qb + h * stride_qh + m_first.to(tl.int64) * stride_qs
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    map_ptr += row * S_KV_PAD
    out_ptr += row * D

    q = _load_tile(q_ptr, m[:, None], d[None, :], stride_qs, stride_qd, rows_left, D)

    if BLOCK_N >= S_KV_PAD:
        # All keys at once, as with a text prompt: one pass.
        scores = _scores(
            q, k_ptr, n, S_kv, scale_log2, stride_ks, stride_kd,
            D, BLOCK_D, PRECISION,
        )  # fmt: skip
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        _store_map(map_ptr, p, m, n, 0, rows_left, H * S_KV_PAD, S_KV_PAD, IS_E4M3)
        v = _load_tile(v_ptr, n[:, None], d[None, :], stride_vs, stride_vd, S_kv, D)
        acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    else:
        # More keys than a tile holds: one pass for each row's maximum and sum, one for the rest.
        # The map wants final probabilities, so an online softmax would have to visit it twice.
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        step = tl.full((), BLOCK_N, tl.int64) * stride_ks
        k_tile = k_ptr
        for start in range(0, S_kv, BLOCK_N):
            scores = _scores(
                q, k_tile, n, S_kv - start, scale_log2, stride_ks, stride_kd,
                D, BLOCK_D, PRECISION,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(scores, 1))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
            top = new_top
            k_tile += step
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, S_kv, BLOCK_N):
            scores = _scores(
                q, k_ptr, n, S_kv - start, scale_log2, stride_ks, stride_kd,
                D, BLOCK_D, PRECISION,
            )  # fmt: skip
            p = tl.exp2(scores - top[:, None]) / total[:, None]
            _store_map(map_ptr, p, m, n, start, rows_left, H * S_KV_PAD, S_KV_PAD, IS_E4M3)
            v = _load_tile(v_ptr, n[:, None], d[None, :], stride_vs, stride_vd, S_kv - start, D)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            k_ptr += step
            v_ptr += tl.full((), BLOCK_N, tl.int64) * stride_vs

    mask = (m[:, None] < rows_left) & (d[None, :] < D)
    offsets = m[:, None] * (H * D) + d[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
