"""A step of Langevin dynamics on a list of parameters, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._arguments import FLOATS
from ._pieces import dense_parts
from .cuda import langevin as cuda
from .native import langevin as native
from .random import Noise, normals
from .table import Op

__all__ = ["langevin_step_"]

# Bytes held an element: its words in int64, those of the last round, and the numbers.
_HELD = 64


def _langevin_step_(
    params: Sequence[Float[Tensor, ...]],
    grads: Sequence[Float[Tensor, ...]],
    velocities: Sequence[Float[Tensor, ...]] | None,
    lr: float,
    momentum: float,
    noise: Noise,
) -> None:
    """One Langevin step in place, of parameters that share its options.

    v <- momentum v + sqrt(lr) grad - noise, then params <- params - sqrt(lr) v; without
    velocities, v begins at zero. Sums are made in the accumulation dtype and rounded
    once.
    """
    root = math.sqrt(lr)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        moving = (param, grad, *(() if velocities is None else (velocities[i],)))
        first = 0
        for p, g, *v in dense_parts(*moving, bytes_each=_HELD):
            end = first + p.numel()
            dtype = accumulation_dtype(p.dtype)
            wide = g.to(dtype)
            kick = _kick(noise, i, slice(first, end), p)
            if not v:
                p.copy_(p.to(dtype) - lr * wide + root * kick)
            else:
                velocity = momentum * v[0].to(dtype) + root * wide - kick
                v[0].copy_(velocity)
                p.copy_(p.to(dtype) - root * velocity)
            first = end


def _kick(noise: Noise, tensor: int, elements: slice, like: Tensor) -> Tensor | float:
    if noise.deviation == 0:
        return 0.0
    numbers = normals(noise, tensor, elements, like.device).view(like.shape)
    return numbers.mul_(noise.deviation).to(accumulation_dtype(like.dtype))


langevin_step_ = Op("langevin_step_", _langevin_step_, is_in_place=True)
langevin_step_.add_native(native.langevin_step_(_langevin_step_), dtypes=FLOATS)
langevin_step_.add_cuda(cuda.langevin_step_(_langevin_step_), dtypes=FLOATS)
