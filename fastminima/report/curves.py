"""The figures of a run that have the step as their x axis and numbers as y."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .columns import Column, Columns
from .drawn import HOW, Drawn, drawn, has, positive
from .factors import factors, temperature
from .noise import noise_scale, of_signs, preconditioned
from .sharpness import eigenvalues, sharpness
from .traces import dots, smooth

__all__ = ["curves", "own_columns"]

_COUNTED = ("batch", "backward")  # by the callbacks, within an epoch and a step
_GROUPS = ("gradient/", "factors/", "sharpness/", "layers/")


def curves(columns: Columns) -> list[Drawn]:
    """Every figure for which the rows have the numbers, in the order of the page."""
    makers: tuple[Callable[[Columns], Drawn | None], ...] = (
        _loss,
        _norms,
        _trace_of_covariance,
        noise_scale,
        preconditioned,
        of_signs,
        temperature,
        factors,
        sharpness,
        eigenvalues,
    )
    return [found for found in (make(columns) for make in makers) if found is not None]


def own_columns(columns: Columns) -> list[Drawn]:
    """A figure for each column that the user added."""
    known = ("loss", "is_finite", *_COUNTED)
    names = [n for n in columns.names if n not in known and not n.startswith(_GROUPS)]
    return [
        drawn(
            f"own-{number}",
            "Your own columns",
            name,
            f"The column {name!r} that was given as extra=. {HOW}",
            smooth(columns[name], name, "blue"),
            name,
        )
        for number, name in enumerate(names)
        if np.isfinite(columns[name].values).any()
    ]


def _root(column: Column) -> Column:
    return Column(column.at, column.steps, np.sqrt(np.maximum(column.values, 0)))


def _loss(columns: Columns) -> Drawn | None:
    if not has(columns, "loss"):
        return None
    return drawn(
        "loss",
        "Loss",
        "Loss of each batch",
        f"The mean over the batch. {HOW}",
        smooth(columns["loss"], "loss", "blue"),
        "loss",
    )


def _norms(columns: Columns) -> Drawn | None:
    if not has(columns, "gradient/mean_grad_sq_norm"):
        return None
    traces = smooth(
        _root(columns["gradient/mean_grad_sq_norm"]), "of the mean gradient", "blue"
    )
    if has(columns, "gradient/norm_median"):
        median = columns["gradient/norm_median"]
        traces += smooth(median, "of samples, the median", "orange")
    if has(columns, "gradient/norm_max"):
        largest = columns["gradient/norm_max"]
        traces.append(dots(largest, "of samples, the largest", "purple"))
    return drawn(
        "gradient-norms",
        "Gradient norms",
        "Norms of the gradient",
        "A sample's norm is |g_n|, g_n the gradient of its own loss; the mean gradient "
        "is what the optimizer is given. Samples that disagree make the mean smaller "
        f"than they are. {HOW}",
        traces,
        "norm",
    )


def _trace_of_covariance(columns: Columns) -> Drawn | None:
    if not has(columns, "gradient/covariance_trace"):
        return None
    traces = smooth(positive(columns["gradient/covariance_trace"]), "tr Σ", "blue")
    if has(columns, "gradient/signal"):
        signal = positive(columns["gradient/signal"])
        traces.append(dots(signal, "signal |E g|²", "orange"))
    return drawn(
        "covariance-trace",
        "Gradient variance",
        "Variance of the gradient, tr Σ, and its signal",
        "tr Σ is the variance of one sample's gradient, summed over parameters; the "
        "signal is the squared norm of the expected gradient. Both are unbiased, so "
        "that the signal of a single batch can be negative, and is then not drawn. "
        f"{HOW}",
        traces,
        "squared gradient",
    )
