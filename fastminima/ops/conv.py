"""Per-sample statistics of the gradient of a convolution's weight.

`x` is the input of the convolution and `g` the gradient of its output; sample n's
weight gradient is the one of `x[n]` and `g[n]` alone. A ConvGeometry says the rest.
"""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from ._arguments import FLOATS, TRITON
from ._pieces import itemsize, limited, pieces, step_of
from .broadcast import sum_over_space
from .conv_geometry import ConvGeometry
from .conv_pieces import Images
from .native import conv as native
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


def _gradients(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
) -> Tensor:
    """Weight gradient of each sample, [batch, *weight.shape]."""
    of = Images(x, g, geometry)
    whole = list(of.channels())
    if len(whole) == 1 and len(of.samples(whole[0])) <= 1:
        return of.gradients(slice(0, of.batch), whole[0])
    out = of.zeros(of.batch, *of.shape)
    for samples, part, grads in of.gradient_pieces():
        out[samples, part] = grads
        del grads
    return out


def _sq_norms(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
    with_bias: bool,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
    """Squared norm of each sample's weight gradient, and of its bias's if asked for."""
    of = Images(x, g, geometry)
    weight = of.zeros(of.batch)
    for samples, _, grads in of.gradient_pieces():
        weight[samples] += grads.flatten(1).square_().sum(dim=1)
        del grads
    bias = sum_over_space(g.flatten(2)).square().sum(dim=1) if with_bias else None
    return weight, bias


def _second_moment(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
) -> Tensor:
    """Sum over the samples of the squared weight gradient, shaped like the weight."""
    of = Images(x, g, geometry)
    total = of.zeros(*of.shape)
    for _, part, grads in of.gradient_pieces():
        total[part] += grads.square_().sum(dim=0)
        del grads
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
    of = Images(x, g, geometry)
    grad, norms = of.zeros(*of.shape), of.zeros(of.batch)
    moment = torch.zeros_like(grad) if with_second_moment else None
    for samples, part, grads in of.gradient_pieces():
        grad[part] += grads.sum(dim=0)
        squares = grads.square_()
        norms[samples] += squares.flatten(1).sum(dim=1)
        if moment is not None:
            moment[part] += squares.sum(dim=0)
        del grads, squares
    return grad, norms, sum_over_space(g.flatten(2)) if with_bias else None, moment


def _gram(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
) -> Float[Tensor, "batch batch"]:
    """Products <dW_n, dW_m> between the weight gradients of every two samples."""
    of = Images(x, g, geometry)
    gram = of.zeros(of.batch, of.batch)
    # Few channels of the weight for all samples: with all channels for few, images
    # would be unfolded as often, and each gradient made for every pair of blocks.
    for part in of.channels(of.batch):
        blocks = of.samples(part, share=4)
        for i, left in enumerate(blocks):
            grads = of.gradients(left, part).flatten(1)
            gram[left, left] += grads @ grads.T
            for right in blocks[:i]:
                products = grads @ of.gradients(right, part).flatten(1).T
                gram[left, right] += products
                gram[right, left] += products.T
            del grads
    return gram


def _dots(
    x: Float[Tensor, "batch c_in *space"],
    g: Float[Tensor, "batch c_out *space_out"],
    geometry: ConvGeometry,
    v: Tensor,
) -> Float[Tensor, " batch"]:
    """Products <dW_n, v>: the output that the weight `v` would give, times `g`."""
    of = Images(x, g, geometry)
    dots = of.zeros(of.batch)
    size = of.dtype.itemsize
    each = g[:1].numel() * size + x[:1].numel() * itemsize(x.dtype, of.dtype)
    if max(each, v.numel() * itemsize(v.dtype, of.dtype)) > step_of(1):
        for samples, part, grads in of.gradient_pieces():
            dots[samples] += grads.flatten(1) @ v[part].to(of.dtype).flatten()
            del grads
        return dots
    v = v.to(of.dtype)
    for samples in pieces(of.batch, each):
        output = torch.convolution(
            *(x[samples].to(of.dtype), v, None, geometry.stride, geometry.padding),
            *(geometry.dilation, geometry.transposed),
            geometry.output_padding or (0,) * len(geometry.stride),
            geometry.groups,
        )
        dots[samples] = output.mul_(g[samples]).flatten(1).sum(dim=1)
        del output
    return dots


conv_gradients = Op("conv_gradients", _gradients)
conv_sq_norms = Op("conv_sq_norms", _sq_norms)
conv_sq_norms.add_native(native.fastest_sq_norms)
conv_sq_norms.add_triton("conv.conv_sq_norms", dtypes=TRITON)
conv_second_moment = Op("conv_second_moment", _second_moment)
conv_second_moment.add_native(native.second_moment)
conv_second_moment.add_triton("conv.conv_second_moment", dtypes=TRITON)
conv_fused = Op("conv_fused", _fused)
conv_fused.add_native(
    limited(
        *(native.fused, _fused, (0, 3)),
        elements=lambda x, g, geometry, *_: prod(geometry.weight_shape(x, g)),
    ),
    dtypes=FLOATS,
)
conv_fused.add_triton("conv.conv_fused", dtypes=TRITON)
conv_gram = Op("conv_gram", _gram)
conv_dots = Op("conv_dots", _dots)
