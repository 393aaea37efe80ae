"""Attention, its gradients and their tangents in Triton: launchers.

Kernels are in `attention_first` and `attention_second`. Their memory is that of their
results, two numbers a row, and copies of what is not contiguous.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import attention as ops
from ..attention import Scores
from ..recording import launch
from ._launch import power_of_two
from .attention_first import (
    attention_kernel,
    key_gradients_kernel,
    query_gradients_kernel,
)
from .attention_second import (
    key_tangents_kernel,
    query_tangents_kernel,
    tangent_kernel,
)
from .attention_tiles import NUMBERS, SEEN

__all__ = [
    "attention",
    "attention_gradients",
    "attention_gradients_tangent",
    "attention_tangent",
]


class _Tiles(NamedTuple):
    """Rows and keys of a tile of scores, columns of operands at a time, warps."""

    rows: int
    keys: int
    inner: int
    warps: int


# By the width of a head, for kernels by rows and by keys: tiles that spill no registers
# on an A100 or H100, in 99 KB of shared memory (what a block of a consumer's GPU has).
# Without tensor cores the columns of an operand pass registers, 16 at a time.
_WIDEST = 256
_HALF = {
    64: (_Tiles(32, 64, _WIDEST, 8), _Tiles(32, 32, _WIDEST, 4)),
    128: (_Tiles(32, 64, _WIDEST, 8), _Tiles(32, 64, _WIDEST, 8)),
    _WIDEST: (_Tiles(16, 32, _WIDEST, 8), _Tiles(16, 32, _WIDEST, 8)),
}
_FLOAT = {
    64: (_Tiles(32, 16, 16, 4), _Tiles(16, 32, 16, 4)),
    128: (_Tiles(32, 16, 16, 8), _Tiles(16, 32, 16, 8)),
    _WIDEST: (_Tiles(16, 16, 16, 8), _Tiles(16, 16, 16, 8)),
}


class _Launches:
    """Launches on the heads of one call: its sizes, and how its scores are made."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> None:
        self._batch, self._heads, self._time, self._in = q.shape
        self._groups, self._steps, self._out = k.shape[1], k.shape[2], v.shape[3]
        self._scores, self._dtype = scores, q.dtype
        self._mask, self._kind = None, 0
        strides = 0, 0, 0, 0
        if scores.mask is not None:
            shape = self._batch, self._heads, self._time, self._steps
            mask = scores.mask.expand(shape)
            self._kind, strides = NUMBERS, mask.stride()
            if mask.dtype == torch.bool:
                mask, self._kind = mask.view(torch.uint8), SEEN
            self._mask = mask
        shared, many = self._heads // max(1, self._groups), self._batch * self._heads
        sizes = self._heads, shared, self._time, self._steps, self._in, self._out
        self._sizes = *sizes, scores.scale, *strides, many

    def by_rows(self, kernel: Any, *inputs: Tensor, to: tuple[Tensor, ...]) -> None:
        """One program a block of rows of a head of queries."""
        cut, _ = self._cuts
        blocks = -(-self._time // cut.rows)
        self._launch(kernel, cut, self._batch * self._heads * blocks, inputs, to)

    def by_keys(self, kernel: Any, *inputs: Tensor, to: tuple[Tensor, ...]) -> None:
        """One program a block of keys of a head of keys."""
        _, cut = self._cuts
        blocks = -(-self._steps // cut.keys)
        self._launch(kernel, cut, self._batch * self._groups * blocks, inputs, to)

    @property
    def _cuts(self) -> tuple[_Tiles, _Tiles]:
        found = _FLOAT if self._dtype == torch.float32 else _HALF
        widest = max(self._in, self._out)
        return next(cuts for width, cuts in found.items() if widest <= width)

    def _launch(
        self,
        kernel: Any,
        cut: _Tiles,
        programs: int,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
    ) -> None:
        if not programs:
            return
        launch(
            kernel,
            (programs,),
            *(*inputs, self._mask, *outputs, *self._sizes),
            CAUSAL=self._scores.is_causal,
            MASK=self._kind,
            PRECISION=_precision(self._dtype),
            IN=max(16, power_of_two(self._in)),
            OUT=max(16, power_of_two(self._out)),
            INNER=cut.inner,
            ROWS=cut.rows,
            KEYS=cut.keys,
            num_warps=cut.warps,
            num_stages=2,
        )


def _precision(dtype: torch.dtype) -> str:
    """In full, unless PyTorch's own products may be in TF32."""
    asked = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if asked and dtype == torch.float32 else "ieee"


def _is_wide(q: Tensor, v: Tensor) -> bool:
    """Whether a row of a head does not fit the registers."""
    return max(q.shape[3], v.shape[3]) > _WIDEST


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


def _row_numbers(q: Tensor, *first: int) -> Tensor:
    return q.new_empty(*first, *q.shape[:3], dtype=torch.float32)


def attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Launch `attention_kernel`; see `ops.attention`."""
    if _is_wide(q, v):
        return ops.attention.reference(q, k, v, scores)
    q, k, v = _contiguous(q, k, v)
    out, stats = q.new_empty(*q.shape[:3], v.shape[3]), _row_numbers(q, 2)
    _Launches(q, k, v, scores).by_rows(attention_kernel, q, k, v, to=(out, stats))
    return out, stats


def attention_gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels by rows and by keys; see `ops.attention`."""
    if _is_wide(q, v):
        return ops.attention_gradients.reference(g, q, k, v, o, stats, scores)
    g, q, k, v, o = _contiguous(g, q, k, v, o)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    means = _row_numbers(q)
    launches = _Launches(q, k, v, scores)
    launches.by_rows(query_gradients_kernel, g, q, k, v, o, stats, to=(dq, means))
    launches.by_keys(key_gradients_kernel, g, q, k, v, means, stats, to=(dk, dv))
    return dq, dk, dv


def attention_tangent(
    uq: Tensor, uk: Tensor, uv: Tensor,
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scores: Scores,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch `tangent_kernel`; see `ops.attention`."""
    if _is_wide(q, v):
        return ops.attention_tangent.reference(uq, uk, uv, q, k, v, o, stats, scores)
    inputs = _contiguous(uq, uk, uv, q, k, v, o)
    out, means = o.new_empty(o.shape), _row_numbers(q)
    launches = _Launches(q, k, v, scores)
    launches.by_rows(tangent_kernel, *inputs, stats, to=(out, means))
    return out, means


def attention_gradients_tangent(
    g: Tensor, uq: Tensor, uk: Tensor, uv: Tensor,
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor,
    moved: Tensor, means: Tensor, scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernels by rows and by keys; see `ops.attention`."""
    if _is_wide(q, v):
        return ops.attention_gradients_tangent.reference(
            g, uq, uk, uv, q, k, v, o, stats, moved, means, scores
        )
    g, uq, uk, uv, q, k, v, o, moved = _contiguous(g, uq, uk, uv, q, k, v, o, moved)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    inputs = g, uq, uk, uv, q, k, v
    rows = _row_numbers(q, 2)
    launches = _Launches(q, k, v, scores)
    launches.by_rows(
        query_tangents_kernel, *inputs, o, stats, moved, means, to=(dq, rows)
    )
    launches.by_keys(key_tangents_kernel, *inputs, stats, means, rows, to=(dk, dv))
    return dq, dk, dv
