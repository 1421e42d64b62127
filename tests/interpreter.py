"""Makes Triton's interpreter compute in bfloat16 as a GPU does. Loaded as a pytest plugin where TRITON_INTERPRET=1.

Triton 3.6 keeps bfloat16 as uint16 and multiplies the bits as integers (triton #11585), truncates float32 to bfloat16,
and turns arrays of one element into indices in a way that NumPy 2.4 refuses (triton #9171). It also takes much
time for what it does again for every call and every tile, and for float64's small blocks, which get those of float32.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from pyfastpeft.kernels.blocks import BLOCKS

_cast, _binary, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op, InterpreterBuilder.create_dot


def _widen(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(handle: TensorHandle) -> TensorHandle:
    """float32 to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = handle.data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(handle.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def cast_impl(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target) or source == target:
        return _cast(self, src, dst_type)
    return _cast(self, _widen(src), dst_type) if source == tl.bfloat16 else _round(src)


def binary_op(self, lhs, rhs, op):
    if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
        raise TypeError("arithmetic on bfloat16 tiles: a kernel casts them to the dtype of its sums first")
    return _binary(self, lhs, rhs, op)


def create_dot(self, a, b, d, *precision):
    return _dot(self, _widen(a), _widen(b), d, *precision)


def _index(self) -> int:
    return int(self.handle.data.item())


_patch_lang_tensor = interpreter._patch_lang_tensor


def patch_lang_tensor(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", _index)


_np_dtype, _np_dtypes = interpreter._get_np_dtype, {}


def np_dtype(kind):
    scalar = kind.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _np_dtype(scalar)
    return _np_dtypes[scalar.name]


_called = set()


def call(self, *args, **kwargs):
    """A function that a kernel calls. What it patches stays patched, except for what every launch patches anew."""
    if self.fn not in _called:
        _called.add(self.fn)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter._get_np_dtype = np_dtype
InterpretedFunction.__call__ = call
for kinds in BLOCKS.values():
    if "double" in kinds:
        kinds["double"] = kinds["single"]
InterpreterBuilder.cast_impl = cast_impl
InterpreterBuilder.binary_op = binary_op
InterpreterBuilder.create_dot = create_dot
interpreter._patch_lang_tensor = patch_lang_tensor
