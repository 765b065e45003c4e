"""Repairs of Triton's CPU interpreter that the kernel tests need. Import before the first launch;
no-ops where fixed.

1. bf16 operands of `tl.dot` are multiplied as raw 16-bit integers (triton 3.6 to 3.8, issue 11584):
widen them first. 2. fp32 to bf16 truncates where a GPU rounds to nearest, ties to even. 3. `range`
over a run-time scalar fails with numpy >= 2.4 on triton 3.6: give interpreted scalars an
`__index__`.
"""

import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _round_to_bfloat16(handle):
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    rounded = np.where(np.isnan(handle.data), 0x7FC0, rounded).astype(np.uint16)
    return interpreter.TensorHandle(rounded.reshape(handle.data.shape), tl.bfloat16)


def _as_index(scalar):
    return int(np.asarray(scalar.handle.data).reshape(-1)[0])


def repair() -> None:
    """Apply the repairs, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_hgc_repaired", False):
        return
    create_dot = builder.create_dot
    cast = builder.cast_impl
    patch_tensor = interpreter._patch_lang_tensor

    def repaired_dot(self, a, b, d, *rest):
        return create_dot(self, _widen(a), _widen(b), d, *rest)

    def repaired_cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return _round_to_bfloat16(source)
        return cast(self, source, target)

    builder.create_dot = repaired_dot
    builder.cast_impl = repaired_cast
    if "scope" in inspect.signature(patch_tensor).parameters:

        def repaired_patch(tensor, scope):
            result = patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", _as_index)
            return result

    else:

        def repaired_patch(tensor, *args, **kwargs):
            result = patch_tensor(tensor, *args, **kwargs)
            tensor.__index__ = _as_index
            return result

    interpreter._patch_lang_tensor = repaired_patch
    builder._hgc_repaired = True
