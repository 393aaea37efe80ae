"""The native ways to convolution statistics, and which one a call takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .._arguments import SUFFIX, accumulated
from ..conv_geometry import ConvGeometry
from ..cost.conv import is_apart_faster, prefers_gram

__all__ = [
    "direct_sq_norms",
    "fastest_sq_norms",
    "fused",
    "gram_sq_norms",
    "second_moment",
    "tile_gradient",
]


@lru_cache(maxsize=1024)
def _sizes(
    rows: tuple[int, ...],
    image: tuple[int, ...],
    geometry: ConvGeometry,
    rows_last: bool = False,
    image_last: bool = False,
) -> tuple[int, ...]:
    """The ConvSizes of csrc/cpu/conv.h: missing leading axes have size 1."""
    missing = 3 - len(geometry.kernel_size)
    ones, zeros = (1,) * missing, (0,) * missing
    return (
        *(rows[0], rows[1], image[1], geometry.groups, int(geometry.transposed)),
        *(int(rows_last), int(image_last)),
        *(*ones, *image[2:], *ones, *rows[2:]),
        *(*ones, *geometry.kernel_size, *ones, *geometry.stride),
        *(*zeros, *geometry.padding, *ones, *geometry.dilation),
    )


def _norms(way: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def run(
        kernels: Any, x: Tensor, g: Tensor, geometry: ConvGeometry, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, image = geometry.roles(x.contiguous(), g.to(x.dtype).contiguous())
        weight = x.new_zeros(len(x))
        bias = x.new_zeros(len(x)) if with_bias else None
        if rows.numel():
            getattr(kernels, f"conv_{way}_{SUFFIX[x.dtype]}")(
                *(rows.data_ptr(), image.data_ptr()),
                _sizes(rows.shape, image.shape, geometry),
                *(weight.data_ptr(), 0 if bias is None else bias.data_ptr()),
                _native.threads(),
            )
        return weight, bias

    run.__name__ = f"{way}_sq_norms"
    return run


direct_sq_norms = _norms("direct")
gram_sq_norms = _norms("gram")


def fastest_sq_norms(
    kernels: Any, x: Tensor, g: Tensor, geometry: ConvGeometry, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The way that should be faster for these sizes."""
    rows, image = geometry.roles(x, g)
    gram = prefers_gram(rows.shape, image.shape, geometry)
    way = gram_sq_norms if gram else direct_sq_norms
    return way(kernels, x, g, geometry, with_bias)


def second_moment(kernels: Any, x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Sum over the samples of the squared weight gradient, tile by tile."""
    rows, image = geometry.roles(x.contiguous(), g.to(x.dtype).contiguous())
    total = x.new_zeros(geometry.weight_shape(x, g))
    if rows.numel():
        getattr(kernels, f"conv_second_moment_{SUFFIX[x.dtype]}")(
            *(rows.data_ptr(), image.data_ptr()),
            _sizes(rows.shape, image.shape, geometry),
            *(total.data_ptr(), _native.threads()),
        )
    return total


def _packed(x: Tensor) -> tuple[Tensor, bool]:
    """Without gaps, and whether its channels are the last axis."""
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


def tile_gradient(
    kernels: Any,
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    with_norms: bool,
    with_second_moment: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The weight gradient and, on request, what is per sample, from the same tiles."""
    rows, image = geometry.roles(x, g.to(x.dtype))
    rows, rows_last = _packed(rows)
    image, image_last = _packed(image)
    grad = x.new_empty(geometry.weight_shape(x, g))
    norms = x.new_empty(len(x)) if with_norms else None
    bias = x.new_empty(g.shape[:2]) if with_bias else None
    moment = torch.empty_like(grad) if with_second_moment else None
    results = (grad, norms, bias, moment)
    if rows.numel() == 0:
        for result in results:
            _ = result if result is None else result.zero_()
    else:
        getattr(kernels, f"conv_fused_{SUFFIX[x.dtype]}")(
            *(rows.data_ptr(), image.data_ptr()),
            _sizes(rows.shape, image.shape, geometry, rows_last, image_last),
            *(0 if r is None else r.data_ptr() for r in results),
            _native.threads(),
        )
    return results


def fused(
    kernels: Any,
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    with_second_moment: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `fastminima.ops.conv.conv_fused`, the way that should be fastest.

    Per-sample results cost an update for each element of each sample's gradient, next
    to its product over the positions. Where there are few positions, norms by the Gram
    way and second moments by their own kernel are the cheaper ones.
    """
    x, g = accumulated(x, g)
    rows, image = geometry.roles(x, g)
    apart = is_apart_faster(rows.shape, image.shape, geometry, with_second_moment)
    grad, norms, bias, moment = tile_gradient(
        *(kernels, x, g, geometry, with_bias),
        *(not apart, with_second_moment and not apart),
    )
    if apart and with_second_moment:
        moment = second_moment(kernels, x, g, geometry)
    if norms is None:
        norms, _ = fastest_sq_norms(kernels, x, g, geometry, False)
    return grad, norms, bias, moment
