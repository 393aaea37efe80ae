"""Eigenpairs found with products in bfloat16 and certified with exact ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm
from fastminima.spectrum import ConvergenceWarning


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def outputs(model, batch):
    return model(batch[0])


def trained(device, steps=30):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)).to(device)
    x = torch.randn(256, 20, device=device)
    batch = x, torch.randint(5, (256,), device=device)
    for _ in range(steps):
        model.zero_grad()
        loss(model, batch).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad
    model.zero_grad()
    return model, batch


@pytest.mark.parametrize("criterion", ["residual", "value"])
def test_pair_is_that_of_exact_products(criterion, device, monkeypatch):
    model, batch = trained(device)
    H = fm.Hessian(model, loss, batch)
    true = fm.top_eigenpairs(H, rtol=1e-4).values.item()
    exact = 0
    multiply = fm.Hessian._multiply

    def counted(operator, columns):
        nonlocal exact
        exact += len(columns) * (operator._low is None)
        return multiply(operator, columns)

    monkeypatch.setattr(fm.Hessian, "_multiply", counted)
    for seed in range(10):
        pairs = fm.top_eigenpairs(
            H, seed=seed, precision="certified", criterion=criterion, rtol=0.05
        )
        assert pairs.converged
        assert pairs.values.item() <= true * (1 + 1e-5)
        assert pairs.values.item() == pytest.approx(true, rel=0.01)
        assert pairs.upper >= true
        v = pairs.vectors[0]
        residual = (multiply(H, [v])[0] - pairs.values.to(v) * v).norm().item()
        assert pairs.residuals.item() == pytest.approx(residual, rel=1e-2, abs=1e-6)
    assert exact <= 10 * 4


def test_cold_calls_of_a_probe(device):
    model, batch = trained(device)
    exact = fm.SharpnessProbe(model, loss)
    certified = fm.SharpnessProbe(model, loss, precision="certified")
    for _ in range(3):
        pairs = certified(batch)
        assert pairs.converged
        torch.testing.assert_close(pairs.values, exact(batch).values, rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="one pair"):
        fm.SharpnessProbe(model, loss, k=2, precision="certified")


@pytest.mark.parametrize("kind", ["gauss_newton", "smallest"])
def test_other_matrices_and_the_other_end(kind, device):
    model, batch = trained(device)
    if kind == "smallest":
        H, which = fm.Hessian(model, loss, batch), "smallest"
    else:
        G = fm.GaussNewton(model, outputs, lambda p, b: F.cross_entropy(p, b[1]), batch)
        H, which = G, "largest"
    true = fm.top_eigenpairs(H, which=which, rtol=1e-4).values.item()
    pairs = fm.top_eigenpairs(H, which=which, precision="certified")
    assert pairs.converged
    assert pairs.values.item() == pytest.approx(true, rel=0.02)


def test_rough_operator_shares_random_numbers(device):
    """Dropout draws what the exact one drew, and the model is left as it was."""
    model, batch = trained(device)
    model.insert(1, nn.Dropout(0.5))
    H = fm.Hessian(model, loss, batch)
    torch.rand(3)
    low = H.rough()
    v = torch.randn(H.shape[0], device=device)
    near = torch.nn.functional.cosine_similarity(H @ v, low @ v, dim=0)
    assert near > 0.98
    assert low.noise.dtype == torch.bfloat16
    assert H.noise.dtype == torch.float32


def test_rounding_that_is_too_coarse_is_followed_by_exact_products(device):
    """Where it moves products by more than may be missed, nothing rests on it."""
    model, batch = trained(device)

    def sum_of_large(model, batch):
        # Of differences of large numbers little is left in bfloat16.
        shift = 300 * torch.ones(5, device=device)
        low = torch.is_autocast_enabled(device.type)
        out = model(batch[0]) + shift
        return F.cross_entropy((out.bfloat16() if low else out) - shift, batch[1])

    H = fm.Hessian(model, sum_of_large, batch)
    true = fm.top_eigenpairs(H, rtol=1e-4).values.item()
    pairs = fm.top_eigenpairs(H, precision="certified")
    assert pairs.converged
    assert true <= pairs.upper
    assert pairs.values.item() == pytest.approx(true, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "low"}, "'exact' or 'certified'"),
        ({"k": 2}, "one pair"),
        ({"method": "power"}, "by Lanczos"),
        ({"start": torch.ones(9)}, "starts cold"),
    ],
)
def test_arguments(options, message):
    model = nn.Linear(2, 3)
    H = fm.Hessian(model, loss, (torch.randn(4, 2), torch.tensor([0, 1, 2, 0])))
    with pytest.raises(ValueError, match=message):
        fm.top_eigenpairs(H, **{"precision": "certified", **options})
    with pytest.raises(ValueError, match="Hessian or GaussNewton"):
        fm.top_eigenpairs(torch.eye(3), precision="certified")
    model.double()
    double = fm.Hessian(model, loss, (torch.randn(4, 2).double(), torch.ones(4).long()))
    with pytest.raises(ValueError, match="float64"):
        fm.top_eigenpairs(double, precision="certified")


@pytest.mark.parametrize("most", [1, 4, 10, 60])
def test_both_kinds_of_products_are_limited(most, device):
    """The smallest of a matrix without negative ones is lost in rounding."""
    model, batch = trained(device)
    G = fm.GaussNewton(model, outputs, lambda p, b: F.cross_entropy(p, b[1]), batch)
    with pytest.warns(ConvergenceWarning):
        pairs = fm.top_eigenpairs(
            G, which="smallest", precision="certified", max_products=most
        )
    assert pairs.products <= most + 4  # those of comparing, and of the last residual
    assert not pairs.converged


def test_differences_have_no_cheaper_form(device):
    model, batch = trained(device, steps=0)
    H = fm.Hessian(model, loss, batch, engine="finite_differences")
    with pytest.raises(ValueError, match="mostly rounding"):
        fm.top_eigenpairs(H, precision="certified")


class Blind:
    """The products of a matrix without its largest eigenvalue, as the cheap ones."""

    def __init__(self, matrix, cheap):
        self._matrix, self._cheap = matrix, cheap
        self.shape, self.dtype = matrix.shape, matrix.dtype
        self.device = matrix.device

    def __matmul__(self, v):
        return self._matrix @ v

    def rough(self):
        return self._cheap


def test_bound_that_the_value_itself_is_beyond(device):
    """Exact products show more than cheap ones allow: the bound is not believed."""
    values = torch.linspace(0, 1, 200, device=device)
    values[0] = 30.0
    near = torch.zeros(200, device=device)
    near[-1], near[0] = 1, 1e-2
    cheap = values.clone()
    cheap[0] = 0
    rotation = torch.linalg.qr(torch.eye(200, device=device) + near[:, None] * near)[0]
    exact = rotation @ torch.diag(values) @ rotation.T
    pairs = fm.top_eigenpairs(Blind(exact, torch.diag(cheap)), precision="certified")
    assert pairs.values.item() == pytest.approx(30, rel=1e-2)
    assert pairs.upper >= pairs.values.item()
