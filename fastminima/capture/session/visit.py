"""What a use brings when its gradient comes, by the rule that covers it or by all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from torch import Tensor

from ..contributions import Contribution
from ..errors import CaptureError
from ..graph.node import Node
from ..reading.plan import Slot, Use
from ..rows.layout import RowLayout
from ..rules import contributions_of
from ..rules.universal import Universal
from .collector import Collector
from .delivery import Deliveries
from .parts import Parts

__all__ = ["Announce", "check_real", "contributions_at", "visit"]

# Called with a message the first time a node has no rule.
Announce = Callable[[str, Sequence[str]], None]


def visit(
    use: Use,
    found: Mapping[int, Contribution],
    deliveries: Deliveries,
    parts: Parts,
    collector: Collector,
) -> None:
    """Carry what a use brings to its parameters, and collect those that are whole.

    Args:
        use: what was seen.
        found: the contributions, by number of the slot.
        deliveries: of each slot.
        parts: joins the contributions of several uses.
        collector: takes whole parameters.
    """
    if len(deliveries) > 1:
        deliveries = sorted(deliveries, key=lambda d: found[d[0]].reads_another)
    for number, path, deliver in deliveries:
        part = found[number]
        part = part if deliver is None else deliver(part)
        whole = parts.add(path.parameter, part, use.name)
        if whole is not None:
            collector.take(path.parameter, whole)


def check_real(use: Use, tensors: Sequence[Tensor | None]) -> None:
    """Raise CaptureError for complex numbers where a use reads its tensors.

    No dtype is part of what is remembered of a graph, and a kernel would cast them.
    """
    for x in tensors:
        if x is not None and x.is_complex():
            raise CaptureError(
                f"Numbers of {x.dtype} reached {use.name} (parameters "
                f"{use.parameters}), where they were real when its rows were measured; "
                "complex ones are not supported. Write that part with real ones."
            )


def _check_rows(
    use: Use, grads: Sequence[Tensor | None], layouts: Sequence[RowLayout | None]
) -> None:
    """Raise CaptureError for a gradient whose rows were not measured."""
    check_real(use, grads)
    for grad, layout in zip_longest(grads, layouts):
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
    """Of each slot of a use, by its number; and the slots that no rule covers.

    Raises:
        CaptureError: for a gradient whose rows were not measured.
    """
    _check_rows(use, grads, layouts)
    found = contributions_of(use.name, node, grads, layouts, use.slots)
    rest = [slot for slot in use.slots if slot.number not in found]
    if rest:
        announce(use.name, [name for s in rest for name in s.parameters])
        found |= Universal(node, grads, layouts, batch).contributions(rest)
    return found, rest
