"""Calls of the CUDA kernels for steps on one flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._arguments import SUFFIX, addresses
from ._launch import scratch, stream

__all__ = ["dots", "lanczos_step", "linear_combinations", "power_step", "project_out"]


def lanczos_step(
    kernels: Any, w: Tensor, v: Tensor, previous: Tensor | None, beta: Tensor
) -> Tensor:
    """See `fastminima.ops.vector.lanczos_step`."""
    partials, result = scratch(kernels.vector_partials(len(w), 1), w), scratch(2, w)
    beta = beta.to(result)
    getattr(kernels, f"lanczos_step_{SUFFIX[w.dtype]}")(
        *(w.data_ptr(), v.data_ptr(), 0 if previous is None else previous.data_ptr()),
        *(beta.data_ptr(), len(w), partials.data_ptr(), result.data_ptr(), stream(w)),
    )
    return result


def power_step(kernels: Any, w: Tensor, v: Tensor, shift: float, out: Tensor) -> Tensor:
    """See `fastminima.ops.vector.power_step`."""
    partials, result = scratch(kernels.vector_partials(len(w), 2), w), scratch(3, w)
    getattr(kernels, f"power_step_{SUFFIX[w.dtype]}")(
        *(w.data_ptr(), v.data_ptr(), shift, len(w), out.data_ptr()),
        *(partials.data_ptr(), result.data_ptr(), stream(w)),
    )
    return result


def dots(kernels: Any, w: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """See `fastminima.ops.vector.dots`."""
    return _with_rows(kernels, "dots", w, rows)


def project_out(kernels: Any, w: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """See `fastminima.ops.vector.project_out`."""
    return _with_rows(kernels, "project_out", w, basis)


def _with_rows(kernels: Any, name: str, w: Tensor, rows: Sequence[Tensor]) -> Tensor:
    result = scratch(len(rows), w)
    partials = scratch(kernels.vector_partials(len(w), len(rows)), w)
    places = addresses(rows)
    getattr(kernels, f"{name}_{SUFFIX[w.dtype]}")(
        *(w.data_ptr(), places.data_ptr(), len(rows), len(w)),
        *(partials.data_ptr(), result.data_ptr(), stream(w)),
    )
    return result


def linear_combinations(
    kernels: Any, first: Tensor, rest: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """See `fastminima.ops.vector.linear_combinations`."""
    rows = addresses((first, *rest))
    weights = weights.to(first).contiguous()
    padded = -(-len(first) // 4) * 4  # so that every output can be written in 16 bytes
    out = torch.empty(weights.shape[1], padded, dtype=first.dtype, device=first.device)[
        :, : len(first)
    ]
    getattr(kernels, f"linear_combinations_{SUFFIX[first.dtype]}")(
        *(rows.data_ptr(), len(rows), weights.data_ptr(), weights.shape[1]),
        *(len(first), out.data_ptr(), padded, stream(first)),
    )
    return out
