"""Where what belongs to a parameter is added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._flat import Joined

__all__ = ["Handed", "Leaf", "Leaves", "Nowhere", "wanted"]


class Leaf:
    """The sum for one parameter, or for its transpose.

    Attributes:
        is_wanted: Whether what is added is asked for.
    """

    is_wanted = True

    def __init__(self, leaves: Leaves, index: int, is_turned: bool) -> None:
        self._leaves, self._index, self._is_turned = leaves, index, is_turned

    def add(self, value: Tensor) -> None:
        """Add a tensor of the parameter's shape (or of its transpose's)."""
        self._leaves.add(self._index, value.t() if self._is_turned else value)

    def add_sum(self, value: Tensor) -> None:
        """Add the sum of a matrix over the dims that it was spread along."""
        shape = self._leaves.shape(self._index)
        is_plain = shape == value.shape[1:] and not self._is_turned
        target = self._leaves.unwritten(self._index) if is_plain else None
        if target is None:
            shape = shape[::-1] if self._is_turned else shape
            self.add(value.sum_to_size(shape))
        else:
            torch.sum(value, 0, out=target)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add the matrix a @ b."""
        if self._is_turned:
            a, b = b.t(), a.t()
        target = self._leaves.unwritten(self._index)
        if target is None:
            self._leaves.target(self._index).addmm_(a, b)
        else:
            torch.mm(a, b, out=target)


class Nowhere(Leaf):
    """Where a product within some parameters needs nothing: rules leave it out."""

    is_wanted = False

    def add(self, value: Tensor) -> None:
        """Nothing."""

    def add_sum(self, value: Tensor) -> None:
        """Nothing."""

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Nothing; the product is not made."""


def wanted(has: Sequence[bool], leaves: Sequence[Leaf | None]) -> list[bool]:
    """For each input whether the change of its gradient is asked for."""
    pairs = zip(has, leaves, strict=True)
    return [there and (leaf is None or leaf.is_wanted) for there, leaf in pairs]


class Leaves:
    """A sum for each parameter, in one piece of memory where they are of one dtype."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._targets: list[Tensor] = []
        self._is_written: list[bool] = []
        self._flat: Tensor | None = None

    def start(self) -> None:
        """New memory, nothing in it yet."""
        first = self._parameters[0]
        self._is_written = [False] * len(self._parameters)
        if any(p.dtype != first.dtype for p in self._parameters):
            self._targets = [
                torch.empty(p.shape, dtype=p.dtype, device=p.device)
                for p in self._parameters
            ]
            return
        sizes = [p.numel() for p in self._parameters]
        flat = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self._flat = flat
        self._targets = [
            part.view(p.shape)
            for part, p in zip(flat.split(sizes), self._parameters, strict=True)
        ]

    def shape(self, index: int) -> torch.Size:
        """Of a parameter."""
        return self._parameters[index].shape

    def target(self, index: int) -> Tensor:
        """The sum so far."""
        return self._targets[index]

    def unwritten(self, index: int) -> Tensor | None:
        """Memory for the first summand, which must be written; None if it is there."""
        if self._is_written[index]:
            return None
        self._is_written[index] = True
        return self._targets[index]

    def add(self, index: int, value: Tensor) -> None:
        """Add a tensor of the parameter's shape."""
        target = self.unwritten(index)
        if target is None:
            self._targets[index].add_(value)
        else:
            target.copy_(value)

    def finish(self, is_reached: Sequence[bool]) -> list[Tensor | None]:
        """The sums; None for parameters not reached."""
        found: list[Tensor | None] = []
        for target, written, reached in zip(
            self._targets, self._is_written, is_reached, strict=True
        ):
            found.append((target if written else target.zero_()) if reached else None)
        self._targets, flat, self._flat = [], self._flat, None
        return found if flat is None or not all(is_reached) else Joined(found, flat)


class Handed(Leaves):
    """The sums as they come: what is handed on alone is not copied."""

    def start(self) -> None:
        """Nothing is there yet."""
        self._found: list[Tensor | None] = [None] * len(self._parameters)

    def target(self, index: int) -> Tensor:
        """The sum so far, in memory of its own."""
        found = self._found[index]
        own = torch.zeros_like(self._parameters[index]) if found is None else found + 0
        self._found[index] = own
        return own

    def unwritten(self, index: int) -> None:
        """No memory is kept for it."""

    def add(self, index: int, value: Tensor) -> None:
        """Add a tensor of the parameter's shape."""
        found = self._found[index]
        self._found[index] = value if found is None else found + value

    def finish(self, is_reached: Sequence[bool]) -> list[Tensor | None]:
        """The sums; None for those that nothing was added to."""
        found, self._found = self._found, []
        return found
