"""The trace of a product of two matrices, from products with both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..curvature._finite import NotFiniteError
from ..curvature._scale import dot, length
from ._problem import Problem
from ._quadrature import orthogonalize
from ._student import student_quantile
from .results import Estimate

__all__ = ["product_trace"]

_BASIS_BYTES = 1 << 30
_FIRST = 16  # vectors of the subspace where samples are drawn until they suffice
_FEWEST = 10  # random vectors before a small spread is believed
_SHARE_EXACT = 3  # one product in so many goes into the subspace treated exactly


def product_trace(
    A: Any,
    B: Any,
    products: int = 100,
    seed: int = 0,
    *,
    rtol: float | None = None,
) -> Estimate:
    """The trace of the product of two symmetric matrices, tr(A B).

    A third of the products span a space in which it is exact, made of what both do to
    its vectors; the others are random directions u in its complement, of which
    <A u, B u> is unbiased. tr(H Sigma) is by how much noise of covariance Sigma raises
    the loss: half of it a step, times eta^2 / S.

    Args:
        A: Anything symmetric with `.shape` and `@`.
        B: Another of the same size.
        products: How many products to spend with each of the two, at least 3. The
            result's `products` counts those of both.
        seed: Of the random vectors; global generators are not touched.
        rtol: Stop sooner, once the interval that holds the value with 95 % reaches no
            further than this share of it, and there are ten random vectors.

    Raises:
        ValueError: Matrices of two sizes, too few products (unless P is smaller), an
            rtol that is not positive, or a matrix that is not symmetric.

    Example:
        >>> import torch
        >>> A, B = torch.diag(torch.tensor([1.0, 2.0])), torch.full((2, 2), 3.0)
        >>> product_trace(A, B)
        Estimate(9 exactly; 4 products)

    Source: Hutchinson (1990); Meyer, Musco, Musco, Woodruff (2021), "Hutch++".
    """
    pair = _Pair(Problem(A, seed), Problem(B, seed))
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}.")
    if products >= pair.size:
        return pair.estimate(pair.exact(), [])
    if products < 3:
        raise ValueError(
            "An estimate with a standard error needs at least 3 products, got "
            f"{products}."
        )
    return _sampled(pair, products, rtol)


class _Pair:
    """Two matrices that multiply the same vectors."""

    def __init__(self, first: Problem, second: Problem) -> None:
        if first.size != second.size:
            raise ValueError(
                f"The two matrices have sizes {first.size} and {second.size}. Make "
                "both over the same parameters."
            )
        self._first, self._second = first, second
        self.size, self.dtype = first.size, first.dtype

    @property
    def asked(self) -> int:
        """Products asked for with each."""
        return self._first.asked

    def normal(self) -> Tensor:
        """A random direction, of norm one."""
        return self._first.normal()

    def multiply(self, v: Tensor) -> tuple[float, Tensor, Tensor]:
        """<A v, B v>, A v and B v."""
        second = self._second
        a = self._first.multiply(v)
        b = second.multiply(v.to(second.device, second.dtype)).to(v)
        value = float(dot(a, b))
        if not math.isfinite(value):
            raise NotFiniteError(
                f"Product {self.asked} with one of the matrices is not finite. Check "
                "the parameters and the batch."
            )
        return value, a, b

    def exact(self) -> float:
        """The trace, from products with all unit vectors."""
        total, rows = 0.0, []
        for i in range(self.size):
            e = torch.zeros(self.size, dtype=self.dtype, device=self._first.device)
            e[i] = 1
            value, *images = self.multiply(e)
            total += value
            rows.append(images)
        for problem, images in zip(
            (self._first, self._second), zip(*rows, strict=True), strict=True
        ):
            problem.look_at_rows(torch.stack(images))
        return total

    def estimate(self, exact: float, samples: list[float]) -> Estimate:
        """An exact part and the mean of samples, in the matrices' own units."""
        unit = self._first.unit * self._second.unit
        count = self._first.products + self._second.products
        if not samples:
            return Estimate(unit * exact, 0.0, count)
        drawn = torch.tensor(samples, dtype=torch.float64, device="cpu")
        error = float(drawn.std()) / math.sqrt(len(samples))
        value = exact + float(drawn.mean())
        return Estimate(unit * value, unit * error, count, len(samples) - 1)


def _sampled(pair: _Pair, products: int, rtol: float | None) -> Estimate:
    room = _BASIS_BYTES // (pair.size * pair.dtype.itemsize)
    if rtol is not None:  # how many products there will be is not known yet
        room = min(room, _FIRST)
    basis, exact = _space(pair, min(products // _SHARE_EXACT, room))
    samples: list[float] = []
    while pair.asked < products:
        u = pair.normal()
        u /= orthogonalize(u, basis)[1]
        samples.append((pair.size - len(basis)) * pair.multiply(u)[0])
        if rtol is not None and len(samples) >= _FEWEST:
            found = pair.estimate(exact, samples)
            half = student_quantile(found.degrees, 0.95) * found.standard_error
            if half <= rtol * abs(found.value):
                break
    return pair.estimate(exact, samples)


def _space(pair: _Pair, steps: int) -> tuple[list[Tensor], float]:
    """An orthonormal basis in which outliers of both lie, and the trace there."""
    basis: list[Tensor] = []
    total = 0.0
    v = pair.normal()
    for _ in range(steps):
        value, a, b = pair.multiply(v)
        total += value
        basis.append(v)
        w = _unit(a) + _unit(b)
        _, rest = orthogonalize(w, basis)
        if rest <= 100 * torch.finfo(w.dtype).eps:
            w = pair.normal()  # the space is invariant: go on from another
            _, rest = orthogonalize(w, basis)
        v = w.div_(rest)
    return basis, total


def _unit(x: Tensor) -> Tensor:
    """X of length one, or zero."""
    return x / length(x).clamp_min(1e-30).to(x)
