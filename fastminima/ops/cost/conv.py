"""Which native way to a convolution's statistics, by time."""

from __future__ import annotations

import math
from functools import lru_cache

from ..conv_geometry import ConvGeometry

__all__ = ["is_apart_faster", "prefers_gram"]

# Gram matrices of more positions than this would not fit the L2 cache.
_GRAM_POSITIONS = 576
# Multiply-adds in whose time an element of a sample's gradient is squared and added to
# the sum over the samples. Fitted to times of W3's and W4's layers, float32, one thread
# (AMD EPYC 9004, AVX-512): 0.06 ns from 64 positions down to 4.
_UPDATE = 5
# Up to here, second moments take longer from the tiles of the gradient than apart: with
# 4 positions (512 to 512 channels) 1.7 times as long, with 16 0.8 times.
_FEW_POSITIONS = 8


def _half(n: int) -> int:
    """Pairs that the lower half of a Gram matrix of n positions computes."""
    blocks = -(-n // 16)
    return blocks * (blocks + 1) * 128


def _costs(
    rows: tuple[int, ...], image: tuple[int, ...], geometry: ConvGeometry
) -> tuple[float, float]:
    """Multiply-adds of the Gram way, infinite if it is not open, and of the direct one.

    Either does 85 a nanosecond (AVX-512, one core), in 8 by 16 tiles. A shifted sum of
    the Gram way goes at 20 a nanosecond.
    """
    length, pixels = math.prod(rows[2:]), math.prod(image[2:])
    unfolds = math.prod(geometry.stride) > 1
    taps = geometry.kernel_numel
    channels, height = (
        image[1] // geometry.groups,
        -(-rows[1] // geometry.groups // 8) * 8,
    )
    run = geometry.kernel_size[-1] * channels
    direct = length * height * -(-run // 16) * 16 * (taps // geometry.kernel_size[-1])
    if max(length, 0 if unfolds else pixels) > _GRAM_POSITIONS:
        return math.inf, float(direct)
    if unfolds:
        gram = _half(length) * (rows[1] // geometry.groups + channels * taps + 4)
    else:
        gram = _half(length) * (rows[1] // geometry.groups + 4 * taps)
        gram += _half(pixels) * channels
    return float(gram), float(direct)


@lru_cache(maxsize=1024)
def prefers_gram(
    rows: tuple[int, ...], image: tuple[int, ...], geometry: ConvGeometry
) -> bool:
    """Whether the Gram way to norms is expected to be faster than the direct one."""
    gram, direct = _costs(rows, image, geometry)
    return gram < direct


@lru_cache(maxsize=1024)
def is_apart_faster(
    rows: tuple[int, ...],
    image: tuple[int, ...],
    geometry: ConvGeometry,
    with_second_moment: bool,
) -> bool:
    """Whether per-sample results are cheaper apart from the weight gradient."""
    gram, direct = _costs(rows, image, geometry)
    length = math.prod(rows[2:])
    if with_second_moment:
        return length <= _FEW_POSITIONS and gram < direct
    return gram < _UPDATE * direct / max(1, length)
