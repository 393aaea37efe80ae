"""Calls of the CUDA kernels for embedding tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype
from .._arguments import SUFFIX, contiguous_rows
from ._launch import scratch, stream

__all__ = ["embedding_dots", "embedding_second_moment", "embedding_sq_norms"]


def _sorted_steps(
    kernels: Any, ids: Tensor, padding_idx: int, lists: int, length: int
) -> Tensor:
    """Scratch that holds the steps of each list, sorted by id."""
    words = torch.empty(
        kernels.sort_words(lists, length), dtype=torch.int64, device=ids.device
    )
    kernels.sort_steps(
        *(ids.data_ptr(), *ids.stride(), lists, length, ids.shape[1], padding_idx),
        *(words.data_ptr(), stream(ids)),
    )
    return words


def _rows(g: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    g = contiguous_rows(g)
    return g, (g.data_ptr(), g.stride(0), g.stride(1))  # the tensor must outlive it


def embedding_sq_norms(
    kernels: Any, ids: Tensor, g: Tensor, padding_idx: int
) -> Tensor:
    """See `fastminima.ops.embedding.embedding_sq_norms`."""
    g, rows = _rows(g)
    norms = g.new_empty(len(g), dtype=accumulation_dtype(g.dtype))
    words = _sorted_steps(kernels, ids, padding_idx, *ids.shape)
    partials = scratch(kernels.embedding_partials(*g.shape), g)
    getattr(kernels, f"embedding_sq_norms_{SUFFIX[g.dtype]}")(
        *(words.data_ptr(), *rows, *g.shape, partials.data_ptr(), norms.data_ptr()),
        stream(g),
    )
    return norms


def embedding_second_moment(
    kernels: Any, ids: Tensor, g: Tensor, padding_idx: int, num_embeddings: int
) -> Tensor:
    """See `fastminima.ops.embedding.embedding_second_moment`."""
    g, rows = _rows(g)
    dtype = accumulation_dtype(g.dtype)
    total = g.new_zeros(num_embeddings, g.shape[2], dtype=dtype)
    words = _sorted_steps(kernels, ids, padding_idx, 1, ids.numel())
    getattr(kernels, f"embedding_second_moment_{SUFFIX[g.dtype]}")(
        words.data_ptr(), *rows, *g.shape, total.data_ptr(), stream(g)
    )
    return total


def embedding_dots(
    kernels: Any, ids: Tensor, g: Tensor, padding_idx: int, v: Tensor
) -> Tensor:
    """See `fastminima.ops.embedding.embedding_dots`."""
    g, rows = _rows(g)
    wide = accumulation_dtype(g.dtype)
    v = contiguous_rows(v if v.dtype in (g.dtype, wide) else v.to(wide))
    dots = g.new_empty(len(g), dtype=wide)
    partials = scratch(kernels.embedding_dot_partials(*g.shape), g)
    getattr(kernels, f"embedding_dots_{SUFFIX[g.dtype]}")(
        *(ids.data_ptr(), *ids.stride(), *rows, *g.shape, padding_idx),
        *(v.data_ptr(), v.stride(0), v.dtype == wide, partials.data_ptr()),
        *(dots.data_ptr(), stream(g)),
    )
    return dots
