"""Kernels of attention and of its gradients, in Triton.

Every tensor is contiguous, `[batch * heads, time, width]`; head z of the queries shares
head z // shared of the keys. One program a block of rows of a head, or a block of keys,
which then takes all heads and rows of queries that see them in turn: no atomics.

With T rows and S columns that are seen of it (half of them if causal), a head costs

| kernel | operations of products | reads beside its own block |
|---|---|---|
| `attention_kernel` | 2 T S (d + p) | k, v for each block of rows |
| `query_gradients_kernel` | 2 T S (2 d + p) | the same |
| `key_gradients_kernel` | 2 T S (2 d + 2 p) | q, g for each block of keys |
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    load_rows,
    probabilities,
    product,
    seen_scores,
    store_rows,
)

__all__ = ["attention_kernel", "key_gradients_kernel", "query_gradients_kernel"]


@triton.jit
def attention_kernel(
    q_ptr,  # [heads, time, d_in]
    k_ptr,  # [groups, steps, d_in]
    v_ptr,  # [groups, steps, d_out]
    mask_ptr,  # [batch, heads of a sample, time, steps]; or None
    out_ptr,  # [heads, time, d_out]
    stats_ptr,  # [2, heads, time]
    heads, shared, time, steps, d_in, d_out, scale,
    mask_b, mask_h, mask_t, mask_s, many,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Outputs o = softmax(scale q k^T + mask) v, and its rows' statistics.

    Floor: q, k and v read once, o and 8 bytes a row written.
    """
    blocks = tl.cdiv(time, ROWS)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    i = first + tl.arange(0, ROWS)
    k_ptr += z // shared * steps * d_in
    v_ptr += z // shared * steps * d_out
    q_ptr += z * time * d_in
    if MASK:
        mask_ptr += z // heads * mask_b + z % heads * mask_h
    q = load_rows(q_ptr, i, time, d_in, IN)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, OUT), tl.float32)
    stop = tl.minimum(first + ROWS, steps) if CAUSAL else steps
    for start in range(0, stop, KEYS):
        j = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, j, steps, d_in, IN)
        v = load_rows(v_ptr, j, steps, d_out, OUT)
        scores = seen_scores(
            q, q_ptr, k, k_ptr, mask_ptr, i, j, time, steps, d_in, scale,
            mask_t, mask_s, CAUSAL, MASK, IN, INNER, PRECISION,
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(scores - finite[:, None])
        shrunk = tl.exp(largest - finite)
        total = total * shrunk + tl.sum(weights, axis=1)
        out *= shrunk[:, None]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)
        largest = larger
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    inverse = tl.where(total == 0, 0.0, 1 / total)
    out_ptr += z * time * d_out
    store_rows(out_ptr, out * inverse[:, None], i, time, d_out, OUT)
    stats_ptr += z * time + i
    tl.store(stats_ptr, largest, mask=i < time)
    tl.store(stats_ptr + many.to(tl.int64) * time, inverse, mask=i < time)


@triton.jit
def query_gradients_kernel(
    g_ptr,  # [heads, time, d_out]
    q_ptr,  # [heads, time, d_in]
    k_ptr,  # [groups, steps, d_in]
    v_ptr,  # [groups, steps, d_out]
    o_ptr,  # [heads, time, d_out]
    stats_ptr,  # [2, heads, time]
    mask_ptr,  # [batch, heads of a sample, time, steps]; or None
    dq_ptr,  # [heads, time, d_in]
    means_ptr,  # [heads, time]
    heads, shared, time, steps, d_in, d_out, scale,
    mask_b, mask_h, mask_t, mask_s, many,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """By rows: dq = scale ds k with ds = P (g v^T - D), and D = g . o of each row.

    Floor: g, q, k, v, o and the statistics read once, dq and 4 bytes a row written.
    """
    blocks = tl.cdiv(time, ROWS)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    i = first + tl.arange(0, ROWS)
    k_ptr += z // shared * steps * d_in
    v_ptr += z // shared * steps * d_out
    q_ptr += z * time * d_in
    g_ptr += z * time * d_out
    if MASK:
        mask_ptr += z // heads * mask_b + z % heads * mask_h
    q = load_rows(q_ptr, i, time, d_in, IN)
    g = load_rows(g_ptr, i, time, d_out, OUT)
    o = load_rows(o_ptr + z * time * d_out, i, time, d_out, OUT)
    mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    row = z * time + i
    tl.store(means_ptr + row, mean, mask=i < time)
    largest = tl.load(stats_ptr + row, mask=i < time, other=0.0)
    stats_ptr += many.to(tl.int64) * time
    inverse = tl.load(stats_ptr + row, mask=i < time, other=0.0)
    dq = tl.zeros((ROWS, IN), tl.float32)
    stop = tl.minimum(first + ROWS, steps) if CAUSAL else steps
    for start in range(0, stop, KEYS):
        j = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, j, steps, d_in, IN)
        v = load_rows(v_ptr, j, steps, d_out, OUT)
        p = probabilities(
            q, q_ptr, k, k_ptr, largest, inverse, mask_ptr, i, j, time, steps, d_in,
            scale, mask_t, mask_s, CAUSAL, MASK, IN, INNER, PRECISION,
        )  # fmt: skip
        dp = product(
            g, g_ptr, i, time, v, v_ptr, j, steps, d_out, OUT, INNER, PRECISION
        )
        ds = p * (dp - mean[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + z * time * d_in, dq * scale, i, time, d_in, IN)


@triton.jit
def key_gradients_kernel(
    g_ptr,  # [heads, time, d_out]
    q_ptr,  # [heads, time, d_in]
    k_ptr,  # [groups, steps, d_in]
    v_ptr,  # [groups, steps, d_out]
    means_ptr,  # [heads, time]
    stats_ptr,  # [2, heads, time]
    mask_ptr,  # [batch, heads of a sample, time, steps]; or None
    dk_ptr,  # [groups, steps, d_in]
    dv_ptr,  # [groups, steps, d_out]
    heads, shared, time, steps, d_in, d_out, scale,
    mask_b, mask_h, mask_t, mask_s, many,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """By keys: dk = scale ds^T q and dv = P^T g, with D of each row given.

    Floor: g, q, k, v, D and the statistics read once, dk and dv written.
    """
    blocks = tl.cdiv(steps, KEYS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * KEYS
    j = first + tl.arange(0, KEYS)
    k_ptr += n * steps * d_in
    v_ptr += n * steps * d_out
    k = load_rows(k_ptr, j, steps, d_in, IN)
    v = load_rows(v_ptr, j, steps, d_out, OUT)
    dk = tl.zeros((KEYS, IN), tl.float32)
    dv = tl.zeros((KEYS, OUT), tl.float32)
    begin = first // ROWS * ROWS if CAUSAL else 0
    for head in range(shared):
        z = n * shared + head
        place = z // heads * mask_b + z % heads * mask_h
        here = mask_ptr + place if MASK else mask_ptr
        q_here, g_here = q_ptr + z * time * d_in, g_ptr + z * time * d_out
        for start in range(begin, time, ROWS):
            i = start + tl.arange(0, ROWS)
            q = load_rows(q_here, i, time, d_in, IN)
            g = load_rows(g_here, i, time, d_out, OUT)
            row = z * time + i
            mean = tl.load(means_ptr + row, mask=i < time, other=0.0)
            largest = tl.load(stats_ptr + row, mask=i < time, other=0.0)
            row += many.to(tl.int64) * time
            inverse = tl.load(stats_ptr + row, mask=i < time, other=0.0)
            p = probabilities(
                q, q_here, k, k_ptr, largest, inverse, here, i, j, time, steps, d_in,
                scale, mask_t, mask_s, CAUSAL, MASK, IN, INNER, PRECISION,
            )  # fmt: skip
            dp = product(
                g, g_here, i, time, v, v_ptr, j, steps, d_out, OUT, INNER, PRECISION
            )
            ds = p * (dp - mean[:, None])
            weights = tl.trans(p.to(g.dtype))
            dv = tl.dot(weights, g, dv, input_precision=PRECISION)
            weights = tl.trans(ds.to(q.dtype))
            dk = tl.dot(weights, q, dk, input_precision=PRECISION)
    store_rows(dk_ptr + n * steps * d_in, dk * scale, j, steps, d_in, IN)
    store_rows(dv_ptr + n * steps * d_out, dv, j, steps, d_out, OUT)
