"""Tensors for the tests of CUDA kernels, and how they are compared."""

import torch

FLOATS = [torch.float32, torch.float64]
ALL = [*FLOATS, torch.float16, torch.bfloat16]


def shifted(size, dtype, shift):
    """Random numbers `shift` elements behind an address that is a multiple of 16."""
    return torch.randn(size + shift).to(dtype)[shift:]


def same(got, want, **close):
    torch.testing.assert_close(got, want.to(got.dtype), **close)
