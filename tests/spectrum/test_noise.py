"""Products that are rounded, or not those of one symmetric matrix."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm
from fastminima.curvature._scale import dot, length, norm
from fastminima.spectrum import ConvergenceWarning, NoiseWarning

from .matrices import bulk, rotated


class Rounded:
    """A matrix whose products have errors of this size, new in each or fixed."""

    def __init__(self, matrix, size, *, is_fixed=True):
        self._matrix, self._size, self._is_fixed = matrix, size, is_fixed
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        generator = torch.Generator("cpu").manual_seed(1)
        self._generator = generator
        self._skew = torch.randn(matrix.shape, generator=generator).to(matrix)

    def __matmul__(self, v):
        product = self._matrix @ v
        if self._is_fixed:
            skew = (self._skew - self._skew.T) @ v
        else:
            skew = torch.randn(v.shape, generator=self._generator).to(v)
        return product + self._size * product.norm() / skew.norm() * skew


def network(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    return model.to(dtype), (x.to(dtype), y)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def autocast_loss(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch[0])
    return F.cross_entropy(outputs.float(), batch[1])


HALVES = {
    "bfloat16": (torch.bfloat16, loss),
    "float16": (torch.float16, loss),
    "autocast": (torch.float32, autocast_loss),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rtol", [3e-2, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", HALVES)
def test_residuals_of_halves_are_those_of_products(name, rtol, k):
    dtype, closure = HALVES[name]
    model, batch = network(dtype)
    H = fm.Hessian(model, closure, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pairs = fm.top_eigenpairs(H, k, rtol=rtol, max_products=80)
    assert pairs.products <= 80 + 1
    for value, v, residual in zip(
        pairs.values, pairs.vectors, pairs.residuals, strict=True
    ):
        error = (H @ v - value * v).norm()
        # Two products with what are nearly the same numbers are rounded otherwise.
        assert error <= 1.5 * residual
        if pairs.converged:
            assert residual <= rtol * value
    assert 1e-6 < pairs.noise < 2e-2
    assert not (pairs.converged and rtol <= 1e-5)


@pytest.mark.parametrize("name", HALVES)
def test_probe_measures_halves_too(name):
    dtype, closure = HALVES[name]
    model, batch = network(dtype)
    sharpness = fm.SharpnessProbe(model, closure, k=2, rtol=3e-2)
    for _ in range(3):
        pairs = sharpness(batch)
        H = fm.Hessian(model, closure, batch)
        for value, v, residual in zip(
            pairs.values, pairs.vectors, pairs.residuals, strict=True
        ):
            assert (H @ v - value * v).norm() <= 1.5 * residual


def test_one_product_says_nothing_of_noise():
    pairs = fm.top_eigenpairs(torch.full((1, 1), 2.0))
    assert pairs.products == 1
    assert math.isnan(pairs.noise)


@pytest.mark.parametrize("name", HALVES)
def test_tolerance_below_the_rounding_is_named(name):
    dtype, closure = HALVES[name]
    model, batch = network(dtype)
    said = r"what rounding leaves of the products \(half precision\): raise rtol to"
    with pytest.warns(ConvergenceWarning, match=said):
        fm.top_eigenpairs(fm.Hessian(model, closure, batch), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_honest_products(dtype):
    matrix = rotated([9.0, 7.0, 5.0, *bulk(200, 0.3)], dtype)
    eps = torch.finfo(dtype).eps
    for k in (1, 3):
        assert 0 < fm.top_eigenpairs(matrix, k).noise < 20 * eps
    model, batch = network(dtype)
    pairs = fm.top_eigenpairs(fm.Hessian(model, loss, batch), 2)
    assert 0 < pairs.noise < 20 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("is_fixed", [True, False])
def test_noise_is_warned_of_and_then_refused(is_fixed):
    matrix = rotated([9.0, 7.0, 5.0, *bulk(200, 0.3)])
    sizes = (5e-3, 3.0) if is_fixed else (1e-2, 3.0)
    with pytest.warns(NoiseWarning, match="differ by .*of its norm"):
        pairs = fm.top_eigenpairs(
            Rounded(matrix, sizes[0], is_fixed=is_fixed), rtol=0.2
        )
    assert 1e-4 < pairs.noise < 2e-2
    with pytest.raises(ValueError, match="not symmetric"):
        fm.top_eigenpairs(Rounded(matrix, sizes[1], is_fixed=is_fixed), rtol=0.2)


def test_matrix_that_changes_late_is_refused():
    """The first pairs of products are compared by name; every later one as well."""

    class Late(Rounded):
        products = 0

        def __matmul__(self, v):
            self.products += 1
            self._size = 1.0 if self.products > 14 else 0.0
            return super().__matmul__(v)

    matrix = rotated(torch.linspace(-1, 1, 300))
    with pytest.raises(ValueError, match="not the same in every product"):
        fm.top_eigenpairs(Late(matrix, 0.0), rtol=1e-6)


def test_residual_that_the_recurrence_cannot_know():
    """Without a half in sight: what is near the rounding is made from a product."""
    matrix = rotated([3.0, 2.0, *bulk(300, 0.3)], torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for rtol in (1e-4, 1e-5, 1e-6, 1e-7):
            pairs = fm.top_eigenpairs(matrix, rtol=rtol)
            v, value = pairs.vectors[0], pairs.values[0]
            error = (matrix.double() @ v.double() - value.double() * v.double()).norm()
            assert error <= 1.2 * pairs.residuals.item() + 2e-6


@pytest.mark.parametrize("size", [5, 4096, 4097, 3_000_017])
def test_lengths_of_long_vectors(size):
    """PyTorch's own norm of 3 million elements is off by 1e-4 on a CPU."""
    x, y = torch.randn(2, size)
    want = x.double().square().sum().sqrt()
    torch.testing.assert_close(length(x), want, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(
        norm(1e-30 * x) / 1e-30, want.item(), rtol=1e-6, atol=0.0
    )
    product = (x.double() * y.double()).sum()
    torch.testing.assert_close(dot(x, y), product, rtol=1e-9, atol=1e-9)
    basis = fm.top_eigenpairs(Identity(size), max_products=5, miss=1.0).vectors
    assert basis[0].double().norm().item() == pytest.approx(1, abs=1e-6)


class Identity:
    dtype = torch.float32

    def __init__(self, size):
        self.shape = size, size

    def __matmul__(self, v):
        return v


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e19, 1e30])
def test_every_scale(scale):
    values = [9.0, 7.0, -6.0, 5.0, *bulk(120, 0.2)]
    plain = rotated(values, torch.float32)
    matrix = plain * scale
    for method in ("lanczos", "power"):
        for which in ("largest", "smallest", "magnitude"):
            if method == "power" and which == "smallest":
                continue
            want = fm.top_eigenpairs(plain, 2, which, method)
            got = fm.top_eigenpairs(matrix, 2, which, method)
            close = {"rtol": 1e-4, "atol": 0.0}
            torch.testing.assert_close(got.values / scale, want.values, **close)
            assert got.converged
            assert got.products == want.products
            assert got.upper / scale == pytest.approx(want.upper, rel=1e-3)
    trace, norm = fm.trace(matrix, 40), fm.frobenius_norm(matrix, 40)
    assert trace.value / scale == pytest.approx(fm.trace(plain, 40).value, rel=1e-4)
    assert norm.value / scale == pytest.approx(
        fm.frobenius_norm(plain, 40).value, rel=1e-4
    )
    density, wanted = (fm.spectral_density(m, steps=12) for m in (matrix, plain))
    got, want = (
        (d.nodes.square() * d.weights).sum(1).sqrt() for d in (density, wanted)
    )
    torch.testing.assert_close(got / scale, want, rtol=1e-4, atol=0.0)
    area = torch.trapezoid(density.density, density.grid)
    assert area.item() == pytest.approx(1, abs=1e-6)
    skew = matrix.clone()
    skew[0, 1] += 3 * scale
    with pytest.raises(ValueError, match="not symmetric"):
        fm.top_eigenpairs(skew)
