"""The samples with the largest gradients of a step, and a histogram of all norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..statistics import GradientStatistics
from .layers import Groups
from .origins import Origin
from .packing import Packed

__all__ = ["EDGES", "HISTOGRAM", "ask_for", "ask_for_counts", "table"]

HISTOGRAM = "gradient/sample_norms"
_LOW, _HIGH, _BINS = -20, 20, 80  # powers of two; two bins for each
EDGES = tuple(2.0 ** (_LOW + i * (_HIGH - _LOW) / _BINS) for i in range(_BINS + 1))
_LAYERS = 3  # named for a sample


def ask_for(
    packed: Packed,
    stats: GradientStatistics,
    losses: Tensor | None,
    largest: int,
    each: Tensor | None,
) -> None:
    """Add to a copy what the table of the largest samples needs.

    Args:
        packed: what is copied.
        stats: of the step.
        losses: of its samples, if they are known.
        largest: how many samples the table has.
        each: `[parameters, count]`, squared norms by parameter.
    """
    assert stats.sq_norms is not None
    norms = stats.sq_norms.double()
    top = norms.topk(min(largest, len(norms)))
    logs = norms.log()
    middle = logs.median()
    packed.add("samples/spread", torch.stack([middle, (logs - middle).abs().median()]))
    packed.add("samples/sq_norms", top.values)
    packed.add("samples/numbers", top.indices)
    if stats.samples is not None:
        packed.add("samples/looked_at", stats.samples)
    if losses is not None and len(losses) == stats.all_count:  # else of one rank
        is_all = stats.samples is None
        packed.add("samples/losses", losses[top.indices] if is_all else losses)
    if stats.gram is not None and stats.mean_count is None:
        along = stats.gram[top.indices].double().mean(1)  # <g_n, mean>
        packed.add("samples/dots", along)
    if each is not None:
        packed.add("samples/by_parameter", each[:, top.indices])


def table(
    numbers: Mapping[str, Sequence[float]],
    count: int,
    mean_sq_norm: float,
    groups: Groups | None,
    origin: Origin,
) -> list[dict[str, Any]]:
    """The largest samples, largest first, from what was copied.

    A collective call where the origin has a group.
    """
    looked_at = numbers.get("samples/looked_at")
    middle, deviation = numbers["samples/spread"]
    losses, dots = numbers.get("samples/losses"), numbers.get("samples/dots")
    layers = _layers(numbers.get("samples/by_parameter"), groups)
    rows, whole = [], count * mean_sq_norm
    places = [int(place) for place in numbers["samples/numbers"]]
    if looked_at is not None:
        places = [int(looked_at[place]) for place in places]
    origin = origin.told_by_all(places)
    for i, (number, square) in enumerate(
        zip(places, numbers["samples/sq_norms"], strict=True)
    ):
        loss = None
        if losses is not None:
            loss = losses[i if looked_at is None else number]
        rows.append(
            {
                **origin.of(number),
                "loss": loss,
                "norm": math.sqrt(square) if square >= 0 else math.nan,
                "share": dots[i] / whole if dots and whole else None,
                "share_at_most": _bound(square, count, mean_sq_norm),
                "z": _z(square, middle, deviation),
                "layers": layers[i] if layers else {},
            }
        )
    return rows


def ask_for_counts(packed: Packed, stats: GradientStatistics) -> None:
    """Add to a copy how many norms |g_n| fall between each two of `EDGES`."""
    assert stats.sq_norms is not None
    places = (stats.sq_norms.double().log2() / 2 - _LOW) * (_BINS / (_HIGH - _LOW))
    places = places.nan_to_num(_BINS - 1).floor().clamp(0, _BINS - 1)
    bins = torch.arange(_BINS, dtype=places.dtype, device=places.device)
    packed.add("histogram", (places[:, None] == bins).sum(0))


def _layers(
    by_parameter: Sequence[float] | None, groups: Groups | None
) -> list[dict[str, float]] | None:
    """For each sample its largest layers, with their share of its squared norm."""
    if by_parameter is None or groups is None:
        return None
    each = np.array(by_parameter).reshape(len(groups.of), -1)
    sums = np.zeros((len(groups.layers), each.shape[1]))
    np.add.at(sums, groups.of, each)
    with np.errstate(all="ignore"):
        shares = sums / sums.sum(0)
    order = np.argsort(-sums, axis=0, kind="stable")[:_LAYERS]
    return [
        {groups.layers[i]: float(shares[i, n]) for i in order[:, n]}
        for n in range(each.shape[1])
    ]


def _bound(square: float, count: int, mean_sq_norm: float) -> float | None:
    """|g_n| / (N |mean|): no smaller than <g_n, mean> / (N |mean|^2) can be."""
    if not (square >= 0 and mean_sq_norm > 0):
        return None
    return math.sqrt(square / mean_sq_norm) / count


def _z(square: float, middle: float, deviation: float) -> float | None:
    """Robust z-score of a norm's logarithm within its step."""
    if not (square > 0 and deviation > 0):
        return None
    return (math.log(square) - middle) / (1.4826 * deviation)
