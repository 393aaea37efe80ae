"""The three factors and the noise scale, against hand-computed values."""

import math
from types import SimpleNamespace

import pytest
import torch

import fastminima as fm


def statistics(count=10, parameters=4, trace=8.0, mean_sq=3.0):
    return SimpleNamespace(
        count=count,
        parameter_count=parameters,
        covariance_trace=torch.tensor(trace),
        mean_grad_sq_norm=torch.tensor(mean_sq),
    )


def sgd(*groups, **options):
    groups = groups or ({},)
    params = [{"params": [torch.zeros(2, requires_grad=True)], **g} for g in groups]
    return torch.optim.SGD(params, **{"lr": 0.1, **options})


def test_ratio_and_temperature():
    plain = fm.ThreeFactors(0.1, 50, gradient_variance=3.0)
    assert plain.ratio == pytest.approx(0.1 / 50)
    assert plain.temperature == pytest.approx(0.1 * 3 / (2 * 50))
    heavy = fm.ThreeFactors(0.1, 50, 3.0, momentum=0.75)
    assert heavy.ratio == pytest.approx(4 * plain.ratio)
    finite = fm.ThreeFactors(0.1, 50, 3.0, dataset_size=200)
    assert finite.ratio == pytest.approx(0.1 * (1 / 50 - 1 / 200))
    assert fm.ThreeFactors(0.1, 50, 3.0, dataset_size=50).temperature == 0


def test_scaling_both_factors_changes_nothing():
    for beta in (0.5, 2, 8):
        scaled = fm.ThreeFactors(0.1 * beta, int(50 * beta), 3.0, momentum=0.5)
        want = fm.ThreeFactors(0.1, 50, 3.0, momentum=0.5).temperature
        assert scaled.temperature == pytest.approx(want)


def test_is_frozen():
    with pytest.raises(AttributeError):
        fm.ThreeFactors(0.1, 50, 3.0).momentum = 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate.*-0.1"),
        ({"learning_rate": math.nan}, "learning_rate.*nan"),
        ({"learning_rate": math.inf}, "learning_rate.*inf"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"batch_size": 2.5}, "batch_size.*2.5"),
        ({"gradient_variance": -1.0}, "gradient_variance.*-1.0"),
        ({"momentum": 1.0}, "momentum.*1.0"),
        ({"momentum": -0.1}, "momentum.*-0.1"),
        ({"dataset_size": 49}, "dataset_size 49.*batch_size 50"),
        ({"dataset_size": 1e5}, "dataset_size.*100000.0"),
    ],
)
def test_refuses(changes, message):
    values = {"learning_rate": 0.1, "batch_size": 50, "gradient_variance": 1.0}
    with pytest.raises(ValueError, match=message):
        fm.ThreeFactors(**{**values, **changes})


def test_a_variance_that_is_not_finite_is_reported_and_not_raised():
    assert math.isnan(fm.ThreeFactors(0.1, 50, math.nan).temperature)
    assert fm.ThreeFactors(0.1, 50, math.inf).temperature == math.inf


def test_from_an_optimizer():
    factors = fm.three_factors(sgd(momentum=0.5), statistics(), dataset_size=100)
    assert factors == fm.ThreeFactors(0.1, 10, 2.0, momentum=0.5, dataset_size=100)


def test_learning_rates_may_be_tensors_and_groups_may_agree():
    optimizer = sgd({"lr": torch.tensor(0.25)}, {"lr": 0.25}, momentum=0.5)
    assert fm.three_factors(optimizer, statistics()).learning_rate == 0.25


def test_rounding_below_zero_is_zero_and_nan_stays():
    assert fm.three_factors(sgd(), statistics(trace=-1e-9)).gradient_variance == 0
    assert math.isnan(fm.three_factors(sgd(), statistics(trace=math.nan)).temperature)


@pytest.mark.parametrize(
    ("option", "values", "word"),
    [
        ("lr", (0.1, 0.2), "learning rates"),
        ("momentum", (0.0, 0.9), "momenta"),
        ("dampening", (0.0, 0.5), "dampenings"),
    ],
)
def test_groups_that_differ_are_refused(option, values, word):
    optimizer = sgd(*({option: v} for v in values))
    with pytest.raises(ValueError, match=f"different {word}.*{values[1]}"):
        fm.three_factors(optimizer, statistics())


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "Rprop"])
def test_adaptive_optimizers_are_refused(name):
    optimizer = getattr(torch.optim, name)([torch.zeros(2, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=f"{name} rescales"):
        fm.three_factors(optimizer, statistics())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.9},
        {"momentum": 0.5, "dampening": 0.25},
    ],
    ids=str,
)
def test_ratio_is_what_one_gradient_moves_in_all(options):
    """A single unit gradient moves the parameter by ratio * S over the run."""
    param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([param], lr=0.1, **options)
    # The velocity starts as the first gradient, without dampening: start it at 0.
    for gradient in [0.0, 1.0] + [0.0] * 400:
        param.grad = torch.full_like(param, gradient)
        optimizer.step()
    factors = fm.three_factors(optimizer, statistics())
    assert factors.ratio * 10 == pytest.approx(-param.item())


def test_langevin_has_the_ratio_of_its_gradient_noise():
    params = [torch.zeros(2, requires_grad=True)]
    optimizer = fm.optim.Langevin(params, lr=0.1, temperature=3.0, momentum=0.5)
    assert fm.three_factors(optimizer, statistics()).ratio == pytest.approx(0.02)


def test_noise_scale():
    one = statistics(count=4, trace=8.0, mean_sq=3.0)
    assert fm.noise_scale(one).item() == pytest.approx(8 / (3 - 2))
    other = statistics(count=2, trace=2.0, mean_sq=5.0)
    want = (8 + 2) / ((3 - 2) + (5 - 1))
    assert fm.noise_scale([one, other]).item() == pytest.approx(want)
    assert fm.noise_scale(s for s in [one, other]).item() == pytest.approx(want)


def test_noise_scale_may_be_negative_but_needs_a_step():
    assert fm.noise_scale(statistics(count=2, trace=8.0, mean_sq=3.0)) < 0
    with pytest.raises(ValueError, match="at least one step"):
        fm.noise_scale([])
