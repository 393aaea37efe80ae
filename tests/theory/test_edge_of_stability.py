"""SGD on least squares with more parameters than samples: it diverges past K = 1."""

import math

import pytest
import torch

from fastminima.theory import critical_learning_rate, stability_ratio

SAMPLES, PARAMETERS, WALKERS = 100, 400, 64
BATCH_SIZES = (1, 4, 16, 100)


def kernel():
    """X X' of Gaussian inputs: its spectrum / N is that of the Hessian X'X / N."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, PARAMETERS, generator=draw, dtype=torch.float64)
    return x @ x.T / PARAMETERS


def growth(gram, learning_rate, batch_size, steps):
    """log of how much the mean squared residual grew; batches without replacement.

    A step on the parameters, theta -= eta/S X_B' r_B, moves r = X theta - y
    by -eta/S (X X')_B r_B, so that the 400 parameters are never needed.
    """
    draw = torch.Generator().manual_seed(1)
    r = torch.randn(SAMPLES, WALKERS, generator=draw, dtype=torch.float64)
    start = r.square().mean()
    for _ in range(steps):
        order = torch.rand(WALKERS, SAMPLES, generator=draw)
        chosen = order.topk(batch_size, dim=1).indices
        mask = torch.zeros(WALKERS, SAMPLES, dtype=torch.float64).scatter_(
            1, chosen, 1.0
        )
        r = r - learning_rate / batch_size * (gram @ (mask.T * r))
    return math.log(r.square().mean() / start)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_converges_below_and_diverges_above(batch_size):
    gram = kernel()
    eigenvalues = torch.linalg.eigvalsh(gram) / SAMPLES
    critical = critical_learning_rate(eigenvalues, batch_size, SAMPLES)
    steps = {1: 2000, 4: 600, 16: 200, 100: 200}[batch_size]
    # At 0.9 and 1.1 the loss changed by e^5 and more: both ends are far from 0.
    assert growth(gram, 0.9 * critical, batch_size, steps) < -3
    assert growth(gram, 1.1 * critical, batch_size, steps) > 3


def test_the_edge_is_where_the_ratio_is_one():
    eigenvalues = torch.linalg.eigvalsh(kernel()) / SAMPLES
    for batch_size in BATCH_SIZES[:-1]:
        critical = critical_learning_rate(eigenvalues, batch_size, SAMPLES)
        ratio = stability_ratio(eigenvalues, critical, batch_size, SAMPLES)
        assert ratio == pytest.approx(1, abs=1e-9)
    full = critical_learning_rate(eigenvalues, SAMPLES, SAMPLES)
    assert full == pytest.approx(2 / eigenvalues.max().item())
    assert stability_ratio(eigenvalues, 1.01 * full, 1) == math.inf


def test_small_batches_are_limited_by_the_trace():
    """(eta / S) tr H = 2 / (1 - S / N) to first order in the learning rate."""
    eigenvalues = torch.ones(400, dtype=torch.float64)
    assert critical_learning_rate(eigenvalues, 1) / 2 * 400 == pytest.approx(
        1, abs=0.003
    )


def test_directions_without_curvature_do_not_count():
    eigenvalues = torch.tensor([2.0, 1.0, 0.0, -1e-9], dtype=torch.float64)
    both = [critical_learning_rate(e, 2) for e in (eigenvalues, eigenvalues[:2])]
    assert both[0] == both[1]


@pytest.mark.parametrize("eigenvalues", [[], [-1.0, 0.0]])
def test_refuses_a_spectrum_without_an_edge(eigenvalues):
    with pytest.raises(ValueError, match="needs a positive one"):
        critical_learning_rate(torch.tensor(eigenvalues), 4)
