"""Biases and scales: every implementation against the float64 reference."""

import pytest
import torch

from fastminima.ops import broadcast

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [
    (3, 5, 7),
    (1, 1, 1),
    (2, 33, 64),
    (0, 3, 4),
    (3, 0, 4),
    (4, 2, 131),
    (2, 6, 1),
]


def layouts(batch, time, width, dtype):
    yield torch.randn(batch, time, width).to(dtype)
    yield torch.randn(time, batch, width).to(dtype).transpose(0, 1)
    yield torch.randn(batch, time, width + 3).to(dtype)[:, :, 1 : 1 + width]
    yield torch.randn(batch, width, time).to(dtype).transpose(1, 2)
    yield torch.randn(batch, 1, width).to(dtype).expand(-1, time, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums(check, shape, dtype):
    room = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-4}
    for g in layouts(*shape, dtype):
        check(broadcast.sum_over_time, g, **room)
        check(broadcast.sum_over_space, g, **room)
        for x in layouts(*shape, dtype):
            check(broadcast.product_over_time, g, x, **room)


def test_half_precision_sums_do_not_overflow():
    g = torch.full((2, 3000, 4), 60.0, dtype=torch.float16)
    torch.testing.assert_close(broadcast.sum_over_time(g), torch.full((2, 4), 180000.0))
