"""Gradients of matrices and of what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype
from ...ops import broadcast, dense
from ...ops.dense_pieces import Sequences
from .base import Contribution, Fused, fused_of, sq_norms_of, summed

__all__ = ["Column", "Dense", "DenseBias", "Products", "Stacked"]


class Products:
    """What a dense layer multiplies, for the gradients of its weight and of its bias.

    Args:
        a: `[batch, time, d_in]` inputs, g: `[batch, time, d_out]` output gradients; or
            both without the time axis, one row a sample.
        with_bias: whether a pass for the weight leaves something for a bias too.
    """

    def __init__(self, a: Tensor, g: Tensor, *, with_bias: bool = False) -> None:
        self.rows, self.row_grads = a, g
        self._with_bias = with_bias
        # What passes for the weight have left for the bias.
        self._bias_norms: Tensor | None = None
        self._bias_samples: Tensor | None = None

    @property
    def a(self) -> Tensor:
        """`[batch, time, d_in]`."""
        return self.rows if self.rows.dim() == 3 else self.rows.unsqueeze(1)

    @property
    def g(self) -> Tensor:
        """`[batch, time, d_out]`."""
        if self.row_grads.dim() == 3:
            return self.row_grads
        return self.row_grads.unsqueeze(1)

    @property
    def has_one_row(self) -> bool:
        """Whether each sample has one row."""
        return self.row_grads.dim() == 2

    @cached_property
    def weight_norms(self) -> Tensor:
        """Squared norms of the weight's gradients, `[batch]`; leaves the bias' ones."""
        if self.has_one_row:
            norms, self._bias_norms = dense.row_sq_norms(self.rows, self.row_grads)
        else:
            norms, self._bias_norms = dense.sequence_sq_norms(
                self.rows, self.row_grads, self._with_bias
            )
        return norms

    @property
    def bias_norms(self) -> Tensor:
        """Squared norms of the bias' gradients, left by the weight's pass or its own.

        A weight whose norms nobody asks for (it is used twice, or normalised on its
        way) has no such pass, and the bias needs none of it.
        """
        if self._bias_norms is not None:
            return self._bias_norms
        return sq_norms_of(self.bias_samples)

    def fused(self, *, out_first: bool, with_second_moment: bool) -> Fused:
        """The weight's gradient, norms and second moment; keeps the bias' gradients."""
        right, left = (self.a, self.g) if out_first else (self.g, self.a)
        # Of one row a sample they are there.
        with_bias = self._with_bias and out_first and not self.has_one_row
        total, norms, self._bias_samples, moment = dense.sequence_fused(
            right, left, with_bias, with_second_moment
        )
        return Fused(total, norms, moment)

    @cached_property
    def bias_samples(self) -> Tensor:
        """Gradients of a bias, `[batch, d_out]`."""
        if self._bias_samples is not None:
            return self._bias_samples
        if self.g.shape[1] == 1:
            g = self.g[:, 0]
            return g.to(accumulation_dtype(g.dtype))
        return broadcast.sum_over_time(self.g)


class Dense(Contribution):
    """Gradient of a matrix: sum over time of inputs and output gradients.

    Args:
        products: what the layer multiplies.
        out_first: whether the matrix is `[d_out, d_in]`, else `[d_in, d_out]`.
    """

    def __init__(self, products: Products, *, out_first: bool) -> None:
        self.products, self.out_first = products, out_first
        self.batch = len(products.rows)
        d_in, d_out = products.rows.shape[-1], products.row_grads.shape[-1]
        self.shape = (d_out, d_in) if out_first else (d_in, d_out)

    def transposed(self) -> Dense:
        """These gradients as those of the transposed matrix."""
        return Dense(self.products, out_first=not self.out_first)

    @property
    def left(self) -> Tensor:
        """What gives the matrix its rows, `[batch, time, shape[0]]`."""
        return self.products.g if self.out_first else self.products.a

    @property
    def right(self) -> Tensor:
        """What gives the matrix its columns, `[batch, time, shape[1]]`."""
        return self.products.a if self.out_first else self.products.g

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return dense.sequence_gradients(self.right[lo:hi], self.left[lo:hi])

    def sq_norms(self) -> Tensor:
        return self.products.weight_norms

    def second_moment(self) -> Tensor:
        return dense.sequence_second_moment(self.right, self.left)

    def total(self) -> Tensor:
        return Sequences(self.right, self.left).total()

    def fused(self, *, with_second_moment: bool) -> Fused:
        return self.products.fused(
            out_first=self.out_first, with_second_moment=with_second_moment
        )

    def gram(self) -> Tensor:
        return dense.sequence_gram(self.products.a, self.products.g)

    def dots(self, direction: Tensor) -> Tensor:
        return dense.sequence_dots(self.right, self.left, direction)

    def several_dots(self, directions: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(directions) < 2 or self.products.has_one_row:
            return super().several_dots(directions)
        dots = dense.sequence_multi_dots(self.right, self.left, directions)
        return dots.unbind(1)


class DenseBias(Contribution):
    """Gradient of a bias beside a dense weight: sum over time of output gradients."""

    reads_another = True

    def __init__(self, products: Products, shape: tuple[int, ...]) -> None:
        self.products, self.shape = products, shape
        self.batch = len(products.rows)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        samples = self.products.bias_samples[lo:hi]
        return samples.reshape(hi - lo, *self.shape)

    def sq_norms(self) -> Tensor:
        return self.products.bias_norms

    def fused(self, *, with_second_moment: bool) -> Fused:
        if with_second_moment:
            return super().fused(with_second_moment=True)
        return fused_of(self.products.bias_samples, self.shape)


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

    def fused(self, *, with_second_moment: bool) -> Fused:
        found = [
            block.fused(with_second_moment=with_second_moment) for block in self.blocks
        ]
        moments = [f.second_moment for f in found if f.second_moment is not None]
        return Fused(
            torch.stack([f.total for f in found]),
            summed(f.sq_norms for f in found),
            torch.stack(moments) if moments else None,
        )

    def total(self) -> Tensor:
        return torch.stack([block.total() for block in self.blocks])

    def gram(self) -> Tensor:
        return summed(block.gram() for block in self.blocks)

    def dots(self, direction: Tensor) -> Tensor:
        return summed(
            block.dots(v) for block, v in zip(self.blocks, direction, strict=True)
        )
