"""The least that each op has to move and to multiply, whatever computes it.

Bytes: every input read once, every output written once. Products: operations (two a
multiply-add) of the cheapest known way. No kernel can do less; what it does more is its
own affair, and a test counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastminima.ops.attention import Scores
from fastminima.ops.conv_geometry import ConvGeometry

__all__ = ["FLOORS", "Work", "work_of"]


class Work(NamedTuple):
    """Bytes to and from memory, and operations of matrix products."""

    bytes: int
    products: int = 0


def _size(*tensors: Any) -> int:
    """Bytes of tensors, also in lists; what is no tensor is an argument by value."""
    found = (x for x in tree_leaves(tensors) if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in found)


def _wide(x: Tensor) -> int:
    """Bytes of an element in the accumulation dtype."""
    return max(4, x.element_size())


def _gram(batch: int, time: int, width: int) -> int:
    """All products of two time steps, t >= s, of rows of this width."""
    return batch * time * (time + 1) * width


class _Sizes(NamedTuple):
    batch: int
    time: int
    d_in: int
    d_out: int

    @property
    def direct(self) -> int:
        return 2 * prod(self)

    @property
    def cheapest(self) -> int:
        """For squared norms: of the Gram way and the direct one."""
        if self.time == 1:
            return 0
        return min(_gram(*self[:2], self.d_in + self.d_out), self.direct)


def _sizes(a: Tensor, g: Tensor) -> _Sizes:
    return _Sizes(*a.shape, g.shape[-1])


def _row_sq_norms(a: Tensor, g: Tensor) -> Work:
    return Work(_size(a, g) + 2 * len(g) * _wide(g))


def _gram_sq_norms(a: Tensor, g: Tensor) -> Work:
    batch, time, d_in, d_out = _sizes(a, g)
    return Work(_size(a, g) + batch * _wide(g), _gram(batch, time, d_in + d_out))


def _direct_sq_norms(a: Tensor, g: Tensor) -> Work:
    return Work(_size(a, g) + len(g) * _wide(g), _sizes(a, g).direct)


def _sequence_sq_norms(a: Tensor, g: Tensor, with_bias: bool) -> Work:
    written = (1 + with_bias) * len(g) * _wide(g)
    return Work(_size(a, g) + written, _sizes(a, g).cheapest)


def _sequence_fused(
    a: Tensor, g: Tensor, with_bias: bool, with_second_moment: bool
) -> Work:
    batch, _, d_in, d_out = sizes = _sizes(a, g)
    written = (
        (1 + with_second_moment) * d_in * d_out + batch + with_bias * batch * d_out
    )
    return Work(_size(a, g) + written * _wide(g), sizes.direct)


def _sequence_second_moment(a: Tensor, g: Tensor) -> Work:
    sizes = _sizes(a, g)
    return Work(_size(a, g) + sizes.d_in * sizes.d_out * _wide(g), sizes.direct)


def _sequence_gram(a: Tensor, g: Tensor) -> Work:
    batch, _, d_in, d_out = sizes = _sizes(a, g)
    by_gradients = sizes.direct + batch * (batch + 1) * d_in * d_out
    by_rows = _gram(1, batch * sizes.time, d_in + d_out)
    return Work(_size(a, g) + batch**2 * _wide(g), min(by_gradients, by_rows))


def _sequence_dots(a: Tensor, g: Tensor, v: Tensor) -> Work:
    return Work(_size(a, g, v) + len(g) * _wide(g), _sizes(a, g).direct)


def _sequence_multi_dots(a: Tensor, g: Tensor, v: list[Tensor]) -> Work:
    batch, _, d_in, d_out = sizes = _sizes(a, g)
    written = batch * len(v) * _wide(g)
    by_gradients = sizes.direct + 2 * len(v) * batch * d_in * d_out
    return Work(_size(a, g, v) + written, min(by_gradients, len(v) * sizes.direct))


def _sequence_gradients(a: Tensor, g: Tensor) -> Work:
    batch, _, d_in, d_out = sizes = _sizes(a, g)
    return Work(_size(a, g) + batch * d_in * d_out * _wide(g), sizes.direct)


def _conv_direct(x: Tensor, g: Tensor, geometry: ConvGeometry) -> int:
    """Every position of the rows with every weight, once a sample."""
    rows, _ = geometry.roles(x, g)
    positions = rows.shape[0] * prod(rows.shape[2:])
    return 2 * positions * prod(geometry.weight_shape(x, g))


def _conv_sq_norms(
    x: Tensor, g: Tensor, geometry: ConvGeometry, with_bias: bool
) -> Work:
    """Directly, or by Gram matrices over the positions of channels, not of patches."""
    rows, _ = geometry.roles(x, g)
    positions = prod(rows.shape[2:])
    gram = _gram(len(g), positions, x.shape[1] + g.shape[1])
    written = (1 + with_bias) * len(g) * _wide(g)
    return Work(_size(x, g) + written, min(gram, _conv_direct(x, g, geometry)))


def _conv_fused(
    x: Tensor, g: Tensor, geometry: ConvGeometry, with_bias: bool, with_moment: bool
) -> Work:
    weight = prod(geometry.weight_shape(x, g))
    written = (1 + with_moment) * weight + len(g) + with_bias * g.shape[0] * g.shape[1]
    return Work(_size(x, g) + written * _wide(g), _conv_direct(x, g, geometry))


def _conv_second_moment(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Work:
    weight = prod(geometry.weight_shape(x, g))
    return Work(_size(x, g) + weight * _wide(g), _conv_direct(x, g, geometry))


def _conv_gradients(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Work:
    weights = len(g) * prod(geometry.weight_shape(x, g))
    return Work(_size(x, g) + weights * _wide(g), _conv_direct(x, g, geometry))


def _conv_gram(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Work:
    return Work(_size(x, g) + len(g) ** 2 * _wide(g))  # its products: not known


def _conv_dots(x: Tensor, g: Tensor, geometry: ConvGeometry, v: Tensor) -> Work:
    return Work(_size(x, g, v) + len(g) * _wide(g), _conv_direct(x, g, geometry))


def _time_gradients(g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> Work:
    return Work(_size(g, x, mean, rstd) + 2 * len(g) * g.shape[2] * _wide(g))


def _space_gradients(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Work:
    return Work(_size(g, x, mean, rstd) + 2 * len(g) * g.shape[1] * _wide(g))


def _seen(q: Tensor, k: Tensor, scores: Scores) -> int:
    """Pairs of a query and a key that it sees."""
    (batch, heads, time, _), steps = q.shape, k.shape[2]
    each = time * steps
    if scores.is_causal:
        least = min(time, steps)
        each = least * (least + 1) // 2 + (time - least) * steps
    return batch * heads * each


def _row(x: Tensor) -> int:
    """Bytes of one number in the accumulation dtype for each row."""
    return x[..., 0].numel() * _wide(x)


def _attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Work:
    d_in, d_out = q.shape[3], v.shape[3]
    written = q[..., 0].numel() * d_out * q.element_size() + 2 * _row(q)
    products = 2 * _seen(q, k, scores) * (d_in + d_out)
    return Work(_size(q, k, v, scores) + written, products)


def _attention_gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, rows: Tensor, scores: Scores
) -> Work:
    products = 2 * _seen(q, k, scores) * (3 * q.shape[3] + 2 * v.shape[3])
    return Work(_size(g, q, k, v, o, rows, scores) + _size(q, k, v), products)


def _attention_tangent(*arguments: Any) -> Work:
    *_, q, k, v, o, _rows, scores = arguments
    products = 2 * _seen(q, k, scores) * (3 * q.shape[3] + 2 * v.shape[3])
    return Work(_size(arguments) + _size(o) + _row(q), products)


def _attention_gradients_tangent(*arguments: Any) -> Work:
    q, k, v = arguments[4:7]
    products = 2 * _seen(q, k, arguments[-1]) * (7 * q.shape[3] + 3 * v.shape[3])
    return Work(_size(arguments) + _size(q, k, v), products)


def _over_time(g: Tensor, *more: Tensor) -> Work:
    return Work(_size(g, more) + len(g) * g.shape[2] * _wide(g))


def _sum_over_space(g: Tensor) -> Work:
    return Work(_size(g) + g.shape[0] * g.shape[1] * _wide(g))


def _tokens(ids: Tensor, g: Tensor, written: int) -> Work:
    return Work(_size(ids, g) + written * _wide(g))


def _tied_cross(
    ids: Tensor, ge: Tensor, padding_idx: int, a: Tensor, go: Tensor
) -> Work:
    batch, steps, width = a.shape
    columns = batch * steps * ids.shape[1]
    read = _size(ids, ge, a) + columns * go.element_size()
    return Work(read + batch * _wide(ge), 2 * columns * width)


# By op, of the arguments that it is called with.
FLOORS: dict[str, Callable[..., Work]] = {
    "row_sq_norms": _row_sq_norms,
    "gram_sq_norms": _gram_sq_norms,
    "direct_sq_norms": _direct_sq_norms,
    "sequence_sq_norms": _sequence_sq_norms,
    "sequence_fused": _sequence_fused,
    "sequence_second_moment": _sequence_second_moment,
    "sequence_gram": _sequence_gram,
    "sequence_dots": _sequence_dots,
    "sequence_multi_dots": _sequence_multi_dots,
    "sequence_gradients": _sequence_gradients,
    "conv_sq_norms": _conv_sq_norms,
    "conv_fused": _conv_fused,
    "conv_second_moment": _conv_second_moment,
    "conv_gradients": _conv_gradients,
    "conv_gram": _conv_gram,
    "conv_dots": _conv_dots,
    "attention": _attention,
    "attention_gradients": _attention_gradients,
    "attention_tangent": _attention_tangent,
    "attention_gradients_tangent": _attention_gradients_tangent,
    "layer_norm_gradients": _time_gradients,
    "channel_norm_gradients": _space_gradients,
    "sum_over_time": _over_time,
    "sum_over_space": _sum_over_space,
    "product_over_time": _over_time,
    "embedding_sq_norms": lambda ids, g, _: _tokens(ids, g, len(g)),
    "embedding_second_moment": lambda ids, g, _, count: _tokens(
        ids, g, count * g.shape[2]
    ),
    "embedding_gram": lambda ids, g, _: _tokens(ids, g, len(g) ** 2),
    "embedding_dots": lambda ids, g, _, v: _tokens(ids, g, len(g)),
    "embedding_gradients": lambda ids, g, _, count: _tokens(
        ids, g, len(g) * count * g.shape[2]
    ),
    "tied_cross": _tied_cross,
    "lanczos_step": lambda w, v, u, beta: Work(_size(w, v, u) + _size(w)),
    "power_step": lambda w, v, shift, out: Work(_size(w, v, out)),
    "dots": lambda w, rows: Work(_size(w, rows)),
    "project_out": lambda w, basis: Work(_size(w, basis) + _size(w)),
    "linear_combinations": lambda first, rest, weights: Work(
        _size(first, rest) + weights.shape[1] * _size(first)
    ),
    "same_values": lambda a, b: Work(_size(a, b)),
    "sq_norm": lambda x: Work(_size(x)),
    "sample_sq_norms": lambda x: Work(_size(x)),
    "multi_sq_norm": lambda xs: Work(_size(xs)),
    "langevin_step_": lambda params, grads, velocities, *_: Work(
        2 * _size(params, velocities) + _size(grads)
    ),
}


def work_of(op: str, arguments: tuple[Any, ...]) -> Work:
    """The least work of an op on these arguments."""
    return FLOORS[op](*arguments)
