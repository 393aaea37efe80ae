"""Per-sample statistics of the gradient of an embedding table.

Row v of sample n's gradient is the sum of g[n, t] over the t where ids[n, t] = v, of
shape [num_embeddings, features] in all; the row `padding_idx` (-1: none) stays zero.
Rows are found by sorting ids within samples: nothing here has the size of batch x
table, except where that is the result asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _native
from .._dtypes import accumulation_dtype
from . import embedding_cuda
from ._arguments import SUFFIX, accumulated, contiguous_rows
from .table import Op

__all__ = [
    "embedding_dots",
    "embedding_gradients",
    "embedding_gram",
    "embedding_second_moment",
    "embedding_sq_norms",
    "tied_cross",
]

_BLOCK_BYTES = 64 << 20


class _Rows(NamedTuple):
    """The rows of the samples' gradients that an id has reached, by sample and id."""

    sample: Int[Tensor, " rows"]
    id: Int[Tensor, " rows"]
    value: Float[Tensor, "rows features"]


def _rows(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
) -> _Rows:
    """Add up the time steps of each (sample, id)."""
    ids = ids.long()
    keep = (ids != padding_idx).flatten()
    kept = ids.flatten()[keep]
    stride = int(kept.max()) + 1 if kept.numel() else 1
    sample = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
    sample = sample.repeat_interleave(ids.shape[1])
    keys, row = torch.unique(sample[keep] * stride + kept, return_inverse=True)
    terms = g.flatten(0, 1)[keep].to(accumulation_dtype(g.dtype))
    value = terms.new_zeros(len(keys), g.shape[2]).index_add_(0, row, terms)
    return _Rows(keys // stride, keys % stride, value)


def _embedding_sq_norms(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
) -> Float[Tensor, " batch"]:
    """Squared norm of each sample's gradient: steps with the same id add up first."""
    rows = _rows(ids, g, padding_idx)
    norms = rows.value.new_zeros(len(ids))
    return norms.index_add_(0, rows.sample, rows.value.square().sum(dim=1))


def _embedding_second_moment(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
    num_embeddings: int,
) -> Float[Tensor, "num_embeddings features"]:
    """Sum over the samples of the elementwise square of their gradients."""
    rows = _rows(ids, g, padding_idx)
    total = rows.value.new_zeros(num_embeddings, g.shape[2])
    return total.index_add_(0, rows.id, rows.value.square())


def _embedding_gram(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
) -> Float[Tensor, "batch batch"]:
    """Inner products between the samples' gradients, in blocks of ids."""
    rows = _rows(ids, g, padding_idx)
    used, column = torch.unique(rows.id, return_inverse=True)
    gram = rows.value.new_zeros(len(ids), len(ids))
    bytes_each = len(ids) * g.shape[2] * rows.value.element_size()
    step = max(1, _BLOCK_BYTES // max(1, bytes_each))
    for start in range(0, len(used), step):
        here = (column >= start) & (column < start + step)
        part = rows.value.new_zeros(len(ids), min(step, len(used) - start), g.shape[2])
        part[rows.sample[here], column[here] - start] = rows.value[here]
        gram.addmm_(part.flatten(1), part.flatten(1).T)
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
    steps = (v[ids * keep].to(dtype) * g.to(dtype)).sum(dim=2)
    return torch.where(keep, steps, 0).sum(dim=1)


def _embedding_gradients(
    ids: Int[Tensor, "batch time"],
    g: Float[Tensor, "batch time features"],
    padding_idx: int,
    num_embeddings: int,
) -> Float[Tensor, "batch num_embeddings features"]:
    """Each sample's gradient. For chunks of a batch."""
    rows = _rows(ids, g, padding_idx)
    grads = rows.value.new_zeros(len(ids), num_embeddings, g.shape[2])
    grads[rows.sample, rows.id] = rows.value
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
    columns = (ids * keep).unsqueeze(1).expand(-1, a.shape[1], -1)
    products = torch.bmm(a.to(dtype), ge.to(dtype).transpose(1, 2))
    products = products * go.gather(2, columns).to(dtype)
    return torch.where(keep.unsqueeze(1), products, 0).sum(dim=(1, 2))


def _embedding_sq_norms_native(
    kernels: Any, ids: Tensor, g: Tensor, padding_idx: int
) -> Tensor:
    (g,) = accumulated(g)
    ids, g = ids.contiguous(), contiguous_rows(g)
    norms = g.new_empty(len(g))
    getattr(kernels, f"embedding_sq_norms_{SUFFIX[g.dtype]}")(
        *(ids.data_ptr(), g.data_ptr(), g.stride(0), g.stride(1), padding_idx),
        *(*g.shape, norms.data_ptr(), _native.threads()),
    )
    return norms


embedding_sq_norms = Op("embedding_sq_norms", _embedding_sq_norms)
embedding_second_moment = Op("embedding_second_moment", _embedding_second_moment)
embedding_gram = Op("embedding_gram", _embedding_gram)
embedding_dots = Op("embedding_dots", _embedding_dots)
embedding_gradients = Op("embedding_gradients", _embedding_gradients)
tied_cross = Op("tied_cross", _tied_cross)
embedding_sq_norms.add_native(_embedding_sq_norms_native, dtypes=(torch.int64,))
embedding_sq_norms.add_cuda(embedding_cuda.embedding_sq_norms, dtypes=(torch.int64,))
embedding_second_moment.add_cuda(
    embedding_cuda.embedding_second_moment, dtypes=(torch.int64,)
)
embedding_dots.add_cuda(embedding_cuda.embedding_dots, dtypes=(torch.int64,))
