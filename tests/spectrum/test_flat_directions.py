"""Warm calls where wanted eigenvalues are zero: products are rounding there."""

import warnings

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.spectrum import ConvergenceWarning

SIZE = 60
# Largest first; the rest is zero, or the last number as often as needed.
SPECTRA = {
    "zero": [0.0] * SIZE,
    "rank one": [7.0] + [0.0] * (SIZE - 1),
    "zero on top": [0.0] * 3 + [-1.0] * (SIZE - 3),
    "nearly zero on top": [1e-6] + [0.0] * (SIZE - 2) + [-1.0],
}


class Point(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1, SIZE, dtype=dtype))


def quadratic(model, A):
    return model.x @ (A @ model.x) / 2


def courses(spectrum, dtype, calls=5, is_step=False, **options):
    """Each call's pairs, with the matrix in double, of eigenvectors that turn."""
    generator = torch.Generator().manual_seed(0)
    S, T = torch.randn(2, SIZE, SIZE, generator=generator, dtype=torch.float64)
    basis, turn = torch.linalg.qr(S)[0], torch.matrix_exp(1e-3 * (T - T.T))
    values = torch.tensor(spectrum, dtype=torch.float64)
    model = Point(dtype)
    sharpness = fm.SharpnessProbe(model, quadratic, **options)
    for call in range(calls):
        if call > 2:  # at first the matrix stays as it is
            basis = turn @ basis
        A = (basis * values) @ basis.T
        A = ((A + A.T) / 2).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            given = {"loss": quadratic(model, A)} if is_step else {"batch": A}
            yield call, sharpness(**given), A.double()


@pytest.mark.parametrize("criterion", ["residual", "value"])
@pytest.mark.parametrize("is_step", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.filterwarnings("error::fastminima.spectrum.NoiseWarning")
def test_values_and_residuals_are_true(name, k, criterion, is_step):
    options = {"k": k, "rtol": 1e-8, "criterion": criterion, "is_step": is_step}
    for call, pairs, A in courses(SPECTRA[name], torch.float64, **options):
        true = torch.linalg.eigvalsh(A).flip(0)[:k]
        scale = max(map(abs, SPECTRA[name])) or 1.0
        torch.testing.assert_close(pairs.values, true, rtol=0, atol=1e-8 * scale)
        V = pairs.vectors
        torch.testing.assert_close(V @ V.T, torch.eye(k, dtype=V.dtype))
        true = (A @ V.T - V.T * pairs.values).norm(dim=0)
        torch.testing.assert_close(pairs.residuals, true, rtol=0.01, atol=1e-13 * scale)
        assert pairs.converged
        assert pairs.products <= (20 if call == 0 else 12 + k)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("is_step", [False, True])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
def test_rounding_is_no_asymmetry_and_is_not_multiplied_further(name, rtol, is_step):
    """What float32 leaves of a residual ends the call, not the budget."""
    options = {"k": 3, "rtol": rtol, "is_step": is_step}
    for _, pairs, A in courses(SPECTRA[name], torch.float32, **options):
        assert len(pairs.values) == 3
        true = torch.linalg.eigvalsh(A).flip(0)[:3]
        scale = max(map(abs, SPECTRA[name])) or 1.0
        torch.testing.assert_close(
            pairs.values.double(), true, rtol=0, atol=rtol * scale
        )
        assert pairs.products <= 16


def test_asymmetry_is_seen_beside_a_large_block():
    """The same vectors, and a gap that is no rounding of anything there is."""
    A = torch.diag(torch.full((SIZE,), -1.0, dtype=torch.float64))
    A[:4, :4] = 0
    A[0, 1] = 1e-3
    start = torch.eye(SIZE, dtype=torch.float64)[:2]
    with pytest.raises(ValueError, match="not symmetric"):
        fm.top_eigenpairs(A, k=2, start=start)
