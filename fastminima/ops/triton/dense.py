"""Dense weights in Triton: the launchers that the table of ops names.

float32 products are made in float32 ("ieee"), never in TF32, which cuts operands to
11 bits: norms come out 1.4e-3 too small. Three TF32 products ("tf32x3") would run on
tensor cores and leave 7e-7 of that, against 1e-7 in float32; but tensor cores also
truncate the sums that they add up, an error that grows with the width of the layer:
3 d / 8 steps of 2^-25 each, 5e-5 at d = 4096.

Source: Ootomo and Yokota (2022), arXiv:2203.03341, for the truncation of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost.dense import choose_on_gpu, guard_on_gpu
from .dense_direct import direct_sums, replace_lost
from .dense_fused import sequence_sums
from .dense_gram import gram_sums
from .dense_rows import row_sq_norms, row_sums

__all__ = [
    "direct_sq_norms",
    "gram_sq_norms",
    "row_sq_norms",
    "sequence_fused",
    "sequence_second_moment",
    "sequence_sq_norms",
]


def direct_sq_norms(a: Tensor, g: Tensor) -> Tensor:
    """See `fastminima.ops.dense.direct_sq_norms`."""
    return direct_sums(a, g)


def gram_sq_norms(a: Tensor, g: Tensor) -> Tensor:
    """See `fastminima.ops.dense.gram_sq_norms`."""
    return gram_sums(a, g, 0.0).norms


def _guarded(a: Tensor, g: Tensor) -> Tensor:
    """By Gram sums, and directly where those are inaccurate: decided on the device."""
    share = guard_on_gpu(a.shape[-1], g.shape[-1], a.dtype)
    norms, is_lost = gram_sums(a, g, share)
    replace_lost(a, g, norms, is_lost)
    return norms


def _bias_grads(g: Tensor) -> Tensor:
    return g.sum(dim=1, dtype=torch.float32)


def sequence_sq_norms(
    a: Tensor, g: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """See `fastminima.ops.dense.sequence_sq_norms`."""
    way = choose_on_gpu(g.shape[1], a.shape[2], g.shape[2])
    if way == "rows":
        weight, bias = row_sq_norms(a[:, 0], g[:, 0])
        return weight, bias if with_bias else None
    weight = direct_sq_norms(a, g) if way == "direct" else _guarded(a, g)
    if not with_bias:
        return weight, None
    return weight, _bias_grads(g).square().sum(dim=1)


def sequence_fused(
    a: Tensor, g: Tensor, with_bias: bool, with_second_moment: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `fastminima.ops.dense.sequence_fused`."""
    bias = _bias_grads(g) if with_bias else None
    if g.shape[1] == 1:
        a, g = a[:, 0], g[:, 0]
        grad, moment = row_sums(a, g, True, with_second_moment)
        return grad, row_sq_norms(a, g)[0], bias, moment
    sums = sequence_sums(
        a, g, grad=True, sq_norms=True, second_moment=with_second_moment
    )
    return sums.grad, sums.sq_norms, bias, sums.second_moment


def sequence_second_moment(a: Tensor, g: Tensor) -> Tensor:
    """See `fastminima.ops.dense.sequence_second_moment`."""
    if g.shape[1] == 1:
        return row_sums(a[:, 0], g[:, 0], False, True)[1]
    return sequence_sums(
        a, g, grad=False, sq_norms=False, second_moment=True
    ).second_moment
