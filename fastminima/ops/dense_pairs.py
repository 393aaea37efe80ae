"""Inner products of dense gradients: with each other, and with directions.

As in `dense`, sample n's gradient is sum_t g[n, t] (outer) a[n, t].
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from ._arguments import FLOATS, TRITON
from ._pieces import itemsize, pieces
from .cost.dense import are_gradients_faster
from .dense_pieces import Sequences
from .table import Op

__all__ = ["sequence_dots", "sequence_gram", "sequence_multi_dots"]


def _sequence_gram(
    a: Float[Tensor, "batch time d_in"], g: Float[Tensor, "batch time d_out"]
) -> Float[Tensor, "batch batch"]:
    """Inner products between the samples' gradients, made in blocks of output rows."""
    of = Sequences(a, g)
    blocks = list(of.gram_blocks())
    if len(blocks) == 1:
        return of.gram_block(*blocks[0])
    gram = of.zeros(of.batch, of.batch)
    for left, right in blocks:
        block = of.gram_block(left, right)
        gram[left, right] = block
        if left != right:
            gram[right, left] = block.T
    return gram


def _sequence_dots(
    a: Float[Tensor, "batch time d_in"],
    g: Float[Tensor, "batch time d_out"],
    v: Float[Tensor, "d_out d_in"],
) -> Float[Tensor, " batch"]:
    """Inner product of each sample's gradient with the direction `v`."""
    of = Sequences(a, g)
    if of.is_plain(of.batch * of.time * of.d_in) and v.dtype == of.dtype:
        return (g @ v).mul_(a).sum(dim=(1, 2))
    dots, size = of.zeros(of.batch), of.dtype.itemsize
    for outs in pieces(of.d_out, of.d_in * itemsize(v.dtype, of.dtype), 8):
        direction = v[outs].to(of.dtype)
        for rows, steps in of.blocks(of.d_in * size):
            inputs, grads = of.read(rows, steps, outs)
            dots[rows] += (grads @ direction).mul_(inputs).sum(dim=(1, 2))
            del inputs, grads
        del direction
    return dots


def _sequence_multi_dots(
    a: Float[Tensor, "batch time d_in"],
    g: Float[Tensor, "batch time d_out"],
    v: Sequence[Float[Tensor, "d_out d_in"]],
) -> Float[Tensor, "batch directions"]:
    """Inner product of each sample's gradient with each of the directions `v`."""
    dots = Sequences(a, g).zeros(len(g), len(v))
    for k, direction in enumerate(v):
        dots[:, k] = _sequence_dots(a, g, direction)
    return dots


_CACHED = 16  # share of the limit: 4 MiB, twice the L2 cache of a core and less


def _sequence_multi_dots_torch(a: Tensor, g: Tensor, v: Sequence[Tensor]) -> Tensor:
    """By gradients made once for all directions, where the steps are many enough."""
    if not are_gradients_faster(g.shape[1], len(v)):
        return _sequence_multi_dots(a, g, v)
    of = Sequences(a, g)
    dots = of.zeros(of.batch, len(v))
    for rows, outs, grads in of.gradient_pieces(_CACHED):
        flat = grads.flatten(1)
        for k, direction in enumerate(v):
            dots[rows, k] += flat @ direction[outs].to(of.dtype).flatten()
        del grads, flat
    return dots


sequence_gram = Op("sequence_gram", _sequence_gram)
sequence_dots = Op("sequence_dots", _sequence_dots)
sequence_multi_dots = Op("sequence_multi_dots", _sequence_multi_dots)

sequence_multi_dots.add(
    "torch", _sequence_multi_dots_torch, devices=("cpu",), dtypes=FLOATS
)
sequence_gram.add_triton("dense_pairs.sequence_gram", dtypes=TRITON)
for _op in (sequence_dots, sequence_multi_dots):
    _op.add_triton(f"dense_dots.{_op.name}", dtypes=TRITON)
