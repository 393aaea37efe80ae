"""What an operator in compiled code says of itself: which use of which parameter it is.

A mark is one string among the operator's arguments, so it is in the code that the
compiler writes and in every cache of it, and means the same in another process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor

__all__ = [
    "REFUSED",
    "WITH_FACTORS",
    "Into",
    "Mark",
    "Move",
    "joined_moves",
    "mark_of",
    "refusal",
]

# In place of a mark, before the reason why a region has none.
REFUSED = "not marked: "
# ("reshape", shape), ("permute", dims), ("scale", factor), ("times", n): by the n-th of
# the tensors saved as `factor`, ("where", n, kept): zero but where that is `kept`,
# ("take", dim, start, end, step), or ("put", dim, start, end, step, size): into zeros
# of that size along a dim.
Move = tuple[Any, ...]
WITH_FACTORS = frozenset(["times", "where"])


@dataclass(frozen=True)
class Into:
    """A gradient that a use adds to.

    Attributes:
        number: of the input by which the parameter enters, as an eager node counts.
        edge: of the region's node, by which the parameter enters.
        shape: in which the parameter enters the use; -1 for a size that changes.
        moves: from the use's own gradient, of that shape, to that of the parameter; or
            to rows that were looked up in it.
        looked_up: how many rows the parameter has then, of which the node has saved
            `lookup`, -1 for those that are padding.
    """

    number: int
    edge: int
    shape: tuple[int, ...]
    moves: tuple[Move, ...] = ()
    looked_up: int | None = None


@dataclass(frozen=True)
class Mark:
    """One use, as an eager graph would show it.

    Attributes:
        place, total: its number among the marks of the graph, and how many there are.
        name: of the node that does the same in an eager graph.
        saved: what that node saves, for each tensor that the operator is given besides
            the gradient; names that end in [] are those of a list's parts.
        constants: what else it saves.
        into: the gradients that it adds to.
        viewed: the shape of the gradient before it was reshaped; None if it was not.
        edges: of the region's node.
        behind: the place of a look-up that this use stands for, if what comes there is
            summed over samples already; None for uses that stand for themselves.
    """

    place: int
    total: int
    name: str
    saved: tuple[str, ...]
    into: tuple[Into, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    viewed: tuple[int, ...] | None = None
    edges: int = 0
    behind: int | None = None

    def encoded(self) -> str:
        """The string that `mark_of` reads."""
        return json.dumps(asdict(self), separators=(",", ":"))

    def node(self, tensors: Sequence[Tensor]) -> Any:
        """Stands for the eager node, for its rule: what it has saved."""
        found: dict[str, Any] = {f"_saved_{k}": v for k, v in self.constants.items()}
        for name, t in zip(self.saved, tensors, strict=True):
            if name.endswith("[]"):
                found.setdefault(f"_saved_{name[:-2]}", []).append(t)
            else:
                found[f"_saved_{name}"] = t
        hidden = found.pop("_saved_hidden", None)
        if (mask := found.pop("_saved_mask", None)) is not None:
            hidden = ~mask
        for name in ("_saved_indices", "_saved_lookup"):
            if hidden is not None and name in found:
                into = self.into[0]  # an index may count from the end
                ids = found[name].remainder(into.looked_up or into.shape[0])
                found[name] = ids.masked_fill(hidden.squeeze(-1), -1)
        return SimpleNamespace(name=lambda: self.name, **found)


@lru_cache(maxsize=4096)
def mark_of(text: str) -> Mark:
    """The mark that a string says."""
    said = json.loads(text)
    into = tuple(
        Into(
            found["number"],
            found["edge"],
            tuple(found["shape"]),
            tuple(_hashable(move) for move in found["moves"]),
            found["looked_up"],
        )
        for found in said.pop("into")
    )
    viewed = said.pop("viewed")
    return Mark(
        said["place"],
        said["total"],
        said["name"],
        tuple(said["saved"]),
        into,
        said["constants"],
        None if viewed is None else tuple(viewed),
        said["edges"],
        said["behind"],
    )


def joined_moves(moves: Sequence[Move]) -> tuple[Move, ...]:
    """The moves without those that undo each other, or do nothing."""
    joined: list[Move] = []
    for move in moves:
        before = joined[-1] if joined else ("", ())
        if move[0] == before[0] == "permute":
            joined[-1] = ("permute", tuple(before[1][dim] for dim in move[1]))
        elif move[0] == before[0] == "reshape":
            joined[-1] = move
        else:
            joined.append(move)
        kind, *numbers = joined[-1]
        if kind == "permute" and list(numbers[0]) == sorted(numbers[0]):
            joined.pop()
    return tuple(joined)


def refusal(text: str) -> str | None:
    """Why a region is not marked, where an operator says that; else None."""
    return text.removeprefix(REFUSED) if text.startswith(REFUSED) else None


def _hashable(move: Sequence[Any]) -> Move:
    return tuple(tuple(x) if isinstance(x, list) else x for x in move)
