"""Per-sample statistics of a convolution's weight gradient, by Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..conv_geometry import ConvGeometry
from ..dense_cost import guard
from .conv_cost import DirectTile, GramTile, direct_tile, fastest
from .conv_direct import products
from .conv_gram import gram_parts
from .conv_sizes import Operands, operands

__all__ = ["conv_fused", "conv_second_moment", "conv_sq_norms"]


def _bias_gradients(g: Tensor) -> Tensor:
    """Each sample's bias gradient, [batch, c_out]."""
    return g.sum(dim=tuple(range(2, g.dim())), dtype=torch.float32)


def conv_sq_norms(
    x: Tensor, g: Tensor, geometry: ConvGeometry, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Squared norm of each sample's weight gradient, and of its bias's if asked for."""
    bias = _bias_gradients(g).square().sum(dim=1) if with_bias else None
    of = operands(x, g, geometry)
    if not of.rows.numel() or not of.image.numel():
        return g.new_zeros(len(g), dtype=torch.float32), bias
    return _sq_norms(of, fastest(of.sizes, of.image.dtype)), bias


def _sq_norms(of: Operands, tile: DirectTile | GramTile) -> Tensor:
    """By the way whose tile is given; again by direct where a Gram sum is inaccurate.

    Which samples these are is known to the device only: the direct kernel is always
    launched, and ends at once for the others.
    """
    if isinstance(tile, DirectTile):
        norms, _, _ = products(of, tile, norms=True)
        return norms
    sizes = of.sizes
    total, diagonal = gram_parts(of, tile)
    share = guard(sizes.channels * sizes.taps, sizes.height, torch.float32)
    # Neither is a sum that is not a number.
    lost = ~(total >= share * diagonal)
    direct = direct_tile(sizes, of.image.dtype, outputs=0)
    again, _, _ = products(of, direct, norms=True, wanted=lost)
    return torch.where(lost, again, total)


def conv_second_moment(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Sum over the samples of the squared weight gradient, shaped like the weight."""
    of = operands(x, g, geometry)
    shape = geometry.weight_shape(x, g)
    if not of.rows.numel() or not of.image.numel():
        return g.new_zeros(shape, dtype=torch.float32)
    tile = direct_tile(of.sizes, of.image.dtype, outputs=1)
    _, _, moment = products(of, tile, moment=True)
    return moment.reshape(shape)


def conv_fused(
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    with_second_moment: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weight gradient, squared norms, bias gradients, second moment, in one pass."""
    bias = _bias_gradients(g) if with_bias else None
    of = operands(x, g, geometry)
    shape = geometry.weight_shape(x, g)
    if not of.rows.numel() or not of.image.numel():
        zeros = g.new_zeros(shape, dtype=torch.float32)
        moment = torch.zeros_like(zeros) if with_second_moment else None
        return zeros, g.new_zeros(len(g), dtype=torch.float32), bias, moment
    norms, grad, moment = products(of, norms=True, grad=True, moment=with_second_moment)
    moment = moment.reshape(shape) if moment is not None else None
    return grad.reshape(shape), norms, bias, moment
