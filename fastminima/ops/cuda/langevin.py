"""Calls of the CUDA kernel for a step of Langevin dynamics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._arguments import SUFFIX, alike, columns, signed, write_back
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
        memory, (moved, source, first, sizes, *moving) = columns(
            *(map(Tensor.data_ptr, dense[: len(params)]), map(Tensor.data_ptr, read)),
            *(noise.places, map(Tensor.numel, params)),
            *((map(Tensor.data_ptr, dense[len(params) :]),) if velocities else ()),
        )
        getattr(kernels, f"langevin_step_{SUFFIX[params[0].dtype]}")(
            *(moved, source, moving[0] if moving else 0, first, sizes, len(params)),
            *(lr, momentum, noise.deviation, signed(noise.seed), signed(noise.step)),
            stream(params[0]),
        )
        del memory  # until here the addresses were good
        return write_back(written, dense)

    return run
