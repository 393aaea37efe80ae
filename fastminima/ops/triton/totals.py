"""What kernels leave in parts is added up, and squared sample by sample, in Triton.

PyTorch's sums would do, but a step that consists of kernels of this package alone can
be launched again without Python (`fastminima.ops.recording`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from ._launch import power_of_two, split

__all__ = ["first_added", "last_added", "last_added_of_two", "sample_sq_norms"]

_ELEMENTS = 2048  # that a program has under way at a time
_WIDE = 16 * _ELEMENTS  # of a sample, from where several programs share it


@triton.jit(do_not_specialize=["items", "kept"])
def _parts_kernel(
    parts_ptr,  # [items, count], of any strides
    first_ptr,  # [kept]
    second_ptr,  # [items - kept]
    items,
    kept,
    count,
    parts_item,
    parts_part,
    ITEMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out[i] = sum_p parts[i, p], ITEMS a program; those from `kept` on go to `second`.

    Floor: parts read once, 4 bytes written an item.
    """
    rows = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    is_row = rows < items
    lanes = tl.arange(0, PARTS)
    at = (
        parts_ptr
        + rows[:, None] * parts_item
        + lanes.to(tl.int64)[None, :] * parts_part
    )
    step = tl.full((), PARTS, tl.int64)
    total = tl.zeros((ITEMS, PARTS), tl.float32)
    for start in range(0, count, PARTS):
        mask = is_row[:, None] & (lanes < count - start)[None, :]
        total += tl.load(at, mask=mask, other=0.0)
        at += step * parts_part
    sums = tl.sum(total, axis=1)
    tl.store(first_ptr + rows, sums, mask=rows < kept)
    tl.store(second_ptr + (rows - kept), sums, mask=is_row & (rows >= kept))


def _added(parts: Tensor, first: Tensor, second: Tensor | None) -> None:
    """`[items, count]` into one or two outputs of together `items` elements."""
    items, count = parts.shape
    if items == 0:
        return
    if parts.stride(1) == 1:
        block = min(power_of_two(count), 256)
        rows = max(1, min(power_of_two(items), _ELEMENTS // block // 8))
    else:
        rows = min(power_of_two(items), 256)
        block = max(1, min(power_of_two(count), _ELEMENTS // rows))
    launch(
        _parts_kernel,
        (triton.cdiv(items, rows),),
        *(parts, first, first if second is None else second),
        *(items, first.numel(), count, *parts.stride()),
        ITEMS=rows,
        PARTS=block,
        num_warps=4,
    )


def last_added(parts: Tensor) -> Tensor:
    """The sum over the last dimension of `[items, count]`, float32."""
    if parts.shape[1] == 1:
        return parts[:, 0]
    out = parts.new_empty(len(parts))
    _added(parts, out, None)
    return out


def last_added_of_two(parts: Tensor) -> tuple[Tensor, Tensor]:
    """The same of `[2, items, count]`, apart for the first and the second of them."""
    first, second = (parts.new_empty(parts.shape[1]) for _ in range(2))
    _added(parts.flatten(0, 1), first, second)
    return first, second


def first_added(parts: Tensor) -> Tensor:
    """The sum over the first dimension of a contiguous tensor, float32."""
    if len(parts) == 1:
        return parts[0]
    out = parts.new_empty(parts.shape[1:])
    _added(parts.flatten(1).T, out, None)
    return out


@triton.jit(do_not_specialize=["batch", "parts"])
def _sq_norms_kernel(
    x_ptr,  # [batch, width]
    out_ptr,  # [batch, parts]
    batch,
    width,
    parts,
    span,
    x_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n, p] = |x[n, p * span : (p + 1) * span]|^2, ROWS samples a program.

    Floor: x read once, 4 bytes written a sample and part.
    """
    part = tl.program_id(0) % parts
    rows = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < batch
    start = part.to(tl.int64) * span
    left = tl.minimum(width - start, span)
    lanes = tl.arange(0, BLOCK)
    at = x_ptr + rows[:, None] * x_row + (start + lanes)[None, :]
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for done in range(0, left, BLOCK):
        mask = is_row[:, None] & (lanes < left - done)[None, :]
        x = tl.load(at + done, mask=mask, other=0.0)
        squares += x * x
    tl.store(out_ptr + rows * parts + part, tl.sum(squares, axis=1), mask=is_row)


def sample_sq_norms(x: Tensor) -> Tensor:
    """See `fastminima.ops.reduce.sample_sq_norms`."""
    batch, width = x.shape
    if x.numel() == 0:
        return x.new_zeros(batch)
    if x.stride(1) != 1:
        x = x.contiguous()
    block = min(_ELEMENTS, power_of_two(width))
    rows = _ELEMENTS // block
    parts, each = (1, 1) if width < _WIDE else split(triton.cdiv(width, block), batch)
    out = x.new_empty(batch, parts)
    launch(
        _sq_norms_kernel,
        (parts * triton.cdiv(batch, rows),),
        *(x, out, batch, width, parts, width if parts == 1 else each * block),
        x.stride(0),
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
    return last_added(out)
