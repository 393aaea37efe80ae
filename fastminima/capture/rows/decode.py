"""From the norms of rows in several passes to the sample of each row.

A row that belongs to sample n grows by exactly w_n where machines repeat themselves. On
a GPU they do not: kernels that add with atomics round in another order in each pass, so
rows grow by nearly w_n, and rows whose sums cancelled by anything. So evidence is
weighed by size: what a row says counts as much as its norm, against the noise of this
very pass, which a second plain pass shows.

Rows that mix samples are another order of magnitude. Weights span 2^-8 ... 2^7, so a
hundredth of a batch mean is 16 times the row of the lightest sample: over all rows,
weighted by norm, |log2 growth - nearest level| is 6e-2 and more, where noise makes
4e-3 in bfloat16 and 3e-6 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .layout import IrregularLayout, RowLayout, fit_layouts

__all__ = ["Measurement", "Scheme", "Votes", "graph_noise", "weigh"]

_LEVELS = 16  # of a weight in one pass, 2^-8 ... 2^7: gradients of 1e-20 stay normal
_UNDERFLOW = 1e-30  # below this a product with 2^-8 may be zero
_HALF_LEVELS = 4  # float16 underflows at 6e-8
# log2 of a row's growth over a level, where passes are the same twice: exact but for
# rounding in sums of rows. Rows that touch float16's subnormal range are rounded too.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2
# Mean deviation, weighted by norm, that says "mixed": some times the output's own
# noise, or twice that where it is more than samples that mix would make (see above).
# Outputs of few rows may agree twice by chance: then ten times the noise of the graph.
_MIXED, _EXCESS = 0.1, 4.0
_LEAST, _OF_GRAPH = 1e-2, 10.0
# Rows that are zero in one pass only: so much of all norms is not noise.
_CANCELLED = 5e-2
# What is mixed in few rows: how much of all norms may be off by more than this, beside
# some times as much as a second plain pass was off.
_OFF, _FEW, _TIMES = 0.25, 1e-3, 8.0
_UNTOLD = 0.45  # rows that are off by more are no sample's
# Where passes are the same twice, rows this small beside the usual ones say nothing.
_ROUNDING = 1e-4


@dataclass
class Measurement:
    """Labels of the rows of one node output, for two ways of reading rows.

    `rows` labels positions of the first dims (all but the last, or only the first two,
    where what follows is the same), `trailing` the places of the last dim; each is None
    when rows read that way mix samples. -1 is a row that says nothing.

    Attributes:
        weight: of each row's word, where the pass was not the same twice; None where
            every word counts.
    """

    shape: tuple[int, ...]
    rows: np.ndarray | None
    trailing: np.ndarray | None = None
    weight: np.ndarray | None = None
    _fits: dict[int, list[RowLayout]] = field(default_factory=dict, repr=False)

    @property
    def leading(self) -> np.ndarray | None:
        """Labels of all positions but the last dim, as a view of `rows`."""
        if self.rows is None or self.rows.ndim >= len(self.shape) - 1:
            return self.rows
        sizes = (*self.rows.shape, *[1] * (len(self.shape) - 1 - self.rows.ndim))
        return np.broadcast_to(self.rows.reshape(sizes), self.shape[:-1])

    @property
    def is_mixed(self) -> bool:
        """Whether no reading gives every row to one sample."""
        return self.rows is None and self.trailing is None

    def mixed(self) -> Measurement:
        """This output, with rows that do not belong to one sample each."""
        return Measurement(self.shape, None)

    def shows_all(self, batch: int) -> bool:
        """Whether every sample was seen, so that what fits will fit again.

        A gradient that was zero, or not finite, for some samples fits too much.
        """
        return self.seen == batch

    @property
    def seen(self) -> int:
        """Number of samples whose rows were seen."""
        labels = self.trailing if self.rows is None else self.rows
        if labels is None:
            return 0
        return int((np.bincount(labels.reshape(-1) + 1)[1:] > 0).sum())

    def agrees(self, expected: np.ndarray) -> bool:
        """Whether rows belong to these samples (-1: nobody's), by what they weigh.

        `expected` has the dims of `leading`, or is broadcast to them.
        """
        labels = self.leading
        assert labels is not None
        is_other = (labels != expected) & (labels >= 0) & (expected >= 0)
        if self.weight is None:
            return not is_other.any()
        weight = self.weight.reshape(
            (*self.weight.shape, *[1] * (labels.ndim - self.weight.ndim))
        )
        each = labels.size // max(1, self.weight.size)
        return float((is_other * weight).sum()) <= _FEW * each

    def layouts(self, batch: int) -> list[RowLayout]:
        """Regular layouts that fit, else the irregular one; empty when mixed."""
        found = self._fits.get(batch)
        if found is None:
            found = self._fits[batch] = self._find(batch)
        return list(found)

    def _find(self, batch: int) -> list[RowLayout]:
        found: list[RowLayout] = []
        if self.rows is not None:
            weights = None if self.weight is None else (self.weight, _FEW)
            found += fit_layouts(self.rows, batch, weights=weights)
        if not found and self.trailing is not None:
            found += fit_layouts(self.trailing, batch, dim=len(self.shape) - 1)
        labels = self.leading
        if not found and labels is not None:
            listed = torch.from_numpy(np.ascontiguousarray(labels))
            found.append(IrregularLayout(listed, batch))
        return found


@dataclass(frozen=True)
class Scheme:
    """The weights of all passes over a batch, and how to read what comes back.

    One plain pass and one more for each digit of a sample's number in base `base`;
    more digits than it takes do no harm. A digit d stands for the weight
    2^(d * spacing - levels / 2), so that weights span what the dtype allows.
    """

    batch: int
    levels: int
    digits: int
    base: int
    tolerance: float

    @classmethod
    def of(cls, batch: int, has_half: bool) -> Scheme:
        """For a graph that computes in float16 somewhere, or does not."""
        levels = _HALF_LEVELS if has_half else _LEVELS
        digits = max(1, math.ceil(math.log(batch, levels) - 1e-9))
        base = next(b for b in range(2, levels + 1) if b**digits >= batch)
        tolerance = _HALF_TOLERANCE if has_half else _TOLERANCE
        return cls(batch, levels, digits, base, tolerance)

    @property
    def spacing(self) -> int:
        """Levels from one digit to the next."""
        return (self.levels - 1) // (self.base - 1)

    @property
    def passes(self) -> int:
        """How many it takes."""
        return 1 + self.digits

    def weights(self, number: int) -> Tensor:
        """`[batch]` for pass `number`; ones for the first, and for those repeated."""
        if not 0 < number < self.passes:
            return torch.ones(self.batch, dtype=torch.float32, device="cpu")
        sample = torch.arange(self.batch, dtype=torch.int64, device="cpu")
        digit = sample // self.base ** (number - 1) % self.base
        return torch.exp2((digit * self.spacing - self.levels // 2).float())


@dataclass(frozen=True)
class Votes:
    """What the norms of some rows say, before the noise of the pass is known.

    Attributes:
        plain: norms in the plain pass, 1 where a row says nothing.
        known: where rows say something.
        label: the sample whose weights are nearest.
        deviation: how far the row's growth is from them, in log2.
        change: the same for a second plain pass; None where there was none.
        has_gaps: whether rows were zero in one pass and not in another.
        is_repeated: whether all passes were made twice.
    """

    scheme: Scheme
    plain: Tensor
    known: Tensor
    label: Tensor
    deviation: Tensor
    change: Tensor | None
    has_gaps: bool = False
    is_repeated: bool = False

    @cached_property
    def is_exact(self) -> bool:
        """Whether every row grew by a sample's weights, to rounding."""
        return not (
            self.has_gaps or bool((self.deviation > self.scheme.tolerance).any())
        )

    @cached_property
    def share(self) -> Tensor:
        """What each row's word weighs."""
        size = torch.where(self.known, self.plain, 0)
        return size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)

    @cached_property
    def mean(self) -> float:
        """Mean deviation of the rows that are off, weighted by their norms."""
        is_off = self.deviation > self.scheme.tolerance
        return float((self.share * self.deviation * is_off).sum())

    @cached_property
    def noise(self) -> float:
        """Mean change from one plain pass to the other, weighted alike."""
        return 0.0 if self.change is None else float((self.share * self.change).sum())

    @property
    def is_clear(self) -> bool:
        """Whether rows are a sample's beyond doubt, whatever the noise."""
        return self.is_exact or (self.mean <= _LEAST and not self.has_gaps)

    @property
    def is_open(self) -> bool:
        """Whether it takes a second plain pass to tell."""
        return not self.is_exact and self.change is None and self.mean < _MIXED

    def is_doubtful(self, graph_noise: float) -> bool:
        """Whether rows are off by little, and more than a second plain pass was.

        A pass may be off that differs from the others for once: an H100's attention in
        bfloat16 was, for one sample of eight.
        """
        is_near = self.change is not None and self.mean < _MIXED
        return is_near and not self.is_repeated and self.rows(graph_noise)[0] is None

    def rows(self, graph_noise: float) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Labels, None where rows mix samples; and what they weigh, under noise.

        `graph_noise` is the largest of all outputs of the graph.
        """
        if self.is_exact:
            return _numpy(torch.where(self.known, self.label, -1)), None
        if self.change is None:
            return None, None
        if graph_noise == 0:
            return self._rows_of_repeatable(), None
        noise = self.noise
        most = max(
            min(_EXCESS * noise, max(_MIXED, 2 * noise)),
            min(_LEAST, _OF_GRAPH * graph_noise),
        )
        is_off = (self.share * (self.deviation > _OFF)).sum()
        was_off = (self.share * (self.change > _OFF / 2)).sum()
        if self.mean > most or bool(is_off > _FEW + _TIMES * was_off):
            return None, None
        is_told = self.known & (self.deviation < _UNTOLD)
        return _numpy(torch.where(is_told, self.label, -1)), _numpy(self.share)

    def _rows_of_repeatable(self) -> np.ndarray | None:
        """Labels where the pass is the same twice: only rounding may be off."""
        if self.has_gaps:
            return None
        is_off = self.deviation > self.scheme.tolerance
        usual = (self.share * self.plain).sum()
        is_large = self.plain > _ROUNDING * usual
        if bool((self.known & is_off & is_large).any()):
            return None
        return _numpy(torch.where(self.known & ~is_off, self.label, -1))


def weigh(norms: Sequence[Tensor], scheme: Scheme) -> Votes | None:
    """What the norms of rows in each pass say; None where samples cancelled.

    Args:
        norms: of a plain pass and one for each digit; then, where there are any, of a
            second plain pass; then of all once more.
        scheme: of the weights.
    """
    passes = scheme.passes
    exact = _exact(norms[:passes], scheme)
    if exact is not None:
        return exact
    plain, weighted = [norms[0]], [torch.stack(list(norms[1:passes]))]
    gaps = _gaps(plain[0], weighted[0], scheme)
    plain += norms[passes : passes + 2]
    if len(norms) > passes + 1:
        weighted.append(torch.stack(list(norms[passes + 2 :])))
        gaps = min(gaps, _gaps(plain[-1], weighted[-1], scheme))
    if gaps > _CANCELLED:
        return None
    known = torch.stack([_says(p) for p in (*plain, *weighted[0], *weighted[-1])])
    known = known.all(0)
    safe = [torch.where(known, p, 1) for p in plain]
    grown = [torch.where(known, w, 1) for w in weighted]
    label, deviation = _best([(w / p).log2_() for p in safe for w in grown], scheme)
    change = None
    if len(plain) > 1:
        changes = [(p / safe[0]).log2_().abs_() for p in safe[1:]]
        changes += [(w / grown[0]).log2_().abs_().amax(0) for w in grown[1:]]
        change = torch.stack(changes).amax(0)
    deviation = torch.where(known, deviation, 0)
    is_repeated = len(weighted) > 1
    return Votes(
        scheme, safe[0], known, label, deviation, change, gaps > 0, is_repeated
    )


def _says(norms: Tensor) -> Tensor:
    return torch.isfinite(norms) & (norms > 0)


def _best(growths: Sequence[Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The label that fits a row best in any of several passes, and how well it does.

    A row that mixes samples does not grow like one of them in any pass; one of a sample
    does in those passes that were as they should be.
    """
    label, deviation = _nearest(growths[0], scheme)
    for growth in growths[1:]:
        other, off = _nearest(growth, scheme)
        is_better = off < deviation
        label = torch.where(is_better, other, label)
        deviation = torch.where(is_better, off, deviation)
    return label, deviation


def _exact(norms: Sequence[Tensor], scheme: Scheme) -> Votes | None:
    """What norms say where every row grew by a power of two exactly: the usual way.

    None where one did not.
    """
    plain = norms[0]
    mantissa, exponent = torch.frexp(plain)
    known = plain > 0
    label = torch.zeros_like(exponent)
    is_told = ~known | (plain < math.inf)
    for number, weighted in enumerate(norms[1:]):
        grown, level = torch.frexp(weighted)
        level = level - exponent + scheme.levels // 2
        digit = level.div(scheme.spacing, rounding_mode="floor")
        is_told &= grown == mantissa
        is_digit = (digit * scheme.spacing == level) & (digit >= 0)
        is_told &= ~known | (is_digit & (digit < scheme.base))
        label += digit * scheme.base**number
    is_told &= ~known | (label < scheme.batch)
    if not bool(is_told.all()):
        return None
    nothing = torch.zeros((), dtype=plain.dtype, device=plain.device)
    return Votes(scheme, plain, known, label, nothing, None)


def _gaps(plain: Tensor, weighted: Tensor, scheme: Scheme) -> float:
    """What rows weigh that are zero with one set of weights and not with another.

    Their samples cancelled, or they are the noise of the pass. (What is below that, or
    in float16, may underflow in a product with 2^-8.)
    """
    if scheme.levels != _LEVELS:
        return 0.0
    passes = torch.cat([plain[None], weighted])
    passes = passes.reshape(len(passes), -1)
    passes = passes.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    is_zero = passes == 0
    is_gap = is_zero.any(0) & ~is_zero.all(0) & (passes.amax(0) > _UNDERFLOW)
    if not bool(is_gap.any()):
        return 0.0
    total = passes.sum(1).clamp(min=torch.finfo(passes.dtype).tiny)
    return float(((passes * is_gap).sum(1) / total).max())


def _nearest(growth: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The label whose weights are nearest, and by how much the worst pass is off.

    One half (in log2) is as much as it can be off, and what no sample's weight is.
    """
    spacing, lowest = scheme.spacing, -(scheme.levels // 2)
    digit = ((growth - lowest) / spacing).round_()
    off = (growth - lowest - digit * spacing).abs_()
    off.clamp_(max=0.5)[(digit < 0) | (digit >= scheme.base)] = 0.5
    label = torch.zeros(growth.shape[1:], dtype=torch.int64, device=growth.device)
    for number, of_pass in enumerate(digit):
        label += of_pass.to(torch.int64) * scheme.base**number
    deviation = off.amax(0)
    deviation[label >= scheme.batch] = 0.5
    return label, deviation


def _numpy(t: Tensor) -> np.ndarray:
    return t.cpu().numpy()


def graph_noise(votes: Iterable[Votes]) -> float:
    """The largest noise of the outputs that are not the same twice."""
    return max((v.noise for v in votes if v.change is not None), default=0.0)
