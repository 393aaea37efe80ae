"""Calls of the native kernels for dense weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _native
from .._arguments import SUFFIX, accumulated, accumulated_rows
from ..cost.dense import choose, guard

__all__ = [
    "direct_sq_norms",
    "gram_sq_norms",
    "part_of_rows",
    "row_sq_norms",
    "row_sums",
    "sequence_fused",
    "sequence_second_moment",
    "sequence_sq_norms",
]

# Bytes of a gradient that stay in the caches while samples are added to it, and rows of
# it that a block has at least, since the inputs are read anew for each.
_BLOCK, _ROWS = 1 << 20, 512


def _numbers(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    a, g = accumulated_rows(a, g)
    numbers = (
        *(a.data_ptr(), a.stride(0), a.stride(1)),
        *(g.data_ptr(), g.stride(0), g.stride(1)),
        *(*g.shape[:2], a.shape[2], g.shape[2]),
    )
    return a, g, numbers  # the tensors must outlive the call


def row_sq_norms(kernels: Any, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastminima.ops.dense.row_sq_norms`."""
    a, g = accumulated_rows(a, g)
    weight, bias = g.new_empty(2, len(g)).unbind()
    getattr(kernels, f"row_sq_norms_{SUFFIX[g.dtype]}")(
        *(a.data_ptr(), a.stride(0), g.data_ptr(), g.stride(0)),
        *(len(g), a.shape[1], g.shape[1], weight.data_ptr(), bias.data_ptr()),
        _native.threads(),
    )
    return weight, bias


def _sequence(
    kernels: Any, a: Tensor, g: Tensor, share: float | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """By the Gram sum, or directly where `share` is None."""
    a, g, numbers = _numbers(a, g)
    weight, bias = g.new_empty(2, len(g)).unbind()
    getattr(kernels, f"sequence_sq_norms_{SUFFIX[g.dtype]}")(
        *(numbers, -1.0 if share is None else share, weight.data_ptr()),
        *(bias.data_ptr() if with_bias else 0, _native.threads()),
    )
    return weight, bias if with_bias else None


def sequence_sq_norms(
    kernels: Any, a: Tensor, g: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """See `fastminima.ops.dense.sequence_sq_norms`."""
    _, time, d_in = a.shape
    d_out = g.shape[2]
    way = choose(time, d_in, d_out)
    if way == "rows":
        weight, bias = row_sq_norms(kernels, a[:, 0], g[:, 0])
        return weight, bias if with_bias else None
    dtype = accumulated(a[:0], g[:0])[0].dtype
    share = guard(d_in, d_out, dtype) if way == "gram" else None
    return _sequence(kernels, a, g, share, with_bias)


def gram_sq_norms(kernels: Any, a: Tensor, g: Tensor) -> Tensor:
    """See `fastminima.ops.dense.gram_sq_norms`."""
    return _sequence(kernels, a, g, 0.0, False)[0]


def direct_sq_norms(kernels: Any, a: Tensor, g: Tensor) -> Tensor:
    """See `fastminima.ops.dense.direct_sq_norms`."""
    return _sequence(kernels, a, g, None, False)[0]


def sequence_second_moment(kernels: Any, a: Tensor, g: Tensor) -> Tensor:
    """See `fastminima.ops.dense.sequence_second_moment`."""
    if g.shape[1] == 1:
        return _row_second_moment(kernels, a[:, 0], g[:, 0])
    a, g, numbers = _numbers(a, g)
    total = g.new_empty(g.shape[2], a.shape[2])
    getattr(kernels, f"sequence_second_moment_{SUFFIX[g.dtype]}")(
        numbers, total.data_ptr(), _native.threads()
    )
    return total


def row_sums(kernels: Any, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and second moment of a weight, one row a sample."""
    a, g = accumulated_rows(a, g)
    grad, moment = (g.new_empty(g.shape[1], a.shape[1]) for _ in range(2))
    _row_sums(kernels, a, g, grad.data_ptr(), moment.data_ptr())
    return grad, moment


def _row_second_moment(kernels: Any, a: Tensor, g: Tensor) -> Tensor:
    a, g = accumulated_rows(a, g)
    moment = g.new_empty(g.shape[1], a.shape[1])
    _row_sums(kernels, a, g, 0, moment.data_ptr())
    return moment


def _row_sums(kernels: Any, a: Tensor, g: Tensor, grad: int, moment: int) -> None:
    """Into what has these addresses; the first may be 0, for nothing."""
    getattr(kernels, f"row_sums_{SUFFIX[g.dtype]}")(
        *(a.data_ptr(), a.stride(0), g.data_ptr(), g.stride(0)),
        *(len(g), a.shape[1], g.shape[1], grad, moment, _native.threads()),
    )


def part_of_rows(d_out: int, d_in: int, itemsize: int) -> int:
    """How many rows of a gradient are made at a time; 0 for all of them."""
    rows = max(_ROWS, _BLOCK // max(1, d_in * itemsize))
    return 0 if d_out < 2 * rows else rows


def sequence_fused(
    kernels: Any, a: Tensor, g: Tensor, with_bias: bool, with_second_moment: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `fastminima.ops.dense.sequence_fused`: all from the tiles of one product.

    Of a large gradient, such as that of a head over a vocabulary, some rows at a time:
    the kernel goes over them once for each sample.
    """
    batch, d_out = len(g), g.shape[2]
    rows = part_of_rows(d_out, a.shape[2], a.itemsize)
    if not rows:
        return _fused(kernels, a, g, with_bias, with_second_moment)
    a, g = accumulated_rows(a, g)
    grad = g.new_empty(d_out, a.shape[2])
    bias = g.new_empty(batch, d_out) if with_bias else None
    moment = torch.empty_like(grad) if with_second_moment else None
    total = torch.zeros(batch, dtype=torch.float64, device=g.device)
    for lo in range(0, d_out, rows):
        some = slice(lo, lo + rows)
        part = _fused(
            *(kernels, a, g[:, :, some], with_bias, with_second_moment),
            grad[some],
            None if moment is None else moment[some],
        )
        total += part[1]
        if bias is not None and part[2] is not None:
            bias[:, some] = part[2]
    return grad, total.to(g.dtype), bias, moment


def _fused(
    kernels: Any,
    a: Tensor,
    g: Tensor,
    with_bias: bool,
    with_second_moment: bool,
    grad: Tensor | None = None,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All of it at once, into the gradient and second moment if they are given."""
    a, g, numbers = _numbers(a, g)
    if grad is None:
        grad = g.new_empty(g.shape[2], a.shape[2])
        moment = torch.empty_like(grad) if with_second_moment else None
    norms = g.new_empty(len(g))
    bias = g.new_empty(len(g), g.shape[2]) if with_bias else None
    getattr(kernels, f"sequence_fused_{SUFFIX[g.dtype]}")(
        *(numbers, grad.data_ptr(), norms.data_ptr()),
        *(0 if bias is None else bias.data_ptr(),),
        *(0 if moment is None else moment.data_ptr(), _native.threads()),
    )
    return grad, norms, bias, moment
