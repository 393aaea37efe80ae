"""How much a way of computing may hold at a time, and how it is cut to hold no more.

Beside its arguments and its results an op holds at most `LIMIT` bytes, or as much as
its arguments take where that is more: chosen from sizes, before anything is allocated.
The limit is divided: an op's pieces take half of it, what is read to make them a part
of the other half, and those who call an op for some samples at a time a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LIMIT",
    "dense_parts",
    "in_pieces",
    "itemsize",
    "limited",
    "lower_blocks",
    "pieces",
    "square_side",
    "step_of",
    "sums_over_time",
]

LIMIT = 64 << 20


def step_of(bytes_each: int, share: int = 2) -> int:
    """How many items of that size the given share of the limit holds; one at least."""
    return max(1, LIMIT // (share * max(1, bytes_each)))


def pieces(count: int, bytes_each: int, share: int = 2) -> Iterator[slice]:
    """Slices of range(count) that take at most LIMIT / share bytes, or one item."""
    step = step_of(bytes_each, share)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def square_side(bytes_each: int, bytes_a_row: int = 0, share: int = 2) -> int:
    """Side of a square of items, with rows read for both sides, within that share."""
    half = LIMIT // (2 * share)
    rows = half // (2 * bytes_a_row) if bytes_a_row else half
    return max(1, min(rows, math.isqrt(half // max(1, bytes_each))))


def lower_blocks(count: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of a square of range(count) that cover what is on or below its diagonal.

    All of it in one block, where that is no larger.
    """
    for lo in range(0, count, step):
        for left in range(0, lo + step, step):
            yield slice(lo, min(lo + step, count)), slice(left, min(left + step, count))


def in_pieces(
    run: Callable[[slice], Any],
    count: int,
    bytes_each: int,
    share: int = 2,
    sums: Sequence[int] = (),
) -> Any:
    """The result of `run` for all samples, from its results for some at a time.

    Tensors, or None, that have a row for each sample; but for those of the places
    `sums`, which are sums over the samples.
    """
    step = step_of(bytes_each, share)
    if step >= count:
        return run(slice(0, count))
    whole: list[Tensor | None] = []
    is_one = False
    for rows in (slice(i, min(i + step, count)) for i in range(0, count, step)):
        parts = run(rows)
        is_one = isinstance(parts, Tensor)
        parts = (parts,) if is_one else parts
        whole = whole or [
            _room(part, count if i not in sums else None)
            for i, part in enumerate(parts)
        ]
        for i, (out, part) in enumerate(zip(whole, parts, strict=True)):
            if out is not None:
                _ = out.add_(part) if i in sums else out[rows].copy_(part)
    return whole[0] if is_one else tuple(whole)


def sums_over_time(
    run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None, bytes_each: int
) -> tuple[Tensor, ...]:
    """What `run` makes of `[batch, time, ...]` tensors, on a part of them at a time.

    Its results have a row for each sample and are sums over time; `bytes_each` is what
    it holds for one time step of one sample.
    """
    batch, time = next(x.shape[:2] for x in tensors if x is not None)
    if batch * time * bytes_each <= step_of(1):
        return run(*tensors)

    def of_samples(rows: slice) -> tuple[Tensor, ...]:
        total: tuple[Tensor, ...] = ()
        for steps in pieces(time, (rows.stop - rows.start) * bytes_each):
            parts = run(*(None if x is None else x[rows, steps] for x in tensors))
            if total:
                parts = tuple(t.add_(p) for t, p in zip(total, parts, strict=True))
            total = parts
        return total

    return in_pieces(of_samples, batch, time * bytes_each)


def _room(part: Tensor | None, count: int | None) -> Tensor | None:
    """For so many rows like those of a part, or for a sum of parts."""
    if part is None:
        return None
    if count is None:
        return torch.zeros_like(part)
    return part.new_empty(count, *part.shape[1:])


def limited(
    native: Callable[..., Any],
    reference: Callable[..., Any],
    sums: Sequence[int] = (),
    elements: Callable[..., int] = lambda *_: 0,
) -> Callable[..., Any]:
    """A native way that converts its tensors, on some samples at a time.

    Kernels read float32 and float64, and half precisions are converted to that. Where
    one sample alone is too large, the reference takes it in smaller pieces. The first
    dim of tensors runs over the samples, or has one element for all of them.

    Args:
        native: called with the kernels, then as the op.
        reference: the op's definition.
        sums: places of the results that are sums over the samples.
        elements: how many each of these sums has, from the op's arguments.
    """

    def run(kernels: Any, first: Tensor, *rest: Any) -> Any:
        if first.itemsize >= 4:  # copies of float32 take no more than the arguments
            return native(kernels, first, *rest)
        arguments = (first, *rest)
        copied = 4 * sum(x.numel() for x in arguments if isinstance(x, Tensor))
        if copied <= step_of(1):
            return native(kernels, first, *rest)
        count = len(first)
        parts = len(sums) * elements(first, *rest)
        if copied // count > step_of(1) or parts > step_of(4, 4):
            return reference(first, *rest)

        def some(rows: slice) -> Any:
            return native(kernels, *(_some(x, rows, count) for x in arguments))

        return in_pieces(some, count, copied // count, sums=sums)

    return run


def _some(x: Any, rows: slice, count: int) -> Any:
    return x[rows] if isinstance(x, Tensor) and len(x) == count > 1 else x


def itemsize(dtype: torch.dtype, wanted: torch.dtype) -> int:
    """Bytes that an element takes to be there in the dtype wanted: none if it is."""
    return 0 if dtype == wanted else wanted.itemsize


def dense_parts(
    *tensors: Tensor, bytes_each: int, multiple: int = 1
) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of tensors of one shape, some at a time, as views.

    Parts of the flat tensors, each of a multiple of so many elements; of their first
    dim where one of them has no flat view.
    """
    first = tensors[0]
    if first.numel() <= step_of(bytes_each):
        yield tensors
        return
    if all(x.is_contiguous() for x in tensors):
        tensors = tuple(x.view(-1) for x in tensors)
        step = max(multiple, step_of(bytes_each) // multiple * multiple)
    else:
        step = step_of(bytes_each * (first.numel() // len(first)))
    for lo in range(0, len(tensors[0]), step):
        yield tuple(x[lo : lo + step] for x in tensors)
