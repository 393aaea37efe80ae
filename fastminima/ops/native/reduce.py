"""Calls of the native kernels for norms of what is there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _native
from .._arguments import SUFFIX

__all__ = ["sample_sq_norms"]


def sample_sq_norms(kernels: Any, x: Tensor) -> Tensor:
    """See `fastminima.ops.reduce.sample_sq_norms`."""
    x = x.contiguous()
    norms = x.new_empty(len(x))
    getattr(kernels, f"sample_sq_norms_{SUFFIX[x.dtype]}")(
        *(x.data_ptr(), *x.shape, norms.data_ptr(), _native.threads())
    )
    return norms
