"""Calls of the native kernels for sums over all but the sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _native
from .._arguments import SUFFIX, accumulated, accumulated_rows, contiguous_rows

__all__ = ["product_over_time", "sum_over_space", "sum_over_time"]


def _sum(kernels: Any, name: str, g: Tensor, out_width: int) -> Tensor:
    out = g.new_empty(len(g), out_width)
    getattr(kernels, f"{name}_{SUFFIX[g.dtype]}")(
        *(g.data_ptr(), g.stride(0), g.stride(1), *g.shape, out.data_ptr()),
        _native.threads(),
    )
    return out


def sum_over_time(kernels: Any, g: Tensor) -> Tensor:
    """See `fastminima.ops.broadcast.sum_over_time`."""
    (g,) = accumulated(g)
    if g.stride(2) != 1 and g.stride(1) == 1:
        return _sum(kernels, "sum_over_space", g.transpose(1, 2), g.shape[2])
    return _sum(kernels, "sum_over_time", contiguous_rows(g), g.shape[2])


def sum_over_space(kernels: Any, g: Tensor) -> Tensor:
    """See `fastminima.ops.broadcast.sum_over_space`."""
    return sum_over_time(kernels, g.transpose(1, 2))


def product_over_time(kernels: Any, g: Tensor, x: Tensor) -> Tensor:
    """See `fastminima.ops.broadcast.product_over_time`."""
    g, x = accumulated_rows(g, x)
    out = g.new_empty(len(g), g.shape[2])
    getattr(kernels, f"product_over_time_{SUFFIX[g.dtype]}")(
        *(g.data_ptr(), g.stride(0), g.stride(1)),
        *(x.data_ptr(), x.stride(0), x.stride(1), *g.shape, out.data_ptr()),
        _native.threads(),
    )
    return out
