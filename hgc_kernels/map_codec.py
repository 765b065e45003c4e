"""Triton code for the e4m3 map format, kept as bytes: sm_80 has no such type, and the interpreter
needs none.
"""

import triton
import triton.language as tl


@triton.jit
def encode_e4m3(x):
    """fp32 in [0, 448] to the nearest float8_e4m3fn, ties to even, as uint8. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    # Keep three bits of mantissa and rebias the exponent from 127 to 7: 120 steps of eight codes.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, the step of fp32 at 2^14: the addition rounds for us.
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(x < 0.015625, subnormal, normal)
    return tl.where(x == x, code, 0x7F).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """uint8 codes of float8_e4m3fn without sign to fp16 values 2^-8 as large. NaN stays NaN."""
    # fp16 has the same fields with one more bit of exponent and seven more of mantissa, and a bias
    # of 15 in place of 7; subnormals carry over too.
    bits = code.to(tl.uint16) << 7
    bits = tl.where(code == 0x7F, 0x7E00, bits).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def load_weights(ptr, offsets, mask, IS_E4M3: tl.constexpr, DTYPE: tl.constexpr):
    """Stored map entries as DTYPE; in format e4m3 they are 1.75 = 448 / 256 times the weights."""
    if IS_E4M3:
        return decode_e4m3(tl.load(ptr + offsets, mask=mask, other=0)).to(DTYPE)
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32).to(DTYPE)
