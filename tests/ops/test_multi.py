"""Sums over lists of tensors, against the same on one flat vector."""

import pytest
import torch

from fastminima.ops.multi import multi_sq_norm

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(3,), (0,), (), (5, 7), (1000,)]


def flat(tensors):
    return torch.cat([x.double().flatten() for x in tensors])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sq_norm(dtype):
    xs = [*(torch.randn(s).to(dtype) for s in SHAPES), torch.randn(6, 4).to(dtype).t()]
    norm = multi_sq_norm(xs)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, flat(xs).square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sq_norm_by_every_implementation(dtype):
    sizes = [(3, 5), (0,), (1 << 18,), (2000, 1500), (1,)]  # for two threads
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    tensors.append(tensors[3].T[1:])
    want = multi_sq_norm.reference(tensors)
    before = torch.get_num_threads()
    for backend in multi_sq_norm.backends("cpu", dtype):
        run = multi_sq_norm.on(backend, "cpu", dtype)
        try:
            torch.set_num_threads(1)
            one = run(tensors)
            torch.set_num_threads(2)
            two = run(tensors)
            if backend == "reference":  # PyTorch's sums depend on the threads
                torch.testing.assert_close(two, one)
            else:
                assert torch.equal(two, one), backend
        finally:
            torch.set_num_threads(before)
        assert one.dtype == torch.float64, backend
        rtol = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(one, want, rtol=rtol, atol=0)
