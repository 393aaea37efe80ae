"""Calls of the CUDA kernel for a step of Langevin dynamics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._arguments import SUFFIX, HostIntegers, addresses, alike, signed, write_back
from ..random import Noise
from ._launch import stream

__all__ = ["langevin_step_"]


def langevin_step_(reference: Callable[..., None]) -> Callable[..., None]:
    """See `fastminima.ops.langevin.langevin_step_`; else `reference`."""

    def run(
        kernels: Any,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        velocities: Sequence[Tensor] | None,
        lr: float,
        momentum: float,
        noise: Noise,
    ) -> None:
        if not alike(params, grads, velocities):
            return reference(params, grads, velocities, lr, momentum, noise)
        written = [*params, *(velocities or ())]
        dense = [x.contiguous() for x in written]
        read = [g.contiguous() for g in grads]
        moved, source = addresses(dense), addresses(read)
        places = HostIntegers(noise.places)
        sizes = HostIntegers(p.numel() for p in params)
        moving = moved.data_ptr() + 8 * len(params) if velocities else 0
        getattr(kernels, f"langevin_step_{SUFFIX[params[0].dtype]}")(
            *(moved.data_ptr(), source.data_ptr(), moving, places.data_ptr()),
            *(sizes.data_ptr(), len(params), lr, momentum, noise.deviation),
            *(signed(noise.seed), signed(noise.step), stream(params[0])),
        )
        return write_back(written, dense)

    return run
