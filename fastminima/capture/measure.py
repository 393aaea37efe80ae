"""Measure which sample each row of a node's output gradient belongs to.

The samples' losses are weighted by powers of two and the backward pass is run again:
a row that belongs to sample n is multiplied by exactly w_n, in every floating-point
format, because products with powers of two do not round. A row that is not has met
other samples on its way. Nothing here touches `.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from .._memory import return_freed_memory
from .layout import IrregularLayout, RowLayout, fit_layouts
from .tape import Tape

__all__ = [
    "Fingerprints",
    "Measurement",
    "Measurements",
    "Scheme",
    "Weighting",
    "leaves_below",
    "measure_samples",
]

# Levels of a weight in one pass, 2^-8 ... 2^7: gradients of 1e-20 stay normal numbers.
_LEVELS = 16
_LARGER_THAN_UNDERFLOW = 1e-30
_HALF_LEVELS = 4  # float16 underflows at 6e-8
# log2 of a row's growth must be this close to a whole number. Exact arithmetic gives
# 1e-15; nondeterministic reductions (atomics) give 1e-6 relative.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2  # rows that touch float16's subnormal range

Weighting = Callable[[Tensor], list]  # weights [batch] -> handles of its prehooks
Measurements = dict[int, list["Measurement | None"]]  # node -> each of its outputs


@dataclass
class Measurement:
    """Labels of the rows of one node output, for two ways of reading rows.

    `leading[i...]` labels all positions but the last dim, `trailing[...]` all but the
    first; each is None when rows read that way mix samples. -1 is a row of zeros.
    """

    shape: tuple[int, ...]
    leading: np.ndarray | None
    trailing: np.ndarray | None

    @property
    def is_mixed(self) -> bool:
        """Whether no reading gives every row to one sample."""
        return self.leading is None and self.trailing is None

    def mixed(self) -> Measurement:
        """The same output, with rows that do not belong to one sample each."""
        return Measurement(self.shape, None, None)

    def shows_all(self, batch: int) -> bool:
        """Whether every sample was seen, so that what fits will fit again.

        A gradient that was zero, or not finite, for some samples fits too much.
        """
        return self.seen == batch

    @property
    def seen(self) -> int:
        """Number of samples whose rows were seen."""
        labels = self.trailing if self.leading is None else self.leading
        return 0 if labels is None else len(np.unique(labels[labels >= 0]))

    def layouts(self, batch: int) -> list[RowLayout]:
        """Regular layouts that fit, else the irregular one; empty when mixed."""
        found: list[RowLayout] = []
        if self.leading is not None:
            found += fit_layouts(self.leading, batch)
        if not found and self.trailing is not None and len(self.shape) > 1:
            found += fit_layouts(self.trailing[None], batch)
        if not found and self.leading is not None:
            found.append(IrregularLayout(torch.from_numpy(self.leading), batch))
        return found


@dataclass
class Fingerprints:
    """Row norms of one node in each pass; notes them when called as a hook."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    passes: list[list[tuple[Tensor, Tensor] | None]] = field(default_factory=list)

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Note the gradients of one pass."""
        self.shapes = [() if g is None else tuple(g.shape) for g in grads]
        self.passes.append([None if g is None else _row_norms(g) for g in grads])


@dataclass(frozen=True)
class Scheme:
    """The weights of all passes over a batch, and how to read what comes back.

    One plain pass and one more for each digit of a sample's number in base `levels`;
    more digits than it takes do no harm.
    """

    batch: int
    levels: int
    digits: int
    tolerance: float

    @classmethod
    def of(cls, batch: int, has_half: bool) -> Scheme:
        """For a graph that computes in float16 somewhere, or does not."""
        levels = _HALF_LEVELS if has_half else _LEVELS
        digits = max(1, math.ceil(math.log(batch, levels) - 1e-9))
        return cls(batch, levels, digits, _HALF_TOLERANCE if has_half else _TOLERANCE)

    @property
    def weights(self) -> list[Tensor]:
        """`[batch]` for each pass."""
        sample = torch.arange(self.batch)
        passes = [torch.ones(self.batch)]
        for digit in range(self.digits):
            level = sample // self.levels**digit % self.levels
            passes.append(torch.exp2((level - self.levels // 2).float()))
        return passes

    def decode(self, seen: Mapping[int, Fingerprints]) -> Measurements:
        """Labels of every output of the nodes whose gradients were seen."""
        passes = len(self.weights)
        return {i: _decode(prints, passes, self) for i, prints in seen.items()}


def measure_samples(
    tape: Tape,
    watched: Sequence[int],
    scheme: Scheme,
    weighting: Weighting,
    backward: Callable[[Tensor, list[Tensor]], None],
    *,
    regions: Sequence[int] = (),
    to_the_end: bool = False,
) -> Measurements:
    """Labels of every output of the watched nodes.

    `weighting` hooks the given sample weights into the graph, `backward(weights,
    leaves)` runs a pass that reaches `leaves`. A pass ends with the last watched node,
    unless it is to go `to_the_end` or there are `regions`, which see to their graphs
    themselves.
    """
    leaves = leaves_below(tape, [*watched, *regions])
    seen = {i: Fingerprints() for i in watched}
    for weights in scheme.weights:
        handles = weighting(weights)
        waiting = None if to_the_end or regions else set(watched)
        try:
            for i, fingerprints in seen.items():
                hook = _recorder(fingerprints, waiting, i)
                handles.append(tape.nodes[i].register_prehook(hook))
            backward(weights, leaves)
        except _AllSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
            return_freed_memory()
    return scheme.decode(seen)


class _AllSeen(Exception):
    """Ends a pass whose last node need not run: nothing below it is of interest."""


def _recorder(
    fingerprints: Fingerprints, waiting: set[int] | None, i: int
) -> Callable[[tuple], None]:
    def record(grads: tuple[Tensor | None, ...]) -> None:
        fingerprints(grads)
        if waiting is None:
            return
        waiting.discard(i)
        if not waiting:
            raise _AllSeen

    return record


def _row_norms(g: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of |g| over the last dim and over the first.

    Multiplying a row by a power of two does the same to its sum, to the last bit, and
    unlike a sum of squares it cannot underflow.
    """
    with torch.no_grad():
        g = g.detach()
        dtype = accumulation_dtype(g.dtype)
        if g.dim() < 2:
            magnitude = g.abs().to(dtype)
            return magnitude, magnitude
        last, first = (
            torch.linalg.vector_norm(g, 1, dim=dim, dtype=dtype) for dim in (-1, 0)
        )
        return last, first


def _decode(
    fingerprints: Fingerprints, passes: int, scheme: Scheme
) -> list[Measurement | None]:
    if len(fingerprints.passes) != passes:
        return [None]
    found: list[Measurement | None] = []
    for output, shape in enumerate(fingerprints.shapes):
        rows = [p[output] for p in fingerprints.passes]
        if any(r is None for r in rows):
            found.append(None)
            continue
        leading, trailing = (
            _labels([r[side].cpu().numpy() for r in rows], scheme)  # type: ignore[index]
            for side in (0, 1)
        )
        found.append(Measurement(shape, leading, trailing))
    return found


def _labels(norms: list[np.ndarray], scheme: Scheme) -> np.ndarray | None:
    levels = scheme.levels
    norms = [n.astype(np.float64) for n in norms]
    plain = norms[0]
    label = np.zeros(plain.shape, dtype=np.int64)
    known = np.isfinite(plain) & (plain > 0)
    for weighted in norms[1:]:
        known &= np.isfinite(weighted) & (weighted > 0)
    for weighted in norms[1:] if scheme.levels == _LEVELS else ():
        # Zero with one set of weights and not with another: the samples cancelled.
        # (Below that a product with 2^-8 may underflow, as it may in float16.)
        one_is_zero = (plain == 0) != (weighted == 0)
        if (one_is_zero & (np.fmax(plain, weighted) > _LARGER_THAN_UNDERFLOW)).any():
            return None
    for digit, weighted in enumerate(norms[1:]):
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = np.log2(weighted / plain)
        growth = np.where(known, growth, 0)
        level = np.rint(growth)
        if (np.abs(growth - level) > scheme.tolerance).any():
            return None
        level = np.where(known, level + levels // 2, 0)
        if (level < 0).any() or (level >= levels).any():
            return None
        label += level.astype(np.int64) * levels**digit
    if (label[known] >= scheme.batch).any():
        return None
    return np.where(known, label, -1)


def leaves_below(tape: Tape, watched: Iterable[int]) -> list[Tensor]:
    """Few and small leaves such that every watched node lies above one of them."""
    rank = {i: r for r, i in enumerate(tape.leaves_first)}
    covered: set[int] = set()
    leaves = []
    for i in sorted(watched, key=rank.__getitem__):
        if i in covered:
            continue
        leaf = min(_leaves_of(tape, i), key=lambda j: tape.nodes[j].variable.numel())
        leaves.append(tape.nodes[leaf].variable)
        stack = [leaf]
        while stack:
            for parent, _, _ in tape.parents[stack.pop()]:
                if parent not in covered:
                    covered.add(parent)
                    stack.append(parent)
    return leaves


def _leaves_of(tape: Tape, i: int) -> list[int]:
    found, stack, entered = [], [i], {i}
    while stack:
        j = stack.pop()
        if tape.is_leaf(j):
            found.append(j)
        for edge in tape.children[j]:
            if edge is not None and edge[0] not in entered:
                entered.add(edge[0])
                stack.append(edge[0])
    return found
