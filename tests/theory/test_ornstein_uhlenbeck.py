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


def simulate_saddle(start, *, steps, walkers=4000, learning_rate=0.1, batch_size=10):
    """E z_i^2 after SGD on fresh samples of (x z_0 - r)^2 / 2 - z_2^2 / 4 - r z_2.

    The mean loss has the Hessian diag(1, 0, -1/2) at z = 0; all walkers at `start`.
    """
    noise = torch.Generator().manual_seed(0)
    z = torch.tensor(start, dtype=torch.float64).repeat(walkers, 1)
    for _ in range(steps):
        x, r = torch.randn(2, walkers, batch_size, generator=noise, dtype=torch.float64)
        error = x * z[:, :1] - r
        gradients = (error * x, torch.zeros_like(x), -z[:, 2:] / 2 - r)
        z = z - learning_rate * torch.stack([g.mean(1) for g in gradients], dim=1)
    return z.square().mean(dim=0)


def test_flat_and_falling_directions_have_no_stationary_state():
    """Flat ones stay where they began, falling ones leave: the formula says NaN."""
    eigenvalues = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
    want = stationary_variances(eigenvalues, 0.1, 10)
    assert want.isnan().tolist() == [False, True, True]
    alone = stationary_variances(eigenvalues[:1], 0.1, 10)
    assert torch.equal(want[:1], alone)
    early, late = (simulate_saddle([0.0, 0.0, 0.0], steps=n) for n in (150, 200))
    elsewhere = simulate_saddle([3.0, 3.0, 0.0], steps=200)
    # One direction, so the HZH left out counts as much as the feedback: exactly it is
    # eta / S / (2 - eta - 2 eta / S), half a percent above the prediction.
    exact = 0.1 / 10 / (2 - 0.1 - 2 * 0.1 / 10)
    spread = 4 * math.sqrt(2 / 4000)
    for got in (late, elsewhere):
        assert got[0].item() == pytest.approx(exact, rel=spread)
    assert exact == pytest.approx(want[0].item(), rel=0.006)
    assert late[1] == 0
    assert elsewhere[1] == 9
    # 1 + eta / 2 a step, squared, over 50 steps: 131.
    assert (late[2] / early[2]).item() == pytest.approx(1.05**100, rel=0.05)


def test_nothing_moves_without_a_learning_rate():
    assert stationary_variances(MODES, 0.0, 10).isnan().all()


def test_nan_is_passed_on():
    eigenvalues = torch.tensor([1.0, math.nan])
    assert math.isnan(stability_ratio(eigenvalues, 0.1, 10))
    assert stationary_variances(eigenvalues, 0.1, 10).isnan().all()


def test_refuses_where_there_is_no_stationary_state():
    with pytest.raises(ValueError, match=r"K = .*critical_learning_rate"):
        stationary_variances(MODES, 0.5, 1)
    with pytest.raises(ValueError, match="got 8 of 4"):
        stationary_variances(MODES, 0.1, 8, dataset_size=4)
    with pytest.raises(ValueError, match="not be negative, got -1"):
        stationary_variances(MODES, 0.1, 8, residual_variance=-1.0)


def test_refuses_one_direction_beyond_two():
    """eta lambda >= 2 in one direction leaves none with a stationary state."""
    eigenvalues = torch.tensor([2.0, 0.1, 0.0])
    assert stationary_variances(eigenvalues, 0.9, 100)[:2].isfinite().all()
    for rate in (1.0, 1.5):
        with pytest.raises(ValueError, match=f"K = inf at learning rate {rate}"):
            stationary_variances(eigenvalues, rate, 100)


@pytest.mark.parametrize("rate", [-0.1, math.inf, math.nan])
def test_refuses_a_learning_rate(rate):
    with pytest.raises(ValueError, match=f"not negative, got {rate}"):
        stability_ratio(MODES, rate, 4)
