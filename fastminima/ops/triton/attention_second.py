"""Kernels of the tangents of attention and of its gradients, in Triton.

Tensors and programs are as in `attention_first`, names as in `ops.attention`. A head
costs, of products,

| kernel | operations | reads beside its own block |
|---|---|---|
| `tangent_kernel` | 2 T S (3 d + 2 p) | k, v, uk, uv for each block of rows |
| `query_tangents_kernel` | 2 T S (5 d + 2 p) | the same |
| `key_tangents_kernel` | 2 T S (5 d + 3 p) | q, g, uq for each block of keys |

of which the least, with every matrix of scores made once, is 2 T S (7 d + 5 p).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    load_rows,
    probabilities,
    product,
    score_tangents,
    store_rows,
)

__all__ = ["key_tangents_kernel", "query_tangents_kernel", "tangent_kernel"]


@triton.jit
def tangent_kernel(
    uq_ptr,  # [heads, time, d_in]
    uk_ptr,  # [groups, steps, d_in]
    uv_ptr,  # [groups, steps, d_out]
    q_ptr, k_ptr, v_ptr,  # as their directions
    o_ptr,  # [heads, time, d_out]
    stats_ptr,  # [2, heads, time]
    mask_ptr,  # [batch, heads of a sample, time, steps]; or None
    out_ptr,  # [heads, time, d_out]
    means_ptr,  # [heads, time]
    heads, shared, time, steps, d_in, d_out, scale,
    mask_b, mask_h, mask_t, mask_s, many,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Outputs move by o' = P t v + P uv - e o, and e = sum_j P t of each row.

    Floor: all inputs read once, o' and 4 bytes a row written.
    """
    blocks = tl.cdiv(time, ROWS)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    i = first + tl.arange(0, ROWS)
    k_ptr += z // shared * steps * d_in
    uk_ptr += z // shared * steps * d_in
    v_ptr += z // shared * steps * d_out
    uv_ptr += z // shared * steps * d_out
    if MASK:
        mask_ptr += z // heads * mask_b + z % heads * mask_h
    q_ptr += z * time * d_in
    uq_ptr += z * time * d_in
    q = load_rows(q_ptr, i, time, d_in, IN)
    uq = load_rows(uq_ptr, i, time, d_in, IN)
    row = z * time + i
    largest = tl.load(stats_ptr + row, mask=i < time, other=0.0)
    stats_ptr += many.to(tl.int64) * time
    inverse = tl.load(stats_ptr + row, mask=i < time, other=0.0)
    mean = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, OUT), tl.float32)
    stop = tl.minimum(first + ROWS, steps) if CAUSAL else steps
    for start in range(0, stop, KEYS):
        j = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, j, steps, d_in, IN)
        uk = load_rows(uk_ptr, j, steps, d_in, IN)
        v = load_rows(v_ptr, j, steps, d_out, OUT)
        uv = load_rows(uv_ptr, j, steps, d_out, OUT)
        p = probabilities(
            q, q_ptr, k, k_ptr, largest, inverse, mask_ptr, i, j, time, steps, d_in,
            scale, mask_t, mask_s, CAUSAL, MASK, IN, INNER, PRECISION,
        )  # fmt: skip
        moved = p * score_tangents(
            q, q_ptr, uq, uq_ptr, k, k_ptr, uk, uk_ptr, i, j, time, steps, d_in, scale,
            IN, INNER, PRECISION,
        )  # fmt: skip
        mean += tl.sum(moved, axis=1)
        out = tl.dot(moved.to(v.dtype), v, out, input_precision=PRECISION)
        out = tl.dot(p.to(uv.dtype), uv, out, input_precision=PRECISION)
    o = load_rows(o_ptr + z * time * d_out, i, time, d_out, OUT).to(tl.float32)
    out -= mean[:, None] * o
    store_rows(out_ptr + z * time * d_out, out, i, time, d_out, OUT)
    tl.store(means_ptr + row, mean, mask=i < time)


@triton.jit
def _scores_tangent(
    p, t, g, g_ptr, v, v_ptr, uv, uv_ptr, mean, turn, i, j, time, steps, width,
    WIDTH: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of ds and of ds', from P, t - e, D and D'."""
    dp = product(g, g_ptr, i, time, v, v_ptr, j, steps, width, WIDTH, INNER, PRECISION)
    ds = p * (dp - mean[:, None])
    dp = product(
        g, g_ptr, i, time, uv, uv_ptr, j, steps, width, WIDTH, INNER, PRECISION
    )
    return ds, t * ds + p * (dp - turn[:, None])


@triton.jit
def query_tangents_kernel(
    g_ptr,  # [heads, time, d_out]
    uq_ptr,  # [heads, time, d_in]
    uk_ptr,  # [groups, steps, d_in]
    uv_ptr,  # [groups, steps, d_out]
    q_ptr, k_ptr, v_ptr,  # as their directions
    o_ptr,  # [heads, time, d_out]
    stats_ptr,  # [2, heads, time]
    moved_ptr,  # [heads, time, d_out]: o'
    means_ptr,  # [heads, time]: e
    mask_ptr,  # [batch, heads of a sample, time, steps]; or None
    out_ptr,  # [heads, time, d_in]
    rows_ptr,  # [2, heads, time]
    heads, shared, time, steps, d_in, d_out, scale,
    mask_b, mask_h, mask_t, mask_s, many,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """By rows: dq' = scale (ds' k + ds uk); and D = g . o, D' = g . o' of each row.

    Floor: all inputs read once, dq' and 8 bytes a row written.
    """
    blocks = tl.cdiv(time, ROWS)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    i = first + tl.arange(0, ROWS)
    k_ptr += z // shared * steps * d_in
    uk_ptr += z // shared * steps * d_in
    v_ptr += z // shared * steps * d_out
    uv_ptr += z // shared * steps * d_out
    if MASK:
        mask_ptr += z // heads * mask_b + z % heads * mask_h
    g_ptr += z * time * d_out
    g = load_rows(g_ptr, i, time, d_out, OUT)
    wide = g.to(tl.float32)
    o = load_rows(o_ptr + z * time * d_out, i, time, d_out, OUT)
    mean = tl.sum(wide * o.to(tl.float32), axis=1)
    o = load_rows(moved_ptr + z * time * d_out, i, time, d_out, OUT)
    turn = tl.sum(wide * o.to(tl.float32), axis=1)
    row = z * time + i
    span = many.to(tl.int64) * time
    tl.store(rows_ptr + row, mean, mask=i < time)
    tl.store(rows_ptr + span + row, turn, mask=i < time)
    largest = tl.load(stats_ptr + row, mask=i < time, other=0.0)
    inverse = tl.load(stats_ptr + span + row, mask=i < time, other=0.0)
    shift = tl.load(means_ptr + row, mask=i < time, other=0.0)
    q_ptr += z * time * d_in
    uq_ptr += z * time * d_in
    q = load_rows(q_ptr, i, time, d_in, IN)
    uq = load_rows(uq_ptr, i, time, d_in, IN)
    out = tl.zeros((ROWS, IN), tl.float32)
    stop = tl.minimum(first + ROWS, steps) if CAUSAL else steps
    for start in range(0, stop, KEYS):
        j = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, j, steps, d_in, IN)
        uk = load_rows(uk_ptr, j, steps, d_in, IN)
        p = probabilities(
            q, q_ptr, k, k_ptr, largest, inverse, mask_ptr, i, j, time, steps, d_in,
            scale, mask_t, mask_s, CAUSAL, MASK, IN, INNER, PRECISION,
        )  # fmt: skip
        t = score_tangents(
            q, q_ptr, uq, uq_ptr, k, k_ptr, uk, uk_ptr, i, j, time, steps, d_in, scale,
            IN, INNER, PRECISION,
        )  # fmt: skip
        v = load_rows(v_ptr, j, steps, d_out, OUT)
        uv = load_rows(uv_ptr, j, steps, d_out, OUT)
        ds, moving = _scores_tangent(
            p, t - shift[:, None], g, g_ptr, v, v_ptr, uv, uv_ptr, mean, turn,
            i, j, time, steps, d_out, OUT, INNER, PRECISION,
        )  # fmt: skip
        out = tl.dot(moving.to(k.dtype), k, out, input_precision=PRECISION)
        out = tl.dot(ds.to(k.dtype), uk, out, input_precision=PRECISION)
    store_rows(out_ptr + z * time * d_in, out * scale, i, time, d_in, IN)


@triton.jit
def key_tangents_kernel(
    g_ptr,  # [heads, time, d_out]
    uq_ptr,  # [heads, time, d_in]
    uk_ptr,  # [groups, steps, d_in]
    uv_ptr,  # [groups, steps, d_out]
    q_ptr, k_ptr, v_ptr,  # as their directions
    stats_ptr,  # [2, heads, time]
    means_ptr,  # [heads, time]: e
    rows_ptr,  # [2, heads, time]: D and D'
    mask_ptr,  # [batch, heads of a sample, time, steps]; or None
    dk_ptr,  # [groups, steps, d_in]
    dv_ptr,  # [groups, steps, d_out]
    heads, shared, time, steps, d_in, d_out, scale,
    mask_b, mask_h, mask_t, mask_s, many,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """By keys: dk' = scale (ds'^T q + ds^T uq) and dv' = (P (t - e))^T g.

    Floor: all inputs read once, dk' and dv' written.
    """
    blocks = tl.cdiv(steps, KEYS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * KEYS
    j = first + tl.arange(0, KEYS)
    k_ptr += n * steps * d_in
    uk_ptr += n * steps * d_in
    v_ptr += n * steps * d_out
    uv_ptr += n * steps * d_out
    k = load_rows(k_ptr, j, steps, d_in, IN)
    uk = load_rows(uk_ptr, j, steps, d_in, IN)
    v = load_rows(v_ptr, j, steps, d_out, OUT)
    uv = load_rows(uv_ptr, j, steps, d_out, OUT)
    dk = tl.zeros((KEYS, IN), tl.float32)
    dv = tl.zeros((KEYS, OUT), tl.float32)
    span = many.to(tl.int64) * time
    begin = first // ROWS * ROWS if CAUSAL else 0
    for head in range(shared):
        z = n * shared + head
        place = z // heads * mask_b + z % heads * mask_h
        here = mask_ptr + place if MASK else mask_ptr
        q_here, uq_here = q_ptr + z * time * d_in, uq_ptr + z * time * d_in
        g_here = g_ptr + z * time * d_out
        for start in range(begin, time, ROWS):
            i = start + tl.arange(0, ROWS)
            q = load_rows(q_here, i, time, d_in, IN)
            uq = load_rows(uq_here, i, time, d_in, IN)
            g = load_rows(g_here, i, time, d_out, OUT)
            row = z * time + i
            largest = tl.load(stats_ptr + row, mask=i < time, other=0.0)
            inverse = tl.load(stats_ptr + span + row, mask=i < time, other=0.0)
            shift = tl.load(means_ptr + row, mask=i < time, other=0.0)
            mean = tl.load(rows_ptr + row, mask=i < time, other=0.0)
            turn = tl.load(rows_ptr + span + row, mask=i < time, other=0.0)
            p = probabilities(
                q, q_here, k, k_ptr, largest, inverse, here, i, j, time, steps, d_in,
                scale, mask_t, mask_s, CAUSAL, MASK, IN, INNER, PRECISION,
            )  # fmt: skip
            t = score_tangents(
                q, q_here, uq, uq_here, k, k_ptr, uk, uk_ptr, i, j, time, steps, d_in,
                scale, IN, INNER, PRECISION,
            ) - shift[:, None]  # fmt: skip
            weights = tl.trans((p * t).to(g.dtype))
            dv = tl.dot(weights, g, dv, input_precision=PRECISION)
            ds, moving = _scores_tangent(
                p, t, g, g_here, v, v_ptr, uv, uv_ptr, mean, turn,
                i, j, time, steps, d_out, OUT, INNER, PRECISION,
            )  # fmt: skip
            weights = tl.trans(moving.to(q.dtype))
            dk = tl.dot(weights, q, dk, input_precision=PRECISION)
            weights = tl.trans(ds.to(q.dtype))
            dk = tl.dot(weights, uq, dk, input_precision=PRECISION)
    store_rows(dk_ptr + n * steps * d_in, dk * scale, j, steps, d_in, IN)
    store_rows(dv_ptr + n * steps * d_out, dv, j, steps, d_out, OUT)
