"""Vector arithmetic over lists of tensors, as the parameters of a model are.

Sums are accumulated in float64 and stay on the tensors' device.
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

__all__ = ["multi_axpy", "multi_dot", "multi_sq_norm"]


def _multi_dot(
    xs: Sequence[Float[Tensor, ...]], ys: Sequence[Float[Tensor, ...]]
) -> Float64[Tensor, ""]:
    """Inner product of two lists of tensors, sum_k <xs[k], ys[k]>."""
    return torch.stack([_dot(x, y) for x, y in zip(xs, ys, strict=True)]).sum()


def _dot(x: Tensor, y: Tensor) -> Float64[Tensor, ""]:
    parts = [
        (a.double() * b.double()).sum() for a, b in dense_parts(x, y, bytes_each=24)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _multi_sq_norm(xs: Sequence[Float[Tensor, ...]]) -> Float64[Tensor, ""]:
    """Squared norm of all the tensors together, sum_k |xs[k]|^2."""
    return _multi_dot(xs, xs)


def _multi_axpy(
    ys: Sequence[Float[Tensor, ...]],
    xs: Sequence[Float[Tensor, ...]],
    factor: float | Float64[Tensor, ""],
) -> None:
    """Add multiples in place: ys[k] <- ys[k] + factor xs[k], rounded once.

    A `factor` that is a tensor is read on the device, where the tensors are.
    """
    for y, x in zip(ys, xs, strict=True):
        dtype = accumulation_dtype(y.dtype)
        scale = factor.to(dtype) if isinstance(factor, Tensor) else factor
        for into, part in dense_parts(y, x, bytes_each=4 * dtype.itemsize):
            into.copy_(into.to(dtype) + scale * part.to(dtype))


multi_dot = Op("multi_dot", _multi_dot)
multi_dot.add_cuda(cuda.dot(_multi_dot), dtypes=FLOATS)
multi_sq_norm = Op("multi_sq_norm", _multi_sq_norm)
multi_sq_norm.add_native(native.sq_norm, dtypes=FLOATS)
multi_sq_norm.add_cuda(cuda.sq_norm(_multi_dot), dtypes=FLOATS)
multi_axpy = Op("multi_axpy", _multi_axpy)
multi_axpy.add_cuda(cuda.axpy(_multi_axpy), dtypes=FLOATS)
