"""Tiles of attention's scores: what every one of its kernels does with them.

Rows of queries, keys and values are contiguous, `[heads, time, width]`. A product of
operands in float32 is in float32, or in TF32 where that is asked for; halves are
multiplied as they are, and what is made of the scores is rounded to them before it is
multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["NUMBERS", "SEEN", "load_rows", "probabilities", "product", "store_rows"]

SEEN, NUMBERS = 1, 2  # kinds of masks: booleans, and what is added


@triton.jit
def load_rows(ptr, i, count, width, WIDTH: tl.constexpr):
    """Rows i of a contiguous [count, width]; zeros beyond it."""
    c = tl.arange(0, WIDTH)
    places = i.to(tl.int64)[:, None] * width + c[None, :]
    there = (i < count)[:, None] & (c < width)[None, :]
    return tl.load(ptr + places, mask=there, other=0.0)


@triton.jit
def store_rows(ptr, x, i, count, width, WIDTH: tl.constexpr):
    """Rows i of a contiguous [count, width], in its dtype."""
    c = tl.arange(0, WIDTH)
    places = i.to(tl.int64)[:, None] * width + c[None, :]
    there = (i < count)[:, None] & (c < width)[None, :]
    tl.store(ptr + places, x.to(ptr.dtype.element_ty), mask=there)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """x y^T."""
    return tl.dot(x, tl.trans(y), input_precision=PRECISION)


@triton.jit
def seen_scores(
    q, k,
    mask_ptr,  # [time, steps] of this head, or None
    i, j, time, steps, scale, mask_t, mask_s,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale q k^T and the mask, -inf where a key is not seen or there is none."""
    scores = product(q, k, PRECISION) * scale
    seen = (i < time)[:, None] & (j < steps)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    if MASK:
        places = i.to(tl.int64)[:, None] * mask_t + j.to(tl.int64)[None, :] * mask_s
        if MASK == 1:
            seen = seen & (tl.load(mask_ptr + places, mask=seen, other=0) != 0)
        else:
            added = tl.load(mask_ptr + places, mask=seen, other=0.0)
            scores += added.to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def probabilities(
    q, k, largest, inverse, mask_ptr, i, j, time, steps, scale, mask_t, mask_s,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P of a tile, from the largest score and 1 / sum of its rows."""
    scores = seen_scores(
        q, k, mask_ptr, i, j, time, steps, scale, mask_t, mask_s,
        CAUSAL, MASK, PRECISION,
    )  # fmt: skip
    return tl.exp(scores - largest[:, None]) * inverse[:, None]
