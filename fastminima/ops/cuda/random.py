"""Calls of the CUDA kernels that make random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._arguments import SUFFIX, addresses
from ._launch import alike, sizes, stream

__all__ = ["gaussian_fill_", "langevin_step_", "rademacher_fill_"]


def _signed(x: int) -> int:
    """The 64 bits of `x` as C++ takes them."""
    return (x + 2**63) % 2**64 - 2**63


def _noise(seed: int, offset: int | Tensor) -> tuple[int, int, int]:
    if isinstance(offset, Tensor):
        return _signed(seed), 0, offset.data_ptr()
    return _signed(seed), _signed(offset), 0


def _fill(
    name: str, kernels: Any, out: Tensor, seed: int, offset: int | Tensor
) -> Tensor:
    dense = out.contiguous()
    getattr(kernels, f"{name}_{SUFFIX[out.dtype]}")(
        dense.data_ptr(), dense.numel(), *_noise(seed, offset), stream(out)
    )
    return out if dense is out else out.copy_(dense)


def gaussian_fill_(
    kernels: Any, out: Tensor, seed: int, offset: int | Tensor
) -> Tensor:
    """See `fastminima.ops.random.gaussian_fill_`."""
    return _fill("gaussian_fill", kernels, out, seed, offset)


def rademacher_fill_(
    kernels: Any, out: Tensor, seed: int, offset: int | Tensor
) -> Tensor:
    """See `fastminima.ops.random.rademacher_fill_`."""
    return _fill("rademacher_fill", kernels, out, seed, offset)


def langevin_step_(reference: Callable[..., None]) -> Callable[..., None]:
    """See `fastminima.ops.random.langevin_step_`; else `reference`."""

    def run(
        kernels: Any,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        lr: float,
        deviation: float,
        seed: int,
        offset: int | Tensor,
    ) -> None:
        grads = [g.contiguous() for g in grads]
        if not alike(params, grads):
            return reference(params, grads, lr, deviation, seed, offset)
        counts, read, written = sizes(params), addresses(grads), addresses(params)
        return getattr(kernels, f"langevin_step_{SUFFIX[params[0].dtype]}")(
            *(read.data_ptr(), written.data_ptr(), counts.data_ptr(), len(counts)),
            *(lr, deviation, *_noise(seed, offset), stream(params[0])),
        )

    return run
