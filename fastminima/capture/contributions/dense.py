"""Gradients of matrices and of what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype
from ...ops import broadcast, dense
from ...ops.dense_pieces import Sequences
from .base import Contribution, Fused, sq_norms_of, summed

__all__ = ["Column", "Dense", "DenseBias", "Stacked"]


class Dense(Contribution):
    """Gradient of a matrix: sum over time of inputs and output gradients.

    Args:
        a: `[batch, time, d_in]` inputs, g: `[batch, time, d_out]` output gradients; or
            both without the time axis, one row a sample.
        out_first: whether the matrix is `[d_out, d_in]`, else `[d_in, d_out]`.
    """

    def __init__(self, a: Tensor, g: Tensor, *, out_first: bool) -> None:
        self._a, self._g = a, g
        self.out_first = out_first
        self.with_bias = False  # compute the bias' norms in the same pass
        self.bias_samples: Tensor | None = None  # its gradients, from a fused pass
        self.batch = len(g)
        d_in, d_out = a.shape[-1], g.shape[-1]
        self.shape = (d_out, d_in) if out_first else (d_in, d_out)

    def transpose_(self) -> Dense:
        """The same gradients as those of the transposed matrix, in place.

        In place, because the bias beside it reads its norms off this very object.
        """
        self.out_first = not self.out_first
        self.shape = self.shape[::-1]
        return self

    @property
    def a(self) -> Tensor:
        """`[batch, time, d_in]`."""
        return self._a if self._a.dim() == 3 else self._a.unsqueeze(1)

    @property
    def g(self) -> Tensor:
        """`[batch, time, d_out]`."""
        return self._g if self._g.dim() == 3 else self._g.unsqueeze(1)

    @property
    def left(self) -> Tensor:
        """What gives the matrix its rows, `[batch, time, shape[0]]`."""
        return self.g if self.out_first else self.a

    @property
    def right(self) -> Tensor:
        """What gives the matrix its columns, `[batch, time, shape[1]]`."""
        return self.a if self.out_first else self.g

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return dense.sequence_gradients(self.right[lo:hi], self.left[lo:hi])

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor | None]:
        """Squared norms of the weight's gradients, and of the bias' if wanted."""
        if self._g.dim() == 2:
            return dense.row_sq_norms(self._a, self._g)
        return dense.sequence_sq_norms(self._a, self._g, self.with_bias)

    def sq_norms(self) -> Tensor:
        return self.pair[0]

    def second_moment(self) -> Tensor:
        return dense.sequence_second_moment(self.right, self.left)

    def total(self) -> Tensor:
        return Sequences(self.right, self.left).total()

    def fused(self, *, with_second_moment: bool) -> Fused:
        total, norms, self.bias_samples, moment = dense.sequence_fused(
            self.right,
            self.left,
            self.with_bias and self.out_first,
            with_second_moment,
        )
        return Fused(total, norms, moment)

    def gram(self) -> Tensor:
        return dense.sequence_gram(self.a, self.g)

    def dots(self, direction: Tensor) -> Tensor:
        return dense.sequence_dots(self.right, self.left, direction)

    def several_dots(self, directions: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(directions) < 2 or self._g.dim() == 2:
            return super().several_dots(directions)
        dots = dense.sequence_multi_dots(self.right, self.left, directions)
        return dots.unbind(1)


class DenseBias(Contribution):
    """Gradient of a bias beside a dense weight: sum over time of output gradients."""

    def __init__(self, weight: Dense, shape: tuple[int, ...]) -> None:
        self.weight = weight
        self.batch = weight.batch
        self.shape = shape

    @cached_property
    def _samples(self) -> Tensor:
        if self.weight.bias_samples is not None:
            return self.weight.bias_samples
        if self.weight.g.shape[1] == 1:
            g = self.weight.g[:, 0]
            return g.to(accumulation_dtype(g.dtype))
        return broadcast.sum_over_time(self.weight.g)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self._samples[lo:hi].reshape(hi - lo, *self.shape)

    def sq_norms(self) -> Tensor:
        if "pair" in self.weight.__dict__ and self.weight.pair[1] is not None:
            return self.weight.pair[1]
        return sq_norms_of(self._samples)


class Column(Contribution):
    """A matrix of one column that the parameter holds as a vector."""

    def __init__(self, inner: Dense) -> None:
        self.inner = inner
        self.batch = inner.batch
        self.shape = (inner.shape[0],)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self.inner.per_sample(lo, hi).flatten(1)

    def sq_norms(self) -> Tensor:
        return self.inner.sq_norms()


class Stacked(Contribution):
    """Independent blocks along the first dim of the parameter, as in `bmm`."""

    def __init__(self, blocks: Sequence[Contribution]) -> None:
        self.blocks = blocks
        self.batch = blocks[0].batch
        self.shape = (len(blocks), *blocks[0].shape)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return torch.stack([block.per_sample(lo, hi) for block in self.blocks], 1)

    def sq_norms(self) -> Tensor:
        return summed(block.sq_norms() for block in self.blocks)

    def second_moment(self) -> Tensor:
        return torch.stack([block.second_moment() for block in self.blocks])

    def gram(self) -> Tensor:
        return summed(block.gram() for block in self.blocks)

    def dots(self, direction: Tensor) -> Tensor:
        return summed(
            block.dots(v) for block, v in zip(self.blocks, direction, strict=True)
        )
