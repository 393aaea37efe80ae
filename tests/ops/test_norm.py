"""Normalisation layers: against the float64 reference and against autograd."""

import pytest
import torch
from torch.nn import functional as F

from fastminima.ops import norm

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(3, 5, 7), (1, 1, 1), (2, 33, 64), (0, 3, 4), (3, 0, 4), (4, 2, 131)]


def layouts(batch, time, width, dtype):
    yield torch.randn(batch, time, width).to(dtype)
    yield torch.randn(time, batch, width).to(dtype).transpose(0, 1)
    yield torch.randn(batch, time, width + 3).to(dtype)[:, :, 1 : 1 + width]
    yield torch.randn(batch, width, time).to(dtype).transpose(1, 2)


def bound(dtype):
    return {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-4}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(check, shape, dtype):
    batch, time, _ = shape
    for g in layouts(*shape, dtype):
        for x in layouts(*shape, dtype):
            rstd = torch.rand(batch, time, dtype=torch.float64) + 0.5
            mean = torch.randn(time, batch, dtype=torch.float64).T
            stats = torch.promote_types(dtype, torch.float32)
            rstd, mean = rstd.to(stats), mean.to(stats)
            check(norm.layer_norm_gradients, g, x, mean, rstd, **bound(dtype))
            check(norm.layer_norm_gradients, g, x, None, rstd, **bound(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 6, 10), (1, 2, 1), (2, 12, 65), (0, 4, 3), (2, 4, 0)]
)
@pytest.mark.parametrize("shared", [True, False])
def test_channel_norm(check, shape, shared, dtype):
    batch, channels, _ = shape
    for g, x in zip(layouts(*shape, dtype), layouts(*shape, dtype), strict=True):
        for groups in (1, 2, channels):
            size = (1 if shared else batch, groups)
            mean, rstd = torch.randn(size).to(dtype), torch.rand(size).to(dtype) + 0.5
            check(norm.channel_norm_gradients, g, x, mean, rstd, **bound(dtype))


def test_layer_norm_against_autograd():
    x, g = torch.randn(3, 4, 8).double(), torch.randn(3, 4, 8).double()
    scale = torch.ones(8).double().requires_grad_()
    shift = torch.zeros(8).double().requires_grad_()
    mean = x.mean(2)
    rstd = (x.var(2, unbiased=False) + 1e-5).rsqrt()
    weight, bias = norm.layer_norm_gradients.reference(g, x, mean, rstd)
    for n in range(3):
        out = F.layer_norm(x[n], (8,), scale, shift)
        want = torch.autograd.grad(out, (scale, shift), g[n])
        torch.testing.assert_close((weight[n], bias[n]), want)


def test_group_norm_against_autograd():
    x, g = torch.randn(3, 6, 5).double(), torch.randn(3, 6, 5).double()
    scale = torch.ones(6).double().requires_grad_()
    shift = torch.zeros(6).double().requires_grad_()
    parts = x.reshape(3, 2, -1)
    mean = parts.mean(2)
    rstd = (parts.var(2, unbiased=False) + 1e-5).rsqrt()
    weight, bias = norm.channel_norm_gradients.reference(g, x, mean, rstd)
    for n in range(3):
        out = F.group_norm(x[n : n + 1], 2, scale, shift)
        want = torch.autograd.grad(out, (scale, shift), g[n : n + 1])
        torch.testing.assert_close((weight[n], bias[n]), want)


@pytest.mark.parametrize("shape", [(3, 500, 300), (40, 60, 130), (2, 3, 100000)])
def test_sizes_that_occupy_several_threads(check, shape):
    g, x = torch.randn(shape), torch.randn(shape)
    rows, channels = torch.randn(shape[:2]), torch.randn(1, shape[1])
    room = {"rtol": 1e-4, "atol": 1e-3}
    check(norm.layer_norm_gradients, g, x, rows, rows.exp(), **room)
    check(norm.channel_norm_gradients, g, x, channels, channels.exp(), **room)
