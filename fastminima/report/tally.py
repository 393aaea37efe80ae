"""Which samples were among the largest of their batch, and how often."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Seen", "Tally", "finite"]


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

    Example:
        >>> tally = Tally()
        >>> for step, norm in enumerate((3.0, 5.0)):
        ...     tally.add({"step": step, "samples": [{"id": 17, "norm": norm}]})
        >>> (seen,) = tally.most(5)
        >>> seen.id, seen.listed, seen.norm, seen.step
        (17, 2, 5.0, 1)
    """

    def __init__(self) -> None:
        self.steps = 0
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
                self._count(sample, line.get("step"), is_first=place == 0)

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
