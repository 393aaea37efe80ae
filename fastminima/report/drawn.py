"""A figure on the page, and what makes one of a column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .columns import Column, Columns
from .traces import Figure, Trace, layout, log_axis

__all__ = ["HOW", "Drawn", "drawn", "has", "positive"]

HOW = (
    "Thin: as logged. Bold: the median over windows of rows that are centred, so that "
    "it does not lag. Shaded: their 10th to 90th percentile."
)


@dataclass(frozen=True)
class Drawn:
    """A figure on the page.

    Attributes:
        id: of its element.
        section: heading under which it stands.
        title: what it shows, in a few words.
        glossary: what its words mean, in a sentence or two.
        figure: in plotly's JSON.
    """

    id: str
    section: str
    title: str
    glossary: str
    figure: Figure


def drawn(
    id: str, section: str, title: str, glossary: str, traces: list[Trace], unit: str
) -> Drawn:
    """A figure with one y axis, which is logarithmic where it can be."""
    figure = {
        "data": traces,
        "layout": layout(title, yaxis=log_axis(traces, unit)),
    }
    return Drawn(id, section, title, glossary, figure)


def has(columns: Columns, name: str) -> bool:
    """Whether there is a finite number under a name."""
    return bool(np.isfinite(columns[name].values).any())


def positive(column: Column) -> Column:
    """Without what a logarithmic axis cannot show."""
    return Column(
        column.at, column.steps, np.where(column.values > 0, column.values, np.nan)
    )
