"""Attention, its gradients, and the tangents of both along a direction.

o = P v with P = softmax(s), s = scale q k^T + mask, and for a gradient g of o

    dv = P^T g,   dq = scale ds k,   dk = scale ds^T q,   ds = P (g v^T - D),

D = g . o of each row; products without a sign between matrices of scores are
elementwise. Along a direction (uq, uk, uv) the scores move by t = scale (uq k^T +
q uk^T), the probabilities by P (t - e) with e = sum_j P t of each row, and all else, by
the product rule and with g as it is, by

    o' = P (t - e) v + P uv,   dv' = (P (t - e))^T g,   D' = g . o',
    dq' = scale (ds' k + ds uk),   dk' = scale (ds'^T q + ds^T uq),
    ds' = (t - e) ds + P (g uv^T - D').

That is also the derivative of <dq, uq> + <dk, uk> + <dv, uv>, as second derivatives are
symmetric: by g it is o', by q, k and v it is dq', dk' and dv'. A piece of the scores
needs some numbers of its whole rows. The largest score and 1 / sum exp(s - largest),
which give P, are kept from the forward pass (their logarithm would be lost beside a
mask of -3e38); D is of g and o; e comes, with o', from a pass of its own; D' is of g
and o'. So no pass holds more than a piece: memory is that of the arguments.

Several heads of queries may share a head of keys and values. A row that sees no key has
an output of zero and no gradients.

Source: Dao et al. (2022), "FlashAttention", for the pieces and the first derivative.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .attention_pieces import Layout, Piece, Scores
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


def _attention(q: Queries, k: Keys, v: Values, scores: Scores) -> tuple[Outputs, Stats]:
    """Outputs, and of each row its largest score and 1 / sum exp(s - largest).

    Both are zero for a row that sees nothing.
    """
    cut = Layout(q, k, scores)
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
    cut = Layout(q, k, scores)
    fg, fq, fo = cut.folded(g, q, o)
    fk, fv = cut.merged(k, v)
    stats = stats.view(2, cut.heads, cut.rows)
    dq, dk, dv = (x.new_empty(x.shape) for x in (fq, fk, fv))
    for heads in cut.some_heads():
        sum_k, sum_v = cut.totals(fk[heads], fv[heads])
        for piece in cut.pieces(heads):
            p = cut.probabilities(piece, fq, fk, stats)
            rows, columns = piece.queries, piece.keys
            grad, queries, outputs = cut.wide(fg[rows], fq[rows], fo[rows])
            keys, values = cut.wide(fk[columns], fv[columns])
            sum_v[:, piece.columns].baddbmm_(p.mT, grad)
            mean = (grad * outputs).sum(dim=2, keepdim=True)
            ds = torch.bmm(grad, values.mT).sub_(mean).mul_(p)
            dq[rows] = torch.bmm(ds, keys).mul_(scores.scale)
            sum_k[:, piece.columns].baddbmm_(ds.mT, queries, alpha=scores.scale)
        dk[heads], dv[heads] = sum_k, sum_v
    return cut.of_queries(dq), cut.of_keys(dk), cut.of_keys(dv)


def _attention_tangent(
    uq: Queries, uk: Keys, uv: Values,
    q: Queries, k: Keys, v: Values, o: Outputs, stats: Stats, scores: Scores,
) -> tuple[Outputs, RowMeans]:  # fmt: skip
    """How outputs move along a direction (uq, uk, uv), o', and e of each row."""
    cut = Layout(q, k, scores)
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
    cut = Layout(q, k, scores)
    fg, fuq, fq, fo, fmoved = cut.folded(g, uq, q, o, moved)
    fuk, fuv, fk, fv = cut.merged(uk, uv, k, v)
    stats, (fmeans,) = stats.view(2, cut.heads, cut.rows), cut.folded(means)
    dq, dk, dv = (x.new_empty(x.shape) for x in (fq, fk, fv))
    for heads in cut.some_heads():
        sum_k, sum_v = cut.totals(fk[heads], fv[heads])
        for piece in cut.pieces(heads):
            rows, columns = piece.queries, piece.keys
            p = cut.probabilities(piece, fq, fk, stats)
            t = cut.tangents(piece, fq, fk, fuq, fuk).sub_(fmeans[rows][..., None])
            grad, turned, queries = cut.wide(fg[rows], fuq[rows], fq[rows])
            pushed, keys = cut.wide(fuk[columns], fk[columns])
            sum_v[:, piece.columns].baddbmm_((p * t).mT, grad)
            ds, moving = _scores_tangent(cut, piece, p, t, (fg, fo, fmoved), (fv, fuv))
            dq[rows] = torch.bmm(moving, keys).baddbmm_(ds, pushed).mul_(scores.scale)
            sum_k[:, piece.columns].baddbmm_(moving.mT, queries, alpha=scores.scale)
            sum_k[:, piece.columns].baddbmm_(ds.mT, turned, alpha=scores.scale)
        dk[heads], dv[heads] = sum_k, sum_v
    return cut.of_queries(dq), cut.of_keys(dk), cut.of_keys(dv)


def _scores_tangent(
    cut: Layout, piece: Piece, p: Tensor, t: Tensor,
    of_rows: tuple[Tensor, ...], of_columns: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The piece of ds and of ds', from P and t - e, which is written over."""
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
