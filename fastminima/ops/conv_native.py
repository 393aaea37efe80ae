"""The native ways to convolution statistics, and which one a call takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .conv_geometry import ConvGeometry

__all__ = ["direct_sq_norms", "fastest_sq_norms", "fused", "gram_sq_norms", "second_moment"]

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}

# Gram matrices of more positions than this would not fit the L2 cache.
_GRAM_POSITIONS = 576


@lru_cache(maxsize=1024)
def _sizes(
    rows: tuple[int, ...], image: tuple[int, ...], geometry: ConvGeometry
) -> tuple[int, ...]:
    """The ConvSizes of csrc/cpu/conv.h: missing leading axes have size 1."""
    missing = 3 - len(geometry.kernel_size)
    ones, zeros = (1,) * missing, (0,) * missing
    return (
        *(rows[0], rows[1], image[1], geometry.groups, int(geometry.transposed)),
        *(*ones, *image[2:], *ones, *rows[2:]),
        *(*ones, *geometry.kernel_size, *ones, *geometry.stride),
        *(*zeros, *geometry.padding, *ones, *geometry.dilation),
    )


def _half(n: int) -> int:
    """Pairs that the lower half of a Gram matrix of n positions computes."""
    blocks = -(-n // 16)
    return blocks * (blocks + 1) * 128


@lru_cache(maxsize=1024)
def _prefers_gram(
    rows: tuple[int, ...], image: tuple[int, ...], geometry: ConvGeometry
) -> bool:
    """Whether the Gram way is expected to be the faster one.

    Both are counted in multiply-adds, which either does at 85 a nanosecond (AVX-512,
    one core), in 8 by 16 tiles. A shifted sum of the Gram way goes at 20 a nanosecond.
    """
    length, pixels = math.prod(rows[2:]), math.prod(image[2:])
    unfolds = math.prod(geometry.stride) > 1
    if max(length, 0 if unfolds else pixels) > _GRAM_POSITIONS:
        return False
    taps = geometry.kernel_numel
    channels, height = (
        image[1] // geometry.groups,
        -(-rows[1] // geometry.groups // 8) * 8,
    )
    run = geometry.kernel_size[-1] * channels
    direct = length * height * -(-run // 16) * 16 * (taps // geometry.kernel_size[-1])
    if unfolds:
        gram = _half(length) * (rows[1] // geometry.groups + channels * taps + 4)
    else:
        gram = _half(length) * (rows[1] // geometry.groups + 4 * taps)
        gram += _half(pixels) * channels
    return gram < direct


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


def gradient(
    kernels: Any,
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    with_norms: bool,
    with_second_moment: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The weight gradient and, on request, what is per sample, from the same tiles."""
    rows, image = geometry.roles(x.contiguous(), g.to(x.dtype).contiguous())
    grad = x.new_zeros(geometry.weight_shape(x, g))
    norms = x.new_zeros(len(x)) if with_norms else None
    bias = x.new_zeros(g.shape[:2]) if with_bias else None
    moment = torch.zeros_like(grad) if with_second_moment else None
    if rows.numel():
        getattr(kernels, f"conv_fused_{_SUFFIX[x.dtype]}")(
            *(rows.data_ptr(), image.data_ptr()),
            _sizes(rows.shape, image.shape, geometry),
            *(0 if t is None else t.data_ptr() for t in (grad, norms, bias, moment)),
            _native.threads(),
        )
    return grad, norms, bias, moment


def fused(
    kernels: Any,
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    with_second_moment: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return gradient(kernels, x, g, geometry, with_bias, True, with_second_moment)


def fgram(kernels, x, g, geometry, with_bias, with_second_moment):
    grad = gradient(kernels, x, g, geometry, with_bias, False, False)
    return grad[0], gram_sq_norms(kernels, x, g, geometry, False)[0], grad[2], None


def plain(kernels, x, g, geometry, with_bias, with_second_moment):
    return gradient(kernels, x, g, geometry, with_bias, False, False)
