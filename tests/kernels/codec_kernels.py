"""The e4m3 codec as kernels of its own, for its test."""

import triton
import triton.language as tl

from hgc_kernels.map_codec import decode_e4m3, encode_e4m3


@triton.jit
def run_encode(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, encode_e4m3(tl.load(x_ptr + i)))


@triton.jit
def run_decode(code_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, decode_e4m3(tl.load(code_ptr + i)).to(tl.float32))
