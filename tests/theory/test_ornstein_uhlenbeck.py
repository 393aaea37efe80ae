"""SGD on linear regression: stationary variances, in discrete time."""

import math

import pytest
import torch

from fastminima.theory import stability_ratio, stationary_variances

MODES = torch.linspace(1.0, 0.2, 20, dtype=torch.float64)


def simulate(learning_rate, batch_size, *, walkers=500, times=30, sigma=1.0):
    """E z_i^2 of SGD on fresh samples x ~ N(0, diag(MODES)), residuals ~ N(0, sigma^2).

    All walkers and samples at once; `times` relaxation times of the slowest mode.
    """
    noise = torch.Generator().manual_seed(0)
    scale = MODES.float().sqrt()
    z = torch.zeros(walkers, len(MODES))
    total = torch.zeros(len(MODES))
    relaxation = 1 / (learning_rate * MODES.min().item())
    burn_in, steps = int(5 * relaxation), int((5 + times) * relaxation)
    x = torch.empty(walkers, batch_size, len(MODES))
    label = torch.empty(walkers, batch_size, 1)
    for step in range(steps):
        x.normal_(generator=noise).mul_(scale)
        residual = torch.baddbmm(
            label.normal_(0, sigma, generator=noise), x, z[..., None]
        )
        z = z - learning_rate / batch_size * torch.bmm(x.mT, residual)[..., 0]
        if step >= burn_in:
            total += z.square().mean(dim=0)
    return total.double() / (steps - burn_in)


def gaussian_variances(learning_rate, batch_size, sigma=1.0):
    """E z_i^2 without approximation: for Gaussian x the noise has HZH as well."""
    rates = learning_rate * MODES
    loops = 2 - rates - rates / batch_size
    feedback = (rates / loops).sum() / batch_size
    return learning_rate * sigma**2 / batch_size / loops / (1 - feedback)


SETTINGS = [(0.03, 4), (0.05, 4), (0.1, 6), (0.1, 8), (0.2, 16)]


@pytest.mark.parametrize(("learning_rate", "batch_size"), SETTINGS)
def test_stationary_variances(learning_rate, batch_size):
    assert stability_ratio(MODES, learning_rate, batch_size) <= 0.12
    want = stationary_variances(MODES, learning_rate, batch_size)
    got = simulate(learning_rate, batch_size)
    # The prediction leaves out HZH, at most 1/modes-th of the feedback K.
    assert (got / want).mean().item() == pytest.approx(1.0075, abs=0.0075)
    exact = gaussian_variances(learning_rate, batch_size)
    # 500 walkers over at least 30 relaxation times, two of which make a sample.
    assert (got / exact - 1).abs().max() < 4 * math.sqrt(2 / (500 * 30 / 2))


def test_feedback_and_discrete_time_matter():
    """Without 2 - eta lambda and 1 - K the same simulation would be missed by 15 %."""
    learning_rate, batch_size = 0.1, 6
    got = simulate(learning_rate, batch_size, times=15)
    assert got.mean() / (learning_rate / (2 * batch_size)) > 1.12


def test_drawing_without_replacement_takes_the_full_batch_noise_away():
    full = stationary_variances(MODES, 0.1, 50, dataset_size=50)
    assert torch.equal(full, torch.zeros_like(MODES))
    half = stationary_variances(MODES, 0.001, 50, dataset_size=100)
    stream = stationary_variances(MODES, 0.001, 50)
    torch.testing.assert_close(
        half / stream, torch.full_like(MODES, 0.5), rtol=1e-3, atol=0
    )


def test_small_learning_rates_give_the_width_law():
    """E L - L* = (eta sigma^2 / 4S) tr H."""
    variances = stationary_variances(MODES, 1e-5, 10, residual_variance=3.0)
    excess = (MODES * variances).sum().item() / 2
    assert excess == pytest.approx(1e-5 * 3 / (4 * 10) * MODES.sum().item(), rel=1e-4)


def test_refuses_where_there_is_no_stationary_state():
    with pytest.raises(ValueError, match=r"K = .*critical_learning_rate"):
        stationary_variances(MODES, 0.5, 1)
    with pytest.raises(ValueError, match="got 8 of 4"):
        stationary_variances(MODES, 0.1, 8, dataset_size=4)
