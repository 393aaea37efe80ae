"""Calls of the native kernels for scales and shifts of normalisation layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _native
from .._arguments import SUFFIX, accumulated_rows

__all__ = ["channel_norm_gradients", "layer_norm_gradients"]


def layer_norm_gradients(
    kernels: Any, g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """See `fastminima.ops.norm.layer_norm_gradients`."""
    g, x = accumulated_rows(g, x)
    rstd = rstd.to(g.dtype).contiguous()
    mean = None if mean is None else mean.to(g.dtype).contiguous()
    weight, bias = g.new_empty(2, len(g), g.shape[2]).unbind()
    getattr(kernels, f"layer_norm_gradients_{SUFFIX[g.dtype]}")(
        *(g.data_ptr(), g.stride(0), g.stride(1)),
        *(x.data_ptr(), x.stride(0), x.stride(1)),
        *(0 if mean is None else mean.data_ptr(), rstd.data_ptr(), *g.shape),
        *(weight.data_ptr(), bias.data_ptr(), _native.threads()),
    )
    return weight, bias


def channel_norm_gradients(
    kernels: Any, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """See `fastminima.ops.norm.channel_norm_gradients`."""
    g, x = accumulated_rows(g, x)
    mean, rstd = mean.to(g.dtype).contiguous(), rstd.to(g.dtype).contiguous()
    weight, bias = g.new_empty(2, *g.shape[:2]).unbind()
    getattr(kernels, f"channel_norm_gradients_{SUFFIX[g.dtype]}")(
        *(g.data_ptr(), g.stride(0), g.stride(1)),
        *(x.data_ptr(), x.stride(0), x.stride(1)),
        *(mean.data_ptr(), rstd.data_ptr(), *mean.shape, *g.shape),
        *(weight.data_ptr(), bias.data_ptr(), _native.threads()),
    )
    return weight, bias
