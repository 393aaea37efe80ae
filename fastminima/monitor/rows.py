"""From statistics to flat rows: named numbers, in groups as TensorBoard shows them.

What a row needs of tensors is asked for first (`ask_for_...`), copied together, and
then put together on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..spectrum import Eigenpairs
from ..statistics import GradientStatistics
from .packing import Packed

__all__ = [
    "Row",
    "ask_for_gradient",
    "ask_for_sharpness",
    "gradient_row",
    "is_finite",
    "sharpness_row",
]

Row = dict[str, float]
Numbers = Mapping[str, Sequence[float]]

# Ratios and their intervals, which have no value where the denominator may be zero.
_RATIOS = ("noise_scale", "_smoothed", "_low", "_high", "/share")


def ask_for_gradient(packed: Packed, stats: GradientStatistics) -> None:
    """Add to a copy what the "gradient/" group needs."""
    packed.add("mean_grad_sq_norm", stats.mean_grad_sq_norm)
    if stats.sq_norms is not None:
        norms = stats.sq_norms.sqrt()
        packed.add("norm_max", norms.max())
        packed.add("norm_median", norms.quantile(0.5))
        packed.add("mean_sq_norm", stats.sq_norms.double().mean())


def gradient_row(numbers: Numbers, count: int, all_count: int) -> Row:
    """The "gradient/" group; what needs two samples is left out when there is one.

    Args:
        numbers: what was copied.
        count: samples looked at.
        all_count: samples behind the mean.
    """
    (mean,) = numbers["mean_grad_sq_norm"]
    row: Row = {"gradient/count": count, "gradient/mean_grad_sq_norm": mean}
    if "norm_max" not in numbers:
        return row
    for name in ("norm_max", "norm_median"):
        row[f"gradient/{name}"] = numbers[name][0]
    if all_count > 1:
        unbiased = all_count / (all_count - 1)
        trace = (numbers["mean_sq_norm"][0] - mean) * unbiased
        row |= noise_columns("gradient/", trace, mean, all_count)
    return row


def noise_columns(group: str, trace: float, power: float, count: int) -> Row:
    """Trace, unbiased signal and their ratio; `power` is that of the mean gradient."""
    signal = power - trace / count
    return {
        f"{group}covariance_trace": trace,
        f"{group}signal": signal,
        f"{group}noise_scale": trace / signal if signal else math.nan,
    }


def ask_for_sharpness(packed: Packed, pairs: Eigenpairs) -> None:
    """Add to a copy what the "sharpness/" group needs."""
    packed.add("eigenvalues", pairs.values)
    packed.add("residuals", pairs.residuals)


def sharpness_row(pairs: Eigenpairs, numbers: Numbers | None = None) -> Row:
    """The "sharpness/" group: eigenvalues from the first one on, with residuals.

    With what bounds them, and how far products are from those of one matrix, where that
    is known.

    Args:
        pairs: of the Hessian.
        numbers: what was copied; None to copy now.
    """
    if numbers is None:
        packed = Packed()
        ask_for_sharpness(packed, pairs)
        numbers = packed.read()
    row: Row = {}
    found = zip(numbers["eigenvalues"], numbers["residuals"], strict=True)
    for number, (value, residual) in enumerate(found, start=1):
        row[f"sharpness/eigenvalue_{number}"] = value
        row[f"sharpness/residual_{number}"] = residual
    for name, value in (("upper", pairs.upper), ("noise", pairs.noise)):
        if math.isfinite(value):
            row[f"sharpness/{name}"] = value
    row["sharpness/products"] = pairs.products
    row["sharpness/converged"] = pairs.converged
    return row


def ask_for_extra(packed: Packed, extra: Mapping[str, float | Tensor]) -> None:
    """Add to a copy the user's own columns that are tensors.

    Raises:
        TypeError: for a column that is not one number.
    """
    for name, value in extra.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            packed.add(f"extra/{name}", value)
        elif not isinstance(value, (int, float)):
            _number(name, value)


def extra_row(extra: Mapping[str, float | Tensor], numbers: Numbers, row: Row) -> Row:
    """The user's own columns, beside those of `row`.

    Raises:
        ValueError: for a name that the row has already.
    """
    for name in extra:
        if name in row:
            raise ValueError(
                f"extra[{name!r}] has the name of a column that the row has already. "
                f"Choose another, such as {'my ' + name!r}."
            )
    return {
        name: numbers[f"extra/{name}"][0] if f"extra/{name}" in numbers
        # A boolean stays one; NumPy's numbers become Python's.
        else value if isinstance(value, (bool, int)) else _number(name, value)
        for name, value in extra.items()
    }  # fmt: skip


def _number(name: str, value: object) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(
        f"extra[{name!r}] must be a number or a tensor of one, got {value!r}."
    )


def is_finite(row: Row) -> bool:
    """Whether every number that was measured is finite; ratios may have no value."""
    return all(
        math.isfinite(value) or name.endswith(_RATIOS) for name, value in row.items()
    )
