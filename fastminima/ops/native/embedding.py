"""Calls of the native kernels for embedding tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _native
from .._arguments import SUFFIX, accumulated_rows, contiguous_rows

__all__ = ["embedding_sq_norms", "tied_cross"]


def embedding_sq_norms(
    kernels: Any, ids: Tensor, g: Tensor, padding_idx: int
) -> Tensor:
    """See `fastminima.ops.embedding.embedding_sq_norms`."""
    (g,) = accumulated_rows(g)
    ids = ids.contiguous()
    norms = g.new_empty(len(g))
    getattr(kernels, f"embedding_sq_norms_{SUFFIX[g.dtype]}")(
        *(ids.data_ptr(), g.data_ptr(), g.stride(0), g.stride(1), padding_idx),
        *(*g.shape, norms.data_ptr(), _native.threads()),
    )
    return norms


def tied_cross(
    kernels: Any, ids: Tensor, ge: Tensor, padding_idx: int, a: Tensor, go: Tensor
) -> Tensor:
    """See `fastminima.ops.embedding.tied_cross`; all of one dtype that kernels read."""
    ge, a, go = map(contiguous_rows, (ge, a, go))
    ids = ids.contiguous()
    cross = ge.new_empty(len(ge))
    head = (
        *(a.data_ptr(), a.stride(0), a.stride(1)),
        *(go.data_ptr(), go.stride(0), go.stride(1)),
        *(*a.shape[:2], a.shape[2], go.shape[2]),
    )
    getattr(kernels, f"tied_cross_{SUFFIX[ge.dtype]}")(
        *(head, ids.data_ptr(), ge.data_ptr(), ge.stride(0), ge.stride(1)),
        *(padding_idx, ids.shape[1], cross.data_ptr(), _native.threads()),
    )
    return cross
