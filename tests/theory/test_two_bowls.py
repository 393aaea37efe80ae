"""SGD with isotropic noise in two bowls: Gibbs occupancy, and where it breaks down.

L(x) = min(.05 + (x + .6)^2 / 2, 16 (x - .25)^2 / 2), the first bowl flat and higher.
"""

import math

import pytest
import torch

import fastminima as fm
from fastminima.theory import bowl_occupancy, crossover_temperature

SIGMA = 20.0
CURVATURES = torch.tensor([1.0, 16.0], dtype=torch.float64)
BOTTOMS = torch.tensor([0.05, 0.0], dtype=torch.float64)


def loss_and_slope(x):
    flat, sharp = 0.05 + (x + 0.6).square() / 2, 8 * (x - 0.25).square()
    in_flat = flat < sharp
    return torch.minimum(flat, sharp), torch.where(in_flat, x + 0.6, 16 * (x - 0.25))


def is_flat(x):
    return 0.05 + (x + 0.6).square() / 2 < 8 * (x - 0.25).square()


def gibbs(temperature):
    """P(flat bowl) under exp(-L / n), by quadrature."""
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    weight = torch.exp(-loss_and_slope(x)[0] / temperature)
    return (weight[is_flat(x)].sum() / weight.sum()).item()


def occupancy(rates, batch_sizes, *, steps, walkers=1000):
    """Share of SGD's time in the flat bowl, all settings (rows) at once."""
    noise = torch.Generator().manual_seed(0)
    eta = torch.tensor(rates, dtype=torch.float32).unsqueeze(1)
    spread = eta * SIGMA / torch.tensor(batch_sizes).float().sqrt().unsqueeze(1)
    half = torch.full((len(rates), walkers // 2), 1.0)
    x = torch.cat([-0.6 * half, 0.25 * half], dim=1)
    count = torch.zeros(len(rates))
    kick = torch.empty_like(x)
    for step in range(steps):
        x = x - eta * loss_and_slope(x)[1] + spread * kick.normal_(generator=noise)
        if step >= steps // 3:
            count += is_flat(x).float().mean(dim=1)
    return (count / (steps - steps // 3)).tolist()


WANTED = {0.05: 0.595, 0.10: 0.707, 0.20: 0.755}


@pytest.mark.parametrize(("temperature", "want"), WANTED.items())
def test_gibbs_occupancy(temperature, want):
    assert gibbs(temperature) == pytest.approx(want, abs=6e-4)
    closed = bowl_occupancy(BOTTOMS, CURVATURES.log(), temperature)[0].item()
    # The bowls are cut where they meet: Laplace's approximation is a little off.
    assert closed == pytest.approx(want, abs=3e-3)


def test_sgd_has_the_gibbs_occupancy():
    batch_sizes = [20, 10, 5]
    temperatures = [
        fm.ThreeFactors(0.005, s, SIGMA**2).temperature for s in batch_sizes
    ]
    assert temperatures == pytest.approx(list(WANTED))
    got = occupancy([0.005] * 3, batch_sizes, steps=20_000)
    assert got == pytest.approx(list(WANTED.values()), abs=0.03)


def test_langevin_has_the_gibbs_occupancy():
    x = torch.cat([torch.full((500,), -0.6), torch.full((500,), 0.25)]).requires_grad_()
    optimizer = fm.optim.Langevin([x], 0.01, 0.1, momentum=0.5, seed=1)
    share = []
    for step in range(6000):
        x.grad = loss_and_slope(x.detach())[1]
        optimizer.step()
        if step >= 2000:
            share.append(is_flat(x.detach()).float().mean())
    assert torch.stack(share).mean().item() == pytest.approx(0.707, abs=0.03)


# eta * lambda_max, with lambda_max = 16 of the sharp bowl: P(flat) at n = .05.
BREAKDOWN = {0.04: 0.602, 0.08: 0.614, 0.32: 0.704}
BREAKDOWN |= {0.64: 0.828, 1.28: 0.961, 1.92: 0.992}


def test_scaling_both_factors_holds_only_while_the_rate_is_small():
    """Same n = .05: invariant for eta lambda_max < .1, then the flat bowl gains."""
    rates = [r / 16 for r in BREAKDOWN]
    batch_sizes = [eta * SIGMA**2 / (2 * 0.05) for eta in rates]
    # Crossing the barrier takes a fixed time eta * steps, so small rates need more.
    slow = occupancy(rates[:2], batch_sizes[:2], steps=80_000)
    got = slow + occupancy(rates[2:], batch_sizes[2:], steps=10_000)
    assert got == pytest.approx(list(BREAKDOWN.values()), abs=0.03)
    assert got == sorted(got)
    assert abs(got[0] - WANTED[0.05]) < 0.03
    assert got[-1] - WANTED[0.05] > 0.3


def test_crossover():
    """At the crossover both bowls are equally likely; hotter favours the flat one."""
    n = crossover_temperature(0.05, math.log(16))
    both = bowl_occupancy(BOTTOMS, CURVATURES.log(), n)
    assert both.tolist() == pytest.approx([0.5, 0.5])
    assert bowl_occupancy(BOTTOMS, CURVATURES.log(), 1.1 * n)[0] > 0.5


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_refuses_a_temperature(temperature):
    with pytest.raises(ValueError, match=f"positive, got {temperature}"):
        bowl_occupancy(BOTTOMS, CURVATURES.log(), temperature)


@pytest.mark.parametrize("differences", [(-0.1, 1.0), (0.1, -1.0), (0.1, 0.0)])
def test_refuses_minima_without_a_crossover(differences):
    with pytest.raises(ValueError, match="higher and flatter"):
        crossover_temperature(*differences)
