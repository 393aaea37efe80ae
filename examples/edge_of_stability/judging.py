"""Whether runs settle at the edge, and the table that says where they do.

A run **tests** the claim if its sharpness begins below .7 of the edge and has come to
.8 of it before the second half of its steps. Its value is the median of that half for
an eigenvalue, which has spikes, and the mean for batch sharpness, an expectation. A run
that begins at the edge was not sharpened there, and one that has not come near it yet,
such as at a small learning rate, says nothing of what happens there: both have no
value, and with them the verdict is UNDECIDED. Having come near, a run may go beyond,
fall back or hover elsewhere: that is what can be NOT HELD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from examples.engine.experiment import Row

__all__ = ["BRACKET", "arrival", "remark", "second_half", "settled"]

# Of values, their median or their mean.
Middle = Callable[[Sequence[float]], float]
# Within a tenth of the edge.
BRACKET = (0.9, 1.1)
BEGIN, NEAR = 0.7, 0.8


def arrival(row: Row, name: str) -> int | None:
    """The first look, in the first half, at .8 of the edge; None if there is none.

    None as well for a run that begins above .7 of it.
    """
    values = row[name]
    if values[0] is None or values[0] >= BEGIN:
        return None
    early = enumerate(values[: len(values) // 2])
    return next((i for i, v in early if v is not None and v >= NEAR), None)


def second_half(row: Row, name: str, middle: Middle = median) -> float:
    """The middle of the second half of the looks; NaN where one is missing."""
    values = row[name][len(row[name]) // 2 :]
    return math.nan if None in values else middle(values)


def settled(row: Row, name: str, middle: Middle = median) -> float:
    """The share of the edge at which a run settles; NaN if it does not test that."""
    return math.nan if arrival(row, name) is None else second_half(row, name, middle)


def remark(rows: Sequence[Row], name: str, cell: Callable[[Row], str]) -> str:
    """Which runs have no value, and why; "" if all have one."""
    began, short = {}, {}
    for row in rows:
        if arrival(row, name) is None:
            first = row[name][0]
            why = began if first is not None and first >= BEGIN else short
            why[cell(row)] = why.get(cell(row), 0) + 1
    words = [
        f"{count} of the runs at {where} {what}, and test nothing."
        for found, what in (
            (began, f"began above {BEGIN:g} of the edge"),
            (short, f"had not come to {NEAR:g} of the edge by half of their steps"),
        )
        for where, count in found.items()
    ]
    return " ".join(words)
