"""Triton's interpreter with every memory access and product reported and checked."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from tools.kernels.interpreter.formats import bf16_to_f32, f32_to_bf16, to_tf32
from tools.kernels.interpreter.memory import CheckError
from tools.kernels.interpreter.report import Report

__all__ = ["CheckedBuilder", "CheckedExecutor", "CheckedReduce", "CheckedScan"]

TensorHandle = interpreter.TensorHandle


def _is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _refuse_bf16(what: str, *values: Any) -> None:
    if any(map(_is_bf16, values)):
        raise CheckError(f"bfloat16 operand in {what}: convert to float32 first")


def _undefined(pointers: TensorHandle) -> TensorHandle:
    """What a masked lane holds without `other=`: nothing that a result may show."""
    dtype = pointers.get_element_ty()
    kind = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        value: Any = 0x7FC0
    elif np.issubdtype(kind, np.floating):
        value = math.nan
    else:
        value = True if kind == np.bool_ else np.iinfo(kind).max // 3
    return TensorHandle(np.full(np.shape(pointers.data), value, kind), dtype)


def _size(pointers: TensorHandle) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _lanes(mask: Any) -> Any:
    return mask.data if isinstance(mask, TensorHandle) else mask


class CheckedBuilder(interpreter.InterpreterBuilder):
    """The interpreter's operations, reported to `report`."""

    report: Report

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        self.is_running = self.report.is_next_run(math.prod(self.grid_dim))
        if self.report.order == "reverse":
            nx, ny, nz = self.grid_dim
            x, y, z = nx - 1 - x, ny - 1 - y, nz - 1 - z
        super().set_grid_idx(x, y, z)

    def create_masked_load(self, ptrs, mask, other, *args, **kwargs):
        self.report.load(ptrs.data, _lanes(mask), _size(ptrs))
        if other is None:
            other = _undefined(ptrs)
        return super().create_masked_load(ptrs, mask, other, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        self.report.store(ptrs.data, _lanes(mask), _size(ptrs))
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_atomic_rmw(self, op, ptr, val, mask, *args, **kwargs):
        _refuse_bf16("an atomic operation", val)
        self.report.atomic(ptr.data, _lanes(mask), _size(ptr))
        return super().create_atomic_rmw(op, ptr, val, mask, *args, **kwargs)

    def create_atomic_cas(self, ptr, *args, **kwargs):
        self.report.atomic(ptr.data, None, _size(ptr))
        return super().create_atomic_cas(ptr, *args, **kwargs)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        """As tensor cores do: exact products of the operands, sums in `d`'s dtype."""
        _refuse_bf16("the accumulator of a dot", d)
        *batch, rows, inner = a.data.shape
        flops = 2 * math.prod(batch) * rows * inner * b.data.shape[-1]
        self.report.dot(flops)
        if _is_bf16(a):
            a = TensorHandle(bf16_to_f32(a.data), tl.float32)
            b = TensorHandle(bf16_to_f32(b.data), tl.float32)
        elif a.data.dtype == np.float32 and "TF32" in str(input_precision):
            return self._tf32_dot(a, b, d, is_triple="x3" in str(input_precision))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)

    def _tf32_dot(self, a, b, d, is_triple: bool):
        rounding = self.report.tf32
        if rounding is None:
            return super().create_dot(a, b, d, None, 0)
        x, y = to_tf32(a.data, rounding), to_tf32(b.data, rounding)
        total = d.data
        if is_triple:  # each operand in two parts, without the product of the small
            total = total + to_tf32(a.data - x, rounding) @ y
            total = total + x @ to_tf32(b.data - y, rounding)
        return TensorHandle(x @ y + total, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        """With bfloat16 by value; the interpreter truncates, or converts the bits."""
        target = dst_type.scalar
        if _is_bf16(src) and target != tl.bfloat16:
            src = TensorHandle(bf16_to_f32(src.data), tl.float32)
            return src if target == tl.float32 else super().cast_impl(src, dst_type)
        if target == tl.bfloat16 and not _is_bf16(src):
            if src.dtype.scalar != tl.float32:
                src = super().cast_impl(src, tl.float32)
            return TensorHandle(f32_to_bf16(src.data), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def _refuse(self, what: str, *values: Any) -> None:
        if self.report.strict_bf16:
            _refuse_bf16(what, *values)

    def binary_op(self, lhs, rhs, op):
        self._refuse(op.__name__, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):
        self._refuse(op.__name__, arg)
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        self._refuse("fma", x, y, z)
        return super().create_fma(x, y, z)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        self._refuse("clamp", arg, lo, hi)
        return super().create_clampf(arg, lo, hi, propagate_nans)


class CheckedReduce(interpreter.ReduceOps):
    """Reductions; a bfloat16 one would add up bit patterns."""

    def apply_impl(self, input):
        _refuse_bf16("a reduction", *(value.handle for value in input))
        return super().apply_impl(input)


class CheckedScan(interpreter.ScanOps):
    """Scans; a bfloat16 one would add up bit patterns."""

    def apply_impl(self, input):
        _refuse_bf16("a scan", *(value.handle for value in input))
        return super().apply_impl(input)


def _tensors(argument: Any) -> list[Tensor]:
    """The tensors in an argument of a kernel."""
    if hasattr(argument, "data_ptr"):
        return [interpreter._unwrap_tensor(argument)]
    if isinstance(argument, (tuple, list)):
        return [t for part in argument for t in _tensors(part)]
    if hasattr(argument, "block_shape"):
        return _tensors(argument.base)
    return []


def _only_where_running(function: Callable, builder: CheckedBuilder) -> Callable:
    """A kernel that does nothing in the programs that are left out."""

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        if builder.is_running:
            function(**arguments)

    run.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return run


class CheckedExecutor(interpreter.GridExecutor):
    """A launch: tells the report its tensors, and raises what a check found."""

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        tensors = _tensors([*args, *kwargs.values()])
        self._report.begin(self.fn.__name__, tensors)
        return args, kwargs

    @property
    def _report(self) -> Report:
        return interpreter.interpreter_builder.report

    def __call__(self, *args_dev, **kwargs):
        builder = interpreter.interpreter_builder
        if self._report.sample:
            self.fn = _only_where_running(self.fn, builder)
        try:
            with np.errstate(all="ignore"):  # infinities are no news to a GPU
                super().__call__(*args_dev, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, CheckError):
                cause = cause.__cause__
            raise cause or error from error
        self._report.end(builder.grid_dim)
