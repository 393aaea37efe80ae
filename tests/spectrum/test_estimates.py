"""Trace, norm and density, right within their standard errors, which are honest."""

import math

import numpy
import pytest
import torch

import fastminima as fm
from fastminima.spectrum._student import student_quantile

from .matrices import Counted, bulk, rotated

EIGENVALUES = [9.0, 7.0, -6.0, 5.0, *bulk(396, 0.1)]
TRUTH = {
    fm.trace: sum(EIGENVALUES),
    fm.frobenius_norm: math.sqrt(sum(e * e for e in EIGENVALUES)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimate", TRUTH)
def test_within_four_standard_errors(estimate, dtype, device):
    matrix = Counted(rotated(EIGENVALUES, dtype, device=device))
    for seed in range(10):
        matrix.products = 0
        got = estimate(matrix, products=60, seed=seed)
        assert got.products == matrix.products == 60
        assert 0 < abs(got.value - TRUTH[estimate]) < 4 * got.standard_error


@pytest.mark.parametrize("estimate", TRUTH)
def test_standard_error_is_the_spread_over_seeds(estimate, device):
    matrix = rotated(EIGENVALUES, device=device)
    got = [estimate(matrix, products=60, seed=s) for s in range(100)]
    values = torch.tensor([g.value for g in got], dtype=torch.float64)
    errors = torch.tensor([g.standard_error for g in got], dtype=torch.float64)
    # A spread over 100 seeds is known to 7 %, 3 of them are allowed.
    assert values.std() / errors.square().mean().sqrt() == pytest.approx(1, abs=0.21)
    bias = values.mean() - TRUTH[estimate]
    assert abs(bias) < 4 * values.std() / 10


def test_outliers_do_not_add_variance(device):
    """Without the exact subspace the outliers alone would make an error of 3."""
    got = fm.trace(rotated(EIGENVALUES, device=device), products=60)
    assert got.standard_error < 1


@pytest.mark.parametrize("estimate", TRUTH)
@pytest.mark.parametrize("products", [400, 1000])
def test_exact_with_as_many_products_as_dimensions(estimate, products, device):
    got = estimate(rotated(EIGENVALUES, device=device), products)
    assert got.value == pytest.approx(TRUTH[estimate], rel=1e-12)
    assert got.standard_error == 0
    assert got.products == 400


@pytest.mark.parametrize("diagonal", [0.0, 1.0])
def test_multiples_of_the_identity(diagonal, device):
    matrix = diagonal * torch.eye(50, device=device)
    trace, norm = fm.trace(matrix, 12), fm.frobenius_norm(matrix, 12)
    assert trace.value == pytest.approx(50 * diagonal, rel=1e-6)
    assert norm.value == pytest.approx(math.sqrt(50) * diagonal, rel=1e-6)
    assert trace.standard_error <= 1e-5
    assert float(norm) == norm.value


def test_estimates_of_an_operator(device):
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).to(device, torch.float64)
    x = torch.randn(20, 3, device=device).double()
    H = fm.Hessian(model, lambda m, x: m(x).square().mean(), x)
    dense = H @ torch.eye(26, dtype=torch.float64, device=device)
    trace = fm.trace(H, products=15)
    assert abs(trace.value - dense.trace()) < 4 * trace.standard_error
    norm = fm.frobenius_norm(H, products=15)
    assert abs(norm.value - dense.norm()) < 4 * norm.standard_error
    assert fm.trace(H).value == pytest.approx(dense.trace().item())


@pytest.mark.parametrize("products", [6, 12])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_cover_what_they_say(products, confidence):
    """With four samples, too, of which 1.96 standard errors would cover 85 %."""
    matrix = torch.diag(torch.tensor(bulk(200, 1.0), dtype=torch.float64))
    truth, inside, narrow = matrix.trace().item(), 0, 0
    for seed in range(500):
        got = fm.trace(matrix, products, seed=seed)
        low, high = got.interval(confidence)
        inside += low <= truth <= high
        narrow += abs(got.value - truth) <= 1.96 * got.standard_error
        assert got.degrees == products - products // 3 - 1
    # 3 %; a share of 500 has a standard deviation of 1 to 2 %.
    assert inside / 500 == pytest.approx(
        confidence, abs=0.03 if confidence > 0.9 else 0.06
    )
    if products == 6:
        assert narrow < 0.92 * 500


def test_interval_of_an_exact_number_is_that_number(device):
    exact = fm.trace(torch.eye(5, device=device))
    assert exact.interval() == (5.0, 5.0)
    one = fm.Estimate(1.0, 2.0, 3)
    assert one.interval() == pytest.approx((1 - 3.919928, 1 + 3.919928))
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        one.interval(95)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (100, 1.98397)],
)
def test_quantiles_of_student(degrees, quantile):
    """Against the tables."""
    assert student_quantile(degrees, 0.95) == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize("estimate", TRUTH)
def test_tolerance_stops_an_estimate(estimate, device):
    matrix = rotated([4.0, 3.0, *(1 + 0.1 * torch.rand(398)).tolist()], device=device)
    got = estimate(matrix, 300, rtol=0.01)
    low, high = got.interval()
    assert high - low <= 2 * 0.01 * got.value * 1.01
    assert got.products < 100
    truth = matrix.trace() if estimate is fm.trace else matrix.norm()
    assert abs(got.value - truth) < 4 * got.standard_error
    assert estimate(matrix, 30, rtol=1e-9).products == 30
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        estimate(matrix, 30, rtol=0)


def test_band_holds_what_more_steps_show(device):
    """Few steps are off by more than the spread of probes says."""
    matrix = rotated([*bulk(300, 0.3), *bulk(100, 2.0)], device=device)
    few = fm.spectral_density(matrix, steps=8, probes=8, width=0.15)
    many = fm.spectral_density(matrix, steps=60, probes=8, width=0.15)
    grid = few.grid.numpy()
    later = numpy.interp(grid, many.grid.numpy(), many.density.numpy())
    low, high = (edge.numpy() for edge in few.band())
    inside = (low <= later) & (later <= high)
    error = (few.density.numpy() - later).__abs__()
    narrow = error <= 1.96 * few.standard_error.numpy()
    seen = later > 0.01 * later.max()
    assert inside[seen].mean() > 0.9
    assert narrow[seen].mean() < 0.8
    assert (few.truncation >= 0).all()
    assert many.truncation.max() < few.truncation.max()
    with pytest.raises(ValueError, match="at least 2 probes, got 1"):
        fm.spectral_density(matrix, steps=4, probes=1).band()


def test_printed_results_say_what_and_at_what_cost(device):
    matrix = torch.diag(torch.tensor([3.0, 2.0, *[0.0] * 60], device=device))
    pairs = repr(fm.top_eigenpairs(matrix, 2))
    assert pairs.startswith("Eigenpairs(3 +- ")
    assert "products, converged)" in pairs
    assert "none beyond 3" in pairs
    assert "3 more of 5" not in pairs
    many = repr(fm.top_eigenpairs(torch.eye(6, device=device), 6))
    assert "2 more of 6" in many
    assert len(many) < 200
    assert repr(fm.trace(matrix)) == "Estimate(5 exactly; 62 products)"
    sampled = repr(fm.trace(torch.diag(torch.tensor(bulk(100, 1.0))), 30))
    assert "with 95 % in [" in sampled
    assert sampled.endswith("30 products)")
    density = repr(fm.spectral_density(matrix, steps=5, probes=2))
    assert density.startswith("Density(2 probes of 5 steps, from")
    assert density.endswith("10 products)")


def test_too_few_products(device):
    for estimate in TRUTH:
        with pytest.raises(ValueError, match="at least 3 products, got 2"):
            estimate(rotated(EIGENVALUES, device=device), products=2)
    with pytest.raises(ValueError, match="not finite"):
        fm.trace(torch.full((9, 9), float("inf"), device=device), products=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "eigenvalues",
    [EIGENVALUES, [0.0] * 9, [1.0] * 9, [2.0], [-1.0, 5.0]],
    ids=["network", "zero", "identity", "one", "two"],
)
def test_density_integrates_to_one(eigenvalues, dtype, device):
    density = fm.spectral_density(rotated(eigenvalues, dtype, device=device), steps=30)
    area = torch.trapezoid(density.density, density.grid)
    assert area.item() == pytest.approx(1, abs=1e-6)
    sums = density.weights.sum(dim=1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert density.products == 4 * min(30, len(eigenvalues))


def test_density_has_the_moments_of_the_spectrum(device):
    values = torch.tensor(EIGENVALUES).double()
    density = fm.spectral_density(rotated(values, device=device), steps=40, probes=40)
    for power in (1, 2, 3):
        moments = (density.weights * density.nodes**power).sum(dim=1)
        error = moments.std() / math.sqrt(40)
        assert abs(moments.mean() - (values**power).mean()) < 4 * error


def test_density_is_where_the_eigenvalues_are(device):
    """Against the exact density, drawn with the same Gaussians."""
    values = torch.tensor(EIGENVALUES).double()
    density = fm.spectral_density(
        rotated(values, device=device), steps=80, probes=30, width=0.5
    )
    z = (density.grid[:, None] - values) / density.width
    exact = torch.exp(-0.5 * z**2).mean(dim=1) / (
        density.width * math.sqrt(2 * math.pi)
    )
    gap = (density.density - exact).abs()
    assert (gap <= 5 * density.standard_error + 1e-6).all()
    assert gap.max() < 0.05 * exact.max()


def test_density_of_one_probe_has_no_error_bar(device):
    density = fm.spectral_density(
        rotated(EIGENVALUES, device=device), steps=5, probes=1
    )
    assert density.standard_error.isnan().all()


def test_density_plots(device):
    pytest.importorskip("matplotlib").use("Agg")
    density = fm.spectral_density(rotated(EIGENVALUES, device=device), steps=20)
    ax = density.plot()
    assert density.plot(ax) is ax
    assert len(ax.lines) == 2
    assert ax.get_xlabel() == "eigenvalue"


def test_plot_without_matplotlib_says_what_to_do(monkeypatch, device):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        fm.spectral_density(torch.eye(3, device=device)).plot()


def test_density_arguments(device):
    with pytest.raises(ValueError, match="steps=0, probes=4"):
        fm.spectral_density(torch.eye(3, device=device), steps=0)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        fm.spectral_density(torch.eye(3, device=device), width=0.0)
    with pytest.raises(ValueError, match="not finite"):
        fm.spectral_density(torch.full((3, 3), float("nan"), device=device))
