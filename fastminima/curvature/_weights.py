"""What a loss says about the weight of a batch: is it a mean over its rows?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._data import tensors_in

__all__ = ["check_weights"]

# What a closure may raise on a part of a batch it was not written for.
_REFUSALS = (
    *(RuntimeError, ValueError, TypeError, AssertionError),
    *(IndexError, KeyError, AttributeError, NotImplementedError, ZeroDivisionError),
)
_OFF = 2e-2  # of its size, by which a weight must be off to be told from rounding
_SURE = 10  # times the tolerance, by which a mean over rows must be missed

Slope = Callable[[Any], Tensor]


def check_weights(
    slope: Slope, batch: Any, whole: Tensor, rows: int, tolerance: float
) -> None:
    """ValueError if the loss weighs the rows of a batch in another way than equally.

    The flat gradient `whole` of the batch is compared with those of its first rows and
    of its other rows, made by `slope`. A mean over rows is their mean weighted with the
    numbers of rows. A sum, a mean over tokens or masked items, or class weights are
    other combinations of the two; then the number of rows is the wrong weight for a
    batch among others. Nothing can be said where the gradient is no such combination
    of the two: layers or losses that mix samples, or that draw random numbers.
    """
    first = max(rows // 3, 1)
    parts = _parts(slope, batch, rows, first, dim=0)
    found = parts and _misfit(whole, parts, first / rows, tolerance)
    if not found:
        _check_second_dim(slope, batch, whole, tolerance)
        return
    share, total = found
    if share < 0:
        return  # as it should be
    head = f"The batches cannot be weighed by their leading size: of {rows} rows, "
    if abs(total - 2) <= _SURE * tolerance and abs(share - 1) <= _SURE * tolerance:
        raise ValueError(
            f"{head}the first {first} and the others have gradients that add up to "
            "that of the batch, so the loss is a sum, not a mean. Return the mean over "
            "the batch, or pass count=lambda batch: 1 for the mean of the sums."
        )
    off = abs(share - first / rows)
    # Both weights of a mean make 1; those of its square root, with parts that differ
    # by delta, are off by delta / 2 of their size and their sum by delta / 4 of that.
    if off < _OFF * first / rows or abs(total - 1) > _OFF / 2 * off:
        return
    raise ValueError(
        f"{head}the first {first} weigh {share:.1%} in the loss, not "
        f"{first / rows:.1%}: it is a mean over something else (tokens, unmasked "
        "items, edges, weighted classes). Pass count=, a function from a batch to the "
        "number or total weight of what the loss is a mean over."
    )


def _misfit(
    whole: Tensor, parts: tuple[Tensor, Tensor], share: float, tolerance: float
) -> tuple[float, float] | None:
    """Weight of the first part and of both; (-1, 0) for a mean over rows.

    None where the gradient is no combination of those of the parts.
    """
    left, right = (part.double() for part in parts)
    whole = whole.double()
    size = max(
        map(float, (whole.norm(), share * left.norm(), (1 - share) * right.norm()))
    )
    apart = float((whole - share * left - (1 - share) * right).norm())
    if not apart > tolerance * size:
        return -1.0, 0.0
    basis = torch.stack([left, right])
    gram = (basis @ basis.T).cpu().numpy()
    dots = (basis @ whole).cpu().numpy()
    weights = np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ dots
    a, b = map(float, weights)
    left_over = float((whole - a * left - b * right).norm())
    if apart <= _SURE * tolerance * size or not left_over <= tolerance * size:
        return None
    return (a, a + b) if a >= 0 and b >= 0 else None


def _check_second_dim(
    slope: Slope, batch: Any, whole: Tensor, tolerance: float
) -> None:
    """ValueError if the loss is a mean over the second dimension of all tensors."""
    sizes = {t.shape[1] for t in tensors_in(batch) if t.dim() > 1}
    if len(sizes) != 1 or any(t.dim() == 1 for t in tensors_in(batch)):
        return
    (columns,) = sizes
    first = max(columns // 3, 1)
    parts = _parts(slope, batch, columns, first, dim=1) if columns > 1 else None
    if parts is None:
        return
    found = _misfit(whole, parts, first / columns, tolerance)
    if found is not None and found[0] < 0:
        rows = next(t.shape[0] for t in tensors_in(batch) if t.dim() > 1)
        raise ValueError(
            "The batches cannot be weighed by their leading size: the loss is a mean "
            f"over the second dimension of the tensors ({columns}), not over the first "
            f"({rows}). Pass count=, such as lambda batch: batch[0].shape[1]."
        )


def _parts(
    slope: Slope, batch: Any, size: int, first: int, dim: int
) -> tuple[Tensor, Tensor] | None:
    """Gradients of the first rows and of the others; None if they cannot be had."""
    try:
        left = slope(_narrowed(batch, size, 0, first, dim))
        right = slope(_narrowed(batch, size, first, size, dim))
    except _REFUSALS:
        return None
    is_finite = torch.isfinite(left).all() and torch.isfinite(right).all()
    return (left, right) if bool(is_finite) else None


def _narrowed(value: Any, size: int, start: int, stop: int, dim: int) -> Any:
    """The rows from `start` to `stop` of everything that has `size` of them."""

    def inner(part: Any) -> Any:
        return _narrowed(part, size, start, stop, dim)

    if isinstance(value, Tensor):
        is_long = value.dim() > dim and value.shape[dim] == size
        return value.narrow(dim, start, stop - start) if is_long else value
    if isinstance(value, np.ndarray):
        is_long = dim == 0 and value.ndim > 0 and len(value) == size
        return value[start:stop] if is_long else value
    if isinstance(value, Mapping):
        items = {name: inner(part) for name, part in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        narrowed = copy.copy(value)
        narrowed.update(items)
        return narrowed
    if isinstance(value, list | tuple):
        is_plain = next(tensors_in(value), None) is None
        if is_plain and dim == 0 and len(value) == size:
            return value[start:stop]
        parts = map(inner, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
