"""The libraries that are compared, one file each.

A provider turns a workload into a *step*: a callable that does one training step's
work (zero the gradients, forward, backward) plus the measurement, leaves the mean
gradient in `.grad`, and returns the measured statistic. Libraries are imported when
a step is made, so that an absent one costs its own rows only.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.providers.base import FAILURES, Provider, reason_of

__all__ = ["FAILURES", "MODULES", "Provider", "by_name", "providers_of", "reason_of"]

MODULES = (
    "plain",
    "ours",
    "backpack",
    "opacus",
    "dattri",
    "vmap",
    "pyhessian",
    "curvlinops",
    "eigenthings",
)


def providers_of(measure: str) -> list[Provider]:
    """Every provider of "norms", "second_moments", "product" or "eigenvalue"."""
    return [p for p in _all() if measure in p.measures]


def by_name(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ValueError: for an unknown name.
    """
    known = {p.name: p for p in _all()}
    if name not in known:
        raise ValueError(
            f"Unknown provider {name!r}. Choose one of {', '.join(known)}."
        )
    return known[name]


def _all() -> list[Provider]:
    modules = [import_module(f"benchmarks.providers.{name}") for name in MODULES]
    return [p for module in modules for p in module.PROVIDERS]
