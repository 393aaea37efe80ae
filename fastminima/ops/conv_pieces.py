"""The operands of a convolution's weight gradient, multiplied in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._dtypes import accumulation_dtype
from ._pieces import itemsize, pieces, step_of
from .conv_geometry import ConvGeometry, patches

__all__ = ["Images"]

_ALL = slice(None)


class Images:
    """Rows and image of every sample, see `conv_geometry`.

    Held at a time: gradients of half the limit, and beside them patches, or one sum of
    gradients, of a quarter.

    Attributes:
        shape: that of the weight.
        dtype: the accumulation dtype.
    """

    def __init__(self, x: Tensor, g: Tensor, geometry: ConvGeometry) -> None:
        self._rows, self._image = geometry.roles(x, g)
        self._geometry = geometry
        self.shape = geometry.weight_shape(x, g)
        self.batch, self.dtype = len(g), accumulation_dtype(g.dtype)
        self._channel_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._line_bytes = self._bytes_of_a_line()

    def _bytes_of_a_line(self) -> int:
        """What is read and unfolded for one position along the first axis of space."""
        geometry, size = self._geometry, self.dtype.itemsize
        positions = math.prod(self._rows.shape[3:])
        pixels = geometry.stride[0] * math.prod(
            n + 2 * p
            for n, p in zip(self._image.shape[3:], geometry.padding[1:], strict=True)
        )
        channels = self._image.shape[1]
        copies = itemsize(self._image.dtype, self.dtype)
        copies += size if any(geometry.padding) else 0
        return (
            channels * geometry.kernel_numel * positions * size
            + channels * pixels * copies
            + self._rows.shape[1] * positions * size
        )

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the accumulation dtype."""
        return self._rows.new_zeros(shape, dtype=self.dtype)

    def channels(self, of_samples: int = 1) -> Iterator[slice]:
        """Slices of the weight's first dim, of whole groups if there are several.

        Such that the gradients of so many samples take a quarter of the limit there.
        """
        height = self._height
        each = height * self._channel_bytes * of_samples
        for part in pieces(self.shape[0] // height, each, 4):
            yield slice(part.start * height, part.stop * height)

    @property
    def _height(self) -> int:
        """Rows of the weight that stay together."""
        groups = self._geometry.groups
        return 1 if groups == 1 else max(1, self.shape[0] // groups)

    def samples(self, part: slice, share: int = 2) -> list[slice]:
        """Slices of the batch by what their gradients of part of the weight take."""
        step = step_of((part.stop - part.start) * self._channel_bytes, share)
        return [
            slice(lo, min(lo + step, self.batch)) for lo in range(0, self.batch, step)
        ]

    def gradient_pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Samples, rows of the weight, and that part of these samples' gradients.

        The last part should be let go of before the next one is asked for.
        """
        for part in self.channels():
            for samples in self.samples(part):
                yield samples, part, self.gradients(samples, part)

    def gradients(self, samples: slice, part: slice) -> Tensor:
        """Gradients of some samples, `[samples, *part of the weight]`."""
        rows, image = self._rows[samples, part], self._image[samples]
        groups, height = self._geometry.groups, part.stop - part.start
        if groups > 1:
            groups = height // self._height
            first, width = part.start // self._height, self.shape[1]
            image = image[:, first * width : (first + groups) * width]
        count, width = len(rows), self._geometry.kernel_numel * self.shape[1]
        shape = (groups, height // max(1, groups), width)
        step = step_of(rows.shape[2] * self._line_bytes, 4)
        if step >= count:
            out = self._products(rows, image, shape)
        else:
            out = self._rows.new_empty((count, *shape), dtype=self.dtype)
            for some in (slice(lo, lo + step) for lo in range(0, count, step)):
                self._products(rows[some], image[some], shape, out[some])
        return out.reshape(count, height, *self.shape[1:])

    def _products(
        self,
        rows: Tensor,
        image: Tensor,
        shape: tuple[int, int, int],
        out: Tensor | None = None,
    ) -> Tensor:
        """Rows times columns of every group, summed over the positions."""
        count = len(rows) * shape[0]
        flat = None if out is None else out.view(count, *shape[1:])
        for lines in pieces(rows.shape[2], len(rows) * self._line_bytes, 4):
            left = rows[:, :, lines].to(self.dtype)
            length = left[:1, :1].numel() if count else 0
            left = left.reshape(count, shape[1], length)
            right = self._columns(image, lines).reshape(count, shape[2], length).mT
            if lines.start == 0:
                flat = torch.bmm(left, right, out=flat)
            else:
                assert flat is not None
                flat.baddbmm_(left, right)
            del left, right
        return self.zeros(count, *shape[1:]) if flat is None else flat

    def _columns(self, image: Tensor, lines: slice) -> Tensor:
        """The image under the kernel at some of the positions along the first axis."""
        geometry, axes = self._geometry, self._rows.shape[2:]
        if lines == slice(0, axes[0]):
            return patches(image.to(self.dtype), geometry, tuple(axes))
        reach = (geometry.kernel_size[0] - 1) * geometry.dilation[0] + 1
        first = lines.start * geometry.stride[0] - geometry.padding[0]
        last = (lines.stop - 1) * geometry.stride[0] - geometry.padding[0] + reach
        slab = image[:, :, max(0, first) : max(0, last)].to(self.dtype)
        above = min(max(0, -first), last - first)
        missing = (last - first) - slab.shape[2] - above
        sides = [p for p in reversed(geometry.padding[1:]) for _ in range(2)]
        slab = pad(slab, [*sides, above, missing])
        positions = (lines.stop - lines.start, *axes[1:])
        return patches(slab, geometry, positions, is_padded=True)
