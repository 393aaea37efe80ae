"""What the solvers ask of a matrix, checked where the user hands it over."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..curvature import (
    CurvatureOperator,
    DerivedOperator,
    FlatMatrix,
    Noise,
    Suspicion,
    SymmetryWatch,
)
from ..curvature._scale import exponent, length, norm

__all__ = ["Problem"]

# By which products of a matrix of which nothing is known may be asymmetric before it is
# said: 1e3 times what float32 makes.
_UNKNOWN = 1e-4
_REFUSED = 1e-2  # the least that is refused: bfloat16 makes 7e-4, at most 7e-3


class Problem:
    """A symmetric matrix known by `.shape` and `@`, whose products are counted.

    Products come divided by a power of two, the same for all, if the first that is not
    zero is so small or so large that squares of its entries are not what they should
    be; what a solver finds is to be multiplied by it.

    Attributes:
        asked: Products that a solver asked for: what budgets are about.
        limit: How many it may ask for.
        unit: That power of two.
        is_rounded: Whether a solver keeps its vectors rounded.

    Raises:
        ValueError: The matrix is not square or empty, a product is not finite, or the
            first products are not those of a symmetric matrix.
    """

    def __init__(
        self,
        matrix: Any,
        seed: int,
        limit: int = sys.maxsize,
        spare: int = 0,
        *,
        is_rounded: bool = False,
    ) -> None:
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
        self.asked, self.limit, self._spare = 0, limit, spare
        self.unit, self.is_rounded = 1.0, is_rounded
        self._power: int | None = None
        # An operator looks at itself, and knows better what rounding may do.
        self._operator = matrix if isinstance(matrix, CurvatureOperator) else None
        below = matrix.operators if isinstance(matrix, DerivedOperator) else [matrix]
        self._below = [x for x in below if isinstance(x, FlatMatrix)]
        self._watch = SymmetryWatch()
        self._noise = Noise(dtype) if isinstance(matrix, Tensor) else None
        for operator in self._below:
            operator.begin()
        self._extra = self._extra_products()  # less those that are made here
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def multiply(self, v: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """The product with a vector, a new tensor."""
        self.asked += 1
        product = self._matrix @ v.to(self._matrix_dtype)
        product = product.detach().to(self.dtype).contiguous()
        if self._operator is None:
            suspicion = self._watch.look(v, product, self._rounding())
            if suspicion is not None and not self._is_rounding(suspicion):
                self._refuse(suspicion)
            # It may be the user's own tensor, or v itself, and steps write into it.
            product = product.clone()
        return self._divided(product)

    def _is_rounding(self, suspicion: Suspicion) -> bool:
        """Whether a product with a random direction shows that it is no more."""
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn(
            self.size, generator=generator, dtype=torch.float64, device="cpu"
        )
        direction = drawn.to(self.device, self._matrix_dtype)
        self._extra -= 1
        return suspicion.is_rounding_beside(direction, self._matrix @ direction)

    def _divided(self, product: Tensor) -> Tensor:
        if self._power is None and bool(product.any()):
            self._power = exponent(product)
            self.unit = 2.0**self._power
        return product.mul_(2.0**-self._power) if self._power else product

    @property
    def left(self) -> int:
        """Products left for finding; what is rounded needs `spare` for residuals."""
        is_spared = self.is_half or self.is_rounded
        return self.limit - self.asked - (self._spare if is_spared else 0)

    @property
    def is_half(self) -> bool:
        """Whether products are rounded to a half precision somewhere."""
        noise = self._rounding()
        return noise is not None and noise.dtype not in (torch.float32, torch.float64)

    @property
    def smallest(self) -> float:
        """The share of |A| that products do not tell from zero."""
        noise = self._rounding()
        dtype = self.dtype if noise is None else noise.dtype
        return torch.finfo(dtype).eps * (1 if self.is_half else 10)

    @property
    def allowed_noise(self) -> float:
        """By how much honest products may be asymmetric, relative to their norm."""
        noise = self._rounding()
        return _UNKNOWN if noise is None else noise.symmetry

    def refuse_noise(self, noise: float) -> None:
        """ValueError if products are no more those of one symmetric matrix.

        An operator has looked at that itself; what it has let pass is rounding.
        """
        if self._operator is None and noise > max(_REFUSED, self.allowed_noise):
            raise ValueError(
                f"The matrix of type {self.name} is not symmetric, or not the same in "
                f"every product: <u, A v> and <A u, v> differ by {noise:.1e} of its "
                f"norm after {self.products} products; rounding explains "
                f"{self.allowed_noise:.0e}. Its eigenvalues are not what these methods "
                "find. Look at how it makes its products."
            )

    @property
    def name(self) -> str:
        """What the matrix is called in messages."""
        return type(self._matrix).__name__

    def _rounding(self) -> Noise | None:
        known = [x.noise for x in self._below if x.noise is not None]
        return max(known, key=lambda noise: noise.symmetry, default=self._noise)

    @property
    def products(self) -> int:
        """All products made, with those by which an operator checks itself."""
        return self.asked + self._extra_products() - self._extra

    def _extra_products(self) -> int:
        return sum(operator.extra_products for operator in self._below)

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
        noise = self._rounding()
        self._refuse(self._watch.between((u, u @ images), (v, v @ images), noise))

    def _refuse(self, suspicion: Suspicion | None) -> None:
        if suspicion is None:
            return
        raise ValueError(
            f"The matrix of type {self.name} is not symmetric: "
            f"{suspicion.text}. Its eigenvalues are not what these methods find. Pass "
            "a symmetric matrix, such as (A + A.T) / 2; of an operator of your own, "
            "look at how it makes its products."
        )

    def gradient(self) -> Float[Tensor, " params"] | None:
        """The direction of the operator's gradient, where it offers one."""
        gradient = getattr(self._matrix, "gradient", None)
        if not isinstance(gradient, Tensor):
            return None
        gradient = gradient.detach().reshape(-1)
        size = norm(gradient)
        if len(gradient) != self.size or not 0 < size < float("inf"):
            return None
        # In two steps: the reciprocal of what is denormal is not finite.
        power = exponent(gradient)
        return (gradient * 2.0**-power / (size * 2.0**-power)).to(self.dtype)

    def gaussian(self) -> Float[Tensor, " params"]:
        """Independent standard normal numbers."""
        return torch.randn(
            self.size, generator=self._generator, dtype=self.dtype, device=self.device
        )

    def mix(self, vectors: Float[Tensor, "vectors params"]) -> None:
        """Let the random numbers that follow depend on these vectors too."""
        words = vectors.sum(dim=1).cpu().numpy().tobytes()
        seed = self._generator.initial_seed() ^ zlib.crc32(words)
        self._generator.manual_seed(seed)

    def normal(self) -> Float[Tensor, " params"]:
        """A random direction, of norm one."""
        v = self.gaussian()
        return v.div_(length(v).to(v))

    def direction(self) -> Float[Tensor, " params"]:
        """A random direction, of any length: a quarter of the time of normal numbers.

        Entries are independent and uniform, which is not rotation invariant: no bound
        rests on it.
        """
        entries = torch.randint(
            *(-127, 128, (self.size,)),
            generator=self._generator,
            dtype=torch.int8,
            device=self.device,
        )
        return entries.to(self.dtype)

    def signs(self) -> Float[Tensor, " params"]:
        """A vector of random signs (Rademacher)."""
        v = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return v.bernoulli_(0.5, generator=self._generator).mul_(2).sub_(1)
