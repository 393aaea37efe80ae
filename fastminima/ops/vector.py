"""Steps of iterative eigensolvers on one flat vector.

Sums are accumulated in float64 and come back as float64 tensors on the vector's device,
so that a solver looks at them on the host only when it wants to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ._arguments import NATIVE
from ._pieces import dense_parts
from .cuda import vector as cuda
from .native import vector as native
from .table import Op

__all__ = [
    "dots",
    "lanczos_step",
    "linear_combinations",
    "power_step",
    "project_out",
    "same_values",
]


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


def _dots(
    w: Float[Tensor, " params"], rows: Sequence[Float[Tensor, " params"]]
) -> Float64[Tensor, " rows"]:
    """<w, row> of each row."""
    if not rows:
        return w.new_zeros(0, dtype=torch.float64)
    return torch.stack([_dot(w, row) for row in rows])


def _project_out(
    w: Float[Tensor, " params"], basis: Sequence[Float[Tensor, " params"]]
) -> Float64[Tensor, " basis"]:
    """Remove from w, in place, its part along each of some orthonormal vectors.

    w <- w - sum_i c_i basis_i with c_i = <w, basis_i>, all from the first w. Returns c.
    """
    coefficients = _dots(w, basis)
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


lanczos_step = Op("lanczos_step", _lanczos_step)
lanczos_step.add_native(native.lanczos_step)
lanczos_step.add_cuda(cuda.lanczos_step, dtypes=NATIVE)
power_step = Op("power_step", _power_step)
power_step.add_native(native.power_step)
power_step.add_cuda(cuda.power_step, dtypes=NATIVE)
dots = Op("dots", _dots)
dots.add_native(native.dots)
dots.add_cuda(cuda.dots, dtypes=NATIVE)
project_out = Op("project_out", _project_out)
project_out.add_native(native.project_out)
project_out.add_cuda(cuda.project_out, dtypes=NATIVE)
linear_combinations = Op("linear_combinations", _linear_combinations)
linear_combinations.add_native(native.linear_combinations)
linear_combinations.add_cuda(cuda.linear_combinations, dtypes=NATIVE)
same_values = Op("same_values", _same_values)
same_values.add_native(native.same_values)
