"""Per-sample statistics of the gradient of a dense layer's weight.

Sample n's gradient is sum_t g[n, t] (outer) a[n, t], of shape [d_out, d_in]: `a` the
inputs of the layer, `g` the gradient of its outputs. Results leave in the accumulation
dtype, and no squared norm is negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from . import dense_native
from ._arguments import FLOATS, TRITON, accumulated
from .dense_cost import NARROW, choose, guard, is_fused_faster, is_torch_faster
from .table import Op

__all__ = [
    "direct_sq_norms",
    "gathered_sq_norms",
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

_BLOCK_BYTES = 64 << 20


def _blocks(count: int, bytes_each: int) -> Iterator[slice]:
    """Slices of range(count) that hold at most `_BLOCK_BYTES`, or one item."""
    step = max(1, _BLOCK_BYTES // max(1, bytes_each))
    return (slice(i, i + step) for i in range(0, count, step))


def _row_sq_norms(
    a: Float[Tensor, "batch d_in"], g: Float[Tensor, "batch d_out"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Squared norms |a_n|^2 |g_n|^2 of weight and |g_n|^2 of bias, one row a sample."""
    a, g = accumulated(a, g)
    bias = g.square().sum(dim=1)
    return a.square().sum(dim=1) * bias, bias


def _sequence_gradients(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, "batch d_out d_in"]:
    """Each sample's gradient, sum_t g[n, t] (outer) a[n, t]. For chunks of a batch."""
    a, g = accumulated(a, g)
    return torch.bmm(g.transpose(1, 2), a)


def _direct_sq_norms(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, " batch"]:
    """Squared norm of each sample's gradient, by making the gradient in blocks."""
    a, g = accumulated(a, g)
    norms = g.new_zeros(len(g))
    for rows in _blocks(len(g), g.shape[2] * a.shape[2] * g.element_size()):
        norms[rows] = _sequence_gradients(a[rows], g[rows]).square().sum(dim=(1, 2))
    return norms


def _gram_sq_norms(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, " batch"]:
    """Squared norm of each sample's gradient as sum_{t,s} (a_t . a_s)(g_t . g_s).

    Where the contributions of the time steps nearly cancel, little of the accumulation
    dtype's precision is left: see `sequence_sq_norms`.
    """
    a, g = accumulated(a, g)
    norms = g.new_zeros(len(g))
    for rows in _blocks(len(g), 2 * g.shape[1] ** 2 * g.element_size()):
        products = torch.bmm(a[rows], a[rows].transpose(1, 2))
        products *= torch.bmm(g[rows], g[rows].transpose(1, 2))
        norms[rows] = products.sum(dim=(1, 2)).clamp_min(0)
    return norms


def _sequence_sq_norms(
    a: Float[Tensor, "batch time d_in"],
    g: Float[Tensor, "batch time d_out"],
    with_bias: bool,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
    """Squared norms of each sample's weight gradient and of its bias gradient.

    |sum_t g[n, t] (outer) a[n, t]|^2 and, if `with_bias`, |sum_t g[n, t]|^2.
    """
    weight = _direct_sq_norms(a, g)
    if not with_bias:
        return weight, None
    return weight, g.to(weight.dtype).sum(dim=1).square().sum(dim=1)


def _sequence_second_moment(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, "d_out d_in"]:
    """Sum over the samples of the elementwise square of their gradients."""
    a, g = accumulated(a, g)
    if g.shape[1] == 1:
        return g[:, 0].square().T @ a[:, 0].square()
    total = g.new_zeros(g.shape[2], a.shape[2])
    for rows in _blocks(len(g), total.numel() * g.element_size()):
        total += _sequence_gradients(a[rows], g[rows]).square().sum(dim=0)
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
    a, g = accumulated(a, g)
    total = g.new_zeros(g.shape[2], a.shape[2])
    moment = torch.zeros_like(total) if with_second_moment else None
    norms = g.new_zeros(len(g))
    for rows in _blocks(len(g), total.numel() * g.element_size()):
        grads = _sequence_gradients(a[rows], g[rows])
        total += grads.sum(dim=0)
        squares = grads.square_()
        norms[rows] = squares.sum(dim=(1, 2))
        if moment is not None:
            moment += squares.sum(dim=0)
    return total, norms, g.sum(dim=1) if with_bias else None, moment


def _gathered_sq_norms(
    a: Float[Tensor, "rows d_in"],
    g: Float[Tensor, "rows d_out"],
    index: Int64[Tensor, "batch time"],
) -> Float[Tensor, " batch"]:
    """Squared norm of each sample's gradient, its rows named by `index`; -1: no row."""
    if len(g) == 0:
        return accumulated(a, g)[1].new_zeros(len(index))
    is_row = (index >= 0)[..., None]
    rows = index.clamp_min(0)
    # Also `a` without the rows that are missing: infinity times zero is no number.
    return _direct_sq_norms(
        torch.where(is_row, a[rows], 0), torch.where(is_row, g[rows], 0)
    )


def _sequence_gram(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, "batch batch"]:
    """Inner products between the samples' gradients, made in blocks of output rows."""
    a, g = accumulated(a, g)
    if g.shape[1] == 1:
        return (a[:, 0] @ a[:, 0].T) * (g[:, 0] @ g[:, 0].T)
    gram = g.new_zeros(len(g), len(g))
    for rows in _blocks(g.shape[2], len(g) * a.shape[2] * g.element_size()):
        part = _sequence_gradients(a, g[:, :, rows]).flatten(1)
        gram.addmm_(part, part.T)
    return gram


def _sequence_dots(
    a: Float[Tensor, "batch time d_in"],
    g: Float[Tensor, "batch time d_out"],
    v: Float[Tensor, "d_out d_in"],
) -> Float[Tensor, " batch"]:
    """Inner product of each sample's gradient with the direction `v`."""
    a, g = accumulated(a, g)
    return ((g @ v.to(g.dtype)) * a).sum(dim=(1, 2))


def _sequence_multi_dots(
    a: Float[Tensor, "batch time d_in"],
    g: Float[Tensor, "batch time d_out"],
    v: Float[Tensor, "directions d_out d_in"],
) -> Float[Tensor, "batch directions"]:
    """Inner product of each sample's gradient with each of the directions `v`.

    Beside `sequence_dots`: other kinds of gradients take one direction at a time, and
    directions are not stacked unless it pays to read `a` and `g` once for all of them.
    """
    a, g = accumulated(a, g)
    dots = g.new_empty(len(g), len(v))
    for k, direction in enumerate(v):
        dots[:, k] = _sequence_dots(a, g, direction)
    return dots


def _sequence_sq_norms_torch(
    a: Tensor, g: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """By the fastest way, and again by direct where a Gram sum is not accurate."""
    a, g = accumulated(a, g)
    way = choose(g.shape[1], a.shape[2], g.shape[2])
    if way == "rows":
        weight, bias = row_sq_norms(a[:, 0], g[:, 0])
        return weight, bias if with_bias else None
    if way == "direct":
        return _sequence_sq_norms(a, g, with_bias)
    weight = _gram_sq_norms(a, g)
    parts = (a.square().sum(dim=2) * g.square().sum(dim=2)).sum(dim=1)
    lost = weight < guard(a.shape[2], g.shape[2], g.dtype) * parts
    if lost.any():
        weight[lost] = _direct_sq_norms(a[lost], g[lost])
    return weight, g.sum(dim=1).square().sum(dim=1) if with_bias else None


def _sequence_sq_norms_native(
    kernels: Any, a: Tensor, g: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    if is_torch_faster(g.shape[1], a.shape[2], g.shape[2]):
        return _sequence_sq_norms_torch(a, g, with_bias)
    return dense_native.sequence_sq_norms(kernels, a, g, with_bias)


def _sequence_second_moment_native(kernels: Any, a: Tensor, g: Tensor) -> Tensor:
    if g.shape[1] == 1 or a.shape[2] * g.shape[2] <= NARROW:
        return _sequence_second_moment(a, g)
    return dense_native.sequence_second_moment(kernels, a, g)


def _sequence_fused_native(
    kernels: Any, a: Tensor, g: Tensor, with_bias: bool, with_second_moment: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    time, needs_gradients = g.shape[1], with_second_moment and g.shape[1] != 1
    if needs_gradients or is_fused_faster(time, a.shape[2], g.shape[2]):
        return dense_native.sequence_fused(kernels, a, g, with_bias, with_second_moment)
    a, g = accumulated(a, g)
    norms, _ = _sequence_sq_norms_native(kernels, a, g, False)
    moment = _sequence_second_moment(a, g) if with_second_moment else None
    bias = g.sum(dim=1) if with_bias else None
    if a.stride(0) < a.stride(1):  # by time: the sum may be taken in any order
        a, g = a.transpose(0, 1), g.transpose(0, 1)
    return g.flatten(0, 1).T @ a.flatten(0, 1), norms, bias, moment


row_sq_norms = Op("row_sq_norms", _row_sq_norms)
sequence_sq_norms = Op("sequence_sq_norms", _sequence_sq_norms)
gram_sq_norms = Op("gram_sq_norms", _gram_sq_norms)
direct_sq_norms = Op("direct_sq_norms", _direct_sq_norms)
sequence_second_moment = Op("sequence_second_moment", _sequence_second_moment)
sequence_fused = Op("sequence_fused", _sequence_fused)
gathered_sq_norms = Op("gathered_sq_norms", _gathered_sq_norms)
sequence_gram = Op("sequence_gram", _sequence_gram)
sequence_dots = Op("sequence_dots", _sequence_dots)
sequence_multi_dots = Op("sequence_multi_dots", _sequence_multi_dots)
sequence_gradients = Op("sequence_gradients", _sequence_gradients)

row_sq_norms.add_native(dense_native.row_sq_norms, dtypes=FLOATS)
sequence_sq_norms.add(
    "torch", _sequence_sq_norms_torch, devices=("cpu", "cuda"), dtypes=FLOATS
)
sequence_sq_norms.add_native(_sequence_sq_norms_native, dtypes=FLOATS)
gram_sq_norms.add_native(dense_native.gram_sq_norms, dtypes=FLOATS)
direct_sq_norms.add_native(dense_native.direct_sq_norms, dtypes=FLOATS)
sequence_second_moment.add_native(_sequence_second_moment_native, dtypes=FLOATS)
sequence_fused.add_native(_sequence_fused_native, dtypes=FLOATS)

for _op in (
    *(row_sq_norms, gram_sq_norms, direct_sq_norms, sequence_sq_norms),
    *(sequence_second_moment, sequence_fused, gathered_sq_norms),
):
    _op.add_triton(f"dense.{_op.name}", dtypes=TRITON)

sequence_gram.add_triton("pairs.sequence_gram", dtypes=TRITON)
for _op in (sequence_dots, sequence_multi_dots):
    _op.add_triton(f"dots.{_op.name}", dtypes=TRITON)
