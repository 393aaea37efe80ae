"""What one use adds to the gradient of each sample: the interface; plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype

__all__ = ["Contribution", "Fused", "Materialized", "sq_norms_of", "summed"]

_CHUNK_BYTES = 64 << 20


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

    def per_sample(self, lo: int, hi: int) -> Tensor:
        """Gradients of samples lo ... hi - 1, `[hi - lo, *shape]`."""
        raise NotImplementedError

    def chunks(self) -> Iterator[Tensor]:
        """All samples' gradients, some at a time."""
        bytes_each = 8 * max(1, int(torch.Size(self.shape).numel()))
        step = max(1, _CHUNK_BYTES // bytes_each)
        for lo in range(0, self.batch, step):
            yield self.per_sample(lo, min(lo + step, self.batch))

    def sq_norms(self) -> Tensor:
        """|g_n|^2, `[batch]`."""
        return torch.cat([sq_norms_of(chunk) for chunk in self.chunks()])

    def second_moment(self) -> Tensor:
        """sum_n g_n^2 elementwise, of the parameter's shape."""
        return summed(chunk.square().sum(0) for chunk in self.chunks())

    def total(self) -> Tensor:
        """sum_n g_n, of the parameter's shape: the ordinary gradient."""
        return summed(chunk.sum(0) for chunk in self.chunks())

    def fused(self, *, with_second_moment: bool) -> Fused:
        """The ordinary gradient, norms and second moment, in one pass if there is one.

        The second moment is None unless it is asked for.
        """
        moment = self.second_moment() if with_second_moment else None
        return Fused(self.total(), self.sq_norms(), moment)

    def gram(self) -> Tensor:
        """<g_n, g_m>, `[batch, batch]`."""
        rows = [_flat(chunk) for chunk in self.chunks()]
        if len(rows) == 1:
            return rows[0] @ rows[0].t()
        del rows
        return torch.cat(
            [
                torch.cat([_flat(a) @ _flat(b).t() for b in self.chunks()], 1)
                for a in self.chunks()
            ]
        )

    def dots(self, direction: Tensor) -> Tensor:
        """<g_n, direction>, `[batch]`."""
        flat = direction.flatten()
        return torch.cat([_flat(c) @ flat.to(c.dtype) for c in self.chunks()])

    def settled(self) -> Contribution:
        """The same, usable after the backward pass has left this node."""
        return self


def summed(parts: Iterator[Tensor]) -> Tensor:
    """The sum of some tensors, at least one."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def sq_norms_of(samples: Tensor) -> Tensor:
    """Squared norms of `[batch, *shape]`, `[batch]`."""
    norms = torch.linalg.vector_norm(_flat(samples), dim=1)
    return norms.square()


def _flat(samples: Tensor) -> Tensor:
    return samples.reshape(len(samples), -1)


class Materialized(Contribution):
    """Sample gradients that are there: `[batch, *shape]`."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples
        self.batch = len(samples)
        self.shape = tuple(samples.shape[1:])
        self._dtype = accumulation_dtype(samples.dtype)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self.samples[lo:hi].to(self._dtype)
