"""Contributions whose ingredients are larger than what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...ops._pieces import pieces, step_of
from .base import Contribution, summed

__all__ = ["InPieces", "in_pieces"]


class InPieces(Contribution):
    """Contributions of some samples at a time, made anew whenever they are read.

    Args:
        batch: number of samples.
        make: the contribution of samples lo ... hi - 1 alone.
        bytes_each: what it holds for one sample.
    """

    def __init__(
        self,
        batch: int,
        shape: tuple[int, ...],
        make: Callable[[int, int], Contribution],
        bytes_each: int,
    ) -> None:
        self.batch, self.shape = batch, shape
        self._make, self._bytes_each = make, bytes_each

    def _parts(self) -> Iterator[Contribution]:
        for some in pieces(self.batch, self._bytes_each, 4):
            yield self._make(some.start, some.stop)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self._make(lo, hi).per_sample(0, hi - lo)

    def sq_norms(self) -> Tensor:
        return torch.cat([part.sq_norms() for part in self._parts()])

    def second_moment(self) -> Tensor:
        return summed(part.second_moment() for part in self._parts())

    def total(self) -> Tensor:
        return summed(part.total() for part in self._parts())

    def dots(self, direction: Tensor) -> Tensor:
        return torch.cat([part.dots(direction) for part in self._parts()])

    def several_dots(self, directions: Sequence[Tensor]) -> Sequence[Tensor]:
        parts = [part.several_dots(directions) for part in self._parts()]
        return [torch.cat(dots) for dots in zip(*parts, strict=True)]


def in_pieces(
    batch: int,
    make: Callable[[int, int], Contribution],
    bytes_each: int,
    *,
    shared_by: int = 1,
) -> Contribution:
    """The whole contribution where it holds little, or `InPieces` of it.

    Little is what `shared_by` of them may hold together.
    """
    if batch * bytes_each * shared_by <= step_of(1, 4):
        return make(0, batch)
    return InPieces(batch, make(0, min(batch, 1)).shape, make, bytes_each)
