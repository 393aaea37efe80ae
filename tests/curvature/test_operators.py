"""The operators against dense matrices from finite differences of float64 gradients."""

import pytest
import torch

import fastminima as fm

from . import oracles
from .cases import CASES, loss, losses, make, output_loss, outputs, unequal

# Central differences are good to about 1e-9; the entries are of order one.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def dense(operator):
    size = operator.shape[0]
    return operator @ torch.eye(size, dtype=operator.dtype, device=operator.device)


@pytest.mark.parametrize("name", CASES)
def test_hessian_is_the_second_derivative(name, device):
    model, batch = make(name, device=device)
    want = oracles.hessian(model, loss, [batch], [10])
    torch.testing.assert_close(dense(fm.Hessian(model, loss, batch)), want, **CLOSE)


@pytest.mark.parametrize("name", [n for n in CASES if n != "batch_norm"])
def test_hessian_weighs_batches_by_samples(name, device):
    model, batch = make(name, device=device)
    whole = dense(fm.Hessian(model, loss, batch))
    parts = dense(fm.Hessian(model, loss, unequal(batch)))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_is_the_sandwich(name, device):
    model, batch = make(name, device=device)
    want = oracles.gauss_newton(model, outputs, output_loss, [batch], [10])
    got = dense(fm.GaussNewton(model, outputs, output_loss, batch))
    torch.testing.assert_close(got, want, **CLOSE)
    assert torch.linalg.eigvalsh(got).min() > -1e-10


def test_gauss_newton_weighs_batches_by_samples(device):
    model, batch = make("mlp", device=device)
    whole = dense(fm.GaussNewton(model, outputs, output_loss, batch))
    parts = dense(fm.GaussNewton(model, outputs, output_loss, unequal(batch)))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", CASES)
def test_covariance_is_that_of_single_gradients(name, device):
    model, batch = make(name, device=device)
    want = oracles.covariance(model, losses, [batch])
    torch.testing.assert_close(dense(fm.GradientCovariance(model, losses, batch)), want)


@pytest.mark.parametrize("sizes", [(8, 2), (1, 9), (4, 0, 6)])
def test_covariance_over_several_batches(sizes, device):
    model, batch = make("layer_norm", device=device)
    parts = list(zip(*(t.split(sizes) for t in batch), strict=True))
    want = oracles.covariance(model, losses, [batch])
    torch.testing.assert_close(dense(fm.GradientCovariance(model, losses, parts)), want)


@pytest.mark.parametrize("data", [lambda b: b, unequal], ids=["one", "several"])
def test_gradient_is_the_mean_gradient(data, device):
    model, batch = make("mlp", device=device)
    want = oracles.gradient(model, loss, batch)
    for operator in (
        fm.Hessian(model, loss, data(batch)),
        fm.GaussNewton(model, outputs, output_loss, data(batch)),
        fm.GradientCovariance(model, losses, data(batch)),
    ):
        torch.testing.assert_close(operator.gradient, want)


def test_tied_and_frozen_parameters_are_counted_as_named_parameters_does(device):
    model, batch = make("tied", device=device)
    tied = fm.Hessian(model, loss, batch)
    assert tied.shape == (15, 15)
    assert tied.names == ("embed.weight",)
    model, batch = make("unreached", device=device)
    frozen = fm.Hessian(model, loss, batch)
    assert frozen.names == (
        *("idle.weight", "idle.bias"),
        *("first.weight", "last.weight", "last.bias"),
    )
    assert not dense(frozen)[:6].any()
    named = frozen.named(
        torch.arange(float(frozen.shape[0]), dtype=torch.float64, device=device)
    )
    assert named["idle.bias"].tolist() == [4.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_narrower_parameters(dtype, device):
    model, batch = make("mlp", dtype, device)
    exact, _ = make("mlp", device=device)
    exact.load_state_dict(model.state_dict())
    wide = (batch[0].double(), batch[1])
    operator = fm.Hessian(model, loss, batch)
    assert operator.dtype == torch.float32
    v = torch.randn(operator.shape[0], dtype=torch.float32, device=device)
    want = fm.Hessian(exact, loss, wide) @ v.double()
    # Rounding errors of ten operations in a row, relative to the largest entry.
    allowed = 30 * torch.finfo(dtype).eps * want.abs().max()
    assert (operator @ v - want).abs().max() < allowed


def test_mixed_parameters_meet_in_the_wider_type(device):
    model, batch = make("mlp", torch.float32, device)
    model[2].double()

    def mixed(model, batch):
        hidden = torch.relu(model[0](batch[0])).double()
        return torch.nn.functional.cross_entropy(model[2](hidden), batch[1])

    operator = fm.Hessian(model, mixed, batch)
    assert operator.dtype == torch.float64
    matrix = dense(operator)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-5, atol=1e-6)


def test_linear_loss_has_no_curvature(device):
    model = torch.nn.Linear(3, 1).to(device)
    x = torch.randn(4, 3, device=device)
    H = fm.Hessian(model, lambda m, x: m(x).mean(), x)
    assert not dense(H).any()
    G = fm.GaussNewton(model, lambda m, x: m(x), lambda o, x: o.mean(), x)
    assert not dense(G).any()


def test_matrix_of_vectors(device):
    model, batch = make("mlp", device=device)
    H = fm.Hessian(model, loss, batch)
    V = torch.randn(H.shape[0], 3, dtype=H.dtype, device=device)
    torch.testing.assert_close(H @ V, torch.stack([H @ v for v in V.T], dim=1))
    assert (H @ V[:, :0]).shape == (H.shape[0], 0)


def test_weight_counts_tokens_where_asked(device):
    model, batch = make("mlp", device=device)
    counted = fm.Hessian(model, loss, unequal(batch), count=lambda b: 1)
    halves = [dense(fm.Hessian(model, loss, b)) for b in unequal(batch)]
    torch.testing.assert_close(dense(counted), (halves[0] + halves[1]) / 2)


def test_mapping_and_tensor_batches(device):
    model, (x, y) = make("mlp", device=device)
    want = dense(fm.Hessian(model, loss, (x, y)))
    mapping = {"y": y, "x": x}
    got = fm.Hessian(model, lambda m, b: loss(m, (b["x"], b["y"])), mapping)
    torch.testing.assert_close(dense(got), want)
    got = fm.Hessian(model, lambda m, b: loss(m, (b, y)), x)
    torch.testing.assert_close(dense(got), want)


def test_data_loader_of_several_batches(device):
    model, batch = make("mlp", device=device)
    want = dense(fm.Hessian(model, loss, batch))
    data = torch.utils.data.TensorDataset(*batch)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    torch.testing.assert_close(dense(fm.Hessian(model, loss, loader)), want)
