"""What a provider is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "FAILURES",
    "Provider",
    "flat",
    "gradients",
    "math_attention",
    "reason_of",
    "split",
    "square_sums",
]


# What a library raises when it cannot measure a workload: its row then says so.
FAILURES = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)


def reason_of(failure: BaseException) -> str:
    """The first line of what a library said, with the exception's name."""
    lines = str(failure).splitlines() or [""]
    return f"failed: {type(failure).__name__}: {lines[0][:200]}"


@dataclass(frozen=True)
class Provider:
    """One way to measure, as one row of a table.

    `measures` maps a measure to a function from a workload to a step. For "product"
    the function also takes the vector, and the step returns the product; for
    "eigenvalue" the step takes a seed and returns (value, number of products).
    """

    name: str
    label: str
    measures: Mapping[str, Callable]
    module: str | None = None  # what it imports
    package: str | None = None  # what pip installs
    # Workloads it can measure only with the norm layers' parameters off.
    without_norms: frozenset[str] = field(default=frozenset())
    # Workloads where its search for an eigenvalue takes minutes: left out unless asked.
    slow_eigenvalue: frozenset[str] = field(default=frozenset())
    # Chosen before timing by trying each: {"chunk": (8, 16, ...)}.
    choices: Mapping[str, tuple] = field(default_factory=dict)
    # What the library's module must have; for a package that is being built.
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def missing(self, measure: str) -> str:
        """Why this provider cannot run here, or an empty string."""
        if self.module is None:
            return ""
        if find_spec(self.module) is None:
            return f"not installed: pip install {self.package}"
        if needed := self.needs.get(measure):
            library = import_module(self.module)
            absent = [name for name in needed if not hasattr(library, name)]
            if absent:
                return f"{self.module} here has no {', '.join(absent)}"
        return ""


def gradients(workload) -> dict[str, Tensor]:
    """The gradients that a step left, by parameter name."""
    return {
        name: p.grad.detach().clone()
        for name, p in workload.parameters.items()
        if p.grad is not None
    }


def square_sums(per_sample: Tensor) -> Tensor:
    """`[batch, ...]` -> `[batch]`: squared norms, one pass over memory."""
    return per_sample.flatten(1).square().sum(dim=1)


def flat(tensors) -> Tensor:
    """One vector of several tensors, in their order."""
    return torch.cat([t.reshape(-1) for t in tensors])


def split(vector: Tensor, like) -> list[Tensor]:
    """The parts of a flat vector, shaped like each of `like`."""
    like = list(like)
    parts = vector.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


def math_attention():
    """Attention with a second derivative, which the default one does not have."""
    return sdpa_kernel(SDPBackend.MATH)
