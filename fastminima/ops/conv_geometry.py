"""How the weight of a convolution meets its input: sizes, strides, patches.

Every convolution, transposed or not, has the weight gradient

    dW[r, c, k] = sum_t rows[r, t] * image[c, t * stride + k * dilation - padding]

with positions t and k of 1, 2 or 3 axes. The rows are the gradient of the output and
the image is the input; in a transposed convolution they change places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["ConvGeometry", "patches"]


@dataclass(frozen=True)
class ConvGeometry:
    """The arguments of a convolution, one entry of each tuple per spatial axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def roles(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Which of input and output gradient are the rows and which the image.

        Raises:
            ValueError: when the sizes of the two are not those of this convolution.
        """
        rows, image = (x, g) if self.transposed else (g, x)
        fits = self._fits(rows.shape[2:], image.shape[2:])
        divides = rows.shape[1] % self.groups == 0 == image.shape[1] % self.groups
        if len(rows) != len(image) or not fits or not divides:
            raise ValueError(
                f"Input {tuple(x.shape)} and output gradient {tuple(g.shape)} do not "
                f"belong to {self}. Pass the tensors of one call of the layer."
            )
        return rows, image

    def _fits(self, positions: torch.Size, space: torch.Size) -> bool:
        axes = len(self.kernel_size)
        return len(positions) == len(space) == axes and all(
            (out - 1) * step + (kernel - 1) * gap < size + 2 * padding
            for out, size, kernel, step, padding, gap in zip(
                *(positions, space, self.kernel_size, self.stride, self.padding),
                self.dilation,
                strict=True,
            )
        )

    def weight_shape(self, x: Tensor, g: Tensor) -> tuple[int, ...]:
        """Shape of the weight of the layer with this input and output gradient."""
        rows, image = (x, g) if self.transposed else (g, x)
        return (rows.shape[1], image.shape[1] // self.groups, *self.kernel_size)

    @property
    def kernel_numel(self) -> int:
        """Number of positions of the kernel."""
        return math.prod(self.kernel_size)


def patches(
    image: Float[Tensor, "batch channels *space"],
    geometry: ConvGeometry,
    positions: tuple[int, ...],
    *,
    is_padded: bool = False,
) -> Tensor:
    """The image under the kernel at each position, a view of the zero-padded image.

    Its shape is [batch, channels, *kernel, *positions]. The image may have its padding
    already.
    """
    if any(geometry.padding) and not is_padded:
        image = pad(image, [p for p in reversed(geometry.padding) for _ in range(2)])
    batch, channel, *space = image.stride()
    by_kernel = [s * d for s, d in zip(space, geometry.dilation, strict=True)]
    by_position = [s * d for s, d in zip(space, geometry.stride, strict=True)]
    return image.as_strided(
        (*image.shape[:2], *geometry.kernel_size, *positions),
        (batch, channel, *by_kernel, *by_position),
    )
