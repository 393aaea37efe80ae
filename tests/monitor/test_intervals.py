"""The interval of the smoothed noise scale: how often it holds, and where it ends."""

import json
import math

import numpy as np
import pytest

from fastminima.monitor.signs import _root_bias, sign_columns
from fastminima.monitor.smoothing import SmoothedNoiseScale, _student

SEEDS, TRACE = 500, 10.0


def smoothed_over_seeds(signal, decay=0.95, steps=120, correlation=0.0, seed=0):
    """Gaussian gradients of batches of 16, their variance as uneven as 1 / k.

    Averages over steps of 500 runs side by side, as the probe's unbiased estimates
    would give them. `correlation` is that of the mean gradient's noise in neighbouring
    steps.
    """
    random = np.random.default_rng(seed)
    variances = 1 / np.arange(1, 41)
    variances *= TRACE / variances.sum()
    mean = math.sqrt(signal / 40)
    smoothed, noise = SmoothedNoiseScale(decay), None
    for _ in range(steps):
        new = random.standard_normal((SEEDS, 40)) * np.sqrt(variances / 16)
        if noise is None or not correlation:
            noise = new
        noise = correlation * noise + math.sqrt(1 - correlation**2) * new
        if not correlation:
            noise = new
        trace = (variances * random.chisquare(15, (SEEDS, 40)) / 15).sum(1)
        power = np.square(mean + noise).sum(1)
        smoothed.update(trace, power - trace / 16)
    return smoothed


@pytest.mark.parametrize(
    ("signal", "options"),
    [
        (1.0, {}),
        (9.0, {}),
        (0.09, {}),  # of single steps most have no visible signal
        (1.0, {"decay": 0.8, "steps": 40}),
        (1.0, {"steps": 12}),
        (1.0, {"correlation": 0.5}),
    ],
)
def test_coverage(signal, options):
    """95 % within four standard errors of 500 seeds (0.975 %), and not far above."""
    low, high = smoothed_over_seeds(signal, **options).interval()
    truth = TRACE / signal
    holds = ((low <= truth) & (truth <= high)).mean()
    error = math.sqrt(0.95 * 0.05 / SEEDS)
    assert 0.95 - 4 * error < holds <= 0.995
    if signal > 0.5:
        assert np.isfinite(high).mean() > 0.9


def signs_over_seeds(gains, decay=0.95, steps=120, seed=0):
    """The same gradients beside signs of which one in ten is wrong; and the truth."""
    random = np.random.default_rng(seed)
    deviations = 1 / np.sqrt(np.arange(1, 41))
    mean = gains * random.standard_normal(40)
    signs = np.sign(mean) * np.where(np.arange(40) % 10 == 3, -1, 1)
    smoothed = SmoothedNoiseScale(decay)
    for _ in range(steps):
        noise = random.standard_normal((SEEDS, 40)) * deviations / 4
        roots = np.sqrt(random.chisquare(15, (SEEDS, 40)) / 15) * deviations
        smoothed.update(roots.sum(1) / _root_bias(15), (mean + noise) @ signs)
    return smoothed, deviations.sum() / (mean @ signs)


@pytest.mark.parametrize(
    ("gains", "options"),
    [(0.5, {}), (0.05, {}), (0.5, {"decay": 0.8, "steps": 40}), (0.5, {"steps": 12})],
)
def test_coverage_of_signs(gains, options):
    """As above; squaring keeps what is inside, for both ends are above zero."""
    smoothed, truth = signs_over_seeds(gains, **options)
    low, high = smoothed.interval()
    holds = ((low <= truth) & (truth <= high)).mean()
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / SEEDS) < holds <= 0.995


def test_roots_of_variances_are_unbiased():
    """Of Gaussian samples, for each number of them."""
    random = np.random.default_rng(0)
    for freedom in (1, 2, 7, 31):
        roots = np.sqrt(random.chisquare(freedom, 100_000) / freedom)
        error = roots.std() / math.sqrt(len(roots))
        assert abs(roots.mean() - _root_bias(freedom)) < 4 * error
    assert _root_bias(1_000_000) == pytest.approx(1, abs=1e-6)


def test_squares_keep_the_sign_of_a_gain_that_is_not_there():
    smoothed = SmoothedNoiseScale(0.9)
    row = sign_columns(6.0, -2.0, smoothed)
    assert row["gradient/sign_noise_scale"] == -9.0
    assert row["gradient/sign_noise_scale_high"] == math.inf
    assert math.isnan(sign_columns(6.0, 0.0, smoothed)["gradient/sign_noise_scale"])


def test_without_the_correlation_it_would_not_hold(monkeypatch):
    """What the factor for correlated steps is for, and that the test can fail."""
    module = "fastminima.monitor.smoothing._correlation"
    monkeypatch.setattr(module, lambda s, ratio, variance: np.zeros(SEEDS))
    low, high = smoothed_over_seeds(1.0, correlation=0.5).interval()
    assert ((low <= TRACE) & (high >= TRACE)).mean() < 0.9


def test_a_signal_that_is_not_seen_has_no_largest_ratio():
    low, high = smoothed_over_seeds(0.0).interval()
    assert np.isinf(high).mean() > 0.9
    assert (low >= 0).all()


def test_too_few_steps_say_nothing():
    smoothed = SmoothedNoiseScale(0.95)
    for step in range(3):
        smoothed.update(8.0 + step, 2.0)
        assert smoothed.interval() == (0.0, math.inf)


def test_state_goes_on_bit_for_bit():
    random = np.random.default_rng(0)
    steps = random.uniform(1, 2, (30, 2, 3))
    whole, first = SmoothedNoiseScale(0.9), SmoothedNoiseScale(0.9)
    for trace, signal in steps[:17]:
        whole.update(trace, signal)
        first.update(trace, signal)
    second = SmoothedNoiseScale(0.9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for trace, signal in steps[17:]:
        assert np.array_equal(whole.update(trace, signal), second.update(trace, signal))
    assert np.array_equal(whole.interval(), second.interval())


def test_what_is_not_finite_is_left_out_where_it_is():
    both, alone = SmoothedNoiseScale(0.9), SmoothedNoiseScale(0.9)
    for step in range(8):
        bad = math.nan if step == 4 else 1.0 + step
        both.update(np.array([3.0 + step % 3, bad]), np.array([1.0 + step % 2, 1.0]))
        alone.update(3.0 + step % 3, 1.0 + step % 2)
    low, high = both.interval()
    assert (low[0], high[0]) == pytest.approx(alone.interval())
    assert np.isfinite(both.update(np.ones(2), np.ones(2))).all()


def test_student():
    """Quantiles of tables, for 3, 5, 10, 38 and 1000 degrees of freedom."""
    table = {3: 3.1824, 5: 2.5706, 10: 2.2281, 38: 2.0244, 1000: 1.9623}
    for freedom, want in table.items():
        assert _student(np.asarray(float(freedom))) == pytest.approx(want, rel=1e-2)
