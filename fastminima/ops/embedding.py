"""Per-sample statistics of the gradient of an embedding table.

Row v of sample n's gradient is the sum of g[n, t] over the t where ids[n, t] = v, of
shape [num_embeddings, features] in all; the row `padding_idx` (-1: none) stays zero.
Rows are found by sorting ids within samples: nothing here has the size of batch x
table, except where that is the result asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._arguments import NATIVE
from ._pieces import in_pieces, itemsize, pieces, step_of, sums_over_time
from .cuda import embedding as cuda
from .native import embedding as native
from .table import Op

__all__ = [
    "embedding_dots",
    "embedding_gradients",
    "embedding_gram",
    "embedding_second_moment",
    "embedding_sq_norms",
    "tied_cross",
]

# Of a time step: its place in several orders, all of 8 bytes, where ids are sorted.
_SORTED = 64


class _Places(NamedTuple):
    """Which rows of the samples' gradients are reached, and by which time steps."""

    sample: Int[Tensor, " rows"]
    id: Int[Tensor, " rows"]
    step: Int[Tensor, " steps"]  # those that count, of all samples' steps
    row: Int[Tensor, " steps"]  # where they go

    def values(self, g: Float[Tensor, "batch time features"]) -> Tensor:
        """Sums of the time steps of each (sample, id), `[rows, features]`."""
        dtype = accumulation_dtype(g.dtype)
        terms = g.flatten(0, 1)[self.step].to(dtype)
        return terms.new_zeros(len(self.id), g.shape[2]).index_add_(0, self.row, terms)


def _places(ids: Int[Tensor, "batch time"], padding_idx: int) -> _Places:
    """Sort the time steps by (sample, id)."""
    ids = ids.long()
    keep = (ids != padding_idx).flatten()
    kept = ids.flatten()[keep]
    stride = int(kept.max()) + 1 if kept.numel() else 1
    step = keep.nonzero()[:, 0]
    sample = step // max(1, ids.shape[1])
    keys, row = torch.unique(sample * stride + kept, return_inverse=True)
    return _Places(keys // stride, keys % stride, step, row)


def _bytes_of_a_step(g: Float[Tensor, "batch time features"]) -> int:
    """What summing by id takes for one feature of one time step, and its square."""
    return g.itemsize + 4 * accumulation_dtype(g.dtype).itemsize


def _pieces(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
) -> Iterator[tuple[slice, slice, _Places, Tensor]]:
    """Samples and features, and what the rows of these samples' gradients are there."""
    batch, time, features = g.shape
    each = _bytes_of_a_step(g)
    for samples in pieces(batch, time * (features * each + _SORTED)):
        places = _places(ids[samples], padding_idx)
        steps = (samples.stop - samples.start) * time
        for some in pieces(features, steps * each):
            yield samples, some, places, places.values(g[samples, :, some])


def _zeros(g: Tensor, *shape: int) -> Tensor:
    return g.new_zeros(shape, dtype=accumulation_dtype(g.dtype))


def _embedding_sq_norms(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
) -> Float[Tensor, " batch"]:
    """Squared norm of each sample's gradient: steps with the same id add up first."""
    norms = _zeros(g, len(ids))
    for samples, _, places, values in _pieces(ids, g, padding_idx):
        norms[samples].index_add_(0, places.sample, values.square_().sum(dim=1))
        del values
    return norms


def _embedding_second_moment(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
    num_embeddings: int,
) -> Float[Tensor, "num_embeddings features"]:
    """Sum over the samples of the elementwise square of their gradients."""
    total = _zeros(g, num_embeddings, g.shape[2])
    for _, some, places, values in _pieces(ids, g, padding_idx):
        total[:, some].index_add_(0, places.id, values.square_())
        del values
    return total


def _embedding_gram(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
) -> Float[Tensor, "batch batch"]:
    """Inner products between the samples' gradients, in blocks of ids."""
    places = _places(ids, padding_idx)
    used, column = torch.unique(places.id, return_inverse=True)
    gram = _zeros(g, len(ids), len(ids))
    size = gram.itemsize
    for some in pieces(g.shape[2], ids.numel() * _bytes_of_a_step(g)):
        values = places.values(g[:, :, some])
        for block in pieces(len(used), len(ids) * values.shape[1] * size, 4):
            here = (column >= block.start) & (column < block.stop)
            part = _zeros(g, len(ids), block.stop - block.start, values.shape[1])
            part[places.sample[here], column[here] - block.start] = values[here]
            gram.addmm_(part.flatten(1), part.flatten(1).T)
            del part
        del values
    return gram


def _embedding_dots(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
    v: Float[Tensor, "num_embeddings features"],
) -> Float[Tensor, " batch"]:
    """Inner product of each sample's gradient with the direction `v`."""
    dtype = accumulation_dtype(g.dtype)
    keep = ids != padding_idx

    def products(rows: Tensor, g: Tensor, keep: Tensor) -> tuple[Tensor]:
        steps = v[rows].to(dtype).mul_(g).sum(dim=2)
        return (steps.masked_fill_(~keep, 0).sum(dim=1),)

    size = (v.itemsize if v.dtype != dtype else 0) + dtype.itemsize
    (dots,) = sums_over_time(
        products, ids * keep, g, keep, bytes_each=g.shape[2] * size
    )
    return dots


def _embedding_gradients(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
    num_embeddings: int,
) -> Float[Tensor, "batch num_embeddings features"]:
    """Each sample's gradient. For chunks of a batch."""
    grads = _zeros(g, len(ids), num_embeddings, g.shape[2])
    for samples, some, places, values in _pieces(ids, g, padding_idx):
        grads[samples, :, some].index_put_((places.sample, places.id), values)
        del values
    return grads


def _tied_cross(
    ids: Int[Tensor, "batch time"],
    ge: Float[Tensor, "batch time features"],
    padding_idx: int,
    a: Float[Tensor, "batch step features"],
    go: Float[Tensor, "batch step num_embeddings"],
) -> Float[Tensor, " batch"]:
    """Inner product of a sample's embedding gradient with its output head's.

    For a table that is also the weight of the head with inputs `a` and gradient of
    outputs `go`: sum_{t, s} (ge[n, t] . a[n, s]) go[n, s, ids[n, t]]. Only the columns
    `ids` of `go` are read: with those gathered beforehand, [batch, step, time], pass
    arange(time) as ids (and -1 with padding_idx -1 where a step does not count).
    """
    dtype = accumulation_dtype(ge.dtype)
    keep = ids != padding_idx
    columns = ids * keep
    size = (
        2 * dtype.itemsize * ids.shape[1]
        + itemsize(a.dtype, dtype) * a.shape[2]
        + go.itemsize * ids.shape[1]
    )
    cross = ge.new_zeros(len(ids), dtype=dtype)
    table = ids.shape[1] * itemsize(ge.dtype, dtype) * ge.shape[2]
    for samples in pieces(len(ids), table + a.shape[1] * size):
        # The steps of the head, all against all of the table's.
        kept, grads = keep[samples].unsqueeze(1), ge[samples].to(dtype).transpose(1, 2)
        for steps in pieces(a.shape[1], (samples.stop - samples.start) * size):
            inputs = a[samples, steps].to(dtype)
            places = columns[samples].unsqueeze(1).expand(-1, inputs.shape[1], -1)
            products = torch.bmm(inputs, grads)
            products *= go[samples, steps].gather(2, places)
            cross[samples] += products.masked_fill_(~kept, 0).sum(dim=(1, 2))
    return cross


def _embedding_sq_norms_native(
    kernels: Any, ids: Tensor, g: Tensor, padding_idx: int
) -> Tensor:
    size = accumulation_dtype(g.dtype).itemsize
    if g.itemsize < size:  # what is not converted is copied at most once
        each = g.shape[1] * g.shape[2] * size
        if each > step_of(1):
            return _embedding_sq_norms(ids, g, padding_idx)
        if len(g) > step_of(each):
            return in_pieces(
                lambda some: _embedding_sq_norms_native(
                    kernels, ids[some], g[some], padding_idx
                ),
                *(len(g), each),
            )
    return native.embedding_sq_norms(kernels, ids, g, padding_idx)


def _tied_cross_native(
    kernels: Any, ids: Tensor, ge: Tensor, padding_idx: int, a: Tensor, go: Tensor
) -> Tensor:
    if ge.dtype not in NATIVE or not ge.dtype == a.dtype == go.dtype:
        return _tied_cross(ids, ge, padding_idx, a, go)
    return native.tied_cross(kernels, ids, ge, padding_idx, a, go)


embedding_sq_norms = Op("embedding_sq_norms", _embedding_sq_norms)
embedding_second_moment = Op("embedding_second_moment", _embedding_second_moment)
embedding_gram = Op("embedding_gram", _embedding_gram)
embedding_dots = Op("embedding_dots", _embedding_dots)
embedding_gradients = Op("embedding_gradients", _embedding_gradients)
tied_cross = Op("tied_cross", _tied_cross)
embedding_sq_norms.add_native(_embedding_sq_norms_native, dtypes=(torch.int64,))
tied_cross.add_native(_tied_cross_native, dtypes=(torch.int64,))
embedding_sq_norms.add_cuda(cuda.embedding_sq_norms, dtypes=(torch.int64,))
embedding_second_moment.add_cuda(cuda.embedding_second_moment, dtypes=(torch.int64,))
embedding_dots.add_cuda(cuda.embedding_dots, dtypes=(torch.int64,))
