"""Log-determinant, effective dimension, stability ratio: against dense matrices."""

import math

import pytest
import torch

import fastminima as fm

from .matrices import Counted, bulk, rotated

# A bulk between 0.2 and 1, and what stands out of it.
POSITIVE = [50.0, 30.0, 20.0, *(0.2 + 0.8 * torch.arange(117) / 116).tolist()]
SADDLE = [9.0, 7.0, 5.0, *bulk(117, 0.2)]


def log_determinant(values):
    return sum(math.log(value) for value in values)


QUANTITIES = {
    "log-determinant": (fm.log_determinant, {}, POSITIVE, log_determinant(POSITIVE)),
    "damped": (
        fm.log_determinant,
        {"damping": 0.5},
        POSITIVE,
        log_determinant([value + 0.5 for value in POSITIVE]),
    ),
    "above": (
        fm.log_determinant,
        {"above": 2.0},
        SADDLE,
        log_determinant([9.0, 7.0, 5.0]),
    ),
    "dimension": (
        fm.effective_dimension,
        {"damping": 1.0},
        POSITIVE,
        sum(value / (value + 1) for value in POSITIVE),
    ),
    "stability": (
        fm.stability_ratio,
        {"learning_rate": 0.03, "batch_size": 4, "dataset_size": 100},
        POSITIVE,
        fm.theory.stability_ratio(torch.tensor(POSITIVE).double(), 0.03, 4, 100),
    ),
}


@pytest.fixture
def network(device):
    """A Gauss-Newton matrix in float64, and its eigenvalues."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).to(device, torch.float64)
    x = torch.randn(20, 3).to(device, torch.float64)

    def loss(outputs, batch):
        return outputs.square().mean()

    matrix = fm.GaussNewton(model, lambda m, b: m(b), loss, x)
    eye = torch.eye(26, dtype=torch.float64, device=device)
    return matrix, torch.linalg.eigvalsh((matrix @ eye).cpu()).clamp_min(0)


def test_of_a_network_by_hand(network):
    matrix, values = network
    got = fm.log_determinant(matrix, damping=0.01)
    assert got.value == pytest.approx((values + 0.01).log().sum().item())
    assert (got.standard_error, got.products) == (0, 28)  # two more look at it
    got = fm.effective_dimension(matrix, 0.01)
    assert got.value == pytest.approx((values / (values + 0.01)).sum().item())
    rate = 1 / values.max().item()
    got = fm.stability_ratio(matrix, rate, 2, 20)
    assert got.value == pytest.approx(fm.theory.stability_ratio(values, rate, 2, 20))
    above = values[values > 1e-3]
    got = fm.log_determinant(matrix, above=1e-3)
    assert got.value == pytest.approx(above.log().sum().item())
    sampled = fm.effective_dimension(matrix, 0.01, products=24, seed=1)
    low, high = sampled.interval(0.999)
    assert low <= (values / (values + 0.01)).sum() <= high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", QUANTITIES)
def test_within_four_standard_errors(name, dtype, device):
    quantity, arguments, values, truth = QUANTITIES[name]
    matrix = Counted(rotated(values, dtype, device=device))
    for seed in range(4):
        matrix.products = 0
        got = quantity(matrix, products=100, seed=seed, **arguments)
        assert got.products == matrix.products <= 100
        rounding = 1e-4 if dtype == torch.float32 else 1e-10
        allowed = 4 * got.standard_error + got.truncation + rounding * abs(truth)
        assert abs(got.value - truth) < allowed
        if name != "above":  # a few outliers, which are in the exact part
            assert got.standard_error > 0


@pytest.mark.parametrize(
    ("name", "products"), [("log-determinant", 40), ("dimension", 40)]
)
def test_intervals_cover_what_they_say(name, products):
    quantity, arguments, values, truth = QUANTITIES[name]
    matrix = torch.diag(torch.tensor(values, dtype=torch.float64))
    inside = 0
    for seed in range(500):
        got = quantity(matrix, products=products, seed=seed, **arguments)
        low, high = got.interval()
        inside += low <= truth <= high
    assert inside / 500 == pytest.approx(0.95, abs=0.03)


def test_outliers_are_exact(device):
    """Without the space they alone would make a standard error of 0.5 and more."""
    values = [50.0, 30.0, 20.0, 10.0, *[1e-4] * 196]
    got = fm.effective_dimension(rotated(values, device=device), 0.1, products=60)
    assert got.standard_error < 0.01
    assert got.value == pytest.approx(sum(v / (v + 0.1) for v in values), abs=0.03)


def test_few_steps_say_that_they_are_few(device):
    values = torch.logspace(-4, 0, 150, dtype=torch.float64)
    matrix, truth = rotated(values, device=device), values.log().sum().item()
    few = fm.log_determinant(matrix, products=120, steps=4)
    assert abs(few.value - truth) > 4 * few.standard_error
    low, high = few.interval()
    assert low <= truth <= high
    many = fm.log_determinant(matrix, products=140, steps=17)
    assert many.truncation < few.truncation / 2
    low, high = many.interval()
    assert low <= truth <= high


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_any_scale(scale, device):
    matrix = rotated(POSITIVE, torch.float32, device=device) * scale
    truth = log_determinant(POSITIVE) + len(POSITIVE) * math.log(scale)
    got = fm.log_determinant(matrix, products=80)
    assert abs(got.value - truth) < 4 * got.standard_error + got.truncation
    plain = fm.effective_dimension(matrix / scale, 1.0, products=80)
    got = fm.effective_dimension(matrix, scale, products=80)
    assert got.value == pytest.approx(plain.value, rel=1e-4)


def test_tolerance_stops(device):
    values = [4.0, 3.0, *(1 + 0.1 * torch.rand(298)).tolist()]
    matrix = rotated(values, device=device)
    got = fm.log_determinant(matrix, damping=1.0, rtol=0.01)
    low, high = got.interval()
    assert high - low <= 2 * 0.01 * got.value * 1.001
    assert got.products < 100
    assert low <= sum(math.log(value + 1) for value in values) <= high
    assert fm.log_determinant(matrix, damping=1.0, rtol=1e-9).products > 180
    small = fm.log_determinant(rotated(values[:60], device=device), 1.0, rtol=0.05)
    assert small.products < 60


@pytest.mark.parametrize(
    ("values", "met"),
    [
        (SADDLE, "about -0"),
        ([1.0, -2.0], "about -2"),
        ([0.0, 3.0], "about "),
        ([0.0], ""),
    ],
    ids=["saddle", "exact", "singular", "zero"],
)
def test_what_is_not_positive_is_refused(values, met, device):
    matrix = rotated(values, torch.float32, device=device)
    with pytest.raises(ValueError, match=f"has an eigenvalue of {met}.*damping above"):
        fm.log_determinant(matrix)
    assert math.isfinite(fm.log_determinant(matrix, damping=3.0).value)
    assert math.isfinite(fm.log_determinant(matrix, above=0.5).value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_zero_to_rounding_is_not_counted_by_accident(dtype, device):
    """Rounding makes half of the zeros of a singular matrix positive."""
    matrix = rotated([3.0, 2.0, *[0.0] * 30], dtype, device=device)
    got = fm.log_determinant(matrix, above=0.5).value
    assert got == pytest.approx(math.log(6), rel=1e-2)
    with pytest.raises(ValueError, match="rounding leaves"):
        fm.log_determinant(matrix, above=0.0)


def test_negative_eigenvalues_and_the_effective_dimension(device):
    matrix = torch.diag(torch.tensor([3.0, 1.0, -0.5], device=device))
    with_all = fm.effective_dimension(matrix, 1.0)
    assert with_all.value == pytest.approx(0.75 + 0.5 - 1)
    only = fm.effective_dimension(matrix, 1.0, above=0.0)
    assert only.value == pytest.approx(0.75 + 0.5)
    with pytest.raises(ValueError, match=r"about -0.5.*damping above 0\.5"):
        fm.effective_dimension(matrix, 0.4)


def test_beyond_the_edge_the_ratio_is_infinite(device):
    matrix = Counted(rotated(SADDLE, device=device))
    got = fm.stability_ratio(matrix, 0.25, 8, products=60)  # eta lambda = 2.25
    assert (got.value, got.standard_error) == (math.inf, 0)
    assert got.interval() == (math.inf, math.inf)
    assert matrix.products < 60
    below = fm.stability_ratio(matrix, 0.2, 8, products=60)
    truth = fm.theory.stability_ratio(torch.tensor(SADDLE).double(), 0.2, 8)
    assert abs(below.value - truth) < 4 * below.standard_error + below.truncation


@pytest.mark.parametrize("size", [1, 2, 40])
def test_small_and_simple_matrices(size, device):
    for products in (12, 200):
        eye = torch.eye(size, device=device)
        got = fm.log_determinant(2 * eye, damping=1.0, products=products)
        assert got.value == pytest.approx(size * math.log(3), rel=1e-6)
        low, high = got.interval()
        assert high - low <= 1e-4 * size
        zero = fm.effective_dimension(0 * eye, 1.0, products=products, rtol=0.1)
        assert (zero.value, zero.interval()) == (0, (0, 0))
        assert fm.stability_ratio(eye, 0.0, 4, products=products).value == 0


def test_volumes_of_bowls(device):
    """sqrt((2 pi n)^q / det H) over what is counted, in one sum with one error."""
    volume = fm.spectral_sum(
        torch.diag(torch.tensor([4.0, 1.0, 0.0], device=device)),
        lambda h: torch.where(h > 0.1, (2 * math.pi * 0.05 / h).log() / 2, 0.0),
    )
    assert volume.value == pytest.approx(math.log(2 * math.pi * 0.05 / 2), rel=1e-6)


def test_arguments(device):
    matrix = rotated(POSITIVE, device=device)
    for call, message in (
        (lambda: fm.log_determinant(matrix, products=11), "at least 12 products"),
        (lambda: fm.log_determinant(matrix, -1.0), "not negative, got -1"),
        (lambda: fm.log_determinant(matrix, 0.5, above=-1.0), "at least -damping"),
        (lambda: fm.effective_dimension(matrix, 0.0), "damping must be positive"),
        (lambda: fm.stability_ratio(matrix, -0.1, 4), "not negative, got -0.1"),
        (lambda: fm.stability_ratio(matrix, 0.1, 4, 3), "batch_size <= dataset_size"),
        (lambda: fm.log_determinant(matrix, rtol=0.0), "rtol must be positive"),
        (lambda: fm.log_determinant(matrix, products=60, steps=1), "got 1"),
        (lambda: fm.log_determinant(matrix, products=60, steps=30), "products to 240"),
        (lambda: fm.spectral_sum(matrix, torch.sum), r"one of its shape, got \(\)"),
        (lambda: fm.spectral_sum(-matrix, torch.sqrt), "function is nan at -"),
        (lambda: fm.log_determinant(matrix * math.nan), "not finite"),
        (lambda: fm.log_determinant(matrix * math.nan, products=60), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
