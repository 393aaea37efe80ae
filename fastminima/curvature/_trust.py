"""Whether products are those of one symmetric matrix, as far as rounding can tell."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._nodes import Survey
from ._scale import dots, norm, ordinary

__all__ = ["Noise", "Suspicion", "SymmetryWatch", "difference"]

# By which two evaluations may differ, relative to their norm. Noise of four times what
# an H100's atomics make moved products by 5e-15 in float64, 6e-6 in float32, 2e-3 in
# float16, 3e-2 in bfloat16; other random numbers move them by 1e-1 and more.
_REPEAT = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2}
_REPEAT_NARROW = 1e-1
# By which <u, A v> and <A u, v> may differ, relative to the larger. Honest: 1e-14,
# 2e-6, 1e-3, 7e-3 in the same order, under that noise; asymmetric: 2e-2 and more.
_SYMMETRY = {torch.float64: 1e-6, torch.float32: 3e-4, torch.float16: 5e-3}
_SYMMETRY_NARROW = 2e-2
_UNKNOWN = 2e-2  # of a matrix of which nothing but its products is known
# Between vectors that are hardly coupled both are rounding alone: differences below
# this share of `allowed` |A| |u| |v| say nothing. In halves they reach 7e-3 |A|.
_FLOOR = {torch.float64: 0.02, torch.float32: 0.02}
_FLOOR_NARROW = 1.0
_PAIRS = 5  # pairs of consecutive products that are looked at
_LOOKS = 12  # with those between parallel vectors, which tell nothing
_PARALLEL = 0.99
_STABLE = 0.2  # by which a real gap may change next to the point

Pair = tuple[Tensor, Tensor]  # a vector and its product


@dataclass(frozen=True)
class Noise:
    """What rounding may do to products.

    Attributes:
        dtype: The narrowest dtype that the graph computes in.
        saturation: eps / |loss| where the graph has probabilities, else 0. A fitted
            classifier's curvature is made of 1 - p, of which rounding leaves so much.
        saturates: Whether the graph has probabilities.
    """

    dtype: torch.dtype
    saturation: float = 0.0
    saturates: bool = False

    @classmethod
    def of(cls, survey: Survey, loss: float) -> Noise:
        """The noise of a graph whose loss has this value."""
        return cls(survey.dtype, saturates=survey.saturates).at(loss)

    def at(self, loss: float) -> Noise:
        """The noise of the same graph where the loss has another value."""
        share = torch.finfo(self.dtype).eps / max(abs(loss), 1e-300)
        return replace(self, saturation=share if self.saturates else 0.0)

    @property
    def repeat(self) -> float:
        """How much two evaluations may differ."""
        return _REPEAT.get(self.dtype, _REPEAT_NARROW) + min(self.saturation, 0.5)

    @property
    def symmetry(self) -> float:
        """How much <u, A v> and <A u, v> may differ."""
        return _SYMMETRY.get(self.dtype, _SYMMETRY_NARROW) + self.saturation

    @property
    def floor(self) -> float:
        """The share of |A| below which nothing can be told."""
        return _FLOOR.get(self.dtype, _FLOOR_NARROW)


def difference(first: Tensor, second: Tensor) -> float:
    """|first - second| over the larger norm; 0 for zeros, inf for one that is NaN."""
    largest = max(norm(first), norm(second))
    share = norm(first - second) / largest if largest else 0.0
    return share if share == share else float("inf")


@dataclass(frozen=True)
class Suspicion:
    """Two vectors between which a matrix seems not to be symmetric.

    Attributes:
        u: The one.
        v: The other.
        gap: <u, A v> - <A u, v>.
        share: Its size relative to what it is measured by.
        text: What was found, in words.
        innocent: The |A| from which on it is no more than rounding.
    """

    u: Tensor
    v: Tensor
    gap: float
    share: float
    text: str
    innocent: float = float("inf")

    def is_rounding_beside(self, direction: Tensor, image: Tensor) -> bool:
        """Whether another product tells of an |A| of which the gap is rounding.

        All vectors met may lie where A is nothing beside its other entries.
        """
        return norm(image) >= self.innocent * norm(direction)

    def is_confirmed_by(self, image_u: Tensor, image_v: Tensor) -> bool:
        """Whether products at a point next to it show the same gap.

        What rounding makes is another number there.
        """
        left, right, *_ = _dots(self.u, image_u, self.v, image_v)
        return abs(left - right - self.gap) <= _STABLE * abs(self.gap)


class SymmetryWatch:
    """Compares <u, A v> with <A u, v> for the first few products after `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Look at the next products."""
        self._left, self._looks = _PAIRS, _LOOKS
        self._last: Pair | None = None
        self._scale = 0.0

    @property
    def is_fresh(self) -> bool:
        """Whether no product has been looked at yet."""
        return self._looks == _LOOKS

    def look(self, v: Tensor, image: Tensor, noise: Noise | None) -> Suspicion | None:
        """What is wrong with a product beside the one before it, or None."""
        self._looks -= 1
        if not self._left or self._looks < 0:
            self._last = None
            return None
        last, self._last = self._last, (v.clone(), image.clone())
        if last is None:
            return None
        found = self.between(last, self._last, noise)
        if not self._left:
            self._last = None
        return found

    def between(
        self, first: Pair, second: Pair, noise: Noise | None
    ) -> Suspicion | None:
        """What is wrong with two products (v, A v) beside each other, or None."""
        (u, image_u), (v, image_v) = first, second
        left, right, along, nu, nv, au, av = _dots(u, image_u, v, image_v)
        if not (nu > 0 and nv > 0) or abs(along) > _PARALLEL * nu * nv:
            return None
        self._left -= 1
        self._scale = max(self._scale, au / nu, av / nv)
        allowed = _UNKNOWN if noise is None else noise.symmetry
        share = _FLOOR_NARROW if noise is None else noise.floor
        apart = abs(left - right)
        floor = max(abs(left), abs(right), share * self._scale * nu * nv)
        if not apart > allowed * floor:
            return None
        text = (
            f"<u, A v> = {left:.6g} and <A u, v> = {right:.6g} differ by "
            f"{apart / max(abs(left), abs(right)):.1e} of their size, for two vectors "
            f"met; rounding explains {allowed:.0e}"
        )
        innocent = apart / (allowed * share * nu * nv)
        return Suspicion(u, v, left - right, apart / floor, text, innocent)


def _dots(u: Tensor, image_u: Tensor, v: Tensor, image_v: Tensor) -> list[float]:
    """<u, A v>, <A u, v>, <u, v>, |u|, |v|, |A u|, |A v|, whatever their scales."""
    (u, of_u), (v, of_v) = ordinary(u), ordinary(v)
    (image_u, of_image_u), (image_v, of_image_v) = ordinary(image_u), ordinary(image_v)
    found = [dots(u, [image_v, v, u]), dots(v, [image_u, v])]
    found += [dots(x, [x]) for x in (image_u, image_v)]
    left, own, uu, right, vv, image_uu, image_vv = torch.cat(found).unbind()
    norms = torch.stack([uu, vv, image_uu, image_vv]).sqrt()
    read = [*torch.stack([left, right, own]).tolist(), *norms.tolist()]
    scales = (of_u * of_image_v, of_image_u * of_v, of_u * of_v)
    scales += (of_u, of_v, of_image_u, of_image_v)
    return [number * scale for number, scale in zip(read, scales, strict=True)]
