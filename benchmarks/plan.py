"""What a run of the tables measures, in which order, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.curvature import PROBLEMS
from benchmarks.workloads import WORKLOADS

__all__ = ["COLUMNS", "FULL", "QUICK", "Block", "blocks"]

COLUMNS = {
    "norms": tuple(WORKLOADS),
    # With the peers' copies of 67 million numbers a sample W6 took more than 24 GB.
    "second_moments": tuple(name for name in WORKLOADS if name != "W6"),
    "memory": tuple(WORKLOADS),
    "product": ("W1L", "W3", "W5"),
    "eigenvalue": tuple(PROBLEMS),
}
# Seconds of rounds that a block may take, and its fewest rounds.
FULL = {
    "norms": {"budget": 18.0, "min_rounds": 7},
    "second_moments": {"budget": 10.0, "min_rounds": 5},
    "memory": {"repeats": 2},
    "product": {"budget": 12.0, "min_rounds": 5},
    "eigenvalue": {"budget": 30.0, "max_rounds": 5},
}
QUICK = {
    "norms": {"budget": 2.0, "min_rounds": 3},
    "second_moments": {"budget": 2.0, "min_rounds": 3},
    "memory": {"repeats": 1},
    "product": {"budget": 2.0, "min_rounds": 3},
    "eigenvalue": {"budget": 5.0, "max_rounds": 1},
}
QUICK_COLUMNS = ("W1", "W1L", "W2", "W1L trained")


@dataclass(frozen=True)
class Block:
    """One column of one table, and about how many seconds it takes."""

    table: str
    column: str
    seconds: float

    @property
    def workload(self) -> str:
        return self.column.split()[0]


def blocks(
    tables: Sequence[str], workloads: Sequence[str] | None, *, quick: bool
) -> list[Block]:
    """What is to be measured, one workload after the other.

    So a workload's truth is computed once, and what was found right in its norms need
    not be asked again for its memory.
    """
    chosen = [
        (table, column) for table in tables for column in _columns(table, workloads)
    ]
    if quick and not workloads:
        chosen = [pair for pair in chosen if pair[1] in QUICK_COLUMNS]
    found = [Block(*pair, _seconds(*pair, quick)) for pair in chosen]
    order = {name: i for i, name in enumerate(WORKLOADS)}
    return sorted(found, key=lambda block: order[block.workload])


def _columns(table: str, workloads: Sequence[str] | None) -> list[str]:
    return [
        column
        for column in COLUMNS[table]
        if not workloads or column.split()[0] in workloads
    ]


def _seconds(table: str, column: str, quick: bool) -> float:
    seconds = (_QUICK_SECONDS if quick else _FULL_SECONDS).get(table, {})
    return seconds.get(column, seconds.get("", 30.0))


# With all libraries on two idle cores; "" stands for the other columns.
_FULL_SECONDS: dict[str, dict[str, float]] = {
    "norms": {"": 35, "W3": 110, "W4": 60, "W5": 60, "W6": 180},
    "second_moments": {"": 30, "W3": 100, "W4": 45, "W5": 45},
    "memory": {"": 70, "W1L": 130, "W3": 200, "W4": 90, "W5": 100, "W6": 170},
    "product": {"": 35},
    "eigenvalue": {"": 60},
}
_QUICK_SECONDS: dict[str, dict[str, float]] = {
    "norms": {"": 15, "W3": 60, "W6": 120},
    "second_moments": {"": 12, "W3": 50},
    "memory": {"": 40, "W1L": 90, "W3": 120, "W6": 120},
    "product": {"": 10},
    "eigenvalue": {"": 30},
}
