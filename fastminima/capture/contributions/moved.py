"""Contributions on their way from a use to the parameter behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import Contribution, Fused, Materialized

__all__ = ["Placed", "Pushed", "reshaped"]


class Placed(Contribution):
    """A contribution whose elements are moved to their places in the parameter.

    `span` is where in the parameter's first dim they are at most, if that is known.
    """

    def __init__(
        self,
        inner: Contribution,
        shape: tuple[int, ...],
        place: Callable[[Tensor], Tensor],
        span: tuple[int, int] | None = None,
    ) -> None:
        self.inner, self.shape, self.place, self.span = inner, shape, place, span
        self.batch = inner.batch

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return _each(self.place, self.inner.per_sample(lo, hi), self.shape)

    def sq_norms(self) -> Tensor:
        return self.inner.sq_norms()

    def second_moment(self) -> Tensor:
        return self.place(self.inner.second_moment())

    def total(self) -> Tensor:
        return self.place(self.inner.total())

    def fused(self, *, with_second_moment: bool) -> Fused:
        inner = self.inner.fused(with_second_moment=with_second_moment)
        moment = inner.second_moment
        return Fused(
            self.place(inner.total),
            inner.sq_norms,
            None if moment is None else self.place(moment),
        )

    def gram(self) -> Tensor:
        return self.inner.gram()

    def dots(self, direction: Tensor) -> Tensor:
        count = torch.Size(self.inner.shape).numel()
        number = torch.arange(1, count + 1, dtype=torch.int64, device=direction.device)
        source = self.place(number.reshape(self.inner.shape).double()).long()
        moved = direction.new_zeros(count + 1)
        moved[source.flatten()] = direction.flatten()
        return self.inner.dots(moved[1:].reshape(self.inner.shape))

    def settled(self) -> Contribution:
        return Placed(self.inner.settled(), self.shape, self.place, self.span)


class Pushed(Contribution):
    """A contribution taken through a linear map, sample by sample."""

    def __init__(
        self,
        inner: Contribution,
        shape: tuple[int, ...],
        push: Callable[[Tensor], Tensor],
    ) -> None:
        self.inner, self.shape, self.push = inner, shape, push
        self.batch = inner.batch

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return _each(self.push, self.inner.per_sample(lo, hi), self.shape)

    def settled(self) -> Contribution:
        # The nodes that `push` runs through are freed as the pass goes on.
        return Materialized(self.per_sample(0, self.batch))


def _each(
    move: Callable[[Tensor], Tensor], samples: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Every sample's gradient moved: no list of them, beside what they end up in."""
    moved = samples.new_empty(len(samples), *shape)
    for into, grad in zip(moved, samples, strict=True):
        into.copy_(move(grad))
    return moved


def reshaped(inner: Contribution, shape: tuple[int, ...]) -> Placed:
    """A contribution with its elements, in their order, in another shape."""
    return Placed(inner, shape, lambda t: t.reshape(shape))
