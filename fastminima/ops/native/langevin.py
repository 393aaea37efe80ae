"""Calls of the native kernel for a step of Langevin dynamics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ... import _native
from .._arguments import (
    NATIVE,
    SUFFIX,
    alike,
    columns,
    signed,
    write_back,
)
from .._pieces import dense_parts
from ..random import Noise

__all__ = ["langevin_step_"]

_COPIED = 12  # bytes that copies of a parameter, a gradient and a velocity take


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
        numbers = (lr, momentum, noise)
        if not alike(params, grads, velocities):
            return reference(params, grads, velocities, *numbers)
        if params[0].dtype in NATIVE:
            return _dense(kernels, params, grads, velocities, noise.places, *numbers)
        for i, place in enumerate(noise.places):
            rows = [xs[i] for xs in (params, grads, velocities) if xs is not None]
            if all(x.is_contiguous() for x in rows):
                _converted(kernels, rows, place, *numbers)
            else:
                one = noise._replace(indices=noise.indices[i : i + 1])
                parts = [[x] for x in rows] + [None] * (3 - len(rows))
                reference(*parts, lr, momentum, one)
        return None

    return run


def _converted(kernels: Any, rows: list[Tensor], place: int, *numbers: Any) -> None:
    """Of one tensor in half precision: copies in float32 of some of it at a time."""
    for parts in dense_parts(*rows, bytes_each=_COPIED, multiple=4):
        p, g, *v = (x.float() for x in parts)
        _launch(kernels, [p], [g], v or None, [place], *numbers)
        parts[0].copy_(p)
        if v:
            parts[2].copy_(v[0])
        place += -(-p.numel() // 4)


def _dense(
    kernels: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocities: Sequence[Tensor] | None,
    *rest: Any,
) -> None:
    """Through copies of what is not contiguous."""
    written = [*params, *(velocities or ())]
    dense = [x.contiguous() for x in written]
    p, v = dense[: len(params)], dense[len(params) :]
    _launch(kernels, p, [g.contiguous() for g in grads], v or None, *rest)
    write_back(written, dense)


def _launch(
    kernels: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocities: Sequence[Tensor] | None,
    places: Sequence[int],
    lr: float,
    momentum: float,
    noise: Noise,
) -> None:
    moving = () if velocities is None else (map(Tensor.data_ptr, velocities),)
    memory, (written, read, first, sizes, *moved) = columns(
        *(map(Tensor.data_ptr, params), map(Tensor.data_ptr, grads)),
        *(places, map(Tensor.numel, params), *moving),
    )
    getattr(kernels, f"langevin_step_{SUFFIX[params[0].dtype]}")(
        *(written, read, moved[0] if moved else 0, first, sizes, len(params)),
        *(lr, momentum, noise.deviation, signed(noise.seed), signed(noise.step)),
        _native.threads(),
    )
    del memory  # until here the addresses were good
