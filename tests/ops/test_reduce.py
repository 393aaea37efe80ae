"""The squared norm of a dense tensor: every implementation against float64."""

from contextlib import contextmanager

import pytest
import torch

from fastminima._dtypes import accumulation_dtype
from fastminima.ops.reduce import joint_sq_norm, sq_norm


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
    x = torch.randn(2_000_003)
    for backend in sq_norm.backends("cpu", torch.float32):
        run = sq_norm.on(backend, "cpu", torch.float32)
        if backend == "reference":
            continue
        with threads(1):
            one = run(x)
        with threads(2):
            assert torch.equal(run(x), one), backend


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tensors_together(dtype):
    sizes = [(3, 5), (0,), (1 << 18,), (600, 700), (1,)]
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    tensors.append(tensors[3].T[1:])
    want = sum(x.double().square().sum() for x in tensors)
    for backend in joint_sq_norm.backends("cpu", dtype):
        run = joint_sq_norm.on(backend, "cpu", dtype)
        for n in (1, 2):
            with threads(n):
                got = run(tensors[0], tensors[1:])
            assert got.dtype == accumulation_dtype(dtype), backend
            rtol = 1e-13 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)
