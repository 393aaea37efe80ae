"""The squared norm of a dense tensor: every implementation against float64."""

from contextlib import contextmanager

import pytest
import torch

from fastminima.ops.reduce import sample_sq_norms, sq_norm


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def test_a_long_sum_keeps_its_precision(check):
    x = torch.full((30_000_001,), 1.1)
    check(sq_norm, x, rtol=1e-6, atol=0)


def test_the_result_does_not_depend_on_the_number_of_threads():
    x = torch.randn(5_000_003)  # 20 MB: two threads share it
    for backend in sq_norm.backends("cpu", torch.float32):
        run = sq_norm.on(backend, "cpu", torch.float32)
        if backend == "reference":
            continue
        with threads(1):
            one = run(x)
        with threads(2):
            assert torch.equal(run(x), one), backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (5, 37), (3, 10_000)])
def test_norms_of_samples(check, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    check(sample_sq_norms, x, rtol=rtol, atol=0, nonnegative=True)
    wide = torch.randn(shape[0], shape[1] + 3, dtype=dtype)
    check(sample_sq_norms, wide[:, 1 : 1 + shape[1]], rtol=rtol, atol=0)
    check(sample_sq_norms, wide.T, rtol=rtol, atol=0)


def test_norms_of_samples_neither_overflow_nor_lose_precision(check):
    long = torch.full((2, 3_000_001), 1.1)
    check(sample_sq_norms, long, rtol=1e-6, atol=0)
    check(sample_sq_norms, torch.full((2, 100), 1e18), rtol=1e-6, atol=0)
