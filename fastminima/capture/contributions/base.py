"""What one use adds to the gradient of each sample: the interface; plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype
from ...ops import broadcast, reduce
from ...ops._pieces import pieces

__all__ = [
    "Contribution",
    "Fused",
    "Materialized",
    "fused_of",
    "sq_norms_of",
    "summed",
]


class Fused(NamedTuple):
    """The ordinary gradient and the statistics that come with it."""

    total: Tensor
    sq_norms: Tensor
    second_moment: Tensor | None


class Contribution:
    """What one use adds to the gradient of each sample; an interface.

    A subclass gives `per_sample`; it overrides what it can compute without it.
    """

    batch: int
    shape: tuple[int, ...]
    # Whether it saves work to read what another one of the same use has left: it is
    # asked after that one then.
    reads_another = False

    def per_sample(self, lo: int, hi: int) -> Tensor:
        """Gradients of samples lo ... hi - 1, `[hi - lo, *shape]`."""
        raise NotImplementedError

    def chunks(self) -> Iterator[Tensor]:
        """All samples' gradients, some at a time: each should be let go of in turn."""
        for some in self._blocks():
            yield self.per_sample(some.start, some.stop)

    def _blocks(self) -> Iterator[slice]:
        """Slices of the batch whose gradients take a quarter of the limit."""
        return pieces(self.batch, 4 * torch.Size(self.shape).numel(), 4)

    def sq_norms(self) -> Tensor:
        """|g_n|^2, `[batch]`."""
        return torch.cat(list(map(sq_norms_of, self.chunks())))

    def second_moment(self) -> Tensor:
        """sum_n g_n^2 elementwise, of the parameter's shape."""
        return summed(map(_squares, self.chunks()))

    def total(self) -> Tensor:
        """sum_n g_n, of the parameter's shape: the ordinary gradient."""
        return summed(map(_sum, self.chunks()))

    def fused(self, *, with_second_moment: bool) -> Fused:
        """The ordinary gradient, norms and second moment, in one pass if there is one.

        The second moment is None unless it is asked for.
        """
        moment = self.second_moment() if with_second_moment else None
        return Fused(self.total(), self.sq_norms(), moment)

    def gram(self) -> Tensor:
        """<g_n, g_m>, `[batch, batch]`."""
        blocks = list(self._blocks())
        if len(blocks) == 1:
            samples = _flat(self.per_sample(0, self.batch))
            return samples @ samples.t()
        rows = [self._products(left, blocks[: i + 1]) for i, left in enumerate(blocks)]
        gram = rows[0].new_empty(self.batch, self.batch)
        for left, products in zip(blocks, rows, strict=True):
            gram[left, : left.stop] = products
            gram[: left.stop, left] = products.t()
        return gram

    def _products(self, left: slice, rights: Sequence[slice]) -> Tensor:
        """Inner products of the samples of a block with those of blocks up to it."""
        samples = _flat(self.per_sample(left.start, left.stop))
        return torch.cat(
            [
                samples @ (samples if some == left else self._flat_of(some)).t()
                for some in rights
            ],
            dim=1,
        )

    def _flat_of(self, some: slice) -> Tensor:
        return _flat(self.per_sample(some.start, some.stop))

    def dots(self, direction: Tensor) -> Tensor:
        """<g_n, direction>, `[batch]`."""
        flat = direction.flatten()
        return torch.cat([_along(chunk, flat) for chunk in self.chunks()])

    def several_dots(self, directions: Sequence[Tensor]) -> Sequence[Tensor]:
        """<g_n, v> for each of some directions v, `[batch]` each."""
        return [self.dots(v) for v in directions]

    def settled(self) -> Contribution:
        """This contribution, usable after the backward pass has left its node."""
        return self


def summed(parts: Iterator[Tensor]) -> Tensor:
    """The sum of some tensors, at least one."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def sq_norms_of(samples: Tensor) -> Tensor:
    """Squared norms of `[batch, *shape]`, `[batch]`."""
    return reduce.sample_sq_norms(_flat(samples))


def fused_of(samples: Tensor, shape: Sequence[int]) -> Fused:
    """The gradient of a given shape, and norms, of samples' `[batch, width]`."""
    (total,) = broadcast.sum_over_time(samples.unsqueeze(0)).unbind()
    return Fused(total.reshape(shape), sq_norms_of(samples), None)


def _flat(samples: Tensor) -> Tensor:
    return samples.reshape(len(samples), -1)


def _squares(samples: Tensor) -> Tensor:
    return samples.square().sum(0)


def _sum(samples: Tensor) -> Tensor:
    return samples.sum(0)


def _along(samples: Tensor, flat: Tensor) -> Tensor:
    return _flat(samples) @ flat.to(samples.dtype)


class Materialized(Contribution):
    """Sample gradients that are there: `[batch, *shape]`."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples
        self.batch = len(samples)
        self.shape = tuple(samples.shape[1:])
        self._dtype = accumulation_dtype(samples.dtype)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self.samples[lo:hi].to(self._dtype)
