"""What a convolution kernel is told of sizes, strides and geometry."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..conv_geometry import ConvGeometry
from .conv_copies import channels_last

__all__ = ["ConvSizes", "Operands", "operands"]

# Offsets within a sample are computed in 32 bits below this many elements.
_NARROW = 2**31

# Requests for an element from which on its tensor is copied to have channels last.
_OFTEN = 4


class ConvSizes(NamedTuple):
    """One call's sizes, three to each tuple: missing leading axes have size 1."""

    batch: int
    groups: int
    height: int  # rows of a group
    channels: int  # channels of the image of a group
    space: tuple[int, ...]  # of the image
    out: tuple[int, ...]  # positions of the rows
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    axes: int

    @property
    def taps(self) -> int:
        """Elements of the kernel."""
        return math.prod(self.kernel)

    @property
    def length(self) -> int:
        """Positions of the rows, summed over in each product."""
        return math.prod(self.out)

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.groups * self.height * self.channels * self.taps

    @property
    def phases(self) -> int:
        """Residues of pixels modulo the stride."""
        return math.prod(self.stride)

    @property
    def cells(self) -> tuple[int, ...]:
        """Size of a phase: the pixels of the image that have one residue."""
        return tuple(-(-n // s) for n, s in zip(self.space, self.stride, strict=True))

    @property
    def gram(self) -> int:
        """Elements of the Gram matrices of a sample's image, with their borders."""
        return self.groups * self.phases * (math.prod(self.cells) + 2) ** 2

    def constants(self) -> dict[str, object]:
        """The geometry, as the compile-time constants that all kernels share."""
        return {
            "KERNEL": self.kernel,
            "STRIDE": self.stride,
            "PADDING": self.padding,
            "DILATION": self.dilation,
            "AXES": self.axes,
        }


class Operands(NamedTuple):
    """The two factors of a weight gradient."""

    rows: Tensor  # [batch, groups * height, length]
    image: Tensor  # [batch, groups * channels, *space]
    sizes: ConvSizes

    def strides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of sample, row, position; of sample, channel, and three axes."""
        image = self.image.stride()
        return self.rows.stride(), (*image[:2], *(0,) * (5 - len(image)), *image[2:])

    def layout(self) -> dict[str, bool]:
        """How to load tiles, as compile-time constants.

        Which have positions, not channels, along their contiguous axis; and whether
        offsets within a sample need 64 bits.
        """
        (_, row, position), (_, channel, *_, pixel) = self.strides()
        return {
            "ROWS_BY_POSITION": position <= row,
            "IMAGE_BY_POSITION": pixel <= channel,
            "WIDE": max(_span(self.rows), _span(self.image)) >= _NARROW,
        }

    def samples(self, part: slice) -> Operands:
        """The same of some of the samples."""
        rows, image = self.rows[part], self.image[part]
        return Operands(rows, image, self.sizes._replace(batch=len(rows)))

    def packed(self, rows_requests: int, image_requests: int) -> Operands:
        """With channels last, where a kernel asks often enough for each element.

        Then a lane loads 16 bytes, and asynchronously. Positions last, lines are seldom
        a multiple of 16 bytes, and tiles of halves are loaded one by one: 491 instead
        of 117 instructions in a Gram kernel's loop on sm_90. From four requests on that
        is worth the copy.
        """
        rows, image = self.rows, self.image
        if rows_requests >= _OFTEN and self.sizes.height >= 32:
            rows = _channels_last(rows)
        if image_requests >= _OFTEN and self.sizes.channels >= 32:
            image = _channels_last(image)
        return Operands(rows, image, self.sizes)


def _channels_last(tensor: Tensor) -> Tensor:
    """Channels contiguous, if a pixel of them is a multiple of 16 elements."""
    if tensor.stride(1) == 1 or tensor.shape[1] % 16:
        return tensor
    return channels_last(tensor)


def _span(tensor: Tensor) -> int:
    """Elements between the first and the last of one sample."""
    axes = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return sum((size - 1) * stride for size, stride in axes)


def operands(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Operands:
    """Rows and image of a convolution, in one dtype, without a copy where possible.

    A sample of the rows is a matrix: positions that do not lie evenly are copied.
    """
    dtype = torch.promote_types(x.dtype, g.dtype)
    rows, image = geometry.roles(x.to(dtype), g.to(dtype))
    missing = 3 - len(geometry.kernel_size)
    ones, zeros = (1,) * missing, (0,) * missing
    sizes = ConvSizes(
        batch=len(rows),
        groups=geometry.groups,
        height=rows.shape[1] // geometry.groups,
        channels=image.shape[1] // geometry.groups,
        space=(*ones, *image.shape[2:]),
        out=(*ones, *rows.shape[2:]),
        kernel=(*ones, *geometry.kernel_size),
        stride=(*ones, *geometry.stride),
        padding=(*zeros, *geometry.padding),
        dilation=(*ones, *geometry.dilation),
        axes=len(geometry.kernel_size),
    )
    return Operands(rows.flatten(2), image, sizes)
