"""Which panels a figure of rows has, and what is drawn in each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LIMIT", "Line", "Panel", "panels_of", "series", "with_limit"]

# Above this a step of gradient descent overshoots along the steepest direction.
LIMIT = "sharpness/two_over_lr"
_GROUPS = ("gradient/", "factors/", "sharpness/", "layers/")
_OTHERS = frozenset(["step", "loss", "is_finite", "batch", "backward"])

_BOLD = {"lw": 1.8}
_DOTS = {"lw": 0, "marker": ".", "ms": 4, "alpha": 0.45}
_DASHED = {"lw": 1.2, "ls": "--", "color": "0.4"}
_BARS = {"lw": 1.4, "marker": ".", "capsize": 2, "elinewidth": 1}


@dataclass(frozen=True)
class Line:
    """One column of the rows; without a style, thin with its trend bold.

    What the trend is fitted to is the column over the one named `per`, if any: where
    that one jumps, so does the bold line. `error` names the column of error bars, `low`
    and `high` those of a band around the line.
    """

    name: str
    label: str = ""
    style: Mapping[str, Any] | None = None
    per: str | None = None
    error: str | None = None
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Panel:
    """Drawn if the rows have the first of its lines.

    `scale` is "log", or "auto": logarithmic where all values are positive and the
    largest is ten times the smallest or more.
    """

    title: str
    lines: Sequence[Line]
    scale: str = "log"


def _noise_scale(name: str, title: str) -> Panel:
    band = {"low": f"{name}_low", "high": f"{name}_high"}
    return Panel(
        title,
        [
            Line(name, "single steps", _DOTS),
            Line(f"{name}_smoothed", "ratio of averages", _BOLD, **band),
            Line("factors/batch_size", "batch size", _DASHED),
        ],
    )


_FIXED = (
    Panel("loss", [Line("loss")], scale="auto"),
    Panel(
        "gradient norms",
        [
            Line("gradient/mean_grad_sq_norm", "of the mean gradient"),
            Line("gradient/norm_median", "of samples: median"),
            Line("gradient/norm_max", "of samples: largest", _DOTS),
        ],
    ),
    Panel(
        "tr Σ, variance of the gradient over samples",
        [Line("gradient/covariance_trace")],
    ),
    _noise_scale("gradient/noise_scale", "noise scale, in samples"),
    _noise_scale(
        "gradient/preconditioned_noise_scale",
        "noise scale in the norm of the optimizer, in samples",
    ),
    _noise_scale("gradient/sign_noise_scale", "noise scale of signs, in samples"),
    Panel(
        "temperature, in units of the loss",
        [Line("factors/temperature", per="factors/ratio")],
    ),
)


def panels_of(
    rows: Sequence[Mapping[str, float]], columns: Sequence[str] | None
) -> list[Panel]:
    """The panels that rows give: ours, the sharpness, and one for each other column.

    Raises:
        ValueError: for a column that no row has, or that has no numbers.
    """
    names = {name: None for row in rows for name, value in row.items() if _is(value)}
    found = [panel for panel in _FIXED if panel.lines[0].name in names]
    found += _sharpness(names, rows)
    if columns is None:
        columns = [n for n in names if n not in _OTHERS and not n.startswith(_GROUPS)]
    unknown = [name for name in columns if name not in names]
    if unknown:
        raise ValueError(
            f"No row has a number named {', '.join(map(repr, unknown))}; the names are "
            f"{sorted(names)}."
        )
    return found + [Panel(name, [Line(name)], scale="auto") for name in columns]


def _sharpness(
    names: Iterable[str], rows: Sequence[Mapping[str, float]]
) -> list[Panel]:
    numbers = sorted(
        int(name.rpartition("_")[2])
        for name in names
        if name.startswith("sharpness/eigenvalue_")
    )
    if not numbers:
        return []
    lines = [
        Line(
            f"sharpness/eigenvalue_{number}",
            f"λ$_{{{number}}}$ ± residual",
            _BARS,
            error=f"sharpness/residual_{number}",
        )
        for number in numbers
    ]
    has_momentum = any(row.get("factors/momentum") for row in rows)
    label = (
        "2(1 + m)/η, limit of stability" if has_momentum else "2/η, limit of stability"
    )
    limit = Line(LIMIT, label, _DASHED)
    title = "sharpness, largest eigenvalues of the Hessian"
    return [Panel(title, [*lines, limit], scale="auto")]


def with_limit(rows: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Rows with the limit of stability of gradient descent, where they have none.

    Of the heavy ball 2 (1 + m) / eta. Rows of an optimizer that rescales gradients have
    a learning rate and no ratio: nothing is added to them.

    Source: Cohen et al. (2021), arXiv:2103.00065, section 2 and appendix B.
    """
    return [
        row | {LIMIT: limit} if (limit := _limit(row)) is not None else row
        for row in map(dict, rows)
    ]


def _limit(row: Mapping[str, float]) -> float | None:
    rate = row.get("factors/learning_rate")
    if LIMIT in row or "factors/ratio" not in row or not rate:
        return None
    return 2 * (1 + row.get("factors/momentum", 0.0)) / rate


def series(
    rows: Sequence[Mapping[str, float]], name: str, *others: str | None
) -> tuple[list[float], ...]:
    """Steps and values of the rows that have a column; and other columns in them.

    With a gap where the step goes back. Squared norms come as norms. What a row lacks
    of the others is NaN.
    """
    found: tuple[list[float], ...] = tuple([] for _ in range(2 + len(others)))
    for row in rows:
        if not _is(row.get(name)):
            continue
        if found[0] and row["step"] < found[0][-1]:
            for column in found:
                column.append(math.nan)
        cells = [row[name], *(_cell(row, other) for other in others)]
        if name.endswith("grad_sq_norm"):
            cells = [math.sqrt(cell) if cell >= 0 else math.nan for cell in cells]
        for column, cell in zip(found, [row["step"], *cells], strict=True):
            column.append(cell)
    return found


def _cell(row: Mapping[str, float], name: str | None) -> float:
    value = row.get(name) if name is not None else None
    return value if value is not None and _is(value) else math.nan


def _is(value: Any) -> bool:
    """Whether a value can be drawn: user columns may hold anything."""
    return isinstance(value, (int, float))
