"""Hutchinson, Krylov and XTrace: right, honest about their error, and when which."""

import pytest
import torch

import fastminima as fm

from .matrices import Counted, bulk, rotated

METHODS = ("krylov", "hutchinson", "xtrace")


def error_and_se(matrix, products, method, seeds):
    """Root mean squares over seeds of the error, and of the standard error."""
    truth = matrix.trace().item()
    got = [fm.trace(matrix, products, seed, method=method) for seed in range(seeds)]
    errors = torch.tensor([g.value - truth for g in got], dtype=torch.float64)
    bars = torch.tensor([g.standard_error for g in got], dtype=torch.float64)
    return errors.square().mean().sqrt().item(), bars.square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_within_four_standard_errors(method, dtype, device):
    values = [9.0, 7.0, -6.0, *bulk(97, 0.1)]
    matrix = Counted(rotated(values, dtype, device=device))
    for seed in range(5):
        matrix.products = 0
        got = fm.trace(matrix, 40, seed, method=method)
        assert got.products == matrix.products == 40
        assert 0 < abs(got.value - sum(values)) < 4 * got.standard_error


@pytest.mark.parametrize("method", METHODS)
def test_exact_with_as_many_products_as_dimensions(method, device):
    values = bulk(20, 1.0)
    got = fm.trace(rotated(values, device=device), 20, method=method)
    assert got.value == pytest.approx(sum(values), rel=1e-10)
    assert (got.standard_error, got.products) == (0, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_xtrace_is_exact_for_low_rank(dtype, device):
    """Eight dimensions, ten vectors: each space without two of them holds all."""
    values = [*range(1, 9), *[0.0] * 92]
    got = fm.trace(rotated(values, dtype, device=device), 20, method="xtrace")
    eps = torch.finfo(dtype).eps
    assert got.value == pytest.approx(36, abs=200 * eps * 36)
    assert got.standard_error < 200 * eps * 36


@pytest.mark.parametrize("diagonal", [0.0, 1.0])
def test_xtrace_of_multiples_of_the_identity(diagonal, device):
    got = fm.trace(diagonal * torch.eye(50, device=device), 12, method="xtrace")
    assert got.value == pytest.approx(50 * diagonal, rel=1e-6)
    assert got.standard_error <= 1e-5


@pytest.mark.parametrize(
    "values",
    [[i**-0.5 for i in range(1, 81)], [0.93**i for i in range(80)]],
    ids=["slow", "fast"],
)
def test_xtrace_covers_what_it_says(values):
    """The spread of its samples alone, which the paper suggests, covers 84 and 90 %."""
    matrix = torch.diag(torch.tensor(values, dtype=torch.float64))
    inside = 0
    for seed in range(500):
        low, high = fm.trace(matrix, 16, seed, method="xtrace").interval()
        inside += low <= sum(values) <= high
    assert inside / 500 == pytest.approx(0.95, abs=0.03)


def test_xtrace_knows_what_its_samples_share():
    """Where eigenvalues end at a step, their spread is a third of the error."""
    matrix = torch.diag(torch.tensor([*[1.0] * 15, *[1e-3] * 65], dtype=torch.float64))
    error, bar = error_and_se(matrix, 30, "xtrace", 100)
    # Either is known to some 10 %: one of 100 vectors in twenty misses a dimension.
    assert bar == pytest.approx(error, rel=0.3)


def test_which_method_is_better_where():
    outliers = torch.diag(torch.tensor([9.0, 7.0, -6.0, *bulk(147, 0.1)]).double())
    errors = {m: error_and_se(outliers, 30, m, 20)[0] for m in METHODS}
    assert errors["krylov"] < errors["hutchinson"] / 3
    falling = torch.diag(0.8 ** torch.arange(150, dtype=torch.float64))
    errors = {m: error_and_se(falling, 60, m, 20)[0] for m in METHODS}
    assert errors["xtrace"] < errors["krylov"] / 2


@pytest.mark.parametrize("method", METHODS)
def test_tolerance_stops(method, device):
    values = [4.0, 3.0, *(1 + 0.1 * torch.rand(198)).tolist()]
    matrix = rotated(values, device=device)
    got = fm.trace(matrix, 150, method=method, rtol=0.02)
    low, high = got.interval()
    assert high - low <= 2 * 0.02 * got.value * 1.001
    assert got.products < 150
    assert abs(got.value - sum(values)) < 4 * got.standard_error
    assert fm.trace(matrix, 40, method=method, rtol=1e-9).products == 40


def test_arguments(device):
    matrix = torch.eye(9, device=device)
    with pytest.raises(ValueError, match="krylov, hutchinson, xtrace, got 'exact'"):
        fm.trace(matrix, method="exact")
    with pytest.raises(ValueError, match="at least 4 products, got 3"):
        fm.trace(matrix, 3, method="xtrace")
    with pytest.raises(ValueError, match="not finite"):
        fm.trace(matrix * float("nan"), 6, method="xtrace")
    with pytest.raises(ValueError, match="rtol must be positive, got -1"):
        fm.trace(matrix, 6, method="xtrace", rtol=-1)
