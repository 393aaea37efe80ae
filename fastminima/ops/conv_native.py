"""The native ways to convolution statistics, and which one a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .conv_geometry import ConvGeometry

__all__ = ["direct_sq_norms", "fastest_sq_norms", "gram_sq_norms", "second_moment"]

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def _sizes(rows: Tensor, image: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """The ConvSizes of csrc/cpu/conv.h: missing leading axes have size 1."""
    missing = 3 - len(geometry.kernel_size)
    ones, zeros = (1,) * missing, (0,) * missing
    return (
        *(len(rows), rows.shape[1], image.shape[1], geometry.groups),
        int(geometry.transposed),
        *(*ones, *image.shape[2:], *ones, *rows.shape[2:]),
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
            getattr(kernels, f"conv_{way}_{_SUFFIX[x.dtype]}")(
                *(rows.data_ptr(), image.data_ptr(), _sizes(rows, image, geometry)),
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
    return direct_sq_norms(kernels, x, g, geometry, with_bias)


def second_moment(
    kernels: Any, x: Tensor, g: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Sum over the samples of the squared weight gradient, tile by tile."""
    rows, image = geometry.roles(x.contiguous(), g.to(x.dtype).contiguous())
    total = x.new_zeros(geometry.weight_shape(x, g))
    if rows.numel():
        getattr(kernels, f"conv_second_moment_{_SUFFIX[x.dtype]}")(
            *(rows.data_ptr(), image.data_ptr(), _sizes(rows, image, geometry)),
            *(total.data_ptr(), _native.threads()),
        )
    return total
