"""Where training settles: at the edges of stability, by measured curvature.

Small networks, trained until the sharpness stops to rise. The numbers are shares
of the edge; Cohen et al. (2021, 2022) and Andreyev and Beneventano (2024) found one.
"""

import statistics

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.theory import edge_of_stability

# Shares of an edge depend on every step before, and no device rounds like another.
pytestmark = pytest.mark.usefixtures("on_the_cpu")


def half_squares(model, batch):
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(1).mean()


def network(seed, samples, width):
    torch.manual_seed(seed)
    x = torch.randn(samples, 6)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1)), (x, y)


def trained(model, optimizer, batches, measure, steps):
    """What `measure` says after each of these steps."""
    found = {}
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        half_squares(model, next(batches)).backward()
        optimizer.step()
        if step in steps:
            found[step] = measure()
    return found


def always(batch):
    while True:
        yield batch


def test_gradient_descent():
    """The sharpness rises to 2 / learning rate, and stays."""
    model, data = network(0, 128, 48)
    edge = edge_of_stability(0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    sharpness = fm.SharpnessProbe(model, half_squares)

    def share():
        pairs = sharpness(data)
        assert pairs.converged
        return float(pairs.values[0]) / edge

    steps = [5, *range(600, 1001, 100)]
    found = trained(model, optimizer, always(data), share, steps)
    assert found.pop(5) < 0.85
    assert list(found.values()) == pytest.approx([1.0] * len(found), rel=0.1)


def test_adam():
    """The preconditioned sharpness rises to 38 / learning rate."""
    model, data = network(0, 64, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005, betas=(0.9, 0.99))
    edge = edge_of_stability(0.005, 0.9, 0.9)

    def share():
        H = fm.Hessian(model, half_squares, data)
        divisor = fm.preconditioner(model, optimizer)
        return float(fm.top_eigenpairs(H.preconditioned(divisor)).values[0]) / edge

    steps = [50, *range(1000, 2001, 250)]
    found = trained(model, optimizer, always(data), share, steps)
    assert found.pop(50) < 0.3
    assert statistics.fmean(found.values()) == pytest.approx(1.0, rel=0.1)


def test_sgd():
    """Batch sharpness rises to 2 / learning rate."""
    model, (x, y) = network(0, 128, 48)
    edge = edge_of_stability(0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    generator = torch.Generator().manual_seed(0)

    def drawn():
        while True:
            rows = torch.randperm(len(x), generator=generator)[:16]
            yield x[rows], y[rows]

    batches = drawn()

    def share():
        some = [next(batches) for _ in range(24)]
        found = fm.batch_sharpness(model, half_squares, some)
        assert 0 < found.standard_error < 0.1 * edge
        return found.value / edge

    steps = [5, *range(2000, 4001, 400)]
    found = trained(model, optimizer, batches, share, steps)
    assert found.pop(5) < 0.7
    assert statistics.fmean(found.values()) == pytest.approx(1.0, rel=0.1)
