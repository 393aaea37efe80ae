"""What bad input gets: what is wrong, the value met, what to do."""

import pytest
import torch

import fastminima as fm

from .cases import loss, losses, make, output_loss, outputs


def product(operator):
    return operator @ torch.ones(
        operator.shape[0], dtype=operator.dtype, device=operator.device
    )


@pytest.mark.parametrize("cls", ["Hessian", "GaussNewton", "GradientCovariance"])
def test_model_without_trainable_parameters(cls, device):
    model, batch = make("mlp", device=device)
    model.requires_grad_(False)
    closures = {"GaussNewton": (outputs, output_loss)}.get(cls, (loss,))
    with pytest.raises(ValueError, match=r"0 of its 4 parameters.*requires_grad_"):
        getattr(fm, cls)(model, *closures, batch)


def test_vectors_that_do_not_fit(device):
    model, batch = make("mlp", device=device)
    H = fm.Hessian(model, loss, batch)
    with pytest.raises(ValueError, match=r"\(38, 38\).*\(3,\).*\[38\]"):
        H @ torch.ones(3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"\(2, 38\)"):
        H @ torch.ones(2, 38, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"float64.*got torch.float32.*v\.to"):
        H @ torch.ones(38, dtype=torch.float32, device=device)
    with pytest.raises((ValueError, TypeError)):  # TypeError where shapes are checked
        H @ [1.0] * 38


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((b for b in [1]), r"one-shot iterator \(generator\).*list\(data\)"),
        (iter([1]), "one-shot iterator"),
        ([], "empty: list of length 0"),
        (torch.utils.data.TensorDataset(torch.ones(3)), "Dataset.*DataLoader"),
        (3, "neither a batch nor iterable: int"),
    ],
)
def test_data_that_are_not_batches(data, message, device):
    model, _ = make("mlp", device=device)
    with pytest.raises(ValueError, match=message):
        fm.Hessian(model, loss, data)


@pytest.mark.parametrize("data", [torch.ones(0, 3), [(torch.ones(0, 3),)]])
def test_no_samples(data, device):
    model, _ = make("mlp", device=device)
    with pytest.raises(ValueError, match="hold no samples"):
        product(fm.Hessian(model, loss, data))


@pytest.mark.parametrize("data", [[{"a": 1}], torch.tensor(1.0)])
def test_samples_that_cannot_be_counted(data, device):
    model, _ = make("mlp", device=device)
    with pytest.raises(ValueError, match="count="):
        product(fm.Hessian(model, loss, data))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss(value, device):
    model, batch = make("mlp", device=device)
    with pytest.raises(ValueError, match=rf"returned {value}"):
        product(fm.Hessian(model, lambda m, b: loss(m, b) * value, batch))
    with pytest.raises(ValueError, match="10 of 10 losses are not finite"):
        product(fm.GradientCovariance(model, lambda m, b: losses(m, b) * value, batch))


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (losses, r"shape \(10,\).*losses.mean"),
        (lambda m, b: loss(m, b).item(), "got float"),
        (lambda m, b: loss(m, b).detach(), "without a graph"),
        (torch.no_grad()(loss), "without a graph"),
    ],
)
def test_losses_that_are_no_scalar_with_a_graph(closure, message, device):
    model, batch = make("mlp", device=device)
    with pytest.raises(ValueError, match=message):
        product(fm.Hessian(model, closure, batch))


def test_covariance_needs_a_vector_and_two_samples(device):
    model, batch = make("mlp", device=device)
    with pytest.raises(ValueError, match=r"vector \[batch\].*shape \(\)"):
        product(fm.GradientCovariance(model, loss, batch))
    one = (batch[0][:1], batch[1][:1])
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        product(fm.GradientCovariance(model, losses, one))


def test_outputs_must_be_one_tensor(device):
    model, batch = make("mlp", device=device)
    with pytest.raises(ValueError, match="got tuple"):
        product(
            fm.GaussNewton(model, lambda m, b: (m(b[0]),), output_loss, batch),
        )


def test_complex_parameters(device):
    model = torch.nn.Linear(2, 2, dtype=torch.complex64, device=device)
    with pytest.raises(ValueError, match=r"'weight' is torch.complex64"):
        fm.Hessian(model, loss, torch.ones(2, 2, device=device))
