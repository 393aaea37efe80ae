"""Which dtype a statistic is accumulated in."""

from __future__ import annotations

import torch

__all__ = ["accumulation_dtype"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower.

    Squared norms overflow float16 at 65504 and lose all meaning in bfloat16.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
