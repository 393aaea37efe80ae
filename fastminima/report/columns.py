"""Rows turned into columns, which is how figures and tables read them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

__all__ = ["Column", "Columns"]


@dataclass(frozen=True)
class Column:
    """One name of the rows that have it.

    Attributes:
        at: numbers of those rows, from 0.
        steps: their steps.
        values: NaN where the row has a null.
    """

    at: Int[np.ndarray, " rows"]
    steps: Float[np.ndarray, " rows"]
    values: Float[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.at)

    @property
    def last(self) -> float:
        """The newest value; NaN without any."""
        return float(self.values[-1]) if len(self) else math.nan

    @property
    def usual(self) -> float:
        """The median of the newest fifty values: not that of one short batch."""
        newest = self.values[-50:]
        newest = newest[np.isfinite(newest)]
        return float(np.median(newest)) if len(newest) else math.nan

    def where(self, kept: np.ndarray) -> Column:
        """The part of it that a mask over its entries keeps."""
        return Column(self.at[kept], self.steps[kept], self.values[kept])


class Columns:
    """Columns that grow by a row at a time. A row without a step is left out.

    Numbers and truth values are kept; text is not.

    Example:
        >>> columns = Columns()
        >>> columns.add({"step": 10, "loss": 0.5})
        True
        >>> columns.add({"step": 20, "loss": None, "sharpness/eigenvalue_1": 7.0})
        True
        >>> columns["loss"].values
        array([0.5, nan])
        >>> columns["sharpness/eigenvalue_1"].steps
        array([20.])
    """

    def __init__(self) -> None:
        self._steps = array("d")
        self._at: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def __getitem__(self, name: str) -> Column:
        """A column; an empty one where no row has the name."""
        at = np.array(self._at.get(name, ()), dtype=np.int64)
        values = np.array(self._values.get(name, ()), dtype=np.float64)
        return Column(at, self.steps[at], values)

    @property
    def names(self) -> list[str]:
        """All names but the step, in the order they were met."""
        return list(self._at)

    @property
    def steps(self) -> Float[np.ndarray, " rows"]:
        """The step of each row."""
        return np.array(self._steps, dtype=np.float64)

    @property
    def current(self) -> np.ndarray:
        """Which rows stand: of a run that went back to an earlier step, the redone."""
        steps = self.steps
        if not len(steps):
            return np.zeros(0, dtype=bool)
        later = np.minimum.accumulate(steps[::-1])[::-1]
        return steps <= later

    def add(self, row: Mapping[str, Any]) -> bool:
        """Add a row; null is NaN. False for what is no row, having no step."""
        step = _number(row.get("step"))
        if step is None or not math.isfinite(step):
            return False
        number = len(self._steps)
        self._steps.append(step)
        for name, value in row.items():
            known = _number(value)
            if name != "step" and known is not None:
                if name not in self._at:
                    self._at[name], self._values[name] = array("q"), array("d")
                self._at[name].append(number)
                self._values[name].append(known)
        return True


def _number(value: object) -> float | None:
    """A number, NaN for null, None for anything else."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, (bool, int, float)) else None
