"""Where kernels leave norms and sums, in parts, and how the parts become results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .conv_cost import chunks
from .conv_sizes import Operands
from .totals import first_added, last_added

__all__ = ["Outputs", "outputs"]


class Outputs(NamedTuple):
    """Partial results; what was not asked for is None.

    Sums of parts are made in a fixed order, so a result is the same at each call.
    """

    norms: Tensor | None  # [batch, parts]
    grad: Tensor | None  # [chunks, weight]
    moment: Tensor | None  # [chunks, weight]
    chunks: int
    per_chunk: int  # samples

    def pointers(self, unused: Tensor) -> list[Tensor]:
        """The three as arguments of a kernel."""
        return [unused if part is None else part for part in self[:3]]

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Squared norms [batch], summed gradient and summed squares [weight]."""
        return (
            None if self.norms is None else last_added(self.norms),
            None if self.grad is None else first_added(self.grad),
            None if self.moment is None else first_added(self.moment),
        )


def outputs(
    of: Operands,
    tiles: int,
    norms: bool,
    grad: bool,
    moment: bool,
    *,
    norms_a_tile: int = 1,
) -> Outputs:
    """Memory for the results of a kernel that cuts the weight into `tiles`."""
    batch = of.sizes.batch
    per_chunk = -(-batch // chunks(batch, tiles)) if grad or moment else 1
    count = -(-batch // per_chunk)

    def new(*shape: int) -> Tensor:
        return of.image.new_empty(shape, dtype=torch.float32)

    return Outputs(
        norms=new(batch, tiles * norms_a_tile) if norms else None,
        grad=new(count, of.sizes.weight) if grad else None,
        moment=new(count, of.sizes.weight) if moment else None,
        chunks=count,
        per_chunk=per_chunk,
    )
