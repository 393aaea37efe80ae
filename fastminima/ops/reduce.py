"""Reductions of one dense tensor."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from .table import Op

__all__ = ["sq_norm"]


def _sq_norm(x: Float[Tensor, ...]) -> Float[Tensor, ""]:
    """Squared norm |x|^2 in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).square().sum()


sq_norm = Op("sq_norm", _sq_norm)
