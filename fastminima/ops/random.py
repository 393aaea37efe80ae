"""Random numbers as a function of (seed, offset, element), with no state.

The bits are those of Philox4x32-10 with the key `seed` and the counter (element // 4,
offset), 64 bits each: so a number does not depend on how a kernel is launched, and
different offsets give independent streams. An `offset` that is a tensor is read on the
device, so that a captured graph can count it up.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011, doi:10.1145/2063384.2063405; Box and Muller (1958),
doi:10.1214/aoms/1177706645.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._arguments import FLOATS
from ._pieces import dense_parts, pieces
from .cuda import random as cuda
from .table import Op

__all__ = ["gaussian_fill_", "langevin_step_", "philox", "rademacher_fill_"]

_LOW = 0xFFFFFFFF


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


def _words(
    seed: int, offset: int | Int64[Tensor, ""], first: int, blocks: int, like: Tensor
) -> Int64[Tensor, "blocks 4"]:
    """The words of the elements 4 first to 4 (first + blocks)."""
    end = first + blocks
    place = torch.arange(first, end, dtype=torch.int64, device=like.device)
    stream = place.new_zeros(blocks)
    counters = [place & _LOW, place >> 32 & _LOW]
    counters += [stream + (offset & _LOW), stream + (offset >> 32 & _LOW)]
    return philox(counters, (seed & _LOW, seed >> 32 & _LOW))


def _normals(words: Int64[Tensor, "blocks 4"]) -> Float64[Tensor, " elements"]:
    """Standard normal numbers: words 0 and 2 are radii, 1 and 3 signed angles."""
    radius = torch.sqrt(-2 * torch.log((words[:, ::2].double() + 0.5) * 2.0**-32))
    signed = words[:, 1::2] - ((words[:, 1::2] >> 31) << 32)
    angle = math.pi * signed.double() * 2.0**-31
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten()


# Bytes held an element: its words in int64, those of the last round, and the numbers.
_HELD = 64


def _fill(
    out: Tensor,
    seed: int,
    offset: int | Int64[Tensor, ""],
    numbers: Callable[[Tensor], Tensor],
) -> Tensor:
    flat = out.view(-1)
    for part in pieces(-(-out.numel() // 4), 4 * _HELD):
        words = _words(seed, offset, part.start, part.stop - part.start, out)
        into = flat[4 * part.start : 4 * part.stop]
        into.copy_(numbers(words)[: len(into)])
    return out


def _gaussian_fill_(
    out: Float[Tensor, ...], seed: int, offset: int | Int64[Tensor, ""]
) -> Float[Tensor, ...]:
    """Fill `out` with independent standard normal numbers, at most 6.8 in size."""
    return _fill(out, seed, offset, _normals)


def _rademacher_fill_(
    out: Float[Tensor, ...], seed: int, offset: int | Int64[Tensor, ""]
) -> Float[Tensor, ...]:
    """Fill `out` with independent signs, 1 or -1 with equal probability."""
    return _fill(out, seed, offset, lambda words: 1 - 2 * (words.flatten() >> 31))


def _langevin_step_(
    params: Sequence[Float[Tensor, ...]],
    grads: Sequence[Float[Tensor, ...]],
    lr: float,
    deviation: float,
    seed: int,
    offset: int | Int64[Tensor, ""],
) -> None:
    """One Langevin step in place: params <- params - lr grads + deviation noise.

    `deviation` is sqrt(2 lr temperature). The noise is standard normal, numbered
    through the list, each tensor starting at the next multiple of four; a sum is
    rounded once.
    """
    place = 0
    for p, g in zip(params, grads, strict=True):
        dtype = accumulation_dtype(p.dtype)
        first = place
        for part, grad in dense_parts(p, g, bytes_each=_HELD, multiple=4):
            moved = part.to(dtype) - lr * grad.to(dtype)
            blocks = -(-part.numel() // 4)
            if deviation:
                noise = _normals(_words(seed, offset, first, blocks, p))
                noise = noise[: part.numel()].view(part.shape)
                moved += (deviation * noise).to(dtype)
            part.copy_(moved)
            first += blocks
        place += -(-p.numel() // 4)


gaussian_fill_ = Op("gaussian_fill_", _gaussian_fill_)
gaussian_fill_.add_cuda(cuda.gaussian_fill_, dtypes=FLOATS)
rademacher_fill_ = Op("rademacher_fill_", _rademacher_fill_)
rademacher_fill_.add_cuda(cuda.rademacher_fill_, dtypes=FLOATS)
langevin_step_ = Op("langevin_step_", _langevin_step_)
langevin_step_.add_cuda(cuda.langevin_step_(_langevin_step_), dtypes=FLOATS)
