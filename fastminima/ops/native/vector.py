"""Calls of the native kernels for steps on one flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .._arguments import SUFFIX, addresses

__all__ = [
    "dots",
    "lanczos_step",
    "linear_combinations",
    "power_step",
    "project_out",
    "same_values",
]


def _scratch(kernels: Any, n: int, sums: int, results: int) -> tuple[Tensor, Tensor]:
    counts = kernels.vector_partials(n, sums), results
    partials, result = (
        torch.empty(count, dtype=torch.float64, device="cpu") for count in counts
    )
    return partials, result


def lanczos_step(
    kernels: Any, w: Tensor, v: Tensor, previous: Tensor | None, beta: Tensor
) -> Tensor:
    """See `fastminima.ops.vector.lanczos_step`."""
    partials, result = _scratch(kernels, len(w), 1, 2)
    getattr(kernels, f"lanczos_step_{SUFFIX[w.dtype]}")(
        *(w.data_ptr(), v.data_ptr(), 0 if previous is None else previous.data_ptr()),
        *(beta.data_ptr(), len(w), partials.data_ptr(), result.data_ptr()),
        _native.threads(),
    )
    return result


def power_step(kernels: Any, w: Tensor, v: Tensor, shift: float, out: Tensor) -> Tensor:
    """See `fastminima.ops.vector.power_step`."""
    partials, result = _scratch(kernels, len(w), 2, 3)
    getattr(kernels, f"power_step_{SUFFIX[w.dtype]}")(
        *(w.data_ptr(), v.data_ptr(), shift, len(w), out.data_ptr()),
        *(partials.data_ptr(), result.data_ptr(), _native.threads()),
    )
    return result


def dots(kernels: Any, w: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """See `fastminima.ops.vector.dots`."""
    return _with_rows(kernels, "dots", w, rows)


def project_out(kernels: Any, w: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """See `fastminima.ops.vector.project_out`."""
    return _with_rows(kernels, "project_out", w, basis)


def _with_rows(kernels: Any, name: str, w: Tensor, rows: Sequence[Tensor]) -> Tensor:
    partials, result = _scratch(kernels, len(w), len(rows), len(rows))
    places = addresses(rows)
    getattr(kernels, f"{name}_{SUFFIX[w.dtype]}")(
        *(w.data_ptr(), places.data_ptr(), len(rows), len(w)),
        *(partials.data_ptr(), result.data_ptr(), _native.threads()),
    )
    return result


def linear_combinations(
    kernels: Any, first: Tensor, rest: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """See `fastminima.ops.vector.linear_combinations`."""
    basis = (first, *rest)
    rows = addresses(basis)
    weights = weights.to(first).contiguous()
    out = first.new_empty(weights.shape[1], len(first))
    getattr(kernels, f"linear_combinations_{SUFFIX[first.dtype]}")(
        *(rows.data_ptr(), len(basis), weights.data_ptr(), weights.shape[1]),
        *(len(first), out.data_ptr(), _native.threads()),
    )
    return out


def same_values(kernels: Any, a: Tensor, b: Tensor) -> bool:
    """See `fastminima.ops.vector.same_values`."""
    if not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    size = a.numel() * a.element_size()
    return kernels.same_bytes(a.data_ptr(), b.data_ptr(), size, _native.threads())
