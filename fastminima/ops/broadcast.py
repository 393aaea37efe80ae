"""Per-sample gradients of biases and scales: sums over all but the sample.

Results leave in the accumulation dtype.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from .table import Op

__all__ = ["product_over_time", "sum_over_space", "sum_over_time"]


def _sum_over_time(
    g: Float[Tensor, "batch time features"],
) -> Float[Tensor, "batch features"]:
    """Each sample's bias gradient, sum_t g[n, t]."""
    return g.sum(dim=1, dtype=accumulation_dtype(g.dtype))


def _sum_over_space(
    g: Float[Tensor, "batch channels space"],
) -> Float[Tensor, "batch channels"]:
    """Each sample's gradient of a bias by channel, sum_s g[n, :, s]."""
    return g.sum(dim=2, dtype=accumulation_dtype(g.dtype))


def _product_over_time(
    g: Float[Tensor, "batch time features"], x: Float[Tensor, "batch time features"]
) -> Float[Tensor, "batch features"]:
    """Each sample's gradient of a scale, sum_t g[n, t] * x[n, t] elementwise."""
    dtype = accumulation_dtype(torch.promote_types(g.dtype, x.dtype))
    return (g.to(dtype) * x.to(dtype)).sum(dim=1)


sum_over_time = Op("sum_over_time", _sum_over_time)
sum_over_space = Op("sum_over_space", _sum_over_space)
product_over_time = Op("product_over_time", _product_over_time)
