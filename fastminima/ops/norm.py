"""Per-sample gradients of the scale and shift of normalisation layers.

The layer computes weight * xhat + bias with xhat = (x - mean) * rstd; `g` is the
gradient of its outputs. Results leave in the accumulation dtype.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
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
    dtype = accumulation_dtype(g.dtype)
    g, x = g.to(dtype), x.to(dtype)
    if mean is not None:
        x = x - mean.to(dtype).unsqueeze(2)
    x = x * rstd.to(dtype).unsqueeze(2)
    return (g * x).sum(dim=1), g.sum(dim=1)


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
    dtype = accumulation_dtype(g.dtype)
    g, x = g.to(dtype), x.to(dtype)
    size = x.shape[1] // mean.shape[1]
    mean = mean.to(dtype).repeat_interleave(size, dim=1).unsqueeze(2)
    rstd = rstd.to(dtype).repeat_interleave(size, dim=1).unsqueeze(2)
    return (g * ((x - mean) * rstd)).sum(dim=2), g.sum(dim=2)


layer_norm_gradients = Op("layer_norm_gradients", _layer_norm_gradients)
channel_norm_gradients = Op("channel_norm_gradients", _channel_norm_gradients)
