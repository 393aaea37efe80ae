"""What launchers of Triton kernels share: arguments, and when a grid is too small."""

from __future__ import annotations

import functools

from torch import Tensor

from .._arguments import TRITON, contiguous_rows

__all__ = [
    "PROGRAMS",
    "balanced",
    "has_vectors",
    "one_dtype",
    "power_of_two",
    "side",
    "split",
]

# Programs that keep a GPU of today busy: 108 to 148 multiprocessors, one to two blocks
# each. One number for all of them, so that a result does not depend on the GPU.
PROGRAMS = 256
MULTIPROCESSORS = 132


def one_dtype(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype with contiguous rows; float32 where they differ.

    Raises:
        TypeError: One is of a dtype that the kernels do not have, such as float64.
    """
    for x in (a, g):
        if x.dtype not in TRITON:
            raise TypeError(
                f"The Triton kernels take {TRITON}, got {a.dtype} and {g.dtype}. Use "
                'the op\'s "reference", or convert one.'
            )
    if a.dtype != g.dtype:
        a, g = a.float(), g.float()
    return contiguous_rows(a), contiguous_rows(g)


def split(items: int, programs: int) -> tuple[int, int]:
    """Into how many parts to split a sum over `items`, and the items of a part.

    One, unless the programs of a part are too few to fill a GPU.
    """
    parts = max(1, min(items, PROGRAMS // max(1, programs)))
    each = -(-items // parts)
    return -(-items // max(1, each)), each


@functools.lru_cache(maxsize=1024)
def balanced(samples: int, tiles: int, work: float, most: int) -> tuple[int, int]:
    """Into how many parts to split a sum over samples, and the samples of a part.

    A multiprocessor works on a tile at a time: 144 tiles take two rounds on 132, of
    which the second is nearly empty, and 4 x 144 with a quarter of the samples five
    short ones. More parts cost the writing of each, and its reading.

    Args:
        samples: what the sum is over.
        tiles: programs of one part.
        work: how many times longer a sample's product takes than to write its tile.
        most: parts at most.
    """

    def time(parts: int) -> float:
        rounds = -(-tiles * parts // MULTIPROCESSORS)
        return rounds * (-(-samples // parts) * work + (1 if parts == 1 else 2))

    useful = max(8, 4 * MULTIPROCESSORS // max(1, tiles))
    parts = min(range(1, max(1, min(samples, most, useful)) + 1), key=time)
    each = -(-samples // parts)
    return -(-samples // max(1, each)), each


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and 1."""
    return 1 << max(0, size - 1).bit_length()


def side(size: int, largest: int) -> int:
    """Side of a tile: a power of two, 16 at least as in a product of tensor cores."""
    return min(largest, max(16, power_of_two(size)))


def has_vectors(x: Tensor) -> bool:
    """Whether the compiler sees that rows can be read 16 bytes at a time."""
    return x.shape[-1] % 16 == 0 and x.stride(-2) % 16 == 0
