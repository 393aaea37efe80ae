"""Calls of the CUDA kernels over lists of tensors, each list in one launch per 96.

Lists that a launch cannot take, of several dtypes or with outputs that are not dense,
go to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._arguments import SUFFIX, addresses
from ._launch import alike, scratch, sizes, stream

__all__ = ["axpy", "dot", "sq_norm"]


def dot(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """See `fastminima.ops.multi.multi_dot`."""

    def run(kernels: Any, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        xs, ys = [x.contiguous() for x in xs], [y.contiguous() for y in ys]
        if not alike(xs, ys):
            return reference(xs, ys)
        counts, first, second = sizes(xs), addresses(xs), addresses(ys)
        blocks = kernels.multi_partials(counts.data_ptr(), len(xs))
        partials, result = scratch(blocks, xs[0]), scratch(1, xs[0])
        getattr(kernels, f"multi_dot_{SUFFIX[xs[0].dtype]}")(
            *(first.data_ptr(), second.data_ptr(), counts.data_ptr(), len(xs)),
            *(partials.data_ptr(), result.data_ptr(), stream(xs[0])),
        )
        return result[0]

    return run


def sq_norm(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """See `fastminima.ops.multi.multi_sq_norm`."""
    inner = dot(reference)

    def run(kernels: Any, xs: Sequence[Tensor]) -> Tensor:
        dense = [x.contiguous() for x in xs]
        return inner(kernels, dense, dense)

    return run


def axpy(reference: Callable[..., None]) -> Callable[..., None]:
    """See `fastminima.ops.multi.multi_axpy`."""

    def run(
        kernels: Any,
        ys: Sequence[Tensor],
        xs: Sequence[Tensor],
        factor: float | Tensor,
    ) -> None:
        xs = [x.contiguous() for x in xs]
        if not alike(ys, xs):
            return reference(ys, xs, factor)
        counts, read, written = sizes(ys), addresses(xs), addresses(ys)
        on_device = isinstance(factor, Tensor)
        return getattr(kernels, f"multi_axpy_{SUFFIX[ys[0].dtype]}")(
            *(read.data_ptr(), written.data_ptr(), counts.data_ptr(), len(ys)),
            *((0.0, factor.data_ptr()) if on_device else (factor, 0)),
            stream(ys[0]),
        )

    return run
