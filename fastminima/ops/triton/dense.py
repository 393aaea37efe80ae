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

from .. import dense
from .._pieces import step_of
from ..cost.dense import choose_by_torch_on_gpu, choose_on_gpu
from ._launch import one_dtype
from .broadcast import sum_over_time
from .dense_direct import direct_sums
from .dense_fused import sequence_sums
from .dense_gram import folded_sums, gram_sums
from .dense_rows import row_sq_norms, row_sums
from .dense_settled import settled
from .totals import last_added, sample_sq_norms

__all__ = [
    "direct_sq_norms",
    "gram_sq_norms",
    "row_sq_norms",
    "sequence_fused",
    "sequence_second_moment",
    "sequence_sq_norms",
    "sequence_sq_norms_by_torch",
]


def direct_sq_norms(a: Tensor, g: Tensor) -> Tensor:
    """See `fastminima.ops.dense.direct_sq_norms`."""
    return direct_sums(a, g)


def gram_sq_norms(a: Tensor, g: Tensor) -> Tensor:
    """See `fastminima.ops.dense.gram_sq_norms`."""
    return last_added(gram_sums(*one_dtype(a, g))[:, 0]).clamp_min_(0)


def _direct(a: Tensor, g: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    bias = sample_sq_norms(sum_over_time(g)) if with_bias else None
    return direct_sums(a, g), bias


def sequence_sq_norms(
    a: Tensor, g: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """See `fastminima.ops.dense.sequence_sq_norms`.

    By Gram sums, of which those of g alone are the bias' norm, and directly where they
    are inaccurate: decided on the device.
    """
    a, g = one_dtype(a, g)
    way = choose_on_gpu(g.shape[1], a.shape[2], g.shape[2], a.dtype)
    if way == "rows":
        weight, bias = row_sq_norms(a[:, 0], g[:, 0])
        return weight, bias if with_bias else None
    if way == "direct":
        return _direct(a, g, with_bias)
    return settled(a, g, gram_sums(a, g, with_bias), with_bias)


def sequence_sq_norms_by_torch(
    a: Tensor, g: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """As `sequence_sq_norms` in float32, with PyTorch's products of rows.

    They come from tensor cores where TF32 is allowed, so the kernels' own are taken
    there.
    """
    a, g = one_dtype(a, g)
    if a.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return sequence_sq_norms(a, g, with_bias)
    time = g.shape[1]
    way = choose_by_torch_on_gpu(time, a.shape[2], g.shape[2])
    if way == "rows":
        weight, bias = dense.row_sq_norms(a[:, 0], g[:, 0])
        return weight, bias if with_bias else None
    if way == "direct" or 2 * time * time > step_of(a.itemsize):
        return _direct(a, g, with_bias)
    return settled(a, g, folded_sums(a, g, with_bias), with_bias)


def sequence_fused(
    a: Tensor, g: Tensor, with_bias: bool, with_second_moment: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `fastminima.ops.dense.sequence_fused`."""
    bias = sum_over_time(g) if with_bias else None
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
