"""The inputs and output gradients of a dense layer, read and multiplied in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._pieces import itemsize, lower_blocks, pieces, square_side, step_of

__all__ = ["Sequences"]

_ALL = slice(None)


class Sequences:
    """Rows of every sample: `[batch, time, d_in]` and `[batch, time, d_out]`.

    Attributes:
        dtype: the accumulation dtype of both.
        step_bytes: what reading one time step of one sample allocates.
    """

    def __init__(
        self,
        a: Float[Tensor, "batch time d_in"],
        g: Float[Tensor, "batch time d_out"],
    ) -> None:
        self._a, self._g = a, g
        self.batch, self.time = g.shape[:2]
        self.d_in, self.d_out = a.shape[-1], g.shape[-1]
        if a.dtype == g.dtype and a.dtype.itemsize >= 4:
            self.dtype, self.step_bytes = a.dtype, 0
            return
        self.dtype = accumulation_dtype(torch.promote_types(a.dtype, g.dtype))
        self.step_bytes = self.d_in * itemsize(a.dtype, self.dtype)
        self.step_bytes += self.d_out * itemsize(g.dtype, self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the accumulation dtype."""
        return self._g.new_zeros(shape, dtype=self.dtype)

    def read(
        self, rows: slice = _ALL, steps: slice = _ALL, outs: slice = _ALL
    ) -> tuple[Tensor, Tensor]:
        """Some samples' time steps in the accumulation dtype, of some outputs."""
        a, g = self._a, self._g
        return a[rows, steps].to(self.dtype), g[rows, steps, outs].to(self.dtype)

    def is_plain(self, elements: int) -> bool:
        """Whether nothing is converted, and so many elements can be held at once."""
        return self.step_bytes == 0 and elements * self.dtype.itemsize <= step_of(1, 8)

    @property
    def is_small(self) -> bool:
        """Whether that is so for the gradients of all samples."""
        return self.is_plain(self.batch * self.d_out * self.d_in)

    def all_gradients(self) -> Tensor:
        """Gradients of all samples, where nothing is converted."""
        return torch.bmm(self._g.transpose(1, 2), self._a)

    def blocks(self, bytes_more: int) -> Iterator[tuple[slice, slice]]:
        """Samples and time steps that take little, with so many bytes more a step."""
        each = self.step_bytes + bytes_more
        for rows in pieces(self.batch, self.time * each):
            for steps in pieces(self.time, (rows.stop - rows.start) * each):
                yield rows, steps

    def gradients(self, rows: slice, outs: slice = _ALL) -> Tensor:
        """Gradients of some samples, `[rows, outs, d_in]`."""
        each = (rows.stop - rows.start) * self.step_bytes
        if each * self.time <= step_of(1, 8):
            a, g = self.read(rows, _ALL, outs)
            return torch.bmm(g.transpose(1, 2), a)
        count = rows.stop - rows.start
        total = self.zeros(count, len(range(*outs.indices(self.d_out))), self.d_in)
        for steps in pieces(self.time, each, 8):
            self.add_gradients(total, rows, steps, outs)
        return total

    def add_gradients(
        self, total: Tensor, rows: slice, steps: slice, outs: slice = _ALL
    ) -> None:
        """Add what some time steps give to gradients `[rows, outs, d_in]`."""
        a, g = self.read(rows, steps, outs)
        total.baddbmm_(g.transpose(1, 2), a)

    def gradient_pieces(self, share: int = 2) -> Iterator[tuple[slice, slice, Tensor]]:
        """Samples, rows of the gradient, and that part of these samples' gradients.

        A part takes that share of the limit. The last one should be let go of before
        the next one is asked for.
        """
        if share == 2 and self.is_small:
            yield slice(0, self.batch), slice(0, self.d_out), self.all_gradients()
            return
        row_bytes = self.d_in * self.dtype.itemsize
        most = step_of(self.time * self.step_bytes, 8)
        for outs in pieces(self.d_out, row_bytes, max(8, share)):
            step = min(most, step_of((outs.stop - outs.start) * row_bytes, share))
            for lo in range(0, self.batch, step):
                rows = slice(lo, min(lo + step, self.batch))
                yield rows, outs, self.gradients(rows, outs)

    def gram_sums(self) -> Tensor:
        """Sum_{t,s} (a_t . a_s)(g_t . g_s) of each sample, `[batch]`."""
        each = self.time * (2 * self.time * self.dtype.itemsize + self.step_bytes)
        if each > step_of(1):
            return torch.stack([self._gram_sum(n) for n in range(self.batch)])
        sums = self.zeros(self.batch)
        for rows in pieces(self.batch, each):
            both = self.read(rows)
            sums[rows] = _product_sums(both, both)
        return sums

    def _gram_sum(self, n: int) -> Tensor:
        """That of one sample of many time steps, in squares of them."""
        side = square_side(2 * self.dtype.itemsize, self.step_bytes)
        rows, total = slice(n, n + 1), self.zeros()
        for t in range(0, self.time, side):
            left = self.read(rows, slice(t, t + side))
            for s in range(0, t + side, side):
                right = left if s == t else self.read(rows, slice(s, s + side))
                (part,) = _product_sums(left, right)
                # What is above the diagonal is as what is below it.
                total += part if s == t else 2 * part
                del right
            del left
        return total

    def diagonal_sums(self) -> Tensor:
        """Sum_t |a_t|^2 |g_t|^2 of each sample, `[batch]`."""
        sums = self.zeros(self.batch)
        for rows, steps in self.blocks((self.d_in + self.d_out) * self.dtype.itemsize):
            a, g = (x.square().sum(dim=2) for x in self.read(rows, steps))
            sums[rows] += a.mul_(g).sum(dim=1)
        return sums

    def total(self) -> Tensor:
        """The ordinary gradient, `[d_out, d_in]`: the sum over samples and steps."""
        by_time = self._a.stride(0) < self._a.stride(1)
        total = None
        for rows, steps in self.blocks(0):
            a, g = self.read(rows, steps)
            if by_time:  # the sum may be taken in any order
                a, g = a.transpose(0, 1), g.transpose(0, 1)
            left, right = g.flatten(0, 1).T, a.flatten(0, 1)
            total = left @ right if total is None else total.addmm_(left, right)
            del a, g, left, right
        return self.zeros(self.d_out, self.d_in) if total is None else total

    def gram_blocks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of the lower half of the Gram matrix, by rows and columns."""
        size = self.dtype.itemsize
        if self.time == 1:
            return lower_blocks(self.batch, square_side(2 * size, self.step_bytes))
        # Few rows of the gradients at a time, or few time steps, would be slow.
        step = min(
            step_of(min(self.d_out, 8) * self.d_in * size, 4),
            step_of(min(self.time, 16) * self.step_bytes, 8),
        )
        return lower_blocks(self.batch, step)

    def gram_block(self, left: slice, right: slice) -> Tensor:
        """Inner products of some samples' gradients with others', `[left, right]`."""
        if self.time == 1:
            return self._row_products(left, right)
        is_same = left == right
        if is_same and self.is_small and left == slice(0, self.batch):
            samples = self.all_gradients().flatten(1)
            return samples @ samples.T
        out = self.zeros(left.stop - left.start, right.stop - right.start)
        row_bytes = len(out) * self.d_in * self.dtype.itemsize
        for outs in pieces(self.d_out, row_bytes, 2 if is_same else 4):
            part = self.gradients(left, outs).flatten(1)
            other = part if is_same else self.gradients(right, outs).flatten(1)
            out.addmm_(part, other.T)
            del part, other
        return out

    def _row_products(self, left: slice, right: slice) -> Tensor:
        a, g = (x[:, 0] for x in self.read(left))
        b, h = (a, g) if left == right else (x[:, 0] for x in self.read(right))
        products = a @ b.T
        products *= g @ h.T
        return products


def _product_sums(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]
) -> Float[Tensor, " rows"]:
    """Sum of (a_t . a_s)(g_t . g_s) over the steps t of the left and s of the right."""
    products = torch.bmm(left[0], right[0].transpose(1, 2))
    products *= torch.bmm(left[1], right[1].transpose(1, 2))
    return products.sum(dim=(1, 2))
