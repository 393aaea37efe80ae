"""What a rule is, and what rules ask of slots and layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..contributions import Contribution
from ..reading.plan import Slot
from ..rows.layout import RegularLayout, RowLayout

__all__ = ["Contributions", "Rule", "has_rows", "numbers"]

# By the number of the slot that a contribution is for.
Contributions = dict[int, Contribution]
# Called with a node, its output gradient, whose rows these are, and the slots of the
# node by which parameters enter.
Rule = Callable[[Any, Tensor, RowLayout, Sequence[Slot]], Contributions]


def numbers(slots: Sequence[Slot]) -> set[int]:
    """The inputs of a node by which parameters enter."""
    return {slot.number for slot in slots}


def has_rows(layout: RowLayout) -> bool:
    """Whether rows of the first dim belong to samples."""
    return not isinstance(layout, RegularLayout) or layout.dim == 0
