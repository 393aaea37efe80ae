"""Sums over the samples of two parts, of what is held by sample or by parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["concatenated", "joined", "merged", "numbered", "sq_norms", "weighted"]


def sq_norms(
    vector: Mapping[str, Tensor], like: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """|v|^2 of a vector held by parameter, whole and by parameter: 0-d, like `like`."""
    total = torch.zeros((), dtype=torch.float64, device=like.device)
    each = {name: t.double().square().sum() for name, t in vector.items()}
    for square in each.values():
        total = total + square
    return total.to(like.dtype), {name: t.to(like.dtype) for name, t in each.items()}


def concatenated(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """`[na + nb]` of `[na]` and `[nb]`; None where one is missing."""
    return None if a is None or b is None else torch.cat([a, b])


def numbered(parts: Iterable[tuple[Tensor | None, int, int]]) -> Tensor | None:
    """Which samples of several batches were looked at, numbered through all of these.

    Args:
        parts: of each batch the numbers, None for all; how many were looked at, and how
            many there are.

    Returns:
        None for all, and where it is not known of one.
    """
    several = list(parts)
    like = next((numbers for numbers, _, _ in several if numbers is not None), None)
    if like is None:
        return None
    found, first = [], 0
    for numbers, count, whole in several:
        if numbers is None and count < whole:
            return None
        if numbers is None:
            numbers = torch.arange(count, dtype=like.dtype, device=like.device)
        found.append(numbers + first)
        first += whole
    return torch.cat(found)


def weighted(
    a: Mapping[str, Tensor], na: int, b: Mapping[str, Tensor], nb: int
) -> dict[str, Tensor]:
    """The mean by parameter over na + nb samples; an absent one counts as zero."""
    mean, total = {}, na + nb
    for name in merged(a, b):
        parts = [(t[name], n) for t, n in ((a, na), (b, nb)) if name in t]
        first, n = parts[0]
        mean[name] = first * (n / total)
        for other, n in parts[1:]:
            mean[name].add_(other, alpha=n / total)
    return mean


def merged(a: Collection[str], b: Iterable[str]) -> list[str]:
    """All names, in an order that both are in: that of the model, as far as is known.

    A name that `a` does not have comes before the next one of `b` that it has.
    """
    names, known, waiting = list(a), set(a), []
    for name in b:
        if name not in known:
            waiting.append(name)
        elif waiting:
            at = names.index(name)
            names[at:at] = waiting
            waiting = []
    return names + waiting


def joined(
    a: Mapping[str, Tensor] | None, na: int, b: Mapping[str, Tensor] | None, nb: int
) -> dict[str, Tensor] | None:
    """`{name: [na + nb]}` of `{name: [na]}` and `{name: [nb]}`."""
    if a is None or b is None:
        return None
    found = {}
    for name in merged(a, b):
        like = a[name] if name in a else b[name]
        left = a[name] if name in a else like.new_zeros(na)
        right = b[name] if name in b else like.new_zeros(nb)
        found[name] = torch.cat([left, right])
    return found
