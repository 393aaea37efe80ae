"""What the tests of the Triton kernels share: layouts, and room for rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from pytest import MarkDecorator
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["samples", "times", "slice", "transposed"]
HALF_ULP = 2.0**-24  # of float32, relative


def each_shape(shapes: list[tuple[int, ...]], *, halves: bool = False) -> MarkDecorator:
    """Run a test with every `shape`, in one `dtype` by turn, and the first in all.

    Interpreted programs take milliseconds each. With `halves`, for kernels whose tiles
    depend on the dtype, each shape comes in float32 and in one of the halves.
    """
    cases = [(shapes[0], dtype) for dtype in DTYPES]
    for i, shape in enumerate(shapes[1:], start=1):
        if halves:
            cases += [(shape, DTYPES[0]), (shape, DTYPES[1 + i % 2])]
        else:
            cases.append((shape, DTYPES[i % 3]))
    return pytest.mark.parametrize(("shape", "dtype"), cases)


def laid_out(layout: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Random `[batch, time, width]` as they come: by sample, by time, cut, transposed.

    A slice starts off the 16 bytes that vector loads want.
    """
    batch, time, width = shape
    match layout:
        case "samples":
            return torch.randn(batch, time, width).to(dtype)
        case "times":
            return torch.randn(time, batch, width).to(dtype).transpose(0, 1)
        case "slice":
            return torch.randn(batch, time, width + 3).to(dtype)[:, :, 1 : 1 + width]
        case "transposed":
            return torch.randn(batch, width, time).to(dtype).transpose(1, 2)
    raise LookupError(layout)


@contextlib.contextmanager
def far_apart(
    shape: tuple[int, int, int], strides: tuple[int, int, int]
) -> Iterator[Tensor]:
    """A float16 `[batch, time, width]` in 4 GB of memory, of which little is touched.

    An offset that was computed in 32 bits is wrong in it.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        whole = torch.empty(2**31 + 2**10, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    yield whole.as_strided(shape, strides).copy_(torch.randn(shape))


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    """The oracle's arguments."""
    return [None if t is None else t.double() for t in tensors]


def assert_within(got: Tensor, want: Tensor, size: Tensor, roundings: int) -> None:
    """Compare with float64, where each term of a sum was rounded some times.

    Args:
        got: The kernel's result, float32.
        want: The oracle's, float64.
        size: The same sums over absolute values: what the roundings are relative to.
        roundings: How many a term passes through.
    """
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    error = (got.double() - want).abs()
    fits = error <= roundings * HALF_ULP * size.abs() + 1e-30
    assert fits.all(), f"{error[~fits][:3]} past {size.abs()[~fits][:3]} in size"


def sequences(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random inputs and output gradients, of batch, time, d_in and d_out."""
    batch, time, d_in, d_out = shape
    a, g = torch.randn(batch, time, d_in), torch.randn(batch, time, d_out)
    return a.to(dtype), g.to(dtype)


def cancelling(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Three samples; the steps of the middle one cancel but for a thousandth."""
    a, g = sequences((3, 6, 200, 150))
    a[1] = 1 + a[1] / 1000
    g[1, 1::2] = -g[1, ::2]
    return a.to(dtype), g.to(dtype)
