"""The trend beside what it must reproduce, and beside a least-squares fit."""

import math

import numpy as np
import pytest

from fastminima.monitor.trend import half_window, trend

STEPS = [0, 1, 2, 5, 6, 9, 10, 11, 15, 20, 21, 30]


@pytest.mark.parametrize("half", [1, 2, 4, 50])
def test_a_line_and_an_exponential_are_themselves(half):
    line = [3.0 - 0.25 * step for step in STEPS]
    assert trend(STEPS, line, half) == pytest.approx(line, abs=1e-12)
    decay = [2.3 * math.exp(-step / 5) for step in STEPS]
    assert trend(STEPS, decay, half, logarithmic=True) == pytest.approx(decay)


def test_a_decaying_curve_is_not_read_late():
    """An average over the past reads .107 where the curve ends at .047."""
    steps = range(0, 200, 5)
    rng = np.random.default_rng(0)
    truth = [2.3 * math.exp(-step / 50) for step in steps]
    noisy = [value * math.exp(0.1 * rng.normal()) for value in truth]
    half = half_window(len(noisy))
    found = trend(steps, noisy, half, logarithmic=True)
    # A fit to at least five points by a tenth: within four standard errors of a
    # point at the end of its window, whose variance is below that of one value.
    assert found == pytest.approx(truth, rel=0.4)
    assert found[-1] == pytest.approx(truth[-1], rel=0.2)


def test_beside_weighted_least_squares():
    rng = np.random.default_rng(1)
    values = rng.normal(size=len(STEPS))
    half = 3
    found = trend(STEPS, values, half)
    for number, step in enumerate(STEPS):
        first = min(max(0, number - half), len(STEPS) - 2 * half - 1)
        x = np.array(STEPS[first : first + 2 * half + 1]) - step
        y = values[first : first + 2 * half + 1]
        weight = (1 - (np.abs(x) / (1.001 * np.abs(x).max())) ** 3) ** 3
        want = np.polynomial.polynomial.polyfit(x, y, 1, w=np.sqrt(weight))[0]
        assert found[number] == pytest.approx(want)


def test_nothing_crosses_a_gap():
    steps = [0, 1, 2, math.nan, 0, 1, 2, 3]
    values = [1.0, 1.0, 1.0, math.nan, 9.0, 9.0, math.inf, 5.0]
    found = trend(steps, values, 4)
    assert found[:3] == pytest.approx([1.0] * 3)
    assert found[4:6] == pytest.approx([9.0] * 2)
    assert math.isnan(found[3])
    assert math.isnan(found[6])
    assert found[7] == 5.0


def test_what_has_no_logarithm_is_left_out():
    values = [1.0, -3.0, 4.0, 0.0, 16.0]
    found = trend(range(5), values, 4, logarithmic=True)
    assert found == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0])
    nothing = trend(range(2), [-1.0, 0.0], 4, logarithmic=True)
    assert all(math.isnan(value) for value in nothing)


def test_few_points_and_equal_steps():
    assert trend([], [], 4) == []
    assert trend([3], [2.0], 4) == [2.0]
    assert trend([3, 4], [2.0, 6.0], 4) == pytest.approx([2.0, 6.0])
    assert trend([3, 3, 3], [1.0, 2.0, 6.0], 4) == pytest.approx([3.0] * 3)


def test_a_long_curve_is_fitted_at_some_of_its_points():
    steps = [3 * step + step % 2 for step in range(50_000)]
    decay = [2.3 * math.exp(-step / 30_000) for step in steps]
    half = half_window(len(steps))
    found = trend(steps, decay, half, logarithmic=True)
    assert found == pytest.approx(decay)


def test_the_window_grows_with_the_run():
    assert [half_window(n) for n in (0, 10, 100, 1000)] == [5, 5, 5, 50]
