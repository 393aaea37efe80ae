"""What the detector calls a spike, and what it does not."""

import json
import math
import random

import pytest

import fastminima as fm


def detector(values, what="loss", **options):
    """Feeds values; the spikes of the last one, and the detector."""
    found = fm.monitor.SpikeDetector(**options)
    spikes = []
    for step, value in enumerate(values):
        given = {"loss": 1.0, "norm": 1.0} | {what: value}
        spikes = found.update(step, **given)
    return spikes, found


def test_numbers_by_hand():
    values = [math.exp(x / 10) for x in range(21)]  # logarithms 0, 0.1, ... 2
    (spike,), _ = detector([*values, math.exp(9)])
    assert spike.usual == pytest.approx(math.e)
    assert spike.scale == pytest.approx(1.4826 * 0.5)
    assert spike.z == pytest.approx((9 - 1) / (1.4826 * 0.5))
    assert (spike.step, spike.what, spike.value) == (21, "loss", math.exp(9))


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
    with_outliers, _ = detector([*values, *[100.0] * 10, 5.0])
    assert plain
    assert with_outliers


def test_a_new_level_is_learned():
    spikes, found = detector([1.0, 1.1, 0.9] * 40)
    assert not spikes
    said = [bool(found.update(step, loss=10.0, norm=1.0)) for step in range(100)]
    assert said[0]
    assert not any(said[60:])


def test_nothing_is_said_of_the_first_steps_and_of_falls():
    assert not detector([1.0] * 19 + [99.0])[0]
    assert detector([1.0] * 20 + [99.0])[0]
    assert not detector([1.0] * 20 + [0.01])[0]


def test_not_finite_is_a_spike_once():
    spikes, found = detector([1.0, 1.1] * 15 + [math.nan])
    (spike,) = spikes
    assert math.isinf(spike.z)
    assert spike.usual == pytest.approx(1.05)
    assert not found.update(90, loss=math.inf, norm=1.0)
    assert not found.update(91, loss=1.0, norm=1.0)
    assert found.update(92, loss=math.nan, norm=1.0)


def test_losses_below_zero():
    values = [-3.0 + 0.1 * (i % 5) for i in range(40)]
    assert not detector(values)[0]
    assert detector([*values, 4.0])[0]


def test_state_goes_on():
    _, whole = detector([1.0, 1.2, 0.9] * 20)
    other = fm.monitor.SpikeDetector()
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert whole.update(9, loss=7.0, norm=1.0) == other.update(9, loss=7.0, norm=1.0)


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"least": 1}, {"window": 5}])
def test_options_outside_their_range(bad):
    with pytest.raises(ValueError, match="must be"):
        fm.monitor.SpikeDetector(**bad)
