"""Trace, norm and density, right within their standard errors, which are honest."""

import math

import pytest
import torch

import fastminima as fm

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
