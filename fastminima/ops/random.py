"""Random numbers as a function of (seed, step, tensor, element), with no state.

The bits are those of Philox4x32-10 with the key `seed` and the counter (place, step),
64 bits each, where `place` is 2^40 times the index of a tensor plus a quarter of the
element's own index. So a number does not depend on the device, on how a kernel is
launched, or on what else is drawn.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011, doi:10.1145/2063384.2063405; Box and Muller (1958),
doi:10.1214/aoms/1177706645.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

__all__ = ["Noise", "normals", "philox"]

_LOW = 0xFFFFFFFF
_PLACES = 40  # bits for the places in one tensor


class Noise(NamedTuple):
    """Standard normal numbers times `deviation`, for a list of tensors."""

    seed: int
    step: int
    indices: Sequence[int]  # of the tensors, each below 2^23
    deviation: float

    @property
    def places(self) -> list[int]:
        """Where the numbers of each tensor begin, in fours of elements."""
        return [index << _PLACES for index in self.indices]


def philox(
    counters: Sequence[Int64[Tensor, " blocks"]], key: tuple[int, int]
) -> Int64[Tensor, "blocks 4"]:
    """Four random 32-bit words for each counter of four 32-bit words."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(10):
        # Products wrap around modulo 2**64, whose bits are those of the unsigned one.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW
        c2, c3 = (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=1)


def normals(
    noise: Noise, tensor: int, elements: slice, device: torch.device
) -> Float64[Tensor, " elements"]:
    """Standard normal numbers for some elements of a tensor, at most 6.8 in size.

    `tensor` counts those of the list, and the elements are those of the flat tensor.
    """
    first, end = elements.start // 4, -(-elements.stop // 4)
    base = noise.places[tensor]
    place = torch.arange(base + first, base + end, dtype=torch.int64, device=device)
    stream = torch.zeros_like(place)
    counters = [place & _LOW, place >> 32 & _LOW]
    counters += [stream + (noise.step & _LOW), stream + (noise.step >> 32 & _LOW)]
    words = philox(counters, (noise.seed & _LOW, noise.seed >> 32 & _LOW))
    return _box_muller(words)[elements.start - 4 * first :][
        : elements.stop - elements.start
    ]


def _box_muller(words: Int64[Tensor, "blocks 4"]) -> Float64[Tensor, " elements"]:
    """Words 0 and 2 are radii, 1 and 3 signed angles."""
    radius = torch.sqrt(-2 * torch.log((words[:, ::2].double() + 0.5) * 2.0**-32))
    signed = words[:, 1::2] - ((words[:, 1::2] >> 31) << 32)
    angle = math.pi * signed.double() * 2.0**-31
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten()
