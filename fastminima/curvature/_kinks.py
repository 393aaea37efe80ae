"""On which side of their kinks the operations of a recorded graph are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._nodes import nodes_of

__all__ = ["crossed", "sides"]

# Where the slope of an operation jumps: numbers, or attributes of its node that hold
# them, with either sign.
_KINKS: dict[str, tuple[float | str, ...]] = {
    "Relu": (0.0,),
    "LeakyRelu": (0.0,),
    "Prelu": (0.0,),
    "Rrelu": (0.0,),
    "Abs": (0.0,),
    "Hardswish": (-3.0, 3.0),
    "Threshold": ("_saved_threshold",),
    "Hardtanh": ("_saved_min_val", "_saved_max_val"),
    "Clamp": ("_saved_min", "_saved_max"),
    "Softshrink": ("_saved_lambd",),
    "Hardshrink": ("_saved_lambd",),
}
# Where it jumps when two operands are equal.
_PAIRS = {"Maximum": "other", "Minimum": "other", "L1Loss": "target"}


def sides(roots: Sequence[Tensor]) -> list[Tensor]:
    """What tells it: comparisons with the kinks, and indices and masks of all nodes.

    What hooks have packed, as checkpoints do, is left out.
    """
    return [side for node in nodes_of(roots) for side in _sides(node)]


def crossed(first: list[Tensor], second: list[Tensor]) -> int:
    """In how many elements two points are on different sides."""
    if len(first) != len(second):
        return 1  # another branch was taken
    pairs = list(zip(first, second, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return 1
    return sum(int((a != b).sum()) for a, b in pairs)


def _sides(node: Any) -> Iterator[Tensor]:
    for name in dir(type(node)):
        value = _saved(node, name) if name.startswith("_raw_saved_") else None
        if value is not None and not value.dtype.is_floating_point:
            yield value.detach()
    kind = node.name().rpartition("::")[2]
    for word, kinks in _KINKS.items():
        if kind.startswith(word):
            x = _saved(node, "_raw_saved_self")
            x = _saved(node, "_raw_saved_result") if x is None else x
            if x is not None:
                for kink in kinks:
                    yield from _beyond(node, x.detach(), kink)
    for word, other in _PAIRS.items():
        if kind.startswith(word):
            x, y = _saved(node, "_raw_saved_self"), _saved(node, f"_raw_saved_{other}")
            if x is not None and y is not None:
                yield x.detach() > y.detach()


def _beyond(node: Any, x: Tensor, kink: float | str) -> Iterator[Tensor]:
    at = getattr(node, kink, None) if isinstance(kink, str) else kink
    if isinstance(at, int | float):
        yield x > at
        yield x < at
        yield x > -at


def _saved(node: Any, name: str) -> Tensor | None:
    raw = getattr(node, name, None)
    if raw is None or isinstance(raw, list | tuple) or raw.unpack_hook is not None:
        return None
    value = raw.data
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided
    return value if is_plain and not value.is_complex() else None
