"""An operator's product and gradient beside central differences along a direction."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .._flat import FlatLayout
from ._checks import Checks
from ._data import Batches
from ._kinks import crossed, sides
from ._nodes import survey
from ._scale import norm
from ._trust import Noise

if TYPE_CHECKING:
    from ._operator import CurvatureOperator

__all__ = ["Comparison", "compared", "in_double", "of_one_batch"]

# Lengths of steps over that of the parameters, the largest first.
_STEPS = {torch.float64: (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)}
_COARSE = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
_ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-2}
_ALLOWED_HALF = 1e-1
_DOUBT = 0.03  # by which a step and its half may differ where something is told
_MARGIN = 10  # times that difference may be between the differences and the product
_ROUNDING = 30  # eps of what is subtracted, by which differences may be off
_ENOUGH = 1e-7  # a step that leaves so little doubt is the last

Operator = TypeVar("Operator", bound="CurvatureOperator")
# What is differenced and the loss; the sides of kinks.
End = tuple[tuple[Tensor, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Comparison:
    """Something along a direction, and by central differences.

    Attributes:
        error: How far apart, relative to the larger.
        allowed: How far they may be.
        doubt: How far the differences of a step and of its half are apart.
        step: Its length over that of the parameters; None where all cross kinks.
        is_told: Whether the differences are good enough to tell.
        apart: The elements' differences.
    """

    error: float
    allowed: float
    doubt: float
    step: float | None
    is_told: bool
    apart: Tensor | None

    @classmethod
    def of(
        cls,
        want: Tensor,
        whole: Tensor,
        half: Tensor,
        rounding: float,
        step: float,
        dtype: torch.dtype,
    ) -> Comparison:
        """From differences of a step and of its half, by Richardson's extrapolation."""
        apart = (4 * half - whole) / 3 - want
        scale = max(norm(want), norm(half))
        doubt = norm(half - whole)
        share = _ALLOWED.get(dtype, _ALLOWED_HALF)
        allowed = max(share * scale, _MARGIN * doubt, rounding)
        is_told = doubt <= _DOUBT * scale and rounding <= scale / 3
        # Zeros are told from nothing else but rounding.
        is_told |= dtype == torch.float64 and max(scale, norm(apart)) <= rounding
        over = scale or 1.0
        found = norm(apart) / over, allowed / over, doubt / over
        return cls(*found, step, is_told, apart)

    @property
    def ok(self) -> bool:
        """Whether they agree; True where it cannot be told."""
        return not self.is_told or self.error <= self.allowed


def of_one_batch(operator: Operator, batch: Any, weight: int) -> Operator:
    """The same operator over one of its batches."""
    twin = copy.copy(operator)
    twin._batches = Batches.of_one(batch, weight)
    twin._kept = twin._fresh = None
    return twin


def in_double(operator: Operator) -> Operator:
    """The same operator with a copy of model and batch in double."""
    twin = copy.copy(operator)
    twin._model = copy.deepcopy(operator._model).double()
    twin._layout = FlatLayout(twin._model)
    batch, weight = next(iter(operator._batches))
    twin._batches = Batches.of_one(_doubled(batch), weight)
    twin._checks = Checks(type(operator).__name__, twin._model)
    twin._checks.noise = Noise(torch.float64)
    twin._kept = twin._fresh = None
    return twin


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(map(_doubled, value))
    if type(value) is dict:
        return {key: _doubled(part) for key, part in value.items()}
    if isinstance(value, tuple | list | Mapping):
        raise TypeError(f"A batch of type {type(value).__name__} cannot be copied.")
    return value


def compared(
    operator: CurvatureOperator, direction: Tensor
) -> tuple[Comparison, Comparison]:
    """The product with a direction, and the slope of the loss along it.

    The operator is one over one batch. Of several steps the one counts that leaves the
    least doubt, among those across which no operation changes the side of a kink.
    """
    product = operator._multiply([direction])[0]
    slope = torch.dot(operator._gradient().double(), direction.double()).reshape(1)
    parts = operator._layout.split(direction)
    batch, _ = next(iter(operator._batches))
    with operator._context():
        operator._random.restore()
        roots = operator._evaluate(batch)
    dtype = survey(roots).dtype
    best = [_nothing(), _nothing()]
    for step in _STEPS.get(dtype, _COARSE):
        far = [_end(operator, batch, parts, s * step) for s in (1, -1)]
        if crossed(far[0][1], far[1][1]):
            continue
        near = [_end(operator, batch, parts, s * step / 2) for s in (1, -1)]
        for i, want in enumerate((product, slope)):
            whole = (far[0][0][i] - far[1][0][i]).double() / (2 * step)
            half = (near[0][0][i] - near[1][0][i]).double() / step
            rounding = _ROUNDING * torch.finfo(dtype).eps * _size(far[0][0][i]) / step
            if i == 0:
                size = _size(half)
                with operator._context():
                    whole, half = (
                        operator._by_difference(batch, roots, d) for d in (whole, half)
                    )
                rounding *= norm(half) / size if size else 1.0
            found = Comparison.of(
                *(want.double(), whole.double(), half.double()), rounding, step, dtype
            )
            best[i] = min(best[i], found, key=_rank)
        if all(found.is_told and found.doubt < _ENOUGH for found in best):
            break
    return best[0], best[1]


def _size(x: Tensor) -> float:
    return norm(x.reshape(-1).double())


def _rank(found: Comparison) -> tuple[bool, float]:
    return not found.is_told, max(found.doubt * _MARGIN, found.allowed)


def _nothing() -> Comparison:
    inf = float("inf")
    return Comparison(inf, inf, inf, None, False, None)


def _end(
    operator: CurvatureOperator, batch: Any, parts: Sequence[Tensor], factor: float
) -> End:
    """At one end of a step: what is differenced, the loss, the sides of kinks."""
    with operator._context(), _displaced(operator._layout.parameters, parts, factor):
        operator._random.restore()
        roots = operator._evaluate(batch)
        loss = roots[-1].detach().double().mean().reshape(1)
        met = sides(roots)  # before the graph goes
        return (operator._differenced(roots).detach().clone(), loss), met


@contextlib.contextmanager
def _displaced(
    parameters: Sequence[Tensor], parts: Sequence[Tensor], factor: float
) -> Iterator[None]:
    """Within, parameters are away by `factor` times the parts."""
    before = [p.data for p in parameters]
    try:
        for p, data, part in zip(parameters, before, parts, strict=True):
            p.data = data + factor * part
        yield
    finally:
        for p, data in zip(parameters, before, strict=True):
            p.data = data
