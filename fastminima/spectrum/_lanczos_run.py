"""One Lanczos run: a symmetric matrix seen from the Krylov space of a start vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..curvature._scale import dot, length
from ..ops.vector import lanczos_step, project_out
from ._basis import Basis
from ._bound import Recurrence
from ._start import Start

__all__ = ["LanczosRun", "Ritz"]

Multiply = Callable[[Tensor], Tensor]

# Its reciprocal is finite in float32, so that a zero vector stays one.
_TINY = torch.finfo(torch.float32).tiny


class Ritz(NamedTuple):
    """Eigenpairs of the matrix restricted to the space, ascending, on the host."""

    values: np.ndarray  # [size]
    coordinates: np.ndarray  # [size, size], a column each, in the basis
    residuals: np.ndarray  # [size], |B x - value x|, B what the run sees of A


class LanczosRun:
    """Lanczos on (1 - X X^T) A (1 - X X^T), X some vectors found before.

    A step costs one product and the fused three-term recurrence. By Paige's theorem the
    basis loses orthogonality only against Ritz vectors that converge, by eps |A| over
    their residual; so each step is projected against the whole basis only once some
    residual has fallen below eps^(1/4) |A| (the loss is then eps^(3/4), 6e-6 in
    float32), or from the start with `is_orthogonal`. A residual is that of the
    recurrence, A V = V T + b v e^T (+ X C), which holds to the rounding of products,
    with or without orthogonality.

    Scalars stay on the device until `ritz()` looks at them.

    Attributes:
        recurrence: How the basis follows from the start.
        gap: The largest |<A v_j, v_(j-1)> - <v_j, A v_(j-1)>| met. By rounding some eps
            of |A|; what makes it more is not one symmetric matrix.

        rounding: By what Ritz values may be off since a rounded basis was restarted.

    Source: Paige (1980), "Accuracy and effectiveness of the Lanczos algorithm"; Wu and
    Simon (2000), "Thick-restart Lanczos method", for `restart`.
    """

    def __init__(
        self,
        multiply: Multiply,
        start: Start,
        *,
        deflate: Sequence[Float[Tensor, " params"]] = (),
        scale: float = 0.0,
        is_orthogonal: bool = False,
        basis_dtype: torch.dtype | None = None,
    ) -> None:
        self._multiply = multiply
        self._deflate = list(deflate)
        self._is_orthogonal = is_orthogonal
        first = start.vector
        self._scale = scale  # of A, what is known of it; rounding is measured by it
        self._eps = torch.finfo(first.dtype).eps
        self.products = 0
        self.size = 0
        self.is_exhausted = False
        self._norm = torch.zeros((), dtype=torch.float64, device=first.device)
        # Not looked at yet: leak, column, norm, and <A v_j, v_(j-1)> less what it is.
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._matrix = np.zeros((0, 0))
        self._leaks = np.zeros((len(self._deflate), 0))
        self._last_norm = 0.0
        self._is_chain = True  # whether v_(j-1) is the vector before v_j
        self.gap = self.rounding = 0.0
        self.recurrence = Recurrence()
        for _ in range(2):
            project_out(first, self._deflate)
        self._start = start.deviation, length(first)
        self.basis = Basis(first.div_(self._start[1].to(first)), basis_dtype)

    @property
    def deviation(self) -> float:
        """Standard deviation of what the unit start has along a fixed vector."""
        deviation, size = self._start
        return deviation / float(size)

    def step(self) -> None:
        """Extend the space by one product."""
        v = self.basis[-1]
        w = self._multiply(v)
        self.products += 1
        leak = project_out(w, self._deflate)
        gap = None
        if self._is_orthogonal:
            column = self.basis.project_out(w)
            column += self.basis.project_out(w)
            project_out(w, self._deflate)
            norm = length(w)
        else:
            previous = self.basis[-2] if len(self.basis) > 1 else None
            result = lanczos_step(w, v, previous, self._norm)
            column, norm = result[:1], result[1]
            if previous is not None:
                gap = dot(w, previous)
        self._norm = norm
        self._steps.append((leak, column, norm, gap))
        self.basis.append(w.mul_(norm.clamp_min(_TINY).reciprocal().to(w.dtype)))

    def _look(self) -> None:
        """Bring the steps made since the last look to the host."""
        for leak, column, norm, gap in self._steps:
            if self.is_exhausted:
                break
            self._take(column.cpu().numpy(), float(norm))
            self._leaks = np.column_stack([self._leaks, leak.cpu().numpy()])
            if gap is not None:
                self.gap = max(self.gap, abs(float(gap)))
        self._steps.clear()
        self.basis.cut(self.size + 1)

    def _take(self, values: np.ndarray, norm: float) -> None:
        """One more column of the matrix, whole or only its last element."""
        j = self.size
        self.size += 1
        matrix = np.zeros((j + 1, j + 1))
        matrix[:j, :j] = self._matrix
        if len(values) == j + 1:
            matrix[j, :] = matrix[:, j] = values
            if self._is_chain and j:
                self.gap = max(self.gap, abs(values[j - 1] - self._last_norm))
        else:
            matrix[j, j] = values[0]
            if j:
                matrix[j, j - 1] = matrix[j - 1, j] = self._last_norm
        self._matrix = matrix
        self._is_chain = True
        self._last_norm = norm
        floor = 10 * self._eps * max(np.abs(matrix).max(), self._scale)
        # Also where the norm is rounding alone: it is no smaller than what hides in it.
        self.recurrence.extend(matrix[:, j].copy(), norm)
        self.is_exhausted = self.is_whole or norm <= floor or not np.isfinite(norm)

    @property
    def is_whole(self) -> bool:
        """Whether the space and what was projected out are all there is."""
        return self.size + len(self._deflate) >= len(self.basis[0])

    @property
    def is_finite(self) -> bool:
        """Whether the products so far were; without that there are no Ritz pairs."""
        self._look()
        return bool(np.isfinite(self._matrix).all() and np.isfinite(self._last_norm))

    def ritz(self) -> Ritz:
        """The Ritz pairs of the space so far."""
        self._look()
        values, coordinates = np.linalg.eigh(self._matrix)
        outside = 0.0 if self.is_exhausted else self._last_norm
        residuals = np.abs(outside * coordinates[-1])
        scale = max(np.abs(values).max(), 1e-300)
        if residuals.min() <= self._eps**0.25 * scale:
            self._make_orthogonal()
        return Ritz(values, coordinates, residuals)

    def _make_orthogonal(self) -> None:
        """From here on, and for the vector that is next, project against the basis."""
        if self._is_orthogonal or self.is_exhausted:
            return
        self._is_orthogonal, self._is_chain = True, False
        following = self.basis[self.size]
        for _ in range(2):
            project_out(following, self._deflate)
            self.basis.project_out(following, self.size)
        following /= length(following).to(following)

    def vectors(self, coordinates: np.ndarray) -> Float[Tensor, "k params"]:
        """The vectors with these coordinates (a column each) in the basis."""
        return self.basis.combined(coordinates)

    def images(self, ritz: Ritz, indices: np.ndarray) -> Float[Tensor, "k params"]:
        """A times the vectors of some Ritz pairs, by the recurrence."""
        coordinates = ritz.coordinates[:, indices]
        outside = 0.0 if self.is_exhausted else self._last_norm
        weights = np.vstack(
            [
                coordinates * ritz.values[indices],
                outside * coordinates[-1:],
                self._leaks @ coordinates,
            ]
        )
        return self.basis.combined(weights, self._deflate)

    def restart(self, ritz: Ritz, keep: np.ndarray) -> None:
        """Shrink the space to some Ritz vectors, and go on from where it was."""
        self.basis.replace(ritz.coordinates[:, keep])
        if self.basis.dtype is not None:
            scale = max(float(np.abs(ritz.values).max()), self._scale)
            self.rounding = torch.finfo(self.basis.dtype).eps * scale
        self._matrix = np.diag(ritz.values[keep])
        self._leaks = self._leaks @ ritz.coordinates[:, keep]
        self.recurrence.restart(ritz.coordinates[:, keep])
        self.size = len(keep)
        self._is_orthogonal = True
        self._is_chain = False
