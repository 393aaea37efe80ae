"""Gradients of convolutions."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from ...ops import broadcast, conv
from ...ops.conv_geometry import ConvGeometry
from .base import Contribution, Fused, fused_of, sq_norms_of

__all__ = ["Convolution", "ConvolutionBias", "Frames", "Patches"]


class Patches:
    """What a convolution multiplies, for the gradients of its weight and of its bias.

    Args:
        x: `[batch, c_in, *space]` inputs, g: `[batch, c_out, *space_out]` output
            gradients.
        with_bias: whether a pass for the weight leaves something for a bias too.
    """

    def __init__(
        self, x: Tensor, g: Tensor, geometry: ConvGeometry, *, with_bias: bool = False
    ) -> None:
        self.x, self.g, self.geometry = x, g, geometry
        self._with_bias = with_bias
        # What passes for the weight have left for the bias.
        self._bias_norms: Tensor | None = None
        self._bias_samples: Tensor | None = None

    @cached_property
    def weight_norms(self) -> Tensor:
        """Squared norms of the weight's gradients, `[batch]`; leaves the bias' ones."""
        norms, self._bias_norms = conv.conv_sq_norms(
            self.x, self.g, self.geometry, self._with_bias
        )
        return norms

    @property
    def bias_norms(self) -> Tensor:
        """Squared norms of the bias' gradients, left by the weight's pass or by one."""
        if self._bias_norms is not None:
            return self._bias_norms
        return sq_norms_of(self.bias_samples)

    def fused(self, *, with_second_moment: bool) -> Fused:
        """The weight's gradient, norms and second moment; keeps the bias' gradients."""
        total, norms, self._bias_samples, moment = conv.conv_fused(
            self.x, self.g, self.geometry, self._with_bias, with_second_moment
        )
        return Fused(total, norms, moment)

    @cached_property
    def bias_samples(self) -> Tensor:
        """Gradients of a bias, `[batch, c_out]`."""
        if self._bias_samples is not None:
            return self._bias_samples
        return broadcast.sum_over_space(self.g.flatten(2))


class Convolution(Contribution):
    """Gradient of a convolution's weight, from its input and output gradient."""

    def __init__(self, patches: Patches) -> None:
        self.patches = patches
        self.batch = len(patches.g)
        self.shape = patches.geometry.weight_shape(patches.x, patches.g)

    @property
    def _operands(self) -> tuple[Tensor, Tensor, ConvGeometry]:
        return self.patches.x, self.patches.g, self.patches.geometry

    def per_sample(self, lo: int, hi: int) -> Tensor:
        x, g, geometry = self._operands
        return conv.conv_gradients(x[lo:hi], g[lo:hi], geometry)

    def sq_norms(self) -> Tensor:
        return self.patches.weight_norms

    def second_moment(self) -> Tensor:
        return conv.conv_second_moment(*self._operands)

    def fused(self, *, with_second_moment: bool) -> Fused:
        return self.patches.fused(with_second_moment=with_second_moment)

    def gram(self) -> Tensor:
        return conv.conv_gram(*self._operands)

    def dots(self, direction: Tensor) -> Tensor:
        return conv.conv_dots(*self._operands, direction)


class ConvolutionBias(Contribution):
    """Gradient of a convolution's bias: sum over space of output gradients."""

    reads_another = True

    def __init__(self, patches: Patches) -> None:
        self.patches = patches
        self.batch = len(patches.g)
        self.shape = (patches.g.shape[1],)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self.patches.bias_samples[lo:hi]

    def sq_norms(self) -> Tensor:
        return self.patches.bias_norms

    def fused(self, *, with_second_moment: bool) -> Fused:
        if with_second_moment:
            return super().fused(with_second_moment=True)
        return fused_of(self.patches.bias_samples, self.shape)


class Frames(Contribution):
    """A convolution over several images a sample, written with one axis more."""

    def __init__(self, inner: Convolution) -> None:
        self.inner = inner
        self.batch = inner.batch
        self.shape = (*inner.shape[:2], *inner.shape[3:])

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self.inner.per_sample(lo, hi).reshape(hi - lo, *self.shape)

    def sq_norms(self) -> Tensor:
        return self.inner.sq_norms()

    def second_moment(self) -> Tensor:
        return self.inner.second_moment().reshape(self.shape)
