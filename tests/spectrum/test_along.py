"""Curvature along steps of training, against dense matrices."""

import math

import pytest
import torch
from torch import nn

import fastminima as fm


def squared(model, batch):
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(1).mean()


@pytest.fixture
def regression(device):
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double().to(device)
    x, y = torch.randn(40, 6).double(), torch.randn(40, 1).double()
    return model, (x.to(device), y.to(device))


def dense(model, batch):
    """Hessian and gradient of a linear regression, in closed form."""
    x, y = batch
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype, device=x.device)], 1)
    residual = (model(x) - y).detach()
    return inputs.T @ inputs / len(x), (inputs * residual).mean(0)


def quotient(matrix, u):
    return float(u @ matrix @ u / (u @ u))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_directional_sharpness(regression, scale):
    model, batch = regression
    matrix, gradient = dense(model, batch)
    H = fm.Hessian(model, squared, batch)
    assert fm.directional_sharpness(H) == pytest.approx(quotient(matrix, gradient))
    u = torch.linspace(-1, 2, 7).to(matrix)
    found = fm.directional_sharpness(H, scale * u)
    assert found == pytest.approx(quotient(matrix, u), rel=1e-6)
    assert fm.directional_sharpness(matrix, u) == pytest.approx(quotient(matrix, u))


def test_batch_sharpness(regression):
    model, (x, y) = regression
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    want = torch.tensor([quotient(*dense(model, batch)) for batch in batches]).double()
    found = fm.batch_sharpness(model, squared, batches)
    assert found.value == pytest.approx(float(want.mean()))
    assert found.standard_error == pytest.approx(float(want.std()) / math.sqrt(5))
    assert found.degrees == 4
    assert found.products == 6  # the first is made twice


def test_batches_without_a_gradient_say_nothing(regression):
    model, (x, y) = regression
    flat = (x[:8], model(x[:8]).detach())
    batches = [(x[:8], y[:8]), flat, (x[8:16], y[8:16])]
    with_flat = fm.batch_sharpness(model, squared, batches)
    without = fm.batch_sharpness(model, squared, [batches[0], batches[2]])
    assert with_flat.value == without.value
    with pytest.raises(ValueError, match="1 batches had a gradient"):
        fm.batch_sharpness(model, squared, [batches[0], flat])


@pytest.mark.parametrize(
    "direction",
    [torch.zeros(7), torch.ones(6), torch.full((7,), math.nan), torch.ones(0)],
    ids=["zero", "another size", "not finite", "empty"],
)
def test_directions_that_are_none(regression, direction):
    model, batch = regression
    H = fm.Hessian(model, squared, batch)
    with pytest.raises(ValueError, match="direction must have 7 finite numbers"):
        fm.directional_sharpness(H, direction)


def test_a_matrix_without_a_gradient():
    with pytest.raises(ValueError, match="pass the direction"):
        fm.directional_sharpness(torch.eye(3))
