"""The loop over the implementations of an op."""

import importlib.util

import pytest
import torch
from torch import Tensor

from fastminima._dtypes import accumulation_dtype

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("test_triton_*.py")


def _double(value):
    if isinstance(value, list):
        return [_double(part) for part in value]
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _check(op, *args, dtype=None, rtol=None, atol=None, nonnegative=False):
    """Compare every implementation with the reference in float64.

    Results must come in the accumulation dtype of the first floating argument.
    """
    first = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
    dtype = accumulation_dtype(first.dtype)
    want = op.reference(*map(_double, args))
    for backend in op.backends("cpu", args[0].dtype):
        got = op.on(backend, "cpu", args[0].dtype)(*args)
        many = isinstance(got, tuple)
        for part, truth in zip(
            *((got, want) if many else ([got], [want])), strict=True
        ):
            if truth is None:
                assert part is None, backend
                continue
            assert part.dtype == dtype, backend
            assert not nonnegative or bool((part >= 0).all()), backend
            torch.testing.assert_close(
                part,
                truth.to(dtype),
                rtol=rtol,
                atol=atol,
                msg=lambda m, b=backend: f"{op.name} by {b}: {m}",
            )


@pytest.fixture
def check():
    """Compare every implementation of an op with its reference in float64."""
    return _check


if importlib.util.find_spec("triton") is not None:
    from tools.kernels.place import Cuda, Interpreter

    @pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
    def place(request) -> Interpreter | Cuda:
        """Where a launcher of Triton kernels runs: `place(launcher, *args)`."""
        if request.param == "interpreter":
            return Interpreter()
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return Cuda()
