"""Per-sample statistics of the gradient of a convolution's weight.

`x` is the input of the convolution and `g` the gradient of its output; sample n's
weight gradient is the one of `x[n]` and `g[n]` alone. A ConvGeometry says the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from . import conv_native
from ._arguments import FLOATS, TRITON
from .conv_geometry import ConvGeometry, patches
from .table import Op

__all__ = [
    "ConvGeometry",
    "conv_dots",
    "conv_fused",
    "conv_gradients",
    "conv_gram",
    "conv_second_moment",
    "conv_sq_norms",
]

# Elements that the reference holds at once: 64 MiB in float32.
_BLOCK = 1 << 24


def _gradients(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
) -> Tensor:
    """Weight gradient of each sample, [batch, *weight.shape]."""
    dtype = accumulation_dtype(g.dtype)
    rows, image = geometry.roles(x, g)
    batch, groups = len(rows), geometry.groups
    shape = geometry.weight_shape(x, g)
    length = rows[0:1, 0:1].numel() if batch else 0
    columns = patches(image.to(dtype), geometry, tuple(rows.shape[2:]))
    columns = columns.reshape(batch * groups, shape[1] * geometry.kernel_numel, length)
    rows = rows.to(dtype).reshape(batch * groups, shape[0] // groups, length)
    return torch.bmm(rows, columns.mT).reshape(batch, *shape)


def _sq_norms(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
    with_bias: bool,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
    """Squared norm of each sample's weight gradient, and of its bias's if asked for."""
    weight = g.new_zeros(len(g), dtype=accumulation_dtype(g.dtype))
    for block in _blocks(x, g, geometry):
        grads = _gradients(x[block], g[block], geometry)
        weight[block] = grads.flatten(1).square().sum(dim=1)
    return weight, _bias_sq_norms(g) if with_bias else None


def _bias_sq_norms(g: Float[Tensor, "batch c_out *space_out"]) -> Tensor:
    grads = g.sum(dim=tuple(range(2, g.dim())), dtype=accumulation_dtype(g.dtype))
    return grads.square().sum(dim=1)


def _second_moment(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
) -> Tensor:
    """Sum over the samples of the squared weight gradient, shaped like the weight."""
    dtype = accumulation_dtype(g.dtype)
    total = g.new_zeros(geometry.weight_shape(x, g), dtype=dtype)
    for block in _blocks(x, g, geometry):
        total += _gradients(x[block], g[block], geometry).square_().sum(dim=0)
    return total


def _fused(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
    with_bias: bool,
    with_second_moment: bool,
) -> tuple[
    Tensor,
    Float[Tensor, " batch"],
    Float[Tensor, "batch c_out"] | None,
    Tensor | None,
]:
    """The batch's weight gradient together with the statistics of its samples.

    In this order: the gradient of the weight; the squared norm of each sample's part of
    it; each sample's bias gradient, if asked for; and, if asked for, the sum over the
    samples of the squared weight gradient, shaped like the weight.
    """
    dtype = accumulation_dtype(g.dtype)
    grad = g.new_zeros(geometry.weight_shape(x, g), dtype=dtype)
    moment = torch.zeros_like(grad) if with_second_moment else None
    norms = g.new_zeros(len(g), dtype=dtype)
    for block in _blocks(x, g, geometry):
        grads = _gradients(x[block], g[block], geometry)
        grad += grads.sum(dim=0)
        squares = grads.square_()
        norms[block] = squares.flatten(1).sum(dim=1)
        if moment is not None:
            moment += squares.sum(dim=0)
    bias = g.sum(dim=tuple(range(2, g.dim())), dtype=dtype) if with_bias else None
    return grad, norms, bias, moment


def _gram(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
) -> Float[Tensor, "batch batch"]:
    """Products <dW_n, dW_m> between the weight gradients of every two samples."""
    blocks = list(_blocks(x, g, geometry))
    gram = g.new_zeros(len(g), len(g), dtype=accumulation_dtype(g.dtype))
    for i, left in enumerate(blocks):
        grads = _gradients(x[left], g[left], geometry).flatten(1)
        gram[left, left] = grads @ grads.T
        for right in blocks[:i]:
            others = _gradients(x[right], g[right], geometry).flatten(1)
            gram[left, right] = grads @ others.T
            gram[right, left] = gram[left, right].T
    return gram


def _dots(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
    v: Tensor,
) -> Float[Tensor, " batch"]:
    """Products <dW_n, v>: the output that the weight `v` would give, times `g`."""
    dtype = accumulation_dtype(g.dtype)
    output = torch.convolution(
        *(x.to(dtype), v.to(dtype), None, geometry.stride, geometry.padding),
        *(geometry.dilation, geometry.transposed),
        geometry.output_padding or (0,) * len(geometry.stride),
        geometry.groups,
    )
    return (output * g).flatten(1).sum(dim=1)


def _blocks(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Iterator[slice]:
    """Slices of samples whose patches and gradients together stay below _BLOCK."""
    rows, image = geometry.roles(x, g)
    weight = torch.Size(geometry.weight_shape(x, g)).numel()
    length = rows[0].numel() // rows.shape[1] if len(rows) else 0
    sample = weight + image.shape[1] * geometry.kernel_numel * length
    size = max(1, _BLOCK // max(1, sample))
    return (slice(i, i + size) for i in range(0, len(g), size))


conv_gradients = Op("conv_gradients", _gradients)
conv_sq_norms = Op("conv_sq_norms", _sq_norms)
conv_sq_norms.add_native(conv_native.fastest_sq_norms)
conv_sq_norms.add_triton("conv.conv_sq_norms", dtypes=TRITON)
conv_second_moment = Op("conv_second_moment", _second_moment)
conv_second_moment.add_native(conv_native.second_moment)
conv_second_moment.add_triton("conv.conv_second_moment", dtypes=TRITON)
conv_fused = Op("conv_fused", _fused)
conv_fused.add_native(conv_native.fused, dtypes=FLOATS)
conv_fused.add_triton("conv.conv_fused", dtypes=TRITON)
conv_gram = Op("conv_gram", _gram)
conv_dots = Op("conv_dots", _dots)
