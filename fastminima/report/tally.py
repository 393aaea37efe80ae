"""Which samples were among the largest of their batch, and how often."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Seen", "Tally", "finite"]

_MOST = 100  # of the largest that are kept


@dataclass
class Seen:
    """One sample over all logged steps.

    Attributes:
        id: what identifies it.
        listed: steps in which it was among the largest norms.
        first: steps in which it was the largest.
        norm: its largest |g_n|.
        step: the step of that.
        loss: its loss in that step; NaN if unknown.
        layers: by layer, the sum over steps of its share of |g_n|^2.
    """

    id: Any
    listed: int = 0
    first: int = 0
    norm: float = -math.inf
    step: float = math.nan
    loss: float = math.nan
    layers: Counter[str] = field(default_factory=Counter)


class Tally:
    """Counts samples over the lines of `samples.jsonl`, without keeping the lines.

    Attributes:
        steps: lines so far.
        is_named: whether samples have ids, by which they are known again. An id that is
            the index in the batch is none: in the next batch it is another sample's.

    Example:
        >>> tally = Tally()
        >>> for step, norm in enumerate((3.0, 5.0)):
        ...     tally.add({"step": step, "samples": [{"id": 17, "norm": norm}]})
        >>> (seen,) = tally.most(5)
        >>> seen.id, seen.listed, seen.norm, seen.step
        (17, 2, 5.0, 1)
        >>> tally.is_named
        True
    """

    def __init__(self) -> None:
        self.steps = 0
        self.is_named = False
        self._largest: list[tuple[float, int, dict[str, Any]]] = []  # a heap
        self._ranked = 0
        self._seen: dict[str, Seen] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, line: Mapping[str, Any]) -> None:
        """Count the samples of one step, which come largest first."""
        samples = line.get("samples")
        if not isinstance(samples, list):
            return
        self.steps += 1
        for place, sample in enumerate(samples):
            if isinstance(sample, dict):
                self._rank({"step": line.get("step"), **sample})
                if self._is_known(sample):
                    self._count(sample, line.get("step"), is_first=place == 0)

    def _is_known(self, sample: Mapping[str, Any]) -> bool:
        """Whether it has a name; of other ranks only those are known that were sent."""
        is_other = sample.get("id") != sample.get("index") or "index" not in sample
        self.is_named |= is_other
        return is_other or sample.get("rank", 0) == 0

    def _rank(self, sample: dict[str, Any]) -> None:
        """Keep it, if its norm is one of the largest so far."""
        norm = finite(sample.get("norm"))
        if not math.isnan(norm):
            self._ranked += 1
            entry = (norm, -self._ranked, sample)  # of equals the first one stays
            keep = heapq.heappush if len(self._largest) < _MOST else heapq.heappushpop
            keep(self._largest, entry)

    def largest(self, count: int) -> list[dict[str, Any]]:
        """The samples with the largest norms of all steps, each with its "step"."""
        order = sorted(self._largest, key=lambda entry: entry[:2], reverse=True)
        return [sample for _, _, sample in order[:count]]

    def _count(self, sample: Mapping[str, Any], step: Any, *, is_first: bool) -> None:
        name = sample.get("id", sample.get("index"))
        seen = self._seen.setdefault(json.dumps(name, sort_keys=True), Seen(name))
        seen.listed += 1
        seen.first += is_first
        norm = finite(sample.get("norm"))
        if norm > seen.norm:
            seen.norm, seen.step = norm, step
            seen.loss = finite(sample.get("loss"))
        for layer, share in (sample.get("layers") or {}).items():
            if math.isfinite(finite(share)):
                seen.layers[layer] += share

    def most(self, count: int) -> list[Seen]:
        """The samples that were listed most often; of equals the larger norm first."""
        order = sorted(
            self._seen.values(), key=lambda s: (s.listed, s.first, s.norm), reverse=True
        )
        return order[:count]


def finite(value: object) -> float:
    """A number; NaN for null and what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value)
