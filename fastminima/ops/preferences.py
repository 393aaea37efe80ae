"""Which implementation an op prefers on a GPU, and what says so.

None is preferred until something says that it is faster. So far that is the floor model
of `benchmarks/floors.py`: lower bounds on the time of PyTorch's operations and of the
kernels as they compile for an H100. A kernel is preferred where its bound is less than
two thirds of theirs at every size tried. Nothing was measured; once there are records
of a GPU, their numbers and names belong here instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["ON_GPU", "Preference", "is_preferred"]


class Preference(NamedTuple):
    """What to use, and how much faster the kernels are than PyTorch's operations."""

    backend: str
    speedup: float  # at the worst of the sizes
    source: str = "bounds for an H100, not measured"


_HALF, _FLOAT = torch.bfloat16, torch.float32
# float16 is as bfloat16.
ON_GPU: dict[tuple[str, torch.dtype], Preference] = {}


def is_preferred(op: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether the op of that name uses this implementation on a GPU."""
    key = op, _HALF if dtype == torch.float16 else dtype
    return key in ON_GPU and ON_GPU[key].backend == backend
