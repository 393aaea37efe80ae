"""What the curvature operators share: products, and looks at what they are."""

from __future__ import annotations

import abc
import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ._audit_lines import random_columns
from ._checks import Checks
from ._guard import moved
from ._joint import JointRecorder
from ._matrix import FlatMatrix
from ._rewrites import Rewrites
from ._trust import Noise, Suspicion, difference

__all__ = ["CurvatureOperator"]

_MOVES = 4  # of the parameters, before an operator is said not to be symmetric
_MANY = 8  # columns, beside which products with two more cost little


class CurvatureOperator(JointRecorder, FlatMatrix):
    """A symmetric matrix [P, P] over the flat parameters, known by its products.

    The graph of a single batch is recorded once and kept until the operator goes or
    anything changes that it was recorded from: the model, the batch, what the closures
    read. Several batches are recorded again for each pass, one at a time.

    Random numbers that the closure draws (dropout) are those that would have been drawn
    when the operator was made, in every pass: the operator is one fixed matrix. That it
    is one is looked at: the first product is made twice, and the first pairs of
    products must be those of a symmetric matrix.
    """

    _only: tuple[int, ...] | None = None  # parameters within which products are made

    @property
    def extra_products(self) -> int:
        """Products made so far to compare evaluations, beside those asked for."""
        return self._checks.products

    def __matmul__(
        self, other: Float[Tensor, " params"] | Float[Tensor, "params probes"]
    ) -> Float[Tensor, " params"] | Float[Tensor, "params probes"]:
        """The product with a vector [P], or with each column of a matrix [P, k]."""
        self._check(other)
        columns = [other] if other.dim() == 1 else [c.contiguous() for c in other.T]
        if not columns:
            return torch.zeros_like(other)
        products = self._products([c.detach() for c in columns])
        return products[0] if other.dim() == 1 else torch.stack(products, dim=1)

    @property
    def gradient(self) -> Float[Tensor, " params"]:
        """The mean gradient over the data: where `top_eigenpairs` starts from."""
        return self._gradient()

    def begin(self) -> None:
        """A solver starts: a kept graph must be of today, by what the loss says.

        That finds what no comparison can, such as a file that the closure reads.
        """
        self._checks.start()
        self._start()

    def look_at_mixtures(self) -> None:
        """ValueError unless products with two random vectors show symmetry.

        What is met instead may hardly be coupled: columns of the identity.
        """
        columns = self._mixtures(2)
        self._checks.products += 2
        products = self._multiply(columns)
        watch = self._checks.symmetry
        first, second = zip(columns, products, strict=True)
        self._judge(watch.between(first, second, self._checks.noise))

    def _mixtures(self, count: int) -> list[Tensor]:
        """Vectors of random numbers, always the same."""
        generator = torch.Generator("cpu").manual_seed(1)
        shape = (count, self.shape[0])
        drawn = torch.randn(
            shape, generator=generator, dtype=torch.float64, device="cpu"
        )
        return list(drawn.to(self.device, self.dtype))

    def _within(self, other: Tensor, only: tuple[int, ...]) -> Tensor:
        """The rows of some parameters of a product with what is zero elsewhere.

        The other rows are not to be read. What the graph of that does not go through
        has been looked at before, with a vector of all parameters.
        """
        self._check(other)
        if self._checks.noise is None:
            self._checks.products += 1
            self._products(self._mixtures(1))
        self._only = only
        try:
            with self._checks.within(only):
                return self @ other
        finally:
            self._only = None

    def trust(self, noise: Noise | None) -> None:
        """Take as checked what has been checked with another operator."""
        self._checks.noise = noise

    @property
    def noise(self) -> Noise | None:
        """What rounding may do to products; None before the first."""
        return self._checks.noise

    def _for_audit(self) -> CurvatureOperator:
        """A copy without a kept graph, and with nothing known."""
        twin = copy.copy(self)
        twin._checks = Checks(type(self).__name__, self._model)
        twin._kept = twin._fresh = None
        twin._rewrites = Rewrites()
        return twin

    def _quick(self) -> CurvatureOperator | None:
        """For audits: one whose products are made in a quicker way than by default."""
        return None

    @abc.abstractmethod
    def _differenced(self, roots: tuple[Tensor, ...]) -> Tensor:
        """What an audit takes differences of, of the closures' results."""

    @abc.abstractmethod
    def _by_difference(
        self, batch: Any, roots: tuple[Tensor, ...], difference: Tensor
    ) -> Tensor:
        """The product, from the derivative of that along a vector."""

    @abc.abstractmethod
    def _multiply(self, columns: list[Tensor]) -> list[Tensor]:
        """The product with each of several flat vectors."""

    @abc.abstractmethod
    def _gradient(self) -> Tensor:
        """The flat mean gradient."""

    def _products(self, columns: list[Tensor]) -> list[Tensor]:
        self._ask_for_product()
        self._products_made += len(columns)
        products = self._multiply(columns)
        if self._is_outdated:
            products = self._made_anew(columns, products)
        if not self._batches.is_single and self._has_moved():
            self._checks.forget()
        if self._checks.noise is None:
            self._make_twice(columns, products)
        is_first = self._checks.symmetry.is_fresh
        self._judge(self._checks.look_at_symmetry(columns, products))
        if is_first and len(columns) >= _MANY and self._only is None:
            self.look_at_mixtures()
        return products

    def _judge(self, suspicion: Suspicion | None) -> None:
        if suspicion is not None and self._is_confirmed(suspicion):
            self._checks.refuse(suspicion)

    def _make_twice(self, columns: list[Tensor], products: list[Tensor]) -> None:
        """Evaluate and multiply once more; ValueError unless it is the same product."""
        at = next((i for i, p in enumerate(products) if bool(p.any())), 0)
        if not bool(torch.isfinite(products[at]).all()):
            return
        before = self._checks.finished_pass()
        self._kept = None
        again = self._multiply([columns[at]])[0]
        is_single = self._batches.is_single
        apart = self._checks.compare(products[at], again, before)
        if apart is not None and not (
            is_single and self._is_noise(apart, columns[at], again, before)
        ):
            self._kept = None
            self._checks.refuse_difference(apart, before, is_single)
        self._checks.remember(self._versions())

    def _is_noise(
        self, apart: float, column: Tensor, product: Tensor, before: tuple[float, int]
    ) -> bool:
        """Whether the kept graph by itself makes such differences."""
        self._checks.products += 1
        same_graph = difference(product, self._multiply([column])[0])
        return self._checks.accept(apart, same_graph, before)

    def _is_confirmed(self, suspicion: Suspicion) -> bool:
        """Whether a matrix is as little symmetric with parameters moved by rounding."""
        if suspicion.share <= self._checks.noise_now().symmetry:
            return False
        (direction,) = random_columns(self, 1, 0)
        self._checks.products += 1
        if suspicion.is_rounding_beside(direction, self._multiply([direction])[0]):
            return False
        for seed in range(_MOVES):
            self._kept = None
            self._checks.products += 2
            with moved(self._layout.parameters, self._checks.eps, seed):
                images = self._multiply([suspicion.u, suspicion.v])
            self._kept = None
            if not suspicion.is_confirmed_by(*images):
                return False
        return True

    def _made_anew(self, columns: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        """Products in the place of some by graphs that the loss belies, if they may."""
        uses = self._kept.uses if self._kept is not None else 1
        self._kept = None
        new = self._multiply(columns)
        self._checks.products += len(columns)
        self._checks.same_after(uses, old[0], new[0])
        return new

    def _has_moved(self) -> bool:
        versions = self._versions()
        is_other = self._is_other_on_a_rank or self._checks.is_other(versions)
        return self._checks.has_moved(versions, is_other=is_other)

    def _check(self, other: Tensor) -> None:
        try:
            super()._check(other)
        except ValueError as error:
            is_matrix = isinstance(other, Tensor) and other.dim() == 2
            self._raise_on_all(error, other.shape[1] if is_matrix else 1)
