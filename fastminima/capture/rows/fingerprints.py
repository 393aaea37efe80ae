"""Norms of the rows of a gradient in each measuring pass, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype
from .decode import Measurement, Scheme, Votes, graph_noise, weigh
from .evidence import Measurements

__all__ = ["Fingerprints", "measurements_of", "read_votes", "votes_of"]

_MATRICES = 3  # dims of a batch of them
_PIECE = 1 << 20  # elements looked at together


@dataclass
class Fingerprints:
    """Row norms of one node in each pass; notes them when called as a hook.

    Of each output the sums of |g| over the last dim, and over all but the last where
    that may hold the batch. Multiplying a row by a power of two does the same to its
    sum, to the last bit, and unlike a sum of squares it cannot underflow. Nothing as
    large as the gradient is kept, and nothing leaves its device.

    Args:
        batch: number of samples.
        is_fine: whether rows are those of the last dim in any case. Else of images and
            the like, which have two dims more, all of a channel is one row.
    """

    batch: int
    is_fine: bool = True
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    passes: list[list[tuple[Tensor, Tensor | None] | None]] = field(
        default_factory=list
    )

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Note the gradients of one pass."""
        self.shapes = [() if g is None else tuple(g.shape) for g in grads]
        with torch.no_grad():
            self.passes.append([None if g is None else self._norms(g) for g in grads])

    def is_coarse(self, output: int) -> bool:
        """Whether rows of an output are whole channels."""
        return not self.is_fine and len(self.shapes[output]) > _MATRICES

    def _norms(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        g = g.detach()
        dtype = accumulation_dtype(g.dtype)
        if g.dim() < 2:
            return g.abs().to(dtype), None
        if not self.is_fine and g.dim() > _MATRICES:
            return _sums(g, tuple(range(2, g.dim())), dtype), None
        last = _sums(g, (-1,), dtype)
        if g.shape[-1] == 0 or g.shape[-1] % self.batch:
            return last, None
        return last, _sums(g, tuple(range(g.dim() - 1)), dtype)


def _sums(g: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sums of |g| over some dims.

    On a CPU in pieces that stay in the cache: norms of short rows take ten times as
    long there, and absolute values of all elements as much memory again.
    """
    if g.device.type != "cpu":
        return torch.linalg.vector_norm(g, 1, dim=dims, dtype=dtype)
    rows = max(1, _PIECE * len(g) // max(1, g.numel()))
    sums = [part.abs().sum(dims, dtype=dtype) for part in g.split(rows)]
    if 0 in dims:
        return torch.stack(sums).sum(0)
    return torch.cat(sums)


def measurements_of(seen: Mapping[int, Fingerprints], scheme: Scheme) -> Measurements:
    """Labels of every output of the nodes whose gradients were seen."""
    return read_votes(seen, votes_of(seen, scheme), scheme)


def votes_of(
    seen: Mapping[int, Fingerprints], scheme: Scheme
) -> dict[int, list[Votes | None]]:
    """What the rows of every output say."""
    return {i: _votes(prints, scheme) for i, prints in seen.items()}


def read_votes(
    seen: Mapping[int, Fingerprints],
    votes: Mapping[int, list[Votes | None]],
    scheme: Scheme,
) -> Measurements:
    """Labels of every output, once the noise of the whole graph is known."""
    noise = graph_noise(e for es in votes.values() for e in es if e is not None)
    return {
        i: [
            _measurement(prints, output, of_output, scheme, noise)
            if _is_there(prints, output)
            else None
            for output, of_output in enumerate(votes[i])
        ]
        for i, prints in seen.items()
    }


def _is_complete(prints: Fingerprints, scheme: Scheme) -> bool:
    once = scheme.passes
    return len(prints.passes) in (once, once + 1, 2 * once + 1)


def _is_there(prints: Fingerprints, output: int) -> bool:
    """Whether every pass brought a gradient to this output."""
    return bool(prints.shapes) and all(p[output] is not None for p in prints.passes)


def _votes(prints: Fingerprints, scheme: Scheme) -> list[Votes | None]:
    """What the rows of each output say; None where they mix, or none came."""
    if not _is_complete(prints, scheme):
        return [None]
    return [
        weigh([p[output][0] for p in prints.passes], scheme)  # type: ignore[index]
        if _is_there(prints, output)
        else None
        for output in range(len(prints.shapes))
    ]


def _measurement(
    prints: Fingerprints,
    output: int,
    votes: Votes | None,
    scheme: Scheme,
    noise: float,
) -> Measurement:
    labels = weight = trailing = None
    if votes is not None:
        labels, weight = votes.rows(noise)
    columns = [p[output][1] for p in prints.passes]  # type: ignore[index]
    if labels is None and columns[0] is not None:
        of_columns = weigh(columns, scheme)  # type: ignore[arg-type]
        if of_columns is not None and of_columns.is_clear:
            trailing, _ = of_columns.rows(noise)
    return Measurement(prints.shapes[output], labels, trailing, weight)
