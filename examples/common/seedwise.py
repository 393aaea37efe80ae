"""Paired over seeds: values, differences and slopes, one a seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["by_seed", "cells", "chunks", "difference", "shuffled", "slopes"]

Row = dict[str, Any]
Key = Callable[[Row], Any]


def by_seed(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """The rows of each seed."""
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["seed"]].append(row)
    return dict(sorted(found.items()))


def chunks(seeds: Sequence[int], size: int) -> list[list[int]]:
    """Seeds in groups in their order, so that more of them change no earlier group."""
    return [list(seeds[at : at + size]) for at in range(0, len(seeds), size)]


def cells(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of each combination of some fields, in order."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(sorted(found.items()))


def slopes(
    rows: Iterable[Row], y: Key, *x: Key, fewest: int = 3
) -> list[tuple[float, ...]]:
    """Least-squares slopes of y on each x, a tuple a seed; the constant is fitted too.

    A seed with fewer than `fewest` values of the first x is left out, and rows whose y
    or x is missing are.
    """
    found = []
    for same in by_seed(rows).values():
        points = [(y(r), *(f(r) for f in x)) for r in same]
        kept = [p for p in points if all(v is not None for v in p)]
        table = np.array(kept, dtype=float)
        if len(kept) <= len(x) or len(set(table[:, 1])) < fewest:
            continue
        design = np.column_stack([np.ones(len(kept)), table[:, 1:]])
        fit = np.linalg.lstsq(design, table[:, 0])[0]
        found.append(tuple(float(v) for v in fit[1:]))
    return found


def difference(rows: Iterable[Row], value: Key, first: Key, second: Key) -> list[float]:
    """Mean of `value` over a seed's rows for which `first` holds, less `second`'s.

    Seeds that lack either are left out.
    """
    found = []
    for same in by_seed(rows).values():
        both = [
            [v for r in same if is_of(r) and (v := value(r)) is not None]
            for is_of in (first, second)
        ]
        if all(both):
            found.append(float(np.mean(both[0]) - np.mean(both[1])))
    return found


def shuffled(
    rows: Sequence[Row], seed: int, *names: str, within: Sequence[str] = ()
) -> list[Row]:
    """The rows with some fields permuted together among the rows of each seed.

    Among those rows only that also have the fields `within` in common.
    """
    rng = random.Random(seed)
    found = []
    for same in cells(rows, "seed", *within).values():
        labels = [{name: r.get(name) for name in names} for r in same]
        rng.shuffle(labels)
        found += [{**r, **label} for r, label in zip(same, labels, strict=True)]
    return found
