"""The squared norm of a dense tensor: every implementation against float64."""

import pytest
import torch

from fastminima.ops.reduce import sq_norm

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (1 << 16,), (300, 1001)])
def test_every_implementation(check, shape, dtype):
    x = torch.randn(shape).to(dtype)
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    check(sq_norm, x, rtol=rtol, atol=0, nonnegative=True)
    if x.dim() == 2:
        check(sq_norm, x.T, rtol=rtol, atol=0)
        check(sq_norm, x[:, 1:], rtol=rtol, atol=0)
