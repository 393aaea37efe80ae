"""Per-sample statistics of a convolution's weight gradient, by Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._pieces import in_pieces
from ..conv_geometry import ConvGeometry
from .broadcast import sum_over_space
from .conv_cost import (
    GramTile,
    direct_tile,
    fastest_gram,
    is_depthwise,
    tile_as_it_lies,
)
from .conv_depthwise import depthwise_products
from .conv_direct import products
from .conv_gram import gram_sums
from .conv_settled import settled
from .conv_sizes import Operands, operands
from .totals import sample_sq_norms

__all__ = ["conv_fused", "conv_second_moment", "conv_sq_norms"]


def _bias_gradients(g: Tensor) -> Tensor:
    """Each sample's bias gradient, [batch, c_out]."""
    return sum_over_space(g.flatten(2))


def conv_sq_norms(
    x: Tensor, g: Tensor, geometry: ConvGeometry, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Squared norm of each sample's weight gradient, and of its bias's if asked for."""
    return _in_pieces(_sq_norms, x, g, geometry, with_bias)


def _in_pieces(run: Callable[..., Any], x: Tensor, g: Tensor, *options: Any) -> Any:
    """On some samples at a time, if all had to be copied to have channels last.

    A third of the limit, as there are Gram matrices of images beside those copies.
    """
    size = torch.promote_types(x.dtype, g.dtype).itemsize
    each = (x[:1].numel() + g[:1].numel()) * size
    sums = (0, 3) if run is _fused else (0,) if run is _second_moment else ()

    def some(rows: slice) -> Any:
        return run(x[rows], g[rows], *options)

    return in_pieces(some, len(g), each, 3, sums)


def _sq_norms(
    x: Tensor, g: Tensor, geometry: ConvGeometry, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    bias = sample_sq_norms(_bias_gradients(g)) if with_bias else None
    of = operands(x, g, geometry)
    if not of.rows.numel() or not of.image.numel():
        return g.new_zeros(len(g), dtype=torch.float32), bias
    gram = fastest_gram(of)
    return direct_norms(of) if gram is None else gram_norms(of, gram), bias


def _products(
    of: Operands,
    *,
    norms: bool = False,
    grad: bool = False,
    moment: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By the kernel for depth-wise convolutions, or the one for all others."""
    if is_depthwise(of.sizes):
        return depthwise_products(of, norms=norms, grad=grad, moment=moment)
    packed, tile = direct_tile(of, outputs=grad + moment)
    return products(packed, tile, norms=norms, grad=grad, moment=moment)


def direct_norms(of: Operands) -> Tensor:
    """From the gradients themselves."""
    norms, _, _ = _products(of, norms=True)
    return norms


def gram_norms(of: Operands, tile: GramTile) -> Tensor:
    """From Gram matrices, and directly where rounding errors may be larger than 1e-4.

    What lies as the Gram kernels want it is left so for the few samples, if any, whose
    gradients are made.
    """
    of = of.packed(*tile.requests(of.sizes))
    return settled(of, gram_sums(of, tile), tile_as_it_lies(of, outputs=0))


def conv_second_moment(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Sum over the samples of the squared weight gradient, shaped like the weight."""
    return _in_pieces(_second_moment, x, g, geometry)


def _second_moment(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    of = operands(x, g, geometry)
    shape = geometry.weight_shape(x, g)
    if not of.rows.numel() or not of.image.numel():
        return g.new_zeros(shape, dtype=torch.float32)
    _, _, moment = _products(of, moment=True)
    return moment.reshape(shape)


def conv_fused(
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    with_second_moment: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weight gradient, squared norms, bias gradients, second moment, in one pass."""
    return _in_pieces(_fused, x, g, geometry, with_bias, with_second_moment)


def _fused(
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    with_second_moment: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    bias = _bias_gradients(g) if with_bias else None
    of = operands(x, g, geometry)
    shape = geometry.weight_shape(x, g)
    if not of.rows.numel() or not of.image.numel():
        zeros = g.new_zeros(shape, dtype=torch.float32)
        moment = torch.zeros_like(zeros) if with_second_moment else None
        return zeros, g.new_zeros(len(g), dtype=torch.float32), bias, moment
    norms, grad, moment = _products(
        of, norms=True, grad=True, moment=with_second_moment
    )
    moment = moment.reshape(shape) if moment is not None else None
    return grad.reshape(shape), norms, bias, moment
