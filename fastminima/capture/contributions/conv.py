"""Gradients of convolutions."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from ...ops import broadcast, conv
from ...ops.conv_geometry import ConvGeometry
from .base import Contribution, Fused, sq_norms_of

__all__ = ["Convolution", "ConvolutionBias", "Frames"]


class Convolution(Contribution):
    """Gradient of a convolution's weight, from its input and output gradient."""

    def __init__(
        self, x: Tensor, g: Tensor, geometry: ConvGeometry, *, with_bias: bool
    ) -> None:
        self.x, self.g, self.geometry = x, g, geometry
        self.with_bias = with_bias
        self.bias_samples: Tensor | None = None  # its gradients, from a fused pass
        self.batch = len(g)
        self.shape = geometry.weight_shape(x, g)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return conv.conv_gradients(self.x[lo:hi], self.g[lo:hi], self.geometry)

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor | None]:
        return conv.conv_sq_norms(self.x, self.g, self.geometry, self.with_bias)

    def sq_norms(self) -> Tensor:
        return self.pair[0]

    def second_moment(self) -> Tensor:
        return conv.conv_second_moment(self.x, self.g, self.geometry)

    def fused(self, *, with_second_moment: bool) -> Fused:
        total, norms, self.bias_samples, moment = conv.conv_fused(
            self.x, self.g, self.geometry, self.with_bias, with_second_moment
        )
        return Fused(total, norms, moment)

    def gram(self) -> Tensor:
        return conv.conv_gram(self.x, self.g, self.geometry)

    def dots(self, direction: Tensor) -> Tensor:
        return conv.conv_dots(self.x, self.g, self.geometry, direction)


class ConvolutionBias(Contribution):
    """Gradient of a convolution's bias: sum over space of output gradients."""

    def __init__(self, weight: Convolution) -> None:
        self.weight = weight
        self.batch = weight.batch
        self.shape = (weight.g.shape[1],)

    @cached_property
    def _samples(self) -> Tensor:
        if self.weight.bias_samples is not None:
            return self.weight.bias_samples
        return broadcast.sum_over_space(self.weight.g.flatten(2))

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self._samples[lo:hi]

    def sq_norms(self) -> Tensor:
        if "pair" in self.weight.__dict__ and self.weight.pair[1] is not None:
            return self.weight.pair[1]
        return sq_norms_of(self._samples)


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
