"""Steps of iterative eigensolvers on one flat vector.

Sums are accumulated in float64 and come back as float64 tensors on the vector's device,
so that a solver looks at them on the host only when it wants to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .. import _native
from . import vector_cuda
from ._arguments import addresses
from ._pieces import dense_parts
from .table import Op

__all__ = [
    "lanczos_step",
    "linear_combinations",
    "power_step",
    "project_out",
    "same_values",
]

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def _lanczos_step(
    w: Float[Tensor, " params"],
    v: Float[Tensor, " params"],
    previous: Float[Tensor, " params"] | None,
    beta: Float64[Tensor, ""],
) -> Float64[Tensor, " 2"]:
    """Three-term recurrence in place: w <- w - beta previous - alpha v.

    alpha = <w - beta previous, v>. Returns (alpha, norm of the new w); without
    `previous`, `beta` is not read.
    """
    if previous is not None:
        beta = beta.to(w.dtype)
        for part, before in _parts(w, previous):
            part.sub_(before * beta)
    alpha = _dot(w, v)
    factor = alpha.to(w.dtype)
    for part, along in _parts(w, v):
        part.sub_(along * factor)
    return torch.stack([alpha, _norm(w)])


def _parts(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of vectors, of which a few copies in float64 can be held."""
    return dense_parts(*vectors, bytes_each=32)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    listed = list(parts)
    return listed[0] if len(listed) == 1 else torch.stack(listed).sum()


def _dot(x: Tensor, y: Tensor) -> Float64[Tensor, ""]:
    return _sum(torch.dot(a.double(), b.double()) for a, b in _parts(x, y))


def _norm(x: Tensor) -> Float64[Tensor, ""]:
    norms = [torch.linalg.vector_norm(a, dtype=torch.float64) for (a,) in _parts(x)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def _power_step(
    w: Float[Tensor, " params"],
    v: Float[Tensor, " params"],
    shift: float,
    out: Float[Tensor, " params"],
) -> Float64[Tensor, " 3"]:
    """One power step on a shifted matrix: out <- (w - shift v) / |w - shift v|.

    `w` is the matrix times the unit vector `v`. Returns the Rayleigh quotient <w, v>,
    the residual |w - <w, v> v| and |w - shift v|. A zero w - shift v leaves out = 0.
    """
    rayleigh = _dot(w, v)
    norms = [
        torch.stack([(a - shift * b).norm(), (a - rayleigh * b).norm()])
        for a, b in _doubles(w, v)
    ]
    norm, residual = norms[0] if len(norms) == 1 else torch.stack(norms).norm(dim=0)
    for part, a, b in _parts(out, w, v):
        shifted = a.double() - shift * b.double()
        part.copy_(torch.where(norm > 0, shifted / norm, shifted))
    return torch.stack([rayleigh, residual, norm])


def _doubles(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for parts in _parts(*vectors):
        yield tuple(part.double() for part in parts)


def _project_out(
    w: Float[Tensor, " params"], basis: Sequence[Float[Tensor, " params"]]
) -> Float64[Tensor, " basis"]:
    """Remove from w, in place, its part along each of some orthonormal vectors.

    w <- w - sum_i c_i basis_i with c_i = <w, basis_i>, all from the first w. Returns c.
    """
    if not basis:
        return w.new_zeros(0, dtype=torch.float64)
    coefficients = torch.stack([_dot(w, row) for row in basis])
    for c, row in zip(coefficients.to(w.dtype), basis, strict=True):
        for part, along in _parts(w, row):
            part.sub_(c * along)
    return coefficients


def _linear_combinations(
    first: Float[Tensor, " params"],
    rest: Sequence[Float[Tensor, " params"]],
    weights: Float[Tensor, "basis outputs"],
) -> Float[Tensor, "outputs params"]:
    """Sums of the vectors (first, *rest), weighted with each column of `weights`."""
    out = first.new_zeros(weights.shape[1], len(first))
    for row, factors in zip((first, *rest), weights.to(first), strict=True):
        out.addr_(factors, row)
    return out


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal."""
    return torch.equal(a, b)


def _scratch(kernels: Any, n: int, sums: int, results: int) -> tuple[Tensor, Tensor]:
    counts = kernels.vector_partials(n, sums), results
    partials, result = (
        torch.empty(count, dtype=torch.float64, device="cpu") for count in counts
    )
    return partials, result


def _lanczos_step_native(
    kernels: Any, w: Tensor, v: Tensor, previous: Tensor | None, beta: Tensor
) -> Tensor:
    partials, result = _scratch(kernels, len(w), 1, 2)
    getattr(kernels, f"lanczos_step_{_SUFFIX[w.dtype]}")(
        *(w.data_ptr(), v.data_ptr(), 0 if previous is None else previous.data_ptr()),
        *(beta.data_ptr(), len(w), partials.data_ptr(), result.data_ptr()),
        _native.threads(),
    )
    return result


def _power_step_native(
    kernels: Any, w: Tensor, v: Tensor, shift: float, out: Tensor
) -> Tensor:
    partials, result = _scratch(kernels, len(w), 2, 3)
    getattr(kernels, f"power_step_{_SUFFIX[w.dtype]}")(
        *(w.data_ptr(), v.data_ptr(), shift, len(w), out.data_ptr()),
        *(partials.data_ptr(), result.data_ptr(), _native.threads()),
    )
    return result


def _project_out_native(kernels: Any, w: Tensor, basis: Sequence[Tensor]) -> Tensor:
    partials, result = _scratch(kernels, len(w), len(basis), len(basis))
    rows = addresses(basis)
    getattr(kernels, f"project_out_{_SUFFIX[w.dtype]}")(
        *(w.data_ptr(), rows.data_ptr(), len(basis), len(w)),
        *(partials.data_ptr(), result.data_ptr(), _native.threads()),
    )
    return result


def _linear_combinations_native(
    kernels: Any, first: Tensor, rest: Sequence[Tensor], weights: Tensor
) -> Tensor:
    basis = (first, *rest)
    rows = addresses(basis)
    weights = weights.to(first).contiguous()
    out = first.new_empty(weights.shape[1], len(first))
    getattr(kernels, f"linear_combinations_{_SUFFIX[first.dtype]}")(
        *(rows.data_ptr(), len(basis), weights.data_ptr(), weights.shape[1]),
        *(len(first), out.data_ptr(), _native.threads()),
    )
    return out


def _same_values_native(kernels: Any, a: Tensor, b: Tensor) -> bool:
    if not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    size = a.numel() * a.element_size()
    return kernels.same_bytes(a.data_ptr(), b.data_ptr(), size, _native.threads())


lanczos_step = Op("lanczos_step", _lanczos_step)
lanczos_step.add_native(_lanczos_step_native)
lanczos_step.add_cuda(vector_cuda.lanczos_step, dtypes=_SUFFIX)
power_step = Op("power_step", _power_step)
power_step.add_native(_power_step_native)
power_step.add_cuda(vector_cuda.power_step, dtypes=_SUFFIX)
project_out = Op("project_out", _project_out)
project_out.add_native(_project_out_native)
project_out.add_cuda(vector_cuda.project_out, dtypes=_SUFFIX)
linear_combinations = Op("linear_combinations", _linear_combinations)
linear_combinations.add_native(_linear_combinations_native)
linear_combinations.add_cuda(vector_cuda.linear_combinations, dtypes=_SUFFIX)
same_values = Op("same_values", _same_values)
same_values.add_native(_same_values_native)
