"""What the solvers ask of a matrix, checked where the user hands it over."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..curvature import CurvatureOperator, Noise, Suspicion, SymmetryWatch

__all__ = ["Problem"]


class Problem:
    """A symmetric matrix known by `.shape` and `@`, whose products are counted.

    Attributes:
        asked: Products that a solver asked for: what budgets are about.

    Raises:
        ValueError: The matrix is not square or empty, a product is not finite, or the
            first products are not those of a symmetric matrix.
    """

    def __init__(self, matrix: Any, seed: int) -> None:
        shape = tuple(matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise ValueError(
                f"A symmetric matrix has shape (P, P) with P > 0, got {shape}. Pass an "
                "operator such as fm.Hessian, or a square tensor."
            )
        self._matrix = matrix
        self.size = shape[0]
        dtype = getattr(matrix, "dtype", torch.get_default_dtype())
        self._matrix_dtype = dtype
        self.dtype = accumulation_dtype(dtype)
        self.device = torch.device(getattr(matrix, "device", "cpu"))
        self.asked = 0
        # An operator looks at itself, and knows better what rounding may do.
        self._operator = matrix if isinstance(matrix, CurvatureOperator) else None
        self._watch = SymmetryWatch()
        self._noise = Noise(dtype) if isinstance(matrix, Tensor) else None
        if self._operator is not None:
            self._operator.begin()
        self._extra = self._extra_products()
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def multiply(self, v: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """The product with a vector, a new tensor."""
        self.asked += 1
        product = self._matrix @ v.to(self._matrix_dtype)
        product = product.detach().to(self.dtype).contiguous()
        if self._operator is None:
            self._refuse(self._watch.look(v, product, self._noise))
            # It may be the user's own tensor, or v itself, and steps write into it.
            return product.clone()
        return product

    @property
    def products(self) -> int:
        """All products made, with those by which an operator checks itself."""
        return self.asked + self._extra_products() - self._extra

    def _extra_products(self) -> int:
        return 0 if self._operator is None else self._operator.extra_products

    def look_at_rows(self, images: Float[Tensor, "params params"]) -> None:
        """ValueError unless products with all unit vectors are symmetric together."""
        if self._operator is not None:
            self._operator.look_at_mixtures()
            return
        generator = torch.Generator("cpu").manual_seed(1)
        mixtures = torch.randn(
            (2, self.size), generator=generator, dtype=torch.float64, device="cpu"
        )
        u, v = mixtures.to(images)
        self._refuse(self._watch.between((u, u @ images), (v, v @ images), self._noise))

    def _refuse(self, suspicion: Suspicion | None) -> None:
        if suspicion is None:
            return
        raise ValueError(
            f"The matrix of type {type(self._matrix).__name__} is not symmetric: "
            f"{suspicion.text}. Its eigenvalues are not what these methods find. Pass "
            "a symmetric matrix, such as (A + A.T) / 2; of an operator of your own, "
            "look at how it makes its products."
        )

    def gradient(self) -> Float[Tensor, " params"] | None:
        """The direction of the operator's gradient, where it offers one."""
        gradient = getattr(self._matrix, "gradient", None)
        if not isinstance(gradient, Tensor):
            return None
        norm = torch.linalg.vector_norm(gradient)
        if not (torch.isfinite(norm) and norm > 0):
            return None
        return (gradient / norm).to(self.dtype)

    def normal(self) -> Float[Tensor, " params"]:
        """A random direction, of norm one."""
        v = torch.randn(
            self.size, generator=self._generator, dtype=self.dtype, device=self.device
        )
        return v.div_(torch.linalg.vector_norm(v))

    def signs(self) -> Float[Tensor, " params"]:
        """A vector of random signs (Rademacher)."""
        v = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return v.bernoulli_(0.5, generator=self._generator).mul_(2).sub_(1)
