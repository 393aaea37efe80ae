"""Calls of the native kernels for embedding tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _native
from .._arguments import SUFFIX, accumulated_rows

__all__ = ["embedding_sq_norms"]


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
