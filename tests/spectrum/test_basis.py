"""A basis kept in bfloat16: what it costs, and what is said of it."""

import bytes_held
import numpy as np
import pytest
import torch

import fastminima as fm
from fastminima.curvature._scale import length
from fastminima.spectrum import ConvergenceWarning
from fastminima.spectrum._basis import Basis

from .matrices import SPECTRA, Counted, bulk, rotated, wanted

HALF = torch.bfloat16


def long_basis(count, size, dtype, basis_dtype, device="cpu"):
    generator = torch.Generator("cpu").manual_seed(0)
    square = torch.randn(size, count, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(square)[0].T.to(device, dtype).contiguous()
    basis = Basis(rows[0].clone(), basis_dtype)
    for row in rows[1:]:
        basis.append(row.clone())
    return basis, rows


@pytest.mark.parametrize("piece", [64, 1 << 18])
@pytest.mark.parametrize("kept", [None, HALF])
def test_pieces_are_the_whole(kept, piece, monkeypatch, device):
    monkeypatch.setattr("fastminima.spectrum._basis._PIECE", piece)
    basis, rows = long_basis(6, 150, torch.float32, kept, device)
    # A half of bfloat16's eps for each element of a rounded vector.
    off = 2e-6 if kept is None else 2**-8
    weights = np.random.default_rng(0).normal(size=(6, 2))
    want = torch.from_numpy(weights).T @ rows.double().cpu()
    got = basis.combined(weights).double().cpu()
    assert float((got - want).norm() / want.norm()) < off
    other = torch.ones(150, device=device)
    with_other = basis.combined(np.vstack([weights, np.ones((1, 2))]), [other])
    assert float((with_other.double().cpu() - want - 1).norm() / want.norm()) < 2 * off
    w = torch.randn(150, generator=torch.Generator().manual_seed(1)).to(device)
    left, before = w.clone(), w.double()
    parts = basis.project_out(left)
    assert float((parts.cpu() - rows.double().cpu() @ before.cpu()).norm()) < off * 12
    again = rows @ left
    assert float(again.norm()) < off * float(w.norm())
    basis.replace(weights[:5])
    assert len(basis) == 3
    want = torch.from_numpy(weights[:5]).T @ rows[:5].double().cpu()
    got = basis.combined(np.eye(2)).double().cpu()
    assert float((got - want).norm() / want.norm()) < 2 * off
    assert torch.equal(basis[2], rows[5])


def test_only_two_vectors_are_whole():
    basis, rows = long_basis(5, 40, torch.float32, HALF)
    kinds = [basis[i].dtype for i in range(5)]
    assert kinds == [HALF, HALF, HALF, torch.float32, torch.float32]
    assert torch.equal(basis[4], rows[4])
    whole, _ = long_basis(5, 40, torch.float32, torch.float32)
    assert whole.dtype is None


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_pairs_are_right_and_residuals_measured(k, which):
    values = [9.0, 7.0, 5.0, -8.0, -4.0, *bulk(295, 0.2)]
    A = rotated(values, torch.float32)
    pairs = fm.top_eigenpairs(Counted(A), k=k, which=which, basis_dtype=HALF)
    assert pairs.converged
    for value, vector, residual, truth in zip(
        pairs.values,
        pairs.vectors,
        pairs.residuals,
        wanted(values, which, k),
        strict=True,
    ):
        said, is_one = float(residual), A.double() @ vector.double()
        measured = float((is_one - float(value) * vector.double()).norm())
        assert abs(said - measured) < 1e-4 * abs(truth)
        assert abs(float(value) - truth) <= said
        assert abs(float(length(vector)) - 1) < 1e-5


def test_a_product_more_and_no_wider_bound():
    A = rotated([9.0, 8.5, 8.0, *bulk(400, 1.0)], torch.float32)
    whole, half = (
        fm.top_eigenpairs(Counted(A), basis_dtype=kept) for kept in (None, HALF)
    )
    assert whole.converged and half.converged
    assert half.products <= whole.products + 2
    assert abs(half.upper - whole.upper) < 0.02 * whole.upper


@pytest.mark.parametrize("name", ["outliers", "triple", "both signs", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restarted_in_bfloat16(name, dtype, monkeypatch):
    monkeypatch.setattr("fastminima.spectrum._lanczos_pairs._BASIS_BYTES", 0)
    values = SPECTRA[name]
    A = rotated(values, dtype)
    pairs = fm.top_eigenpairs(A, k=3, basis_dtype=HALF, max_products=400)
    assert pairs.converged
    truth = torch.tensor(wanted(values, "largest", 3), dtype=dtype)
    scale = max(map(abs, values))
    assert float((pairs.values - truth).abs().max()) <= 1e-2 * max(scale, 1e-30)
    assert pairs.upper >= max(values) - 1e-3 * scale


def test_bounds_of_restarted_runs_hold(monkeypatch):
    monkeypatch.setattr("fastminima.spectrum._lanczos_pairs._BASIS_BYTES", 0)
    values = [1.0, 0.97, *np.linspace(-0.5, 0.9, 150)]
    A = rotated(values, torch.float32)
    missed = 0
    for seed in range(20):
        pairs = fm.top_eigenpairs(
            A, seed=seed, basis_dtype=HALF, rtol=5e-3, max_products=300
        )
        assert pairs.converged
        missed += pairs.upper < 1.0
    assert missed <= 1  # expected .04


def test_what_was_not_measured_is_not_converged():
    """With one product there is none for the residual, but what rounding may do."""
    A = torch.eye(40)
    with pytest.warns(ConvergenceWarning):
        pairs = fm.top_eigenpairs(A, basis_dtype=HALF, max_products=1, rtol=5e-3)
    assert not pairs.converged
    assert float(pairs.residuals) >= 2**-8


def test_tolerances_that_rounding_forbids():
    A = rotated([3.0, 1.0, 0.5], torch.float32)
    with pytest.raises(ValueError, match=r"rtol=0.001.*0.004"):
        fm.top_eigenpairs(A, basis_dtype=HALF, rtol=1e-3)
    with pytest.raises(ValueError, match="float16"):
        fm.top_eigenpairs(A, basis_dtype=torch.float16)
    pairs = fm.top_eigenpairs(A.double(), basis_dtype=torch.float32, rtol=1e-6)
    assert pairs.converged


def test_half_of_the_memory(monkeypatch):
    monkeypatch.setattr("fastminima.spectrum._basis._PIECE", 1 << 11)
    size = 1 << 16
    diagonal = torch.linspace(-1, 1, size)
    diagonal[0] = 1.01

    class Diagonal:
        shape, dtype, device = (size, size), torch.float32, torch.device("cpu")

        def __matmul__(self, v):
            return diagonal * v

    most = {}
    for kept in (None, HALF):
        with pytest.warns(ConvergenceWarning, match="Raise max_products"):
            found = bytes_held.held(
                lambda kept=kept: fm.top_eigenpairs(
                    Diagonal(), basis_dtype=kept, max_products=30, rtol=5e-3, miss=1.0
                )
            )
        most[kept] = found.most / (4 * size)
    assert most[None] > 30
    assert most[HALF] < 0.7 * most[None]
