"""Triton's interpreter as a GPU would compute: 3.6 to 3.9 get bfloat16 wrong, and more.

`install()` patches `triton.runtime.interpreter` of this process. Values are NumPy arrays; bfloat16
has no NumPy type, so the interpreter holds its bits as uint16, and as shipped computes on those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def install() -> None:
    """Once a process."""
    _bf16_operators()
    _bf16_casts()
    _bf16_reductions()
    _dot()
    _nan_in_maximum()
    _boolean_masks()
    _run_time_range()
    _patch_language_once()
    _no_idle_work()


# ------------------------------------------------------------------------------------- bit formats


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits -> float32, any shape."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Numbers -> uint16 bits, any shape: to nearest, ties to even, like the hardware."""
    values = np.asarray(values).astype(np.float32)
    bits = values.view(np.uint32)
    nearest = bits + (0x7FFF + ((bits >> 16) & 1))
    return np.where(np.isnan(values), 0x7FC0, nearest >> 16).astype(np.uint16)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 -> float32 of 10 explicit bits, to nearest; infinities and NaN stay."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _is_bf16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _numbers(handle: Handle) -> np.ndarray:
    return from_bf16(handle.data) if _is_bf16(handle) else handle.data


def _bf16_or_bool(values: np.ndarray) -> Handle:
    """Comparisons keep the operands' type here, as in the interpreter's own operators."""
    return Handle(values if values.dtype == np.bool_ else to_bf16(values), tl.bfloat16)


# ----------------------------------------------------------------------------------------- bfloat16


def _bf16_operators() -> None:
    shipped_unary, shipped_binary = Builder.unary_op, Builder.binary_op
    shipped_fma = Builder.create_fma

    def unary_op(self, arg, op):
        if _is_bf16(arg):
            return _bf16_or_bool(op(_numbers(arg)))
        return shipped_unary(self, arg, op)

    def binary_op(self, lhs, rhs, op):
        if _is_bf16(lhs) or _is_bf16(rhs):
            return _bf16_or_bool(op(_numbers(lhs), _numbers(rhs)))
        return shipped_binary(self, lhs, rhs, op)

    def create_fma(self, x, y, z):
        if _is_bf16(z):
            return _bf16_or_bool(_numbers(x) * _numbers(y) + _numbers(z))
        return shipped_fma(self, x, y, z)

    Builder.unary_op, Builder.binary_op = unary_op, binary_op
    Builder.create_fma = create_fma


def _bf16_casts() -> None:
    shipped = Builder.cast_impl

    def cast_impl(self, src, dst_type):
        to = dst_type.scalar
        if to == tl.bfloat16:
            return Handle(src.data if _is_bf16(src) else to_bf16(src.data), to)
        if _is_bf16(src):
            return Handle(_numbers(src).astype(interpreter._get_np_dtype(to)), to)
        return shipped(self, src, dst_type)

    def get_bf16(self, value):
        return Handle(to_bf16([value]), tl.bfloat16)

    Builder.cast_impl, Builder.get_bf16 = cast_impl, get_bf16


def _retyped(tensor: tl.tensor, data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    shape = tensor.type.shape if tensor.type.is_block() else None
    return tl.core.tensor(Handle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)


def _bf16_reductions() -> None:
    """Reduced in float32, rounded once."""
    shipped = interpreter.ReduceOps.apply_impl

    def apply_impl(self, inputs):
        narrow = [tensor.dtype == tl.bfloat16 for tensor in inputs]
        if not any(narrow):
            return shipped(self, inputs)
        wide = tuple(
            _retyped(tensor, from_bf16(tensor.handle.data), tl.float32) if is_bf16 else tensor
            for tensor, is_bf16 in zip(inputs, narrow, strict=True)
        )
        result = shipped(self, wide)
        results = list(result) if isinstance(result, tuple | list) else [result]
        for i, tensor in enumerate(results):  # fewer than inputs: a maximum without its index
            if narrow[i]:
                results[i] = _retyped(tensor, to_bf16(tensor.handle.data), tl.bfloat16)
        return tuple(results)

    interpreter.ReduceOps.apply_impl = apply_impl


# --------------------------------------------------------------------------------- other arithmetic


def _dot() -> None:
    """bfloat16 operands are multiplied as numbers; TF32 ones lose their last 13 bits first."""
    shipped = Builder.create_dot
    tf32 = interpreter._ir.INPUT_PRECISION.TF32

    def create_dot(self, a, b, d, input_precision, *rest):
        if _is_bf16(a) or _is_bf16(b):
            product = np.matmul(_numbers(a), _numbers(b), dtype=np.float32)
            return Handle(product + d.data, d.dtype.scalar)
        if a.dtype.scalar == tl.float32 and input_precision == tf32:
            a, b = (Handle(to_tf32(x.data), tl.float32) for x in (a, b))
        return shipped(self, a, b, d, input_precision, *rest)

    Builder.create_dot = create_dot


def _nan_in_maximum() -> None:
    """Unless told to propagate it, max and min on a GPU drop a NaN; 3.6 and 3.7 return it."""
    Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


def _boolean_masks() -> None:
    """Integers where a scalar took part in the mask, which 3.9 refuses."""
    shipped_load, shipped_store = Builder.create_masked_load, Builder.create_masked_store

    def boolean(mask: Handle) -> Handle:
        return Handle(np.asarray(mask.data) != 0, tl.int1)

    def create_masked_load(self, ptrs, mask, *rest, **options):
        return shipped_load(self, ptrs, boolean(mask), *rest, **options)

    def create_masked_store(self, ptrs, value, mask, *rest):
        return shipped_store(self, ptrs, value, boolean(mask), *rest)

    Builder.create_masked_load, Builder.create_masked_store = (
        create_masked_load,
        create_masked_store,
    )


# ----------------------------------------------------------------------------------- the machinery


def _run_time_range() -> None:
    """`range(n)` with n from an argument: NumPy >= 2.4 makes no int of a one-element array."""
    shipped = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        shipped(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


class _Unchanged:
    """The scope of a patch that was there already."""

    def restore(self) -> None:
        pass


def _patch_language_once() -> None:
    """Every call of a device function, `tl.cdiv` too, patches the language anew: once is enough.

    What it patches depends on the module of the function alone.
    """
    shipped: Callable = interpreter._patch_lang
    shipped_call = interpreter.GridExecutor.__call__
    scopes: dict[int, object] = {}  # by the module's globals, while a launch runs

    def _patch_lang(fn):
        module = id(fn.__globals__)
        if module in scopes:
            return _Unchanged()
        scopes[module] = shipped(fn)
        return _Unchanged()

    def __call__(self, *args, **kwargs):
        try:
            return shipped_call(self, *args, **kwargs)
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()
            scopes.clear()

    interpreter._patch_lang = _patch_lang
    interpreter.GridExecutor.__call__ = __call__


def _no_idle_work() -> None:
    """A fourth of the time: sums of 64 bits for overflow assertions that only a launch with
    `debug` makes, and a table of dtypes that is built for every look-up."""
    assert not interpreter.InterpreterOptions().debug
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, binary_op: None
    of_numbers = functools.cache(interpreter._get_np_dtype)

    def _get_np_dtype(dtype):
        scalar = dtype.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else of_numbers(scalar)

    interpreter._get_np_dtype = _get_np_dtype
