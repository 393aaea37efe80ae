"""What a use brings when its gradient comes, by the rule that covers it or by all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from torch import Tensor

from ..contributions import Contribution
from ..errors import CaptureError
from ..graph.node import Node
from ..reading.plan import Slot, Use
from ..rows.layout import RowLayout
from ..rules import contributions_of
from ..rules.universal import Universal

__all__ = ["Announce", "check_rows", "contributions_at"]

# Called with a message the first time a node has no rule.
Announce = Callable[[str, Sequence[str]], None]


def check_rows(
    use: Use, grads: Sequence[Tensor | None], layouts: Sequence[RowLayout | None]
) -> None:
    """Raise CaptureError for a gradient whose rows were not measured."""
    for grad, layout in zip_longest(grads, layouts):
        if grad is not None and grad.is_complex():
            raise CaptureError(
                f"A gradient of {grad.dtype} reached {use.name} (parameters "
                f"{use.parameters}), where numbers were real when its rows were "
                "measured; complex ones are not supported. Write that part with real "
                "ones."
            )
        if grad is not None and layout is None:
            raise CaptureError(
                f"A gradient of shape {tuple(grad.shape)} reached {use.name} "
                f"(parameters {use.parameters}) where none came when its rows were "
                "measured. Make a new probe; report it if that does not help."
            )


def contributions_at(
    use: Use,
    node: Node,
    grads: Sequence[Tensor | None],
    layouts: Sequence[RowLayout | None],
    batch: int,
    announce: Announce,
) -> tuple[dict[int, Contribution], list[Slot]]:
    """Of each slot of a use, by its number; and the slots that no rule covers."""
    found = contributions_of(use.name, node, grads, layouts, use.slots)
    rest = [slot for slot in use.slots if slot.number not in found]
    if rest:
        announce(use.name, [name for s in rest for name in s.parameters])
        found |= Universal(node, grads, layouts, batch).contributions(rest)
    return found, rest
