"""Per-sample gradients of one parameter, in the form its layer gives them.

A contribution stands for the tensor `[batch, *shape]` of sample gradients without
holding it. All results are in the accumulation dtype and for gradients as autograd
delivers them; who collects them scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..ops import broadcast, conv, dense, embedding
from ..ops.conv_geometry import ConvGeometry

__all__ = [
    "Apart",
    "Column",
    "Contribution",
    "Convolution",
    "ConvolutionBias",
    "Dense",
    "DenseBias",
    "Embedding",
    "Frames",
    "Joined",
    "Materialized",
    "Placed",
    "Pushed",
    "Stacked",
    "joined",
]

_CHUNK_BYTES = 64 << 20


class Contribution:
    """What one use adds to the gradient of each sample; an interface.

    A subclass gives `per_sample`; it overrides what it can compute without it.
    """

    batch: int
    shape: tuple[int, ...]

    def per_sample(self, lo: int, hi: int) -> Tensor:
        """Gradients of samples lo ... hi - 1, `[hi - lo, *shape]`."""
        raise NotImplementedError

    def chunks(self) -> Iterator[Tensor]:
        """All samples' gradients, some at a time."""
        bytes_each = 8 * max(1, int(torch.Size(self.shape).numel()))
        step = max(1, _CHUNK_BYTES // bytes_each)
        for lo in range(0, self.batch, step):
            yield self.per_sample(lo, min(lo + step, self.batch))

    def sq_norms(self) -> Tensor:
        """|g_n|^2, `[batch]`."""
        return torch.cat([_sq_norms(chunk) for chunk in self.chunks()])

    def second_moment(self) -> Tensor:
        """sum_n g_n^2 elementwise, of the parameter's shape."""
        return _sum(chunk.square().sum(0) for chunk in self.chunks())

    def total(self) -> Tensor:
        """sum_n g_n, of the parameter's shape: the ordinary gradient."""
        return _sum(chunk.sum(0) for chunk in self.chunks())

    def gram(self) -> Tensor:
        """<g_n, g_m>, `[batch, batch]`."""
        rows = [_flat(chunk) for chunk in self.chunks()]
        if len(rows) == 1:
            return rows[0] @ rows[0].t()
        del rows
        return torch.cat(
            [
                torch.cat([_flat(a) @ _flat(b).t() for b in self.chunks()], 1)
                for a in self.chunks()
            ]
        )

    def dots(self, direction: Tensor) -> Tensor:
        """<g_n, direction>, `[batch]`."""
        flat = direction.flatten()
        return torch.cat([_flat(c) @ flat.to(c.dtype) for c in self.chunks()])

    def settled(self) -> Contribution:
        """The same, usable after the backward pass has left this node."""
        return self


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _sq_norms(samples: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(_flat(samples), dim=1)
    return norms.square()


def _flat(samples: Tensor) -> Tensor:
    return samples.reshape(len(samples), -1)


class Materialized(Contribution):
    """Sample gradients that are there: `[batch, *shape]`."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples
        self.batch = len(samples)
        self.shape = tuple(samples.shape[1:])
        self._dtype = accumulation_dtype(samples.dtype)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self.samples[lo:hi].to(self._dtype)


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
        dtype = accumulation_dtype(self._g.dtype)
        left, right = (x.flatten(0, 1).to(dtype) for x in (self.left, self.right))
        return left.t() @ right

    def gram(self) -> Tensor:
        return dense.sequence_gram(self.a, self.g)

    def dots(self, direction: Tensor) -> Tensor:
        return dense.sequence_dots(self.right, self.left, direction)


class DenseBias(Contribution):
    """Gradient of a bias beside a dense weight: sum over time of output gradients."""

    def __init__(self, weight: Dense, shape: tuple[int, ...]) -> None:
        self.weight = weight
        self.batch = weight.batch
        self.shape = shape

    @cached_property
    def _samples(self) -> Tensor:
        return broadcast.sum_over_time(self.weight.g)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self._samples[lo:hi].reshape(hi - lo, *self.shape)

    def sq_norms(self) -> Tensor:
        if "pair" in self.weight.__dict__ and self.weight.pair[1] is not None:
            return self.weight.pair[1]
        return _sq_norms(self._samples)


class Convolution(Contribution):
    """Gradient of a convolution's weight, from its input and output gradient."""

    def __init__(
        self, x: Tensor, g: Tensor, geometry: ConvGeometry, *, with_bias: bool
    ) -> None:
        self.x, self.g, self.geometry = x, g, geometry
        self.with_bias = with_bias
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
        return broadcast.sum_over_space(self.weight.g.flatten(2))

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self._samples[lo:hi]

    def sq_norms(self) -> Tensor:
        if "pair" in self.weight.__dict__ and self.weight.pair[1] is not None:
            return self.weight.pair[1]
        return _sq_norms(self._samples)


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


class Embedding(Contribution):
    """Gradient of a table: each row of `g [batch, time, width]` goes to row `ids`."""

    def __init__(self, ids: Tensor, g: Tensor, padding_idx: int, rows: int) -> None:
        self.ids, self.g, self.padding_idx = ids, g, padding_idx
        self.batch = len(g)
        self.shape = (rows, g.shape[2])

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return embedding.embedding_gradients(
            self.ids[lo:hi], self.g[lo:hi], self.padding_idx, self.shape[0]
        )

    def sq_norms(self) -> Tensor:
        return embedding.embedding_sq_norms(self.ids, self.g, self.padding_idx)

    def second_moment(self) -> Tensor:
        return embedding.embedding_second_moment(
            self.ids, self.g, self.padding_idx, self.shape[0]
        )

    def gram(self) -> Tensor:
        return embedding.embedding_gram(self.ids, self.g, self.padding_idx)

    def dots(self, direction: Tensor) -> Tensor:
        return embedding.embedding_dots(self.ids, self.g, self.padding_idx, direction)


class Stacked(Contribution):
    """Independent blocks along the first dim of the parameter, as in `bmm`."""

    def __init__(self, blocks: Sequence[Contribution]) -> None:
        self.blocks = blocks
        self.batch = blocks[0].batch
        self.shape = (len(blocks), *blocks[0].shape)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return torch.stack([block.per_sample(lo, hi) for block in self.blocks], 1)

    def sq_norms(self) -> Tensor:
        return _sum(block.sq_norms() for block in self.blocks)

    def second_moment(self) -> Tensor:
        return torch.stack([block.second_moment() for block in self.blocks])

    def gram(self) -> Tensor:
        return _sum(block.gram() for block in self.blocks)

    def dots(self, direction: Tensor) -> Tensor:
        return _sum(
            block.dots(v) for block, v in zip(self.blocks, direction, strict=True)
        )


class Placed(Contribution):
    """A contribution whose elements are moved to their places in the parameter.

    `span` is where in the parameter's first dim they are at most, if that is known.
    """

    def __init__(
        self,
        inner: Contribution,
        shape: tuple[int, ...],
        place: Callable[[Tensor], Tensor],
        span: tuple[int, int] | None = None,
    ) -> None:
        self.inner, self.shape, self.place, self.span = inner, shape, place, span
        self.batch = inner.batch

    def per_sample(self, lo: int, hi: int) -> Tensor:
        samples = self.inner.per_sample(lo, hi)
        return torch.stack([self.place(g) for g in samples])

    def sq_norms(self) -> Tensor:
        return self.inner.sq_norms()

    def second_moment(self) -> Tensor:
        return self.place(self.inner.second_moment())

    def total(self) -> Tensor:
        return self.place(self.inner.total())

    def gram(self) -> Tensor:
        return self.inner.gram()

    def dots(self, direction: Tensor) -> Tensor:
        count = torch.Size(self.inner.shape).numel()
        number = torch.arange(1, count + 1, device=direction.device)
        source = self.place(number.reshape(self.inner.shape).double()).long()
        moved = direction.new_zeros(count + 1)
        moved[source.flatten()] = direction.flatten()
        return self.inner.dots(moved[1:].reshape(self.inner.shape))

    def settled(self) -> Contribution:
        return Placed(self.inner.settled(), self.shape, self.place, self.span)


class Pushed(Contribution):
    """A contribution taken through a linear map, sample by sample."""

    def __init__(
        self,
        inner: Contribution,
        shape: tuple[int, ...],
        push: Callable[[Tensor], Tensor],
    ) -> None:
        self.inner, self.shape, self.push = inner, shape, push
        self.batch = inner.batch

    def per_sample(self, lo: int, hi: int) -> Tensor:
        samples = self.inner.per_sample(lo, hi)
        return torch.stack([self.push(g).to(g.dtype) for g in samples])

    def settled(self) -> Contribution:
        # The nodes that `push` runs through are freed as the pass goes on.
        return Materialized(self.per_sample(0, self.batch))


class Joined(Contribution):
    """Several uses of one parameter: their sample gradients add up."""

    def __init__(self, parts: Sequence[Contribution]) -> None:
        self.parts = parts
        self.batch = parts[0].batch
        self.shape = parts[0].shape

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return _sum(part.per_sample(lo, hi) for part in self.parts)

    def total(self) -> Tensor:
        return _sum(part.total() for part in self.parts)

    def dots(self, direction: Tensor) -> Tensor:
        return _sum(part.dots(direction) for part in self.parts)


class Apart(Joined):
    """Uses of different rows of one parameter, such as one expert each."""

    def sq_norms(self) -> Tensor:
        return _sum(part.sq_norms() for part in self.parts)

    def second_moment(self) -> Tensor:
        return _sum(part.second_moment() for part in self.parts)

    def gram(self) -> Tensor:
        return _sum(part.gram() for part in self.parts)


class _TiedHead(Joined):
    """A table used as embedding and as output head."""

    def __init__(self, table: Embedding, head: Dense) -> None:
        super().__init__([table, head])
        self.table, self.head = table, head

    def sq_norms(self) -> Tensor:
        table, head = self.table, self.head
        cross = embedding.tied_cross(
            table.ids, table.g, table.padding_idx, head.right, head.left
        )
        parts = table.sq_norms() + head.sq_norms()
        total = parts + 2 * cross
        # Both are accurate to 1e-6 of the parts: below 1e-2 of them add the gradients.
        for n in torch.nonzero(total < 1e-2 * parts).flatten().tolist():
            total[n] = _sq_norms(self.per_sample(n, n + 1))[0]
        return total


def joined(parts: Sequence[Contribution]) -> Contribution:
    """The sum of the contributions of all uses of one parameter, in its best form."""
    if _are_apart(parts):
        return Apart(parts)
    tables = [part for part in parts if isinstance(part, Embedding)]
    matrices = [part for part in parts if isinstance(part, Dense)]
    others = [p for p in parts if not isinstance(p, Embedding | Dense)]
    merged = [*others]
    if matrices:
        merged.append(_concatenated(matrices))
    if tables:
        merged += _concatenated_tables(tables)
    if len(merged) == 1:
        return merged[0]
    if len(merged) == 2 and not others and len(matrices) > 0:
        head, table = merged
        if isinstance(head, Dense) and isinstance(table, Embedding):
            return _TiedHead(table, head)
    return Joined(merged)


def _are_apart(parts: Sequence[Contribution]) -> bool:
    """Whether no element of the parameter is in two of its uses, for sure."""
    spans = [part.span if isinstance(part, Placed) else None for part in parts]
    known = sorted(span for span in spans if span is not None)
    if len(known) < len(spans):
        return False
    return all(a[1] <= b[0] for a, b in pairwise(known))


def _concatenated(parts: list[Dense]) -> Dense:
    if len(parts) == 1:
        return parts[0]
    left = torch.cat([part.left for part in parts], 1)
    right = torch.cat([part.right for part in parts], 1)
    return Dense(right, left, out_first=True)


def _concatenated_tables(parts: list[Embedding]) -> list[Embedding]:
    if len({part.padding_idx for part in parts}) > 1:
        return parts
    ids = torch.cat([part.ids for part in parts], 1)
    g = torch.cat([part.g for part in parts], 1)
    return [Embedding(ids, g, parts[0].padding_idx, parts[0].shape[0])]
