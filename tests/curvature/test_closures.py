"""Closures that do something else than return the loss of the model given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm

from . import oracles
from .cases import loss, losses, make, output_loss, outputs


def ones(operator):
    return torch.ones(operator.shape[0], dtype=operator.dtype, device=operator.device)


@pytest.mark.parametrize(
    "data", [lambda b: b, lambda b: [b, b]], ids=["one", "several"]
)
def test_another_model(data, device):
    model, batch = make("mlp", device=device)
    other = copy.deepcopy(model)
    message = r"does not reach 4 of the 4 .* 4 other .* \(\d, \d\).*first argument"
    for operator in (
        fm.Hessian(other, lambda _, b: loss(model, b), data(batch)),
        fm.GaussNewton(other, lambda _, b: outputs(model, b), output_loss, data(batch)),
        fm.GradientCovariance(other, lambda _, b: losses(model, b), data(batch)),
    ):
        for solve in (
            fm.top_eigenpairs,
            fm.trace,
            fm.spectral_density,
            lambda H: H @ ones(H),
        ):
            with pytest.raises(ValueError, match=message):
                solve(operator)
    with pytest.raises(ValueError, match=message):
        fm.SharpnessProbe(other, lambda _, b: loss(model, b))(data(batch))


def test_part_of_another_model(device):
    model, batch = make("mlp", device=device)
    other = copy.deepcopy(model)
    H = fm.Hessian(
        model,
        lambda m, b: F.cross_entropy(m[2](torch.relu(other[0](b[0]))), b[1]),
        batch,
    )
    with pytest.raises(ValueError, match="2 of the 4"):
        H @ ones(H)


def test_idle_parameters_and_a_head_outside_are_no_fault(device):
    model, batch = make("unreached", device=device)
    head = nn.Linear(3, 3).to(device, torch.float64)
    H = fm.Hessian(model, lambda m, b: F.cross_entropy(head(m(b[0])), b[1]), batch)
    assert (H @ ones(H)).any()


def test_loss_that_ignores_its_predictions(device):
    model, batch = make("mlp", device=device)
    G = fm.GaussNewton(model, outputs, lambda o, b: loss(model, b), batch)
    with pytest.raises(ValueError, match="does not use its predictions"):
        G @ ones(G)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("had", [False, True])
def test_backward_in_the_closure(retain, had, device):
    model, batch = make("mlp", device=device)
    if had:
        loss(model, batch).backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def eager(model, batch):
        value = loss(model, batch)
        value.backward(retain_graph=retain)
        return value

    H = fm.Hessian(model, eager, batch)
    with pytest.raises(ValueError, match="calls backward itself"):
        H @ ones(H)
    after = [p.grad for p in model.parameters()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_training_step_in_the_closure(device):
    model, batch = make("mlp", device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())

    def step(model, batch):
        value = loss(model, batch)
        value.backward(retain_graph=True)
        optimizer.step()
        return value

    H = fm.Hessian(model, step, batch)
    with pytest.raises(ValueError, match="calls backward itself"):
        H @ ones(H)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def clamp(model, batch):
    with torch.no_grad():
        model[0].weight.clamp_(-0.01, 0.01)
    return loss(model, batch)


def renormalise(model, batch):
    model[2].weight.data = F.normalize(model[2].weight.data, dim=1)
    return loss(model, batch)


@pytest.mark.parametrize(
    ("closure", "name"), [(clamp, "0.weight"), (renormalise, "2.weight")]
)
def test_parameters_overwritten_in_the_closure(closure, name, device):
    model, batch = make("mlp", device=device)
    before = copy.deepcopy(model.state_dict())
    H = fm.Hessian(model, closure, batch)
    with pytest.raises(
        ValueError, match=f"overwrites parameters while it runs: {name}"
    ):
        H @ ones(H)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


class Tied(nn.Module):
    """A table with max_norm, read twice, and perhaps as the head as well."""

    def __init__(self, is_tied):
        super().__init__()
        self.table = nn.Embedding(5, 3, max_norm=0.7)
        self.head = nn.Linear(3, 5, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        rows = torch.tanh(self.table(ids[:, :1])).mean(1)
        return self.head(rows + F.embedding(ids[:, 1], self.table.weight, max_norm=0.4))


@pytest.mark.parametrize("is_tied", [False, True])
def test_max_norm_leaves_the_weights_alone(is_tied, device):
    torch.manual_seed(0)
    model = Tied(is_tied).to(device, torch.float64)
    ids = torch.randint(5, (10, 2), device=device)
    batch = ids, torch.randint(5, (10,), device=device)
    before = model.table.weight.detach().clone()
    H = fm.Hessian(model, loss, batch)
    got = H @ torch.eye(H.shape[0], dtype=H.dtype, device=device)
    torch.testing.assert_close(model.table.weight.detach(), before, rtol=0, atol=0)
    if not is_tied:
        want = oracles.hessian(model, constant_shift(model, ids), [batch], [10])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    fm.top_eigenpairs(H)
    torch.testing.assert_close(model.table.weight.detach(), before, rtol=0, atol=0)


def constant_shift(model, ids):
    """The loss with the rows moved by what max_norm moves them at this point."""
    weight = model.table.weight.detach()
    first = weight.clone()
    torch.embedding_renorm_(first, ids[:, 0].contiguous(), 0.7, 2.0)
    second = first.clone()
    torch.embedding_renorm_(second, ids[:, 1].contiguous(), 0.4, 2.0)
    first, second = first - weight, second - weight

    def closure(model, batch):
        table = model.table.weight
        rows = torch.tanh((table + first)[batch[0][:, :1]]).mean(1)
        rows = rows + (table + second)[batch[0][:, 1]]
        return F.cross_entropy(model.head(rows), batch[1])

    return closure


def test_hooks_on_gradients_of_modules_are_off(device):
    model, batch = make("mlp", device=device)
    want = fm.Hessian(model, loss, batch)
    want = want @ ones(want)
    calls = []
    model[0].register_full_backward_hook(lambda m, i, o: calls.append(1))
    model[2].register_full_backward_hook(lambda m, i, o: (2 * i[0],))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(2))
    H = fm.Hessian(model, loss, batch)
    torch.testing.assert_close(H @ ones(H), want)
    assert not calls
    loss(model, batch).backward()
    assert sorted(calls) == [1, 2]


def test_functions_without_a_module():
    """What `exec` makes in a namespace without a name has None in its place."""
    space = {"torch": torch}
    exec("def loss(model, batch):\n    return model(batch).square().mean()", space)
    assert space["loss"].__module__ is None
    model, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
    H = fm.Hessian(model, space["loss"], x)
    named = fm.Hessian(model, lambda m, b: m(b).square().mean(), x)
    torch.testing.assert_close(H @ torch.ones(4), named @ torch.ones(4))
    assert fm.SharpnessProbe(model, space["loss"])(x).converged
