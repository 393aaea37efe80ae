"""The three factors and the noise scale, against hand-computed values."""

import math
import re
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


@pytest.mark.parametrize(("trace", "size"), [(90.0, 8), (90.0, 200), (0.0, 8)])
def test_advice_is_the_best_progress_of_a_quadratic(trace, size):
    """L = |x|^2 / 2, gradient x + noise / sqrt(S): the best of all learning rates."""
    signal = 3.0
    rates = torch.logspace(-8, 0, 200_001, dtype=torch.float64)

    def best(size):
        progress = rates * signal - rates**2 / 2 * (signal + trace / size)
        return progress.max().item()

    scale, small = trace / signal, 1e-4
    advice = fm.advise_batch_size(scale, scale, scale, size)
    part = best(size) / best(math.inf)
    assert advice.step_progress == pytest.approx((part, part), rel=1e-6)
    if trace:
        worth = best(size) / size / (best(small) / small)
        assert advice.sample_worth == pytest.approx((worth, worth), rel=1e-4)


@pytest.mark.parametrize(("averaged", "size"), [(1, 4), (1, 60), (19, 4)])
def test_advice_on_signs_is_the_best_progress_of_a_quadratic(averaged, size):
    """L = |x|^2 / 2 at (1, ..., 1): steps by signs of means of Gaussian gradients."""
    deviation, random = 6.0, torch.Generator().manual_seed(0)

    def best(size):
        """Of all learning rates: E <g, s>^2 / 2 s's."""
        noise = torch.randn(200_000, generator=random) * deviation
        return (1 + noise / (averaged * size) ** 0.5).sign().mean().item() ** 2

    scale = deviation**2
    advice = fm.advise_batch_size(scale, scale, scale, size, averaged=averaged)
    assert advice.step_progress[0] == pytest.approx(best(size), rel=0.04)
    half = advice.half_efficient[0]
    assert best(half) == pytest.approx(0.5, rel=0.02)
    at_half = fm.advise_batch_size(scale, scale, scale, round(half), averaged=averaged)
    small = math.erf((averaged * 1e-6 / scale / 2) ** 0.5) ** 2 / 1e-6
    worth = at_half.step_progress[0] / round(half) / small
    assert at_half.sample_worth[0] == pytest.approx(worth, rel=1e-4)
    assert f"worth {100 * 0.71:.0f} % of" in str(at_half)
    assert advice.to_dict()["averaged"] == averaged


@pytest.mark.parametrize(("spread", "times"), [(0.0, 1.106), (1.0, 0.57)])
def test_half_of_the_progress_of_signs_where_parameters_differ(spread, times):
    """What the docstring says of parameters whose ratios of signal to noise spread."""
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(50_000, generator=random, dtype=torch.float64)
    signal = (spread * normal).exp()  # over deviations of one
    scale = 1 / signal.mean() ** 2
    right = torch.erf(signal * (times * scale / 2).sqrt())
    progress = ((signal * right).sum() / signal.sum()) ** 2
    assert progress.item() == pytest.approx(0.5, abs=0.01)


UNBOUNDED = (64, math.inf), (0, 32 / 96)


@pytest.mark.parametrize(
    ("given", "half", "progress", "words"),
    [
        (
            (120.0, 80.0, 190.0),
            (80, 190),
            (32 / 222, 32 / 112),
            "about 120 (80 to 190) samples: .* At 32 samples a step makes 14 to 29 % "
            ".* worth 71 to 86 %. A larger batch saves steps",
        ),
        (
            (9.0, 4.0, 16.0),
            (4, 16),
            (32 / 48, 32 / 36),
            "A smaller batch saves samples",
        ),
        (
            (40.0, -3.0, 50.0),
            (0, 50),
            (32 / 82, 1.0),
            "at most 50 samples.* neither is",
        ),
        (
            (99.0, 64.0, None),
            (64, math.inf),
            (0, 32 / 96),
            "at least 64 .*makes 0 to 33 %",
        ),
        ((-7.0, 64.0, math.nan), (64, math.inf), (0, 32 / 96), "A larger batch saves"),
        (
            (10.0, None, math.nan),
            (0, math.inf),
            (0, 1),
            "^The noise scale is not known",
        ),
    ],
)
def test_advice_on_the_batch_size(given, half, progress, words):
    advice = fm.advise_batch_size(*given, batch_size=32)
    assert advice.half_efficient == half
    assert advice.step_progress == pytest.approx(progress)
    worth = (1 - progress[1], 1 - progress[0])
    assert advice.sample_worth == pytest.approx(worth)
    pattern = words.replace("(", r"\(").replace(")", r"\)")
    assert re.search(pattern, str(advice)), str(advice)


def test_advice_wants_a_batch_and_an_interval_around_the_estimate():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fm.advise_batch_size(10.0, 5.0, 20.0, 0)
    with pytest.raises(ValueError, match=r"averaged must be .* got 0\.5"):
        fm.advise_batch_size(10.0, 5.0, 20.0, 8, averaged=0.5)
    for given in ((10.0, 11.0, 20.0), (10.0, 5.0, 9.0), (math.nan, 5.0, 9.0)):
        with pytest.raises(ValueError, match=r"is not in its interval \["):
            fm.advise_batch_size(*given, 8)
