"""Sums over lists of tensors, as the parameters of a model are.

They are accumulated in float64 and stay on the tensors' device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._arguments import FLOATS
from ._pieces import dense_parts
from .cuda import multi as cuda
from .native import multi as native
from .table import Op

__all__ = ["each_sq_norm", "multi_sq_norm"]


def _multi_sq_norm(xs: Sequence[Float[Tensor, ...]]) -> Float64[Tensor, ""]:
    """Squared norm of all the tensors together, sum_k |xs[k]|^2."""
    parts = [
        part.double().square().sum()
        for x in xs
        for (part,) in dense_parts(x, bytes_each=16)
    ]
    return torch.stack(parts).sum()


multi_sq_norm = Op("multi_sq_norm", _multi_sq_norm)
multi_sq_norm.add_native(native.sq_norm, dtypes=FLOATS)
multi_sq_norm.add_cuda(cuda.sq_norm(_multi_sq_norm), dtypes=FLOATS)


def each_sq_norm(xs: Sequence[Float[Tensor, ...]]) -> Float64[Tensor, " tensors"]:
    """Squared norm of each of the tensors, |xs[k]|^2.

    On a device by one launch for all (`torch._foreach_norm`), summed there in float32
    or better; on a CPU one by one.
    """
    if xs[0].device.type == "cpu":
        return torch.stack([multi_sq_norm([x]) for x in xs])
    dtype = accumulation_dtype(xs[0].dtype)
    norms = torch._foreach_norm(list(xs), 2, dtype=dtype)
    return torch.stack(list(norms)).double().square()
