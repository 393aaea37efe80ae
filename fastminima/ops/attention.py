"""Attention, its gradients, and the tangents of both along a direction.

o = P v with P = softmax(s), s = scale q k^T + mask, and for a gradient g of o

    dv = P^T g,   dq = scale ds k,   dk = scale ds^T q,   ds = P (g v^T - D),

D = g . o of each row, products without a sign elementwise. Along a direction (uq, uk, uv)
the scores move by t = scale (uq k^T + q uk^T), probabilities by P (t - e) with e = sum_j
P t of each row, and all else, by the product rule and with g as it is:

    o' = P (t - e) v + P uv,   dv' = (P (t - e))^T g,   D' = g . o',
    dq' = scale (ds' k + ds uk),   dk' = scale (ds'^T q + ds^T uq),
    ds' = (t - e) ds + P (g uv^T - D').

That is also the derivative of <dq, uq> + <dk, uk> + <dv, uv>, as a second derivative is
symmetric: by g it is o', by q, k and v it is dq', dk' and dv'. A pass over the scores of
a row needs numbers of the whole row: its largest score and 1 / sum exp(s - largest) for
P (kept from the forward pass: their logarithm would be lost beside a mask of -3e38), D
(from g and o), then e (from a pass of its own, with o') and D' (from g and o'). So no
pass needs more than a piece of the scores: memory is that of the arguments.

Several heads of queries may share a head of keys and values. A row that sees no key has
an output of zero, and zero gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._pieces import LIMIT
from .table import Op

__all__ = [
    "Scores",
    "attention",
    "attention_gradients",
    "attention_gradients_tangent",
    "attention_tangent",
]

Queries = Float[Tensor, "batch heads time d_in"]
Keys = Float[Tensor, "batch groups steps d_in"]
Values = Float[Tensor, "batch groups steps d_out"]
Outputs = Float[Tensor, "batch heads time d_out"]
Stats = Float[Tensor, "2 batch heads time"]
RowMeans = Float[Tensor, "batch heads time"]


class Scores(NamedTuple):
    """How scores are made of the products of queries and keys.

    Attributes:
        scale: What the products are multiplied with.
        is_causal: Whether query i sees the keys j <= i alone.
        mask: None; or booleans, True where a key is seen; or numbers that are added.
            Of four dims, each that of the scores or one.
    """

    scale: float
    is_causal: bool = False
    mask: Tensor | None = None


class _Piece(NamedTuple):
    """Some rows of the scores of some heads, up to the last column that they see."""

    heads: slice
    rows: slice
    columns: slice

    @property
    def queries(self) -> tuple[slice, slice]:
        return self.heads, self.rows

    @property
    def keys(self) -> tuple[slice, slice]:
        return self.heads, self.columns


# Matrices of the size of a piece that are there at a time, in the accumulation dtype.
_COPIES = 8
_SHARE = 2  # of the limit: half of it


class _Layout:
    """Heads of keys, `[heads, steps, width]`, and the rows that queries have for each.

    Heads of queries that share a head of keys lie one after the other in its rows.
    """

    def __init__(self, q: Tensor, k: Tensor, scores: Scores) -> None:
        self.batch, self.groups, self.steps = k.shape[:3]
        self.shared, self.time = q.shape[1] // max(1, self.groups), q.shape[2]
        self.heads, self.rows = self.batch * self.groups, self.shared * self.time
        self.scores = scores
        self.dtype = accumulation_dtype(q.dtype)

    def __iter__(self) -> Iterator[_Piece]:
        each = _COPIES * self.dtype.itemsize * self.steps  # a row's
        heads = max(1, LIMIT // _SHARE // max(1, each * self.rows))
        rows = max(1, min(self.rows, LIMIT // _SHARE // max(1, each)))
        if self.scores.is_causal and self.shared == 1:
            rows = min(rows, max(64, -(-self.time // 8)))
        for head in range(0, self.heads, heads):
            for row in range(0, self.rows, rows):
                stop = min(row + rows, self.rows)
                yield _Piece(
                    slice(head, min(head + heads, self.heads)),
                    slice(row, stop),
                    slice(self._seen(stop)),
                )

    def _seen(self, stop: int) -> int:
        """How many keys the rows before `stop` see, at the most."""
        if self.scores.is_causal and self.shared == 1:
            return min(stop, self.steps)
        return self.steps

    def folded(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors with a row for each query, with one for each row of a head of keys."""
        shape = self.heads, self.rows
        return [x.reshape(*shape, *x.shape[3:]) for x in tensors]

    def merged(self, *tensors: Tensor) -> list[Tensor]:
        """Keys and values, of all heads."""
        return [x.reshape(self.heads, self.steps, -1) for x in tensors]

    def of_queries(self, x: Tensor) -> Tensor:
        """As the queries are."""
        shape = self.batch, self.groups * self.shared, self.time
        return x.view(*shape, *x.shape[2:])

    def of_keys(self, x: Tensor) -> Tensor:
        return x.view(self.batch, self.groups, self.steps, -1)

    def products(self, piece: _Piece, q: Tensor, k: Tensor) -> Tensor:
        """scale q k^T."""
        q, k = q[piece.queries].to(self.dtype), k[piece.keys].to(self.dtype)
        return torch.bmm(q, k.mT).mul_(self.scores.scale)

    def masked(self, piece: _Piece, products: Tensor) -> Tensor:
        """The scores, of these products: they are written over."""
        row = torch.arange(piece.rows.start, piece.rows.stop, device=products.device)
        t = row % max(1, self.time)
        if self.scores.is_causal:
            j = torch.arange(piece.columns.stop, device=products.device)
            products.masked_fill_(j > t[:, None], -torch.inf)
        if self.scores.mask is None:
            return products
        shape = self.batch, self.groups * self.shared, self.time, self.steps
        n = torch.arange(piece.heads.start, piece.heads.stop, device=products.device)
        head = (n % self.groups * self.shared)[:, None] + row // max(1, self.time)
        seen = self.scores.mask.expand(shape)[..., piece.columns]
        seen = seen[(n // self.groups)[:, None], head, t]
        if seen.dtype == torch.bool:
            return products.masked_fill_(seen.logical_not_(), -torch.inf)
        return products.add_(seen)

    def probabilities(
        self, piece: _Piece, q: Tensor, k: Tensor, stats: Tensor
    ) -> Tensor:
        """P of a piece, from the statistics of its rows."""
        largest, inverse = stats[:, *piece.queries, None]
        scores = self.masked(piece, self.products(piece, q, k))
        return scores.sub_(largest).exp_().mul_(inverse)

    def tangents(
        self, piece: _Piece, q: Tensor, k: Tensor, uq: Tensor, uk: Tensor
    ) -> Tensor:
        """t of a piece."""
        return self.products(piece, uq, k).add_(self.products(piece, q, uk))

    def wide(self, *tensors: Tensor) -> list[Tensor]:
        return [x.to(self.dtype) for x in tensors]

    def totals(self, *tensors: Tensor) -> list[Tensor]:
        """Zeros for sums over the pieces of rows, shaped as these."""
        return [x.new_zeros(x.shape, dtype=self.dtype).contiguous() for x in tensors]


def _attention(q: Queries, k: Keys, v: Values, scores: Scores) -> tuple[Outputs, Stats]:
    """Outputs, and of each row its largest score and 1 / sum exp(s - largest).

    Both are zero for a row that sees nothing.
    """
    cut = _Layout(q, k, scores)
    (fq,), (fk, fv) = cut.folded(q), cut.merged(k, v)
    out = fq.new_empty(cut.heads, cut.rows, v.shape[-1])
    stats = fq.new_empty(2, cut.heads, cut.rows, dtype=cut.dtype)
    for piece in cut:
        s = cut.masked(piece, cut.products(piece, fq, fk))
        largest = s.amax(dim=2)
        largest.masked_fill_(largest.isneginf(), 0)
        weights = s.sub_(largest[..., None]).exp_()
        total = weights.sum(dim=2)
        inverse = total.reciprocal().masked_fill_(total == 0, 0)
        (values,) = cut.wide(fv[piece.keys])
        out[piece.queries] = torch.bmm(weights.mul_(inverse[..., None]), values)
        stats[0, *piece.queries], stats[1, *piece.queries] = largest, inverse
    return cut.of_queries(out), stats.view(2, *q.shape[:3])


def _attention_gradients(
    g: Outputs, q: Queries, k: Keys, v: Values, o: Outputs, stats: Stats, scores: Scores
) -> tuple[Queries, Keys, Values]:
    """Gradients of <g, attention(q, k, v)> by q, k and v."""
    cut = _Layout(q, k, scores)
    fg, fq, fo = cut.folded(g, q, o)
    fk, fv = cut.merged(k, v)
    stats = stats.view(2, cut.heads, cut.rows)
    dq = fq.new_empty(fq.shape)
    dk, dv = cut.totals(fk, fv)
    for piece in cut:
        p = cut.probabilities(piece, fq, fk, stats)
        rows, columns = piece.queries, piece.keys
        grad, queries, outputs = cut.wide(fg[rows], fq[rows], fo[rows])
        keys, values = cut.wide(fk[columns], fv[columns])
        dv[columns].baddbmm_(p.mT, grad)
        mean = (grad * outputs).sum(dim=2, keepdim=True)
        ds = torch.bmm(grad, values.mT).sub_(mean).mul_(p)
        dq[rows] = torch.bmm(ds, keys).mul_(scores.scale)
        dk[columns].baddbmm_(ds.mT, queries, alpha=scores.scale)
    return cut.of_queries(dq), *(cut.of_keys(x.to(k.dtype)) for x in (dk, dv))


def _attention_tangent(
    uq: Queries, uk: Keys, uv: Values,
    q: Queries, k: Keys, v: Values, o: Outputs, stats: Stats, scores: Scores,
) -> tuple[Outputs, RowMeans]:  # fmt: skip
    """How outputs move along a direction (uq, uk, uv), o', and e of each row."""
    cut = _Layout(q, k, scores)
    fuq, fq, fo = cut.folded(uq, q, o)
    fuk, fuv, fk, fv = cut.merged(uk, uv, k, v)
    stats = stats.view(2, cut.heads, cut.rows)
    out = fo.new_empty(fo.shape)
    means = stats.new_empty(stats.shape[1:])
    for piece in cut:
        p = cut.probabilities(piece, fq, fk, stats)
        moved = cut.tangents(piece, fq, fk, fuq, fuk).mul_(p)
        mean = moved.sum(dim=2, keepdim=True)
        moved.addcmul_(p, mean, value=-1)
        values, pushed = cut.wide(fv[piece.keys], fuv[piece.keys])
        out[piece.queries] = torch.bmm(moved, values).baddbmm_(p, pushed)
        means[piece.queries] = mean[..., 0]
    return cut.of_queries(out), cut.of_queries(means)


def _attention_gradients_tangent(
    g: Outputs, uq: Queries, uk: Keys, uv: Values,
    q: Queries, k: Keys, v: Values, o: Outputs, stats: Stats,
    moved: Outputs, means: RowMeans, scores: Scores,
) -> tuple[Queries, Keys, Values]:  # fmt: skip
    """How the gradients for g move along a direction (uq, uk, uv): dq', dk', dv'.

    `moved` and `means` are the results of `attention_tangent`.
    """
    cut = _Layout(q, k, scores)
    fg, fuq, fq, fo, fmoved = cut.folded(g, uq, q, o, moved)
    fuk, fuv, fk, fv = cut.merged(uk, uv, k, v)
    stats, (fmeans,) = stats.view(2, cut.heads, cut.rows), cut.folded(means)
    dq = fq.new_empty(fq.shape)
    dk, dv = cut.totals(fk, fv)
    for piece in cut:
        rows, columns = piece.queries, piece.keys
        p = cut.probabilities(piece, fq, fk, stats)
        t = cut.tangents(piece, fq, fk, fuq, fuk).sub_(fmeans[rows][..., None])
        grad, turned, queries = cut.wide(fg[rows], fuq[rows], fq[rows])
        pushed, keys = cut.wide(fuk[columns], fk[columns])
        dv[columns].baddbmm_((p * t).mT, grad)
        ds, moving = _scores_tangent(cut, piece, p, t, (fg, fo, fmoved), (fv, fuv))
        dq[rows] = torch.bmm(moving, keys).baddbmm_(ds, pushed).mul_(scores.scale)
        dk[columns].baddbmm_(moving.mT, queries, alpha=scores.scale)
        dk[columns].baddbmm_(ds.mT, turned, alpha=scores.scale)
    return cut.of_queries(dq), *(cut.of_keys(x.to(k.dtype)) for x in (dk, dv))


def _scores_tangent(
    cut: _Layout, piece: _Piece, p: Tensor, t: Tensor,
    of_rows: tuple[Tensor, ...], of_columns: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ds and ds' of a piece, of P and t - e: both are written over."""
    grad, outputs, moved = cut.wide(*(x[piece.queries] for x in of_rows))
    values, pushed = cut.wide(*(x[piece.keys] for x in of_columns))
    mean = (grad * outputs).sum(dim=2, keepdim=True)
    ds = torch.bmm(grad, values.mT).sub_(mean).mul_(p)
    mean = (grad * moved).sum(dim=2, keepdim=True)
    moving = torch.bmm(grad, pushed.mT).sub_(mean).mul_(p)
    return ds, moving.add_(t.mul_(ds))


attention = Op("attention", _attention)
attention_gradients = Op("attention_gradients", _attention_gradients)
attention_tangent = Op("attention_tangent", _attention_tangent)
attention_gradients_tangent = Op(
    "attention_gradients_tangent", _attention_gradients_tangent
)
# Not float16: gradients of probabilities, rounded to it, fall below its least number.
for _op in (
    attention,
    attention_gradients,
    attention_tangent,
    attention_gradients_tangent,
):
    _op.add_triton(f"attention.{_op.name}", dtypes=(torch.float32, torch.bfloat16))
