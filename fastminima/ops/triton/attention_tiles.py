"""Tiles of attention's scores: what every one of its kernels does with them.

Rows of queries, keys and values are contiguous, `[heads, time, width]`. A product of
operands in float32 is in float32, or in TF32 where that is asked for; halves are
multiplied as they are, and what is made of the scores is rounded to them before it is
multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "NUMBERS",
    "SEEN",
    "load_rows",
    "probabilities",
    "product",
    "score_tangents",
    "seen_scores",
    "store_rows",
]

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
def product(
    x, x_ptr, i, rows, y, y_ptr, j, count, width,
    WIDTH: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products x y^T of rows i and j, x and y as `load_rows` gives them.

    Without tensor cores an operand lies in registers, where rows that are wider than
    INNER do not fit: they are read again, so many columns at a time.
    """
    if INNER >= WIDTH:
        return tl.dot(x, tl.trans(y), input_precision=PRECISION)
    total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for first in range(0, width, INNER):
        left = _columns(x_ptr, i, rows, first, width, INNER)
        right = _columns(y_ptr, j, count, first, width, INNER)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def _columns(ptr, i, count, first, width, INNER: tl.constexpr):
    c = first + tl.arange(0, INNER)
    places = i.to(tl.int64)[:, None] * width + c[None, :]
    there = (i < count)[:, None] & (c < width)[None, :]
    return tl.load(ptr + places, mask=there, other=0.0)


@triton.jit
def seen_scores(
    q, q_ptr, k, k_ptr,
    mask_ptr,  # [time, steps] of this head, or None
    i, j, time, steps, width, scale, mask_t, mask_s,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
    WIDTH: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores scale q k^T and the mask, -inf where there is none or none is seen."""
    scores = scale * product(
        q, q_ptr, i, time, k, k_ptr, j, steps, width, WIDTH, INNER, PRECISION
    )
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
    q, q_ptr, k, k_ptr, largest, inverse, mask_ptr,
    i, j, time, steps, width, scale, mask_t, mask_s,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
    WIDTH: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P of a tile, from the largest score and 1 / sum of its rows."""
    scores = seen_scores(
        q, q_ptr, k, k_ptr, mask_ptr, i, j, time, steps, width, scale, mask_t, mask_s,
        CAUSAL, MASK, WIDTH, INNER, PRECISION,
    )  # fmt: skip
    return tl.exp(scores - largest[:, None]) * inverse[:, None]


@triton.jit
def score_tangents(
    q, q_ptr, uq, uq_ptr, k, k_ptr, uk, uk_ptr, i, j, time, steps, width, scale,
    WIDTH: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """How far the scores of a tile move, t = scale (uq k^T + q uk^T)."""
    t = product(uq, uq_ptr, i, time, k, k_ptr, j, steps, width, WIDTH, INNER, PRECISION)
    t += product(
        q, q_ptr, i, time, uk, uk_ptr, j, steps, width, WIDTH, INNER, PRECISION
    )
    return t * scale
