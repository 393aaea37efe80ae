"""What the solvers ask of a matrix, checked where the user hands it over."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype

__all__ = ["Problem"]


class Problem:
    """A symmetric matrix known by `.shape` and `@`, whose products are counted.

    Raises:
        ValueError: The matrix is not square or empty, or a product is not finite.
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
        self.products = 0
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def multiply(self, v: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """The product with a vector, a new tensor."""
        self.products += 1
        product = self._matrix @ v.to(self._matrix_dtype)
        product = product.detach().to(self.dtype)
        return product if product.is_contiguous() else product.contiguous()

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
