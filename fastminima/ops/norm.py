"""Per-sample gradients of the scale and shift of normalisation layers.

The layer computes weight * xhat + bias with xhat = (x - mean) * rstd; `g` is the
gradient of its outputs. Results leave in the accumulation dtype.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._arguments import FLOATS, TRITON, accumulated
from ._pieces import itemsize, limited, sums_over_time
from .native import norm as native
from .table import Op

__all__ = ["channel_norm_gradients", "layer_norm_gradients"]


def _layer_norm_gradients(
    g: Float[Tensor, "batch time features"],
    x: Float[Tensor, "batch time features"],
    mean: Float[Tensor, "batch time"] | None,
    rstd: Float[Tensor, "batch time"],
) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features"]]:
    """Each sample's gradients sum_t g * xhat of the scale and sum_t g of the shift.

    `mean` None stands for zero, as in RMSNorm.
    """
    dtype, size = _sizes(g, x)
    mean = None if mean is None else mean.to(dtype).unsqueeze(2)
    rstd = rstd.to(dtype).unsqueeze(2)
    weight, bias = sums_over_time(
        _affine, g, x, mean, rstd, bytes_each=g.shape[2] * size
    )
    return weight, bias


def _affine(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over time of g * xhat and of g."""
    g, x = accumulated(g, x)
    xhat = x * rstd if mean is None else (x - mean).mul_(rstd)
    return xhat.mul_(g).sum(dim=1), g.sum(dim=1)


def _sizes(g: Tensor, x: Tensor) -> tuple[torch.dtype, int]:
    """The accumulation dtype, and the bytes that `_affine` holds an element."""
    dtype = accumulation_dtype(torch.promote_types(g.dtype, x.dtype))
    copies = itemsize(g.dtype, dtype) + itemsize(x.dtype, dtype)
    return dtype, dtype.itemsize + copies


def _channel_norm_gradients(
    g: Float[Tensor, "batch channels space"],
    x: Float[Tensor, "batch channels space"],
    mean: Float[Tensor, "shared groups"],
    rstd: Float[Tensor, "shared groups"],
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]:
    """Each sample's gradients sum_s g * xhat of the scale and sum_s g of the shift.

    Statistics are those of `groups` groups of channels; shared is 1 (one set for the
    batch, as in BatchNorm) or batch (as in GroupNorm and InstanceNorm).
    """
    dtype, size = _sizes(g, x)
    each = x.shape[1] // max(1, mean.shape[1])
    g, x = g.transpose(1, 2), x.transpose(1, 2)
    mean, rstd = (
        t.to(dtype).repeat_interleave(each, dim=1).unsqueeze(1).expand(g.shape)
        for t in (mean, rstd)
    )
    weight, bias = sums_over_time(
        _affine, g, x, mean, rstd, bytes_each=g.shape[2] * size
    )
    return weight, bias


layer_norm_gradients = Op("layer_norm_gradients", _layer_norm_gradients)
channel_norm_gradients = Op("channel_norm_gradients", _channel_norm_gradients)
layer_norm_gradients.add_native(
    limited(native.layer_norm_gradients, _layer_norm_gradients), dtypes=FLOATS
)
channel_norm_gradients.add_native(
    limited(native.channel_norm_gradients, _channel_norm_gradients), dtypes=FLOATS
)
for _op in (layer_norm_gradients, channel_norm_gradients):
    _op.add_triton(f"norm.{_op.name}", dtypes=TRITON)
