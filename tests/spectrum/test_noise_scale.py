"""Gradient noise beside curvature, against sums over samples in float64."""

import math

import pytest
import torch

import fastminima as fm

from .matrices import Counted, bulk, rotated

A = [9.0, 7.0, -3.0, *bulk(77, 0.2)]
B = [20.0, 5.0, *(0.1 + torch.rand(78, generator=torch.Generator().manual_seed(0)))]


def losses(model, batch):
    return (model(batch[0]) - batch[1]).square().mean(dim=1)


def mean_loss(model, batch):
    return losses(model, batch).mean()


@pytest.fixture
def run(device):
    """A model with its Hessian and covariance; both dense, and the mean gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).to(device, torch.float64)
    batch = tuple(torch.randn(12, size).to(device, torch.float64) for size in (3, 2))
    rows = []
    for x, y in zip(*(t.split(1) for t in batch), strict=True):
        model.zero_grad()
        mean_loss(model, (x, y)).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    rows = torch.stack(rows)
    model.zero_grad()
    H = fm.Hessian(model, mean_loss, batch)
    Sigma = fm.GradientCovariance(model, losses, batch)
    dense = H @ torch.eye(26, dtype=torch.float64, device=device)
    return H, Sigma, dense, torch.cov(rows.T), rows.mean(dim=0)


def two(device, dtype=torch.float64):
    first = rotated(A, dtype, device=device)
    return first, rotated(B, dtype, seed=1, device=device)


def test_by_hand(run):
    H, Sigma, dense, covariance, gradient = run
    noise = (dense @ covariance).trace().item()
    along = (gradient @ dense @ gradient).item()
    got = fm.product_trace(H, Sigma)
    assert got.value == pytest.approx(noise)
    assert got.standard_error == 0
    assert Sigma.samples == 12
    unbiased = fm.hessian_noise_scale(H, Sigma)
    assert unbiased.value == pytest.approx(noise / (along - noise / 12))
    plain = fm.hessian_noise_scale(H, Sigma, samples=math.inf)
    assert plain.value == pytest.approx(noise / along)
    other = torch.linspace(-1, 1, 26, dtype=torch.float64, device=gradient.device)
    given = fm.hessian_noise_scale(H, Sigma, other, samples=math.inf)
    assert given.value == pytest.approx(noise / (other @ dense @ other).item())


def test_samples_of_several_batches(device):
    model = torch.nn.Linear(3, 2).to(device)
    x, y = (torch.randn(10, size).to(device) for size in (3, 2))
    parts = list(zip(x.split(4), y.split(4), strict=True))
    assert fm.GradientCovariance(model, losses, parts).samples == 10


def test_noise_along_eigenvectors(run):
    H, Sigma, dense, covariance, _ = run
    pairs = fm.top_eigenpairs(H, k=3, rtol=1e-8)
    along = fm.noise_along(Sigma, pairs)
    vectors = torch.linalg.eigh(dense)[1].flip(1)[:, :3]
    want = torch.einsum("pk,pq,qk->k", vectors, covariance, vectors)
    torch.testing.assert_close(along.variances, want.cpu())
    torch.testing.assert_close(along.ratios, along.variances / pairs.values)
    shares = along.shares(fm.trace(Sigma))
    torch.testing.assert_close(shares, (want / covariance.trace()).cpu())
    assert along.products == 3 + 1  # by which a fresh operator compares itself


def test_all_directions_have_all_noise(device):
    H, Sigma = torch.diag(torch.arange(1.0, 6)), rotated(torch.arange(1.0, 6))
    H, Sigma = H.to(device, torch.float64), Sigma.to(device)
    along = fm.noise_along(Sigma, fm.top_eigenpairs(H, k=5, rtol=1e-8))
    assert along.shares(15.0).sum().item() == pytest.approx(1)
    same = fm.noise_along(3 * H, fm.top_eigenpairs(H, k=5, rtol=1e-8))
    torch.testing.assert_close(same.ratios, torch.full_like(same.ratios, 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_within_four_standard_errors(dtype, device):
    first, second = (Counted(matrix) for matrix in two(device, dtype))
    truth = (first._matrix.double() @ second._matrix.double()).trace().item()
    for seed in range(5):
        first.products = second.products = 0
        got = fm.product_trace(first, second, 40, seed)
        assert first.products == second.products == 40
        assert got.products == 80
        assert 0 < abs(got.value - truth) < 4 * got.standard_error


def test_intervals_cover_what_they_say(device):
    first, second = two("cpu")
    truth, inside = (first @ second).trace().item(), 0
    for seed in range(500):
        low, high = fm.product_trace(first, second, 24, seed).interval()
        inside += low <= truth <= high
    assert inside / 500 == pytest.approx(0.95, abs=0.03)


def test_standard_error_of_the_ratio_is_its_spread():
    first, second = two("cpu")
    gradient = torch.linspace(-1, 2, 80, dtype=torch.float64)
    got = [
        fm.hessian_noise_scale(first, second, gradient, 1000, products=40, seed=seed)
        for seed in range(100)
    ]
    values = torch.tensor([g.value for g in got], dtype=torch.float64)
    errors = torch.tensor([g.standard_error for g in got], dtype=torch.float64)
    # A spread over 100 seeds is known to 7 %, 3 of them are allowed.
    assert values.std() / errors.square().mean().sqrt() == pytest.approx(1, abs=0.21)
    assert got[0].products == 81


def test_subtracting_the_noise_removes_the_bias():
    """g'Hg of four samples is a third too large; less tr(H Sigma) / 4 it is right."""
    generator = torch.Generator().manual_seed(0)
    H = torch.diag(torch.arange(1.0, 6, dtype=torch.float64))
    G = torch.full((5,), 2.0, dtype=torch.float64)
    plain, unbiased = [], []
    for _ in range(400):
        rows = G + 2.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
        Sigma, g = torch.cov(rows.T), rows.mean(dim=0)
        noise = fm.product_trace(H, Sigma).value
        found = fm.hessian_noise_scale(H, Sigma, g, samples=4)
        plain.append((g @ H @ g).item())
        unbiased.append(noise / found.value)  # the denominator
    truth = (G @ H @ G).item()
    for values, is_right in ((plain, False), (unbiased, True)):
        drawn = torch.tensor(values, dtype=torch.float64)
        error = drawn.std() / 20
        assert (abs(drawn.mean() - truth) < 4 * error) == is_right


def test_what_cannot_be_told_from_zero_has_no_error_bar(device):
    first, second = two(device)
    gradient = torch.randn(80, generator=torch.Generator().manual_seed(1)).double()
    gradient = gradient.to(device)
    noise = fm.product_trace(first, second, 40).value
    # As long as makes g'Hg what the noise of eight samples is.
    along = (gradient @ first @ gradient).item()
    gradient = gradient * (noise / 8 / along) ** 0.5
    got = fm.hessian_noise_scale(first, second, gradient, 8, products=40)
    assert got.standard_error == math.inf
    assert got.interval() == (-math.inf, math.inf)


def test_tolerance_stops(device):
    matrix = torch.eye(200, device=device) + 0.1 * rotated(bulk(200, 1.0)).to(
        device, torch.float32
    )
    got = fm.product_trace(matrix, matrix, 150, rtol=0.02)
    assert got.products < 2 * 60
    low, high = got.interval()
    assert low <= (matrix @ matrix).trace() <= high


def test_arguments(device):
    first, second = two(device)
    small, g = torch.eye(3, device=device), torch.ones(80, device=device)
    pairs = fm.top_eigenpairs(small)
    for call, message in (
        (lambda: fm.product_trace(first, small), "sizes 80 and 3"),
        (lambda: fm.product_trace(first, second, 2), "at least 3 products, got 2"),
        (lambda: fm.product_trace(first, second, rtol=0.0), "rtol must be positive"),
        (lambda: fm.product_trace(first, second * math.nan), "not finite"),
        (lambda: fm.hessian_noise_scale(first, second), "pass gradient="),
        (lambda: fm.hessian_noise_scale(first, second, g), "pass samples="),
        (lambda: fm.hessian_noise_scale(first, second, g, 0), "at least 1, got 0"),
        (lambda: fm.hessian_noise_scale(first, second, 0 * g, 9), "a norm of 0"),
        (lambda: fm.hessian_noise_scale(first, second, g[:9], 9), "got 9 with"),
        (lambda: fm.noise_along(first, pairs), "3 entries and the covariance 80"),
        (lambda: fm.noise_along(small, pairs).shares(0.0), "positive and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
