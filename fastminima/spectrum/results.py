"""What the solvers return: values, how good they are, and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .._optional import require
from ._student import student_quantile

__all__ = ["Density", "Eigenpairs", "Estimate"]

_SHOWN = 4  # values that a printed result lists


@dataclass(frozen=True, repr=False)
class Eigenpairs:
    """Eigenvalues, each with its residual: an eigenvalue lies within it of the value.

    Attributes:
        values: The eigenvalues, the wanted end of the spectrum first.
        vectors: Their orthonormal eigenvectors, one a row.
        residuals: |H v - value v| of each.
        products: How many Hessian-vector products they took, with the one by which a
            fresh operator compares itself.
        converged: Whether every residual is within the tolerance asked for, and nothing
            beyond the values was missed, with the probability asked for.
        upper: No eigenvalue is larger (for "smallest" smaller, for "magnitude" larger
            in size), but with the probability asked for; infinite where nothing is
            known. It holds, whether converged or not.
        noise: How far products are from those of one symmetric matrix, relative to |H|:
            |<H u, v> - <u, H v>|, 6e-8 in float32, 7e-4 in bfloat16. NaN if unknown.
        errors: How far each value may be from the eigenvalue in its place, with the
            probability asked for. Where nothing is known of the rest, as in warm calls
            of `SharpnessProbe`, the residual, or residual^2 over the distance to the
            runner-up: that holds if nothing else is as near.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k params"]
    residuals: Float[Tensor, " k"]
    products: int
    converged: bool
    upper: float = math.inf
    noise: float = math.nan
    errors: Float[Tensor, " k"] | None = None

    def __repr__(self) -> str:
        shown = [
            f"{value:.6g} +- {residual:.1g}"
            for value, residual in zip(
                self.values[:_SHOWN].tolist(), self.residuals.tolist(), strict=False
            )
        ]
        more = len(self.values) - len(shown)
        listed = ", ".join(shown) + (f", {more} more" if more else "")
        bound = (
            f"none beyond {self.upper:.6g}"
            if math.isfinite(self.upper)
            else "unbounded"
        )
        return (
            f"Eigenpairs({listed} of {self.vectors.shape[1]}; {bound}; "
            f"{self.products} products, "
            f"{'converged' if self.converged else 'not converged'})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Columns of a table with a row a pair, without the vectors.

        `pandas.DataFrame(pairs.to_dict())`; what is said of all pairs is a number.
        """
        row = {"value": self.values.tolist(), "residual": self.residuals.tolist()}
        if self.errors is not None:
            row["error"] = self.errors.tolist()
        of_all = {"upper": self.upper, "noise": self.noise, "products": self.products}
        return {**row, **of_all, "converged": self.converged}


@dataclass(frozen=True, repr=False)
class Estimate:
    """A number estimated by sampling.

    Attributes:
        value: The estimate.
        standard_error: Its standard deviation over the random vectors; 0 if exact.
        products: How many Hessian-vector products it took.
        degrees: Degrees of freedom of the standard error: random vectors less one.
        truncation: What more Lanczos steps may still change, beside the random vectors:
            as much as the second half of them has, or more where that falls slowly.
    """

    value: float
    standard_error: float
    products: int
    degrees: float = math.inf
    truncation: float = 0.0

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        if self._is_exact:
            return f"Estimate({self.value:.6g} exactly; {self.products} products)"
        low, high = self.interval()
        return (
            f"Estimate({self.value:.6g} +- {self.standard_error:.2g}, with 95 % in "
            f"[{low:.6g}, {high:.6g}]; {self.products} products)"
        )

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the true number lies with this probability: Student's t interval.

        The few samples of which the standard error is made do not know it well: of
        four, 1.96 of them cover 85 %. It is widened by `truncation` on both sides.

        Raises:
            ValueError: A confidence that is not between 0 and 1.

        Source: Student (1908), Biometrika 6(1).
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
        if self._is_exact:
            return self.value, self.value
        half = student_quantile(self.degrees, confidence) * self.standard_error
        half += self.truncation
        return self.value - half, self.value + half

    def to_dict(self) -> dict[str, float]:
        """Numbers for a log line, or a row of a table; low and high of the interval."""
        low, high = self.interval()
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "low": low,
            "high": high,
            "products": self.products,
        }

    @property
    def _is_exact(self) -> bool:
        return self.standard_error == 0 and self.truncation == 0


@dataclass(frozen=True, repr=False)
class Density:
    """The density of the eigenvalues, estimated by stochastic Lanczos quadrature.

    Attributes:
        grid: Values at which the density is given, ascending.
        density: Share of the eigenvalues per unit; integrates to one.
        standard_error: Of the density, from the spread of the probes; NaN with one
            probe.
        nodes: Ritz values of each probe, of which the density is made.
        weights: The share of the spectrum that each node stands for; a probe's sum is
            1.
        width: Standard deviation of the Gaussian that stands for each node.
        products: How many Hessian-vector products it took.
        truncation: How far the density of half as many steps is from this one, at each
            point of the grid: what more steps may still change. NaN with one step.
    """

    grid: Float[Tensor, " grid"]
    density: Float[Tensor, " grid"]
    standard_error: Float[Tensor, " grid"]
    nodes: Float[Tensor, "probes steps"]
    weights: Float[Tensor, "probes steps"]
    width: float
    products: int
    truncation: Float[Tensor, " grid"] | None = None

    def __repr__(self) -> str:
        probes, steps = self.nodes.shape
        return (
            f"Density({probes} probes of {steps} steps, from {self.nodes.min():.4g} to "
            f"{self.nodes.max():.4g}, width {self.width:.2g}; {self.products} products)"
        )

    def band(
        self, confidence: float = 0.95
    ) -> tuple[Float[Tensor, " grid"], Float[Tensor, " grid"]]:
        """Between what the density lies at each point: spread of probes and truncation.

        Student's t interval of the probes, widened by `truncation`; never below zero.

        Raises:
            ValueError: One probe has no spread.
        """
        probes, steps = self.nodes.shape
        if probes < 2 or self.truncation is None:
            raise ValueError(
                f"A band needs at least 2 probes, got {probes}. Pass probes=2 or more."
            )
        half = student_quantile(probes - 1, confidence) * self.standard_error
        half = half + (self.truncation if steps > 1 else 0.0)
        return (self.density - half).clamp_min(0), self.density + half

    def to_dict(self) -> dict[str, Any]:
        """Columns of a table with a row a point of the grid.

        `pandas.DataFrame(density.to_dict())`; width and products are numbers.
        """
        columns = {
            name: getattr(self, name).tolist()
            for name in ("grid", "density", "standard_error", "truncation")
            if getattr(self, name) is not None
        }
        return {**columns, "width": self.width, "products": self.products}

    def plot(self, ax: Any = None) -> Any:
        """Draw the density on a logarithmic scale into `ax` (matplotlib); returns it.

        With its band, if there are several probes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            otherwise = "draw .grid and .density yourself"
            pyplot = require("matplotlib.pyplot", "Density.plot()", otherwise)
            ax = pyplot.subplots()[1]
        grid, density = self.grid.numpy(), self.density.numpy()
        ax.semilogy(grid, density)
        if len(self.nodes) > 1:
            low, high = (edge.numpy() for edge in self.band())
            ax.fill_between(grid, low, high, alpha=0.3)
        ax.set_ylim(max(density.max() * 1e-8, 1e-300), density.max() * 3)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        return ax
