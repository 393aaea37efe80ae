"""What the detector calls a spike, and what it does not."""

import json
import math
import random

import numpy as np
import pytest
from scipy.stats import norm as normal
from scipy.stats import t as student

import fastminima as fm
from fastminima.monitor.spikes import _Series
from tools.spike_rates import (
    CURVES,
    FALLS,
    false_alarms,
    forecasts,
    found,
    window_median,
)


def detector(values, what="loss", **options):
    """Feeds values; the spikes of the last one, and the detector."""
    found = fm.monitor.SpikeDetector(**options)
    spikes = []
    for step, value in enumerate(values):
        given = {"loss": 1.0, "norm": 1.0} | {what: value}
        spikes = found.update(step, **given)
    return spikes, found


def by_hand(values, window):
    """Forecast, spread and z of the last value, for the short and the long forecast."""
    logs, found = np.log(values), []
    for back in (3, 15):
        errors = [
            logs[i] - np.median(logs[max(0, i - back) : i])
            for i in range(3, len(logs) - 1)
        ][-window:]
        middle = np.median(errors)
        away = sorted(np.abs(errors - middle), reverse=True)
        above = max(len(errors) // 8, min(2, (len(errors) - 1) // 2))
        spread = away[above] / normal.isf((above + 0.5) / len(errors) / 2)
        known = len(errors) / 2
        scale = np.sqrt((known * spread**2 + 3 * 0.1**2) / (known + 3))
        usual = np.median(logs[-1 - back : -1]) + max(middle, 0)
        found.append((np.exp(usual), scale, (logs[-1] - usual) / scale))
    return found


@pytest.mark.parametrize("trend", [0.0, -0.05, 0.05])
def test_numbers_by_hand(trend):
    noise = np.random.default_rng(0)
    values = np.exp(trend * np.arange(70) + 0.3 * noise.standard_normal(70)).tolist()
    found = fm.monitor.SpikeDetector(0.2, window=30, least=8)
    told = 0
    for step, value in enumerate(values):
        spikes = found.update(step, loss=value, norm=None)
        if step < 8:
            assert not spikes
            continue
        wanted = max(by_hand(values[: step + 1], 30), key=lambda one: one[2])
        wider = student.isf(1e-4, 0.5 * min(step - 3, 30) + 3) / 3.719
        if spikes:
            (spike,) = spikes
            assert (spike.step, spike.what, spike.value) == (step, "loss", value)
            assert (spike.usual, spike.scale, spike.z) == pytest.approx(wanted)
            assert spike.z > 0.2 * wider
            told += 1
        else:
            assert wanted[2] < 0.21 * wider
    assert 10 < told < 60


@pytest.mark.parametrize("seen", [8, 10, 20, 50, 115])
def test_the_threshold_for_few_errors_is_that_of_students_t(seen):
    series = _Series(100)
    series.replace([1.0] * seen)
    wanted = student.isf(1e-4, 0.5 * min(seen - 3, 100) + 3) / student.isf(1e-4, 1e9)
    assert series.widening() == pytest.approx(wanted, rel=0.03)


NOISY = {  # in 1000 steps; five times what 500 seeds had (docs/watching.md) or less
    "Student's t of 5, 5 %": 1,
    "Student's t of 3, 5 %": 5,
    "noise from 5 to 15 % at once": 3,
    "one in five twice as high": 10,
}
FREQUENT = ("every fifth three times as high", "one in five twice as high")


@pytest.mark.parametrize("curve", CURVES)
def test_false_alarms(curve):
    late, early = false_alarms(forecasts, CURVES[curve], range(4))
    assert late <= NOISY.get(curve, 0.0)
    assert early == 0 or curve in FREQUENT  # as long as there is but one of them


@pytest.mark.parametrize("fall", FALLS)
@pytest.mark.parametrize(
    ("noise", "at", "size"),
    [(0.02, 8, 10), (0.05, 12, 10), (0.05, 30, 3), (0.05, 300, 3), (0.1, 30, 10)],
)
def test_found_in_a_falling_loss(fall, noise, at, size):
    assert found(forecasts, fall, noise, at, size, range(3)) == 1
    if fall == "10 % a step":
        assert found(window_median, fall, noise, at, size, range(3)) == 0


def test_spikes_do_not_hide_each_other():
    """Up to one in eight steps, next to each other too."""
    places = (12, 13, 27, 40, 41, 55, 70, 71, 80)
    noise = random.Random(0)
    found, told = fm.monitor.SpikeDetector(), []
    for step in range(100):
        value = math.exp(noise.gauss(0, 0.1) - step / 50 + 3 * (step in places))
        told += [spike.step for spike in found.update(step, loss=value, norm=None)]
    assert tuple(told) == places


def test_a_rise_over_several_steps():
    noise = random.Random(0)
    logs = [noise.gauss(0, 0.1) for _ in range(80)]
    rise = [math.log(10) * (i + 1) / 10 + noise.gauss(0, 0.1) for i in range(10)]
    spikes, said = detector(np.exp(logs).tolist())
    assert not spikes
    for value in np.exp(rise).tolist():
        spikes += said.update(80, loss=value, norm=None)
    assert spikes


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_quiet_in_noise_and_loud_after(what):
    """5000 lognormal steps: z > 6 has a chance of 1e-9 with scales that are known."""
    noise = random.Random(0)
    found = fm.monitor.SpikeDetector()
    spikes = []
    for step in range(5000):
        value = math.exp(noise.gauss(0, 0.3) - step / 2000)
        spikes += found.update(step, **({"loss": None, "norm": None} | {what: value}))
    assert not spikes
    (spike,) = found.update(5000, **({"loss": None, "norm": None} | {what: 5.0}))
    assert spike.what == what


def test_outliers_in_the_window_change_little():
    values = [1.0, 1.1, 0.9, 1.05] * 20
    plain, _ = detector([*values, 5.0])
    with_outliers, _ = detector([*values, *[100.0, 1.0, 1.1] * 3, 5.0])
    assert plain
    assert with_outliers


def test_a_new_level_is_learned():
    spikes, found = detector([1.0, 1.1, 0.9] * 40)
    assert not spikes
    said = [bool(found.update(step, loss=10.0, norm=1.0)) for step in range(100)]
    assert said[0]
    assert not any(said[10:])


def test_a_fall_is_no_spike_nor_what_comes_after():
    """A line through the last steps would lie below what follows."""
    spikes, found = detector([1.0] * 40)
    for value in [0.5, 0.2, 0.1, *[0.1] * 50]:
        spikes += found.update(50, loss=value, norm=None)
    assert not spikes


def test_nothing_is_said_of_the_first_steps():
    assert not detector([1.0] * 7 + [99.0])[0]
    assert detector([1.0] * 8 + [99.0])[0]
    assert not detector([1.0] * 19 + [99.0], least=20)[0]
    assert detector([1.0] * 20 + [99.0], least=20)[0]
    assert not detector([1.0] * 4 + [99.0], least=2)[0]
    assert not detector([1.0] * 20 + [0.01])[0]


def test_not_finite_is_a_spike_once():
    spikes, found = detector([1.0, 1.05, 1.1] * 10 + [math.nan])
    (spike,) = spikes
    assert math.isinf(spike.z)
    assert 1 <= spike.usual <= 1.1
    assert not found.update(90, loss=math.inf, norm=1.0)
    assert not found.update(91, loss=1.0, norm=1.0)
    assert found.update(92, loss=math.nan, norm=1.0)


@pytest.mark.parametrize("before", [[], [2.0], [2.0] * 3])
def test_not_finite_from_the_start(before):
    ((spike,), _) = detector([*before, math.inf])
    assert spike.z == math.inf
    assert spike.usual == 2.0 if before else math.isnan(spike.usual)


def test_losses_below_zero():
    values = [-3.0 + 0.1 * (i % 5) for i in range(40)]
    assert not detector(values)[0]
    assert detector([*values, 4.0])[0]


def test_where_values_become_negative():
    """Losses that pass through zero are compared as they are, others by logarithms."""
    spikes, found = detector([1.0 - i / 50 + 0.01 * (i % 3) for i in range(80)])
    assert not spikes
    assert found.update(80, loss=5.0, norm=None)
    for step in range(81, 201):
        spikes = found.update(step, loss=2.0 + 0.01 * (step % 3), norm=None)
        assert not spikes or step < 90
    (spike,) = found.update(201, loss=8.0, norm=None)
    assert spike.z > 20


@pytest.mark.parametrize("steps", [3, 12, 60, 300])
@pytest.mark.parametrize("last", [7.0, -7.0])
def test_state_goes_on(steps, last):
    noise = random.Random(steps)
    _, whole = detector([math.exp(noise.gauss(0, 0.1)) for _ in range(steps)])
    other = fm.monitor.SpikeDetector()
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for value in (1.3, last, 8.0, math.nan):
        given = {"loss": value, "norm": 1.0}
        assert repr(whole.update(9, **given)) == repr(other.update(9, **given))


def test_an_older_state_is_read():
    """One with windows of a hundred values, as it was before there were forecasts."""
    falling = [2.0 * 0.95**i for i in range(100)]
    state = {
        "windows": {"loss": falling, "norm": [1.0] * 100},
        "was_finite": {"loss": True, "norm": False},
    }
    found = fm.monitor.SpikeDetector()
    found.load_state_dict(state)
    assert not found.update(100, loss=falling[-1], norm=math.nan)
    (spike,) = found.update(101, loss=10 * falling[-1], norm=1.0)
    assert spike.what == "loss"


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"least": 1}, {"window": 5}])
def test_options_outside_their_range(bad):
    with pytest.raises(ValueError, match="must be"):
        fm.monitor.SpikeDetector(**bad)
