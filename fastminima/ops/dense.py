"""Per-sample statistics of the gradient of a dense layer's weight.

Sample n's gradient is sum_t g[n, t] (outer) a[n, t]: `a` the inputs of the layer, `g` the
gradient of its outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _native
from .._dtypes import accumulation_dtype
from .table import Op

__all__ = ["row_sq_norms"]

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def _row_sq_norms(
    a: Float[Tensor, "batch d_in"], g: Float[Tensor, "batch d_out"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Squared norms |a_n|^2 |g_n|^2 of weight and |g_n|^2 of bias, one row a sample."""
    dtype = accumulation_dtype(g.dtype)
    bias = g.to(dtype).square().sum(dim=1)
    return a.to(dtype).square().sum(dim=1) * bias, bias


def _row_sq_norms_native(
    kernels: Any, a: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    a = a if a.stride(1) == 1 else a.contiguous()
    g = g if g.stride(1) == 1 else g.contiguous()
    weight, bias = g.new_empty(2, len(g)).unbind()
    getattr(kernels, f"row_sq_norms_{_SUFFIX[g.dtype]}")(
        *(a.data_ptr(), a.stride(0), g.data_ptr(), g.stride(0)),
        *(len(g), a.shape[1], g.shape[1], weight.data_ptr(), bias.data_ptr()),
        _native.threads(),
    )
    return weight, bias


row_sq_norms = Op("row_sq_norms", _row_sq_norms)
row_sq_norms.add_native(_row_sq_norms_native)
