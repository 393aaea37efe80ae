"""Per-sample statistics of the gradient of a dense layer's weight.

Sample n's gradient is sum_t g[n, t] (outer) a[n, t], of shape [d_out, d_in]: `a` the
inputs of the layer, `g` the gradient of its outputs. Results leave in the accumulation
dtype, and no squared norm is negative.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _native
from .._dtypes import accumulation_dtype
from ._arguments import FLOATS, TRITON, accumulated
from ._pieces import in_pieces, itemsize, limited, pieces, step_of
from .broadcast import sum_over_time
from .cost.dense import (
    NARROW,
    choose,
    guard,
    is_fused_faster,
    is_moment_faster,
    is_torch_faster,
)
from .dense_pairs import sequence_dots, sequence_gram, sequence_multi_dots
from .dense_pieces import Sequences
from .native import dense as native
from .table import Op

__all__ = [
    "direct_sq_norms",
    "gram_sq_norms",
    "row_sq_norms",
    "sequence_dots",
    "sequence_fused",
    "sequence_gradients",
    "sequence_gram",
    "sequence_multi_dots",
    "sequence_second_moment",
    "sequence_sq_norms",
]


def _row_sq_norms(
    a: Float[Tensor, "batch d_in"], g: Float[Tensor, "batch d_out"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Squared norms |a_n|^2 |g_n|^2 of weight and |g_n|^2 of bias, one row a sample."""
    dtype = accumulation_dtype(torch.promote_types(a.dtype, g.dtype))

    def norms(rows: slice) -> tuple[Tensor, Tensor]:
        inputs, grads = accumulated(a[rows], g[rows])
        bias = grads.square().sum(dim=1)
        return inputs.square().sum(dim=1) * bias, bias

    bytes_each = max(a.shape[1], g.shape[1]) * dtype.itemsize
    bytes_each += a.shape[1] * itemsize(a.dtype, dtype)
    bytes_each += g.shape[1] * itemsize(g.dtype, dtype)
    return in_pieces(norms, len(g), bytes_each)


def _sequence_gradients(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, "batch d_out d_in"]:
    """Each sample's gradient, sum_t g[n, t] (outer) a[n, t]. For chunks of a batch."""
    of = Sequences(a, g)
    if of.step_bytes == 0:
        return of.all_gradients()
    bytes_each = of.time * of.step_bytes
    if of.batch * bytes_each <= step_of(1, 8):
        return of.gradients(slice(0, of.batch))
    out = of.zeros(of.batch, of.d_out, of.d_in)
    for rows in pieces(of.batch, bytes_each, 8):
        for steps in pieces(of.time, (rows.stop - rows.start) * of.step_bytes, 8):
            of.add_gradients(out[rows], rows, steps)
    return out


def _direct_sq_norms(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, " batch"]:
    """Squared norm of each sample's gradient, by making the gradient in blocks."""
    of = Sequences(a, g)
    if of.is_small:
        return of.all_gradients().square_().sum(dim=(1, 2))
    norms = of.zeros(of.batch)
    for rows, _, grads in of.gradient_pieces():
        norms[rows] += grads.square_().sum(dim=(1, 2))
        del grads
    return norms


def _gram_sq_norms(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, " batch"]:
    """Squared norm of each sample's gradient as sum_{t,s} (a_t . a_s)(g_t . g_s).

    Where the contributions of the time steps nearly cancel, little of the accumulation
    dtype's precision is left: see `sequence_sq_norms`.
    """
    return Sequences(a, g).gram_sums().clamp_min(0)


def _sequence_sq_norms(
    a: Float[Tensor, "batch time d_in"],
    g: Float[Tensor, "batch time d_out"],
    with_bias: bool,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
    """Squared norms of each sample's weight gradient and of its bias gradient.

    |sum_t g[n, t] (outer) a[n, t]|^2 and, if `with_bias`, |sum_t g[n, t]|^2.
    """
    weight = _direct_sq_norms(a, g)
    return weight, sum_over_time(g).square().sum(dim=1) if with_bias else None


def _sequence_second_moment(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, "d_out d_in"]:
    """Sum over the samples of the elementwise square of their gradients."""
    of = Sequences(a, g)
    if of.time == 1 and of.is_plain(of.batch * (of.d_in + of.d_out)):
        return g[:, 0].square().T @ a[:, 0].square()
    total = of.zeros(of.d_out, of.d_in)
    if of.time == 1:
        squares = (of.d_in + of.d_out) * of.dtype.itemsize
        for rows, _ in of.blocks(squares):
            inputs, grads = (x[:, 0].square() for x in of.read(rows))
            total.addmm_(grads.T, inputs)
            del inputs, grads
        return total
    for _, outs, grads in of.gradient_pieces():
        total[outs] += grads.square_().sum(dim=0)
        del grads
    return total


def _sequence_fused(
    a: Float[Tensor, "batch time d_in"],
    g: Float[Tensor, "batch time d_out"],
    with_bias: bool,
    with_second_moment: bool,
) -> tuple[
    Float[Tensor, "d_out d_in"],
    Float[Tensor, " batch"],
    Float[Tensor, "batch d_out"] | None,
    Float[Tensor, "d_out d_in"] | None,
]:
    """The ordinary gradient and each sample's squared norm, from the same products.

    sum_{n, t} g[n, t] (outer) a[n, t] and |sum_t g[n, t] (outer) a[n, t]|^2; if asked
    for, each sample's bias gradient sum_t g[n, t] and the second moment.
    """
    of = Sequences(a, g)
    if of.is_small:
        grads = of.all_gradients()
        total, squares = grads.sum(dim=0), grads.square_()
        moment = squares.sum(dim=0) if with_second_moment else None
        bias = sum_over_time(g) if with_bias else None
        return total, squares.sum(dim=(1, 2)), bias, moment
    total, norms = of.zeros(of.d_out, of.d_in), of.zeros(of.batch)
    moment = torch.zeros_like(total) if with_second_moment else None
    for rows, outs, grads in of.gradient_pieces():
        total[outs] += grads.sum(dim=0)
        squares = grads.square_()
        norms[rows] += squares.sum(dim=(1, 2))
        if moment is not None:
            moment[outs] += squares.sum(dim=0)
        del grads, squares
    return total, norms, sum_over_time(g).to(of.dtype) if with_bias else None, moment


def _sequence_sq_norms_torch(
    a: Tensor, g: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """By the fastest way, and again by direct where a Gram sum is not accurate."""
    way = choose(g.shape[1], a.shape[2], g.shape[2])
    if way == "rows":
        weight, bias = row_sq_norms(a[:, 0], g[:, 0])
        return weight, bias if with_bias else None
    if way == "direct":
        return _sequence_sq_norms(a, g, with_bias)
    of = Sequences(a, g)
    weight = of.gram_sums().clamp_min_(0)
    lost = weight < guard(of.d_in, of.d_out, of.dtype) * of.diagonal_sums()
    if lost.any():
        size = of.time * (of.d_in * a.itemsize + of.d_out * g.itemsize)
        for some in lost.nonzero()[:, 0].split(step_of(size, 8)):
            weight[some] = _direct_sq_norms(a[some], g[some])
    return weight, sum_over_time(g).square().sum(dim=1) if with_bias else None


def _sequence_sq_norms_native(
    kernels: Any, a: Tensor, g: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    if is_torch_faster(g.shape[1], a.shape[2], g.shape[2]):
        return _sequence_sq_norms_torch(a, g, with_bias)
    return native.sequence_sq_norms(kernels, a, g, with_bias)


def _is_moment_faster(a: Tensor, g: Tensor) -> bool:
    return is_moment_faster(len(g), a.shape[2], g.shape[2], _native.best_isa)


def _sequence_second_moment_native(kernels: Any, a: Tensor, g: Tensor) -> Tensor:
    is_one, is_narrow = g.shape[1] == 1, a.shape[2] * g.shape[2] <= NARROW
    if not _is_moment_faster(a, g) if is_one else is_narrow:
        return _sequence_second_moment(a, g)
    return native.sequence_second_moment(kernels, a, g)


def _sequence_fused_native(
    kernels: Any, a: Tensor, g: Tensor, with_bias: bool, with_second_moment: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    time, needs_gradients = g.shape[1], with_second_moment and g.shape[1] != 1
    if needs_gradients or is_fused_faster(time, a.shape[2], g.shape[2]):
        return native.sequence_fused(kernels, a, g, with_bias, with_second_moment)
    norms, _ = _sequence_sq_norms_native(kernels, a, g, False)
    bias = sum_over_time(g).to(norms.dtype) if with_bias else None
    if with_second_moment and _is_moment_faster(a, g):
        grad, moment = native.row_sums(kernels, a[:, 0], g[:, 0])
        return grad, norms, bias, moment
    moment = _sequence_second_moment(a, g) if with_second_moment else None
    return Sequences(a, g).total(), norms, bias, moment


row_sq_norms = Op("row_sq_norms", _row_sq_norms)
sequence_sq_norms = Op("sequence_sq_norms", _sequence_sq_norms)
gram_sq_norms = Op("gram_sq_norms", _gram_sq_norms)
direct_sq_norms = Op("direct_sq_norms", _direct_sq_norms)
sequence_second_moment = Op("sequence_second_moment", _sequence_second_moment)
sequence_fused = Op("sequence_fused", _sequence_fused)
sequence_gradients = Op("sequence_gradients", _sequence_gradients)

row_sq_norms.add_native(limited(native.row_sq_norms, _row_sq_norms), dtypes=FLOATS)
sequence_sq_norms.add(
    "torch", _sequence_sq_norms_torch, devices=("cpu", "cuda"), dtypes=FLOATS
)
for _op, _call, _sums in (
    (sequence_sq_norms, _sequence_sq_norms_native, ()),
    (gram_sq_norms, native.gram_sq_norms, ()),
    (direct_sq_norms, native.direct_sq_norms, ()),
    (sequence_second_moment, _sequence_second_moment_native, (0,)),
    (sequence_fused, _sequence_fused_native, (0, 3)),
):
    _op.add_native(
        limited(
            *(_call, _op.reference, _sums),
            elements=lambda a, g, *_: a.shape[2] * g.shape[2],
        ),
        dtypes=FLOATS,
    )

for _op in (
    *(row_sq_norms, gram_sq_norms, direct_sq_norms, sequence_sq_norms),
    *(sequence_second_moment, sequence_fused),
):
    _op.add_triton(f"dense.{_op.name}", dtypes=TRITON)
sequence_sq_norms.add_triton(
    *("dense.sequence_sq_norms_by_torch",),
    dtypes=(torch.float32,),
    preferred=True,
    backend="torch",
)
