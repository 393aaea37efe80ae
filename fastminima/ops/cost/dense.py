"""Which way to the norms of dense gradients, by time and by accuracy."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = [
    "NARROW",
    "are_gradients_faster",
    "choose",
    "choose_by_torch_on_gpu",
    "choose_on_gpu",
    "guard",
    "guard_on_gpu",
    "is_fused_faster",
    "is_moment_faster",
    "is_torch_faster",
]

Way = Literal["rows", "gram", "direct"]

# Costs in units of one multiply-add of the Gram kernel (0.0168 ns, 119 GFLOP/s). Fitted
# to CPU times of both native kernels, float32, one thread, at 75 sizes (time 2 to 512,
# widths 10 to 1024) on an Intel Xeon with AVX-512 at 2.6 GHz: the choice was the slower
# way at two of them, both near ties. Only the ratios matter here.
_DIRECT_PRODUCT = 0.7  # a multiply-add of the direct kernel: its panels are short
_DIRECT_ELEMENT = 2.3  # squaring one element of the gradient
_DIRECT_PACKING = 23.0  # reading one element of the inputs
# Squaring an element and adding it to the sum over the samples, where the product is
# made anyway. Fitted like these, on an AMD EPYC 9004 with AVX-512, at 40 sizes (time 2
# to 48, widths 64 to 2048): the choice was the slower way at none by more than 10 %.
_FUSED_ELEMENT = 2.5
_FUSED_SHORT = 0.5  # in multiply-adds of the dot products of up to 8 time steps
_ROWS, _COLUMNS = 8, 16  # what the tiles of the kernels round sizes up to

# Elements of a gradient up to which `torch.bmm`, a square and a sum take 0.7 to 0.9 of
# the time of the direct kernel (9 x 32, 25 x 16, 3 x 16; 27 x 64 is a tie; as above).
NARROW = 1024
# The Gram kernel holds up to 8 time steps in registers and transposes from 9 on, which
# pays from 16 on: `torch.bmm` takes 0.5 to 0.7 times its time at 9 and 12 (width 512).
_SHORT, _LONG = 8, 16

# In multiply-adds an element of the gradient: what it takes to write it and to read it
# for the first direction, and for each. Fitted to times at 22 sizes (time 4 to 1024,
# widths 32 to 3072, 2 to 8 directions), float32, one thread, on the AMD EPYC: the
# choice was the slower way at none by more than 5 %.
_MADE, _READ = 12, 8

_FEW, _SMALL = 48, 1 << 18  # samples and multiply-adds, see `is_moment_faster`

_GRAM_RATE, _DIRECT_RATE = 47, 42  # see `choose_by_torch_on_gpu`
_TILE, _LEAST = 64, 16  # sizes of the tiles of GPU kernels, see `choose_on_gpu`

_MOST_SHARE = 0.5  # of R / Q that the guard may ask for, see `choose_on_gpu`
_GUARANTEED = {torch.float32: 1e-4, torch.float64: 1e-11}


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _gram(time: int, d_in: int, d_out: int) -> float:
    padded = _up(time, _COLUMNS)
    return padded * (padded + _COLUMNS) / 2 * (d_in + d_out)


def _elements(d_in: int, d_out: int) -> int:
    """Those of a gradient in whole tiles."""
    return min(
        _up(d_out, _ROWS) * _up(d_in, _COLUMNS), _up(d_in, _ROWS) * _up(d_out, _COLUMNS)
    )


def choose(time: int, d_in: int, d_out: int) -> Way:
    """The fastest way to the squared norm of one sample's weight gradient.

    | way | multiply-adds | is right when |
    |---|---|---|
    | rows | d_in + d_out | time = 1 |
    | gram | time^2 (d_in + d_out) / 2 | time is short |
    | direct | time * d_in * d_out | time is long, or the layer narrow |
    """
    if time == 1:
        return "rows"
    gram, elements = _gram(time, d_in, d_out), _elements(d_in, d_out)
    direct = elements * (_DIRECT_PRODUCT * time + _DIRECT_ELEMENT)
    direct += _DIRECT_PACKING * time * (d_in + d_out)
    return "gram" if gram < direct else "direct"


def choose_on_gpu(time: int, d_in: int, d_out: int, dtype: torch.dtype) -> Way:
    """The way with the fewest multiply-adds on a GPU, in the tiles of its kernels.

    Directly too where the layer is so wide that the guard would have most Gram sums of
    independent time steps, whose R / Q is about 1, made anew: all of a language model's
    head of 50257 halves, whose share is 1.2.

    Tiles of 64 over time and both widths, smaller ones where a size is smaller; below
    16, the least that a tensor core multiplies, nothing is saved. Both ways run on the
    same units at the same rate, and read their inputs from the cache about as often.
    """
    if time == 1:
        return "rows"
    tile = min(_TILE, _up(max(time, 1), _LEAST))
    steps = _up(time, tile)
    gram = steps * (steps + tile) // 2 * (d_in + d_out)
    tall, wide = (_up(n, _TILE if n > _TILE else _LEAST) for n in (d_in, d_out))
    if guard_on_gpu(d_in, d_out, dtype) > _MOST_SHARE:
        return "direct"
    return "gram" if gram < _up(time, _LEAST) * tall * wide else "direct"


def choose_by_torch_on_gpu(time: int, d_in: int, d_out: int) -> Way:
    """The way that takes least in float32, with Gram matrices made by PyTorch.

    Those are whole squares of time. An H100 made 47 TFLOP/s of them and 42 of the
    direct kernel's products (16 x 512 x 768 -> 3072, 684.6 and 923.6 us).
    """
    if time == 1:
        return "rows"
    gram = _DIRECT_RATE * time * (d_in + d_out)
    return "gram" if gram < _GRAM_RATE * d_in * d_out else "direct"


def is_torch_faster(time: int, d_in: int, d_out: int) -> bool:
    """Whether the chosen way is faster by PyTorch's own products than natively."""
    way = choose(time, d_in, d_out)
    if way == "gram":
        return _SHORT < time < _LONG
    return way == "direct" and d_in * d_out <= NARROW


def is_fused_faster(time: int, d_in: int, d_out: int) -> bool:
    """Whether norms from the tiles of the weight gradient beat a product plus norms.

    The tiles are those of the product, which costs the same either way. What norms add
    to it is an update for each element of each sample's gradient or, apart from it, the
    Gram sum: the cheaper one where time is short and the layer wide. One time step
    leaves nothing to choose: its norms are those of two rows.
    """
    if time == 1:
        return False
    if choose(time, d_in, d_out) == "direct" or d_in * d_out <= NARROW:
        return True
    if _SHORT < time < _LONG:  # `torch.bmm` is the fastest way to Gram sums, not this
        return True
    elements = _elements(d_in, d_out)
    if time <= _SHORT:
        return _FUSED_SHORT * elements < time * (time + 1) * (d_in + d_out)
    return _FUSED_ELEMENT * elements < _gram(time, d_in, d_out)


def is_moment_faster(batch: int, d_in: int, d_out: int, isa: str | None) -> bool:
    """Whether our product of the squares of single rows beats PyTorch's.

    Float32, one thread, on the AMD EPYC (512 x 10 to 1024 x 4096): 0.91 to 0.99 of its
    time from 48 samples on with AVX-512, up to 1.09 with AVX2, and 0.6 where half of
    one side is zero, as behind a ReLU. With fewer samples up to 1.15, and for 64 of
    them and 768 x 30000, where most of it is writing; 64 of 64 x 10 take the 15 us of
    Python. Not measured elsewhere.
    """
    if isa not in ("avx512", "avx2") or batch * d_in * d_out < _SMALL:
        return False
    return batch >= _FEW * max(1, d_in * d_out >> 22)


def are_gradients_faster(time: int, directions: int) -> bool:
    """Whether dot products of gradients that are made beat one product a direction."""
    return _MADE + _READ * directions < (directions - 1) * time


def guard(d_in: int, d_out: int, dtype: torch.dtype) -> float:
    """Smallest R / Q at which the Gram sum R is right to 1e-4 (float64: 1e-11).

    R = sum_{t,s} (a_t . a_s)(g_t . g_s) and Q = sum_t |a_t|^2 |g_t|^2, its diagonal.
    With u = eps / 2 and independent rounding errors, uniform in +-u times each partial
    sum, a dot product over d terms of one sign is off by u |a_t| |a_s| sqrt(d) / 3
    (root mean square); partial sums grow linearly then, which is the worst case. So a
    term (a_t . a_s)(g_t . g_s) is off by at most u x_t x_s sqrt(d_in + d_out) / 3 with
    x_t = |a_t| |g_t|. Each pair t > s is computed once and counts twice, so the errors
    of the whole sum add up, in square, to at most 2 (sum_t x_t^2)^2 of these: R is off
    by sqrt(2) u Q sqrt(d_in + d_out) / 3. Four times that is less than
    eps Q sqrt(d_in + d_out). The time does not enter other than through Q, as errors
    of different pairs are independent.
    """
    return torch.finfo(dtype).eps * (d_in + d_out) ** 0.5 / _GUARANTEED[dtype]


def guard_on_gpu(d_in: int, d_out: int, dtype: torch.dtype) -> float:
    """As `guard`, for the Triton kernels on inputs of this dtype: float32 sums.

    Tensor cores, which half precisions run on, truncate where `guard` has rounding:
    each step over 16 terms takes up to 2^-23 of the partial sum away, half of that on
    average. Partial sums of one sign grow linearly, so a dot product over d terms ends
    d / 16 * 2^-25 too small. Such errors all have one sign: R is off by
    Q (d_in + d_out) / 16 * 2^-25 more.

    Source: Fasi et al. (2021), "Numerical behavior of NVIDIA tensor cores", PeerJ
    Computer Science 7:e330, for the truncation.
    """
    share = guard(d_in, d_out, torch.float32)
    if dtype == torch.float32:
        return share
    return share + (d_in + d_out) / 16 * 2.0**-25 / _GUARANTEED[torch.float32]
