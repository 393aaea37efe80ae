"""Checks of the values that users give."""

from __future__ import annotations

import math
import operator

__all__ = ["as_int", "at_least", "check_range"]


def at_least(lowest: int, name: str, value: int) -> int:
    """The value as an int; ValueError unless it is an integer from `lowest` on."""
    value = as_int(name, value)
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}.")
    return value


def as_int(name: str, value: int) -> int:
    """The value as an int; ValueError unless it is an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}.") from None


def check_range(
    name: str, value: float, lowest: float, below: float = math.inf
) -> None:
    """ValueError unless lowest <= value < below."""
    if not lowest <= value < below:
        raise ValueError(
            f"{name} must be at least {lowest} and below {below}, got {value}."
        )
