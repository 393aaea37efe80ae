"""Matrices made of curvature operators: parts, sums, multiples, preconditioned ones.

    H.block("layers.0")             rows and columns of some parameters
    H + 0.1 * G                     sums and multiples
    H.preconditioned(diagonal)      D^-1/2 H D^-1/2, of what Adam divides by

Each is symmetric like its operators and known by its products, which are theirs.
"""

from __future__ import annotations

import abc
import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ._audit_lines import repeated
from ._trust import difference
from .audit import CurvatureAudit, CurvatureCheck

__all__ = [
    "Algebra",
    "Block",
    "Combination",
    "DerivedOperator",
    "Preconditioned",
]


class Algebra:
    """What operators are combined by: parts, sums, multiples."""

    names: Any
    sizes: Any

    def block(self, *names: str) -> Block:
        """The rows and columns of some parameters, by name or by their module's.

        Raises:
            ValueError: for a name that no trainable parameter has.
        """
        return Block(self, names)

    def blocks(
        self, by: str | Mapping[str, Sequence[str]] = "layer"
    ) -> dict[str, Block]:
        """A block for each layer, parameter or group, by name.

        Their eigenvalues are layer by layer; what couples layers is in none of them.

        Args:
            by: "layer", each module that has trainable parameters itself; "parameter";
                or groups of names of parameters or modules, each with a name.

        Raises:
            ValueError: for another word, or a name that no trainable parameter has.
        """
        if isinstance(by, Mapping):
            return {name: Block(self, chosen) for name, chosen in by.items()}
        if by not in ("layer", "parameter"):
            raise ValueError(
                f"by must be 'layer', 'parameter' or groups of names, got {by!r}."
            )
        if by == "parameter":
            return {name: Block(self, [name]) for name in self.names}
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.names)
        own = {
            owner: [n for n in self.names if n.rpartition(".")[0] == owner]
            for owner in owners
        }
        return {owner: Block(self, names) for owner, names in own.items()}

    def _within(self, other: Tensor, only: tuple[int, ...]) -> Tensor:
        """The rows of some parameters of a product with what is zero elsewhere.

        `only` are their numbers; the other rows are not to be read.
        """
        return cast(Any, self) @ other

    def preconditioned(self, diagonal: Float[Tensor, " params"]) -> Preconditioned:
        """D^-1/2 A D^-1/2 for a diagonal of positive numbers, as `preconditioner` has.

        Raises:
            ValueError: for another size, or numbers that are not positive and finite.
        """
        return Preconditioned(self, diagonal)

    def __mul__(self, factor: float) -> Combination:
        return Combination([(float(factor), self)])

    __rmul__ = __mul__

    def __neg__(self) -> Combination:
        return Combination([(-1.0, self)])

    def __add__(self, other: Any) -> Combination:
        return Combination([(1.0, self), (1.0, other)])

    def __sub__(self, other: Any) -> Combination:
        return Combination([(1.0, self), (-1.0, other)])


class DerivedOperator(Algebra, abc.ABC):
    """A symmetric matrix whose products are made of those of others.

    Attributes:
        operators: the operators below it, which count products and look at themselves.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = list(parts)
        found: dict[int, Any] = {}
        for part in self._parts:
            below = part.operators if isinstance(part, DerivedOperator) else [part]
            found.update((id(x), x) for x in below)
        self.operators: list[Any] = list(found.values())

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), P the length of its vectors."""
        return self._parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """What vectors must have."""
        return self._parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where vectors must be."""
        return self._parts[0].device

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of its vectors."""
        return self._parts[0].names

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each of them has."""
        return self._parts[0].sizes

    def __matmul__(
        self, other: Float[Tensor, " params"] | Float[Tensor, "params probes"]
    ) -> Float[Tensor, " params"] | Float[Tensor, "params probes"]:
        """The product with a vector [P], or with each column of a matrix [P, k]."""
        size = self.shape[0]
        if not isinstance(other, Tensor) or other.shape[:1] != (size,):
            shape = getattr(other, "shape", type(other).__name__)
            raise ValueError(
                f"{self} cannot multiply {shape}. Pass a vector [{size}] or a matrix "
                f"[{size}, k]."
            )
        return self._multiply(other)

    def audit(self, *, seed: int = 0) -> CurvatureAudit:
        """The audits of the operators below, in one table that names each.

        Of a block also: a product within it beside the rows of one with the whole.

        Args:
            seed: Of the random vectors.

        Raises:
            ValueError: As the audits of those operators.
        """
        lines: list[CurvatureCheck] = []
        for number, operator in enumerate(self.operators, 1):
            name = type(operator).__name__
            name = f"{number}, {name}" if len(self.operators) > 1 else name
            lines += [
                replace(line, looked_at=f"{name}: {line.looked_at}")
                for line in operator.audit(seed=seed).checks
            ]
        if all(line.ok for line in lines):
            lines += self._own_lines(seed)
        return CurvatureAudit(str(self), tuple(lines))

    def _own_lines(self, seed: int) -> list[CurvatureCheck]:
        """What an audit says beside that of the operators below."""
        return [line for part in self._parts for line in _own_lines(part, seed)]

    @abc.abstractmethod
    def _multiply(self, other: Tensor) -> Tensor:
        """The product with a vector or a matrix."""

    @property
    @abc.abstractmethod
    def gradient(self) -> Float[Tensor, " params"]:
        """Where solvers start from."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]})"


def _own_lines(part: Any, seed: int) -> list[CurvatureCheck]:
    return part._own_lines(seed) if isinstance(part, DerivedOperator) else []


class Combination(DerivedOperator):
    """A sum of operators over the same parameters, each times a number.

    Raises:
        ValueError: for operators over others, or a number that is not finite.
    """

    def __init__(self, terms: Sequence[tuple[float, Any]]) -> None:
        super().__init__([part for _, part in terms])
        self._factors = [factor for factor, _ in terms]
        if not all(map(math.isfinite, self._factors)):
            raise ValueError(f"Factors must be finite, got {self._factors}.")
        first = _kind(self._parts[0])
        for part in self._parts[1:]:
            if _kind(part) != first:
                raise ValueError(
                    f"A sum needs operators over the same parameters: {first[0]} are "
                    f"not {_kind(part)[0]}, or dtypes or devices differ."
                )

    def _multiply(self, other: Tensor) -> Tensor:
        return self._total(part @ other for part in self._parts)

    def _within(self, other: Tensor, only: tuple[int, ...]) -> Tensor:
        return self._total(part._within(other, only) for part in self._parts)

    def _total(self, products: Iterator[Tensor]) -> Tensor:
        pairs = zip(self._factors, products, strict=True)
        factor, product = next(pairs)
        total = product * factor
        for factor, product in pairs:
            total = total.add_(product, alpha=factor)
        return total

    @property
    def gradient(self) -> Float[Tensor, " params"]:
        """Of the first."""
        return self._parts[0].gradient


def _kind(part: Any) -> tuple[Any, ...]:
    return part.shape, part.names, part.dtype, part.device


class Block(DerivedOperator):
    """The rows and columns of some parameters, such as those of a layer.

    A product goes through the part of the graph that is made of them alone, and costs
    less than one of the whole operator the further up the layers are.

    Args:
        whole: The operator.
        chosen: Names of parameters, or of modules, all of whose parameters are meant.

    Raises:
        ValueError: for a name that no parameter has.
    """

    def __init__(self, whole: Any, chosen: Sequence[str]) -> None:
        super().__init__([whole])
        ends = list(itertools.accumulate(whole.sizes))
        self._names: list[str] = []
        self._slices: list[slice] = []
        self._numbers: list[int] = []
        met = set()
        places = zip(whole.names, ends, whole.sizes, strict=True)
        for number, (name, end, size) in enumerate(places):
            found = {c for c in chosen if name == c or name.startswith(f"{c}.")}
            if found:
                met |= found
                self._names.append(name)
                self._numbers.append(number)
                self._slices.append(slice(end - size, end))
        if missing := [c for c in chosen if c not in met]:
            raise ValueError(
                f"No trainable parameter is named {missing}, or in a module of that "
                f"name. There are {list(whole.names[:8])}"
                f"{' and more' if len(whole.names) > 8 else ''}."
            )
        self._size = sum(s.stop - s.start for s in self._slices)
        self._known: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), P the number of scalars of these parameters."""
        return self._size, self._size

    @property
    def names(self) -> tuple[str, ...]:
        """Names of these parameters."""
        return tuple(self._names)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each of them has."""
        return tuple(place.stop - place.start for place in self._slices)

    def _multiply(self, other: Tensor) -> Tensor:
        return self._inside(other, tuple(self._numbers))

    def _within(self, other: Tensor, only: tuple[int, ...]) -> Tensor:
        return self._inside(other, tuple(self._numbers[index] for index in only))

    def _own_lines(self, seed: int) -> list[CurvatureCheck]:
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(
            self.shape[0], generator=generator, dtype=torch.float64, device="cpu"
        )
        v = drawn.to(self.device, self.dtype)
        apart = difference(self @ v, self._cut(self._parts[0] @ self._padded(v)))
        allowed = max(x.noise.repeat for x in self.operators if x.noise is not None)
        looked_at = f"{self}: its product and the rows of one with the whole"
        line = repeated("within", looked_at, apart, allowed)
        return [line, *super()._own_lines(seed)]

    def _inside(self, other: Tensor, numbers: tuple[int, ...]) -> Tensor:
        return self._cut(self._parts[0]._within(self._padded(other), numbers))

    def _padded(self, other: Tensor) -> Tensor:
        """Vectors of the whole operator, zero elsewhere."""
        padded = other.new_zeros(self._parts[0].shape[0], *other.shape[1:])
        start = 0
        for place in self._slices:
            size = place.stop - place.start
            padded[place] = other[start : start + size]
            start += size
        return padded

    def _cut(self, vector: Tensor) -> Tensor:
        return torch.cat([vector[place] for place in self._slices])

    @property
    def gradient(self) -> Float[Tensor, " params"]:
        """The part of the whole one."""
        if self._known is not None:
            return self._known
        return self._cut(self._parts[0].gradient)

    def starting_from(self, gradient: Float[Tensor, " params"]) -> Block:
        """The same block for solvers, where the whole gradient is known."""
        block = copy.copy(self)
        block._known = self._cut(gradient)
        return block


class Preconditioned(DerivedOperator):
    """D^-1/2 A D^-1/2 for a diagonal D: its eigenvalues are those of D^-1 A.

    An eigenvector u of it belongs to D^-1/2 u, an eigenvector of D^-1 A.

    Args:
        whole: A.
        diagonal: D, of positive numbers.

    Raises:
        ValueError: for a diagonal of another size, or with a number that is not
            positive and finite.
    """

    def __init__(self, whole: Any, diagonal: Float[Tensor, " params"]) -> None:
        super().__init__([whole])
        if diagonal.shape != (whole.shape[0],):
            raise ValueError(
                f"The diagonal must be a vector [{whole.shape[0]}], got "
                f"{tuple(diagonal.shape)}."
            )
        d = diagonal.detach().to(whole.device, torch.float64)
        if not bool((torch.isfinite(d) & (d > 0)).all()):
            least, most = float(d.min()), float(d.max())
            raise ValueError(
                f"The diagonal must be positive and finite, got {least:.3g} to "
                f"{most:.3g}. (Adam divides by zero where a parameter never got a "
                "gradient and eps is 0.)"
            )
        self._root = d.rsqrt().to(whole.dtype)

    def _multiply(self, other: Tensor) -> Tensor:
        root = self._root if other.dim() == 1 else self._root[:, None]
        return (self._parts[0] @ (other * root)).mul_(root)

    def _within(self, other: Tensor, only: tuple[int, ...]) -> Tensor:
        root = self._root if other.dim() == 1 else self._root[:, None]
        return self._parts[0]._within(other * root, only).mul_(root)

    @property
    def gradient(self) -> Float[Tensor, " params"]:
        """The gradient in the same coordinates, D^-1/2 g."""
        return self._parts[0].gradient * self._root
