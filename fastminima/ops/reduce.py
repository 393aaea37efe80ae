"""Squared norms of one dense tensor, whole or sample by sample."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._arguments import FLOATS, TRITON
from ._pieces import dense_parts, pieces
from .native import multi as native
from .native import reduce as native_reduce
from .table import Op

__all__ = ["sample_sq_norms", "sq_norm"]


def _sq_norm(x: Float[Tensor, ...]) -> Float[Tensor, ""]:
    """Squared norm |x|^2 in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    parts = [
        part.to(dtype).square().sum()
        for (part,) in dense_parts(x, bytes_each=2 * dtype.itemsize)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _sample_sq_norms(x: Float[Tensor, "batch width"]) -> Float[Tensor, " batch"]:
    """Squared norms of samples' gradients that are there, in their own dtype.

    By sums of squares: `torch.linalg.vector_norm` adds up long float32 rows one by one
    on a CPU, and is off by 2e-3 at 3e6 elements.
    """
    parts = [
        x[:, some].square().sum(1)
        for some in pieces(max(1, x.shape[1]), max(1, len(x)) * x.itemsize)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


_SMALL = 4096  # PyTorch's two calls take 4 us here, a call of the kernel 5


def _sq_norm_native(kernels: Any, x: Tensor) -> Tensor:
    if x.numel() < _SMALL:
        return _sq_norm(x)
    total = native.sq_norm(kernels, [x])
    return total.to(accumulation_dtype(x.dtype))


sq_norm = Op("sq_norm", _sq_norm)
sq_norm.add_native(_sq_norm_native, dtypes=FLOATS)
sq_norm.add_triton("reduce.sq_norm", dtypes=TRITON)
sample_sq_norms = Op("sample_sq_norms", _sample_sq_norms)
sample_sq_norms.add_native(native_reduce.sample_sq_norms)
sample_sq_norms.add_triton("totals.sample_sq_norms", dtypes=(torch.float32,))
