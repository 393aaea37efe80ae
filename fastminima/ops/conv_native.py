"""The native ways to convolution statistics, and which one a call takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._arguments import accumulated
from .conv_geometry import ConvGeometry

__all__ = [
    "direct_sq_norms",
    "fastest_sq_norms",
    "fused",
    "gram_sq_norms",
    "second_moment",
    "tile_gradient",
]

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}

# Gram matrices of more positions than this would not fit the L2 cache.
_GRAM_POSITIONS = 576
# Multiply-adds in whose time an element of a sample's gradient is squared and added to
# the sum over the samples. Fitted to times of W3's and W4's layers, float32, one thread
# (AMD EPYC 9004, AVX-512): 0.06 ns from 64 positions down to 4.
_UPDATE = 5
# Up to here, second moments take longer from the tiles of the gradient than apart: with
# 4 positions (512 to 512 channels) 1.7 times as long, with 16 0.8 times.
_FEW_POSITIONS = 8


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


def _half(n: int) -> int:
    """Pairs that the lower half of a Gram matrix of n positions computes."""
    blocks = -(-n // 16)
    return blocks * (blocks + 1) * 128


def _costs(
    rows: tuple[int, ...], image: tuple[int, ...], geometry: ConvGeometry
) -> tuple[float, float]:
    """Multiply-adds of the Gram way, infinite if it is not open, and of the direct one.

    Either does 85 a nanosecond (AVX-512, one core), in 8 by 16 tiles. A shifted sum of
    the Gram way goes at 20 a nanosecond.
    """
    length, pixels = math.prod(rows[2:]), math.prod(image[2:])
    unfolds = math.prod(geometry.stride) > 1
    taps = geometry.kernel_numel
    channels, height = (
        image[1] // geometry.groups,
        -(-rows[1] // geometry.groups // 8) * 8,
    )
    run = geometry.kernel_size[-1] * channels
    direct = length * height * -(-run // 16) * 16 * (taps // geometry.kernel_size[-1])
    if max(length, 0 if unfolds else pixels) > _GRAM_POSITIONS:
        return math.inf, float(direct)
    if unfolds:
        gram = _half(length) * (rows[1] // geometry.groups + channels * taps + 4)
    else:
        gram = _half(length) * (rows[1] // geometry.groups + 4 * taps)
        gram += _half(pixels) * channels
    return float(gram), float(direct)


@lru_cache(maxsize=1024)
def _prefers_gram(
    rows: tuple[int, ...], image: tuple[int, ...], geometry: ConvGeometry
) -> bool:
    """Whether the Gram way to norms is expected to be faster than the direct one."""
    gram, direct = _costs(rows, image, geometry)
    return gram < direct


@lru_cache(maxsize=1024)
def _is_apart_faster(
    rows: tuple[int, ...],
    image: tuple[int, ...],
    geometry: ConvGeometry,
    with_second_moment: bool,
) -> bool:
    """Whether per-sample results are cheaper apart from the weight gradient."""
    gram, direct = _costs(rows, image, geometry)
    length = math.prod(rows[2:])
    if with_second_moment:
        return length <= _FEW_POSITIONS and gram < direct
    return gram < _UPDATE * direct / max(1, length)


def _norms(way: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def run(
        kernels: Any, x: Tensor, g: Tensor, geometry: ConvGeometry, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, image = geometry.roles(x.contiguous(), g.to(x.dtype).contiguous())
        weight = x.new_zeros(len(x))
        bias = x.new_zeros(len(x)) if with_bias else None
        if rows.numel():
            getattr(kernels, f"conv_{way}_{_SUFFIX[x.dtype]}")(
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
    gram = _prefers_gram(rows.shape, image.shape, geometry)
    way = gram_sq_norms if gram else direct_sq_norms
    return way(kernels, x, g, geometry, with_bias)


def second_moment(kernels: Any, x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Sum over the samples of the squared weight gradient, tile by tile."""
    rows, image = geometry.roles(x.contiguous(), g.to(x.dtype).contiguous())
    total = x.new_zeros(geometry.weight_shape(x, g))
    if rows.numel():
        getattr(kernels, f"conv_second_moment_{_SUFFIX[x.dtype]}")(
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
        getattr(kernels, f"conv_fused_{_SUFFIX[x.dtype]}")(
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
    apart = _is_apart_faster(rows.shape, image.shape, geometry, with_second_moment)
    grad, norms, bias, moment = tile_gradient(
        *(kernels, x, g, geometry, with_bias),
        *(not apart, with_second_moment and not apart),
    )
    if apart and with_second_moment:
        moment = second_moment(kernels, x, g, geometry)
    if norms is None:
        norms, _ = fastest_sq_norms(kernels, x, g, geometry, False)
    return grad, norms, bias, moment
