"""Parameters that a graph reaches and a probe does not know yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .nodes import ACCUMULATE
from .tape import Tape

__all__ = ["has_changed", "untracked_leaves", "untracked_nodes"]


def untracked_nodes(tape: Tape) -> list[int]:
    """The nodes of leaves that are not tracked parameters."""
    if tape.names.count(ACCUMULATE) == len(tape.leaves):  # all of them are
        return []
    tracked = tape.parameter_at
    return [i for i, n in enumerate(tape.names) if n == ACCUMULATE and i not in tracked]


def untracked_leaves(tape: Tape) -> list[nn.Parameter]:
    """Parameters among the leaves of a graph that are not tracked."""
    leaves = (tape.nodes[i].variable for i in untracked_nodes(tape))
    return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]


def has_changed(
    model: nn.Module,
    tracked: Mapping[str, Tensor],
    tape: Tape,
    others: Sequence[Tensor],
) -> bool:
    """Whether a model has other parameters to train than those that are tracked.

    They were frozen or did not exist when the probe was made, or are frozen now. Only
    a graph that reaches something unknown, or less than all, can tell.
    """
    if others:
        own = {id(p) for p in model.parameters() if p.requires_grad}
        if any(id(leaf) in own for leaf in others):
            return True
    if len(tape.leaves) == len(tracked):
        return False
    return any(
        name not in tape.leaves and not p.requires_grad for name, p in tracked.items()
    )
