"""The model leaves as it came, and the graph follows the model."""

import copy

import pytest
import torch
from torch import nn

import fastminima as fm

from .cases import loss, losses, make, output_loss, outputs


def make_delicate(device):
    """Batch norm, dropout, gradients, a hook: everything that could be disturbed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    ).double()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model = model.to(device)
    batch = (torch.randn(10, 3).double(), torch.randint(3, (10,)))
    batch = tuple(t.to(device) for t in batch)
    loss(model, batch).backward()
    return model, batch


def state(model):
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [t.clone() for t in (*model.parameters(), *model.buffers())],
        [id(t) for t in (*model.parameters(), *model.buffers())],
        [None if p.grad is None else id(p.grad) for p in model.parameters()],
        [len(m._forward_hooks) for m in model.modules()],
        [list(p._backward_hooks or ()) for p in model.parameters()],
        torch.get_rng_state(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
    )


def assert_same(before, after):
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def disturb(model, batch):
    """A closure that leaves nothing as it was."""
    model.train()
    torch.rand(5)
    model[1].momentum = model[1].momentum
    value = loss(model, batch)
    model.eval()
    model[0].bias.requires_grad_(True)
    model.zero_grad()
    return value


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    "data", [lambda b: b, lambda b: [b, b]], ids=["one", "several"]
)
def test_nothing_changes(is_training, data, device):
    model, batch = make_delicate(device)
    model.train(is_training)
    before = state(model)
    for operator in (
        fm.Hessian(model, disturb, data(batch)),
        fm.GaussNewton(model, outputs, output_loss, data(batch)),
        fm.GradientCovariance(model, losses, data(batch)),
    ):
        v = torch.ones(operator.shape[0], dtype=torch.float64, device=device)
        operator @ v
        operator @ v
        _ = operator.gradient
        assert_same(before, state(model))
    fm.SharpnessProbe(model, loss, max_products=5, rtol=10.0)(data(batch))
    assert_same(before, state(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_changes_after_an_exception(error, device):
    model, batch = make_delicate(device)
    model[3].weight.register_hook(lambda g: g)

    def failing(model, batch):
        disturb(model, batch)
        raise error("planted")

    before = state(model)
    H = fm.Hessian(model, failing, batch)
    with pytest.raises(error, match="planted"):
        H @ torch.ones(H.shape[0], dtype=torch.float64, device=device)
    assert_same(before, state(model))


def test_interrupted_operator_works_again(device):
    model, batch = make("mlp", device=device)
    calls = []

    def sometimes(model, batch):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return loss(model, batch)

    H = fm.Hessian(model, sometimes, batch)
    v = torch.ones(H.shape[0], dtype=torch.float64, device=device)
    with pytest.raises(KeyboardInterrupt):
        H @ v
    torch.testing.assert_close(H @ v, fm.Hessian(model, loss, batch) @ v)


def test_dropout_is_one_fixed_operator(device):
    model, batch = make_delicate(device)
    model.train()
    several = [batch, batch]
    for data in (batch, several):
        H = fm.Hessian(model, loss, data)
        I = torch.eye(H.shape[0], dtype=H.dtype, device=device)
        first = H @ I
        torch.rand(3)
        for p in model.parameters():
            p.data = p.data.clone()  # forces the graph to be recorded again
        torch.testing.assert_close(H @ I, first, rtol=0, atol=0)
        torch.testing.assert_close(first, first.T)


def changes(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def replace():
        for p in model.parameters():
            p.data = p.data * 1.1

    def behind_the_counter():
        for p in model.parameters():
            p.data.mul_(1.1)

    def load():
        state = {k: v + 0.1 for k, v in model.state_dict().items()}
        model.load_state_dict(state)

    return {
        "optimizer": optimizer.step,
        "data replaced": replace,
        "data in place": behind_the_counter,
        "load_state_dict": load,
    }


@pytest.mark.parametrize("how", changes(nn.Linear(1, 1)))
def test_graph_follows_the_parameters(how, device):
    model, batch = make("mlp", device=device)
    H = fm.Hessian(model, loss, batch)
    v = torch.ones(H.shape[0], dtype=torch.float64, device=device)
    old = H @ v
    loss(model, batch).backward()
    changes(model)[how]()
    want = fm.Hessian(copy.deepcopy(model), loss, batch) @ v
    assert (want - old).abs().max() > 1e-6
    torch.testing.assert_close(H @ v, want, rtol=0, atol=0)


def test_graph_follows_frozen_parameters_buffers_mode_and_batch(device):
    model, batch = make("batch_norm", device=device)
    model[0].weight.requires_grad_(False)
    model.eval()
    H = fm.Hessian(model, loss, batch)
    v = torch.ones(H.shape[0], dtype=torch.float64, device=device)

    def follows():
        old = H @ v
        yield
        want = fm.Hessian(model, loss, batch) @ v
        assert (want - old).abs().max() > 1e-6
        torch.testing.assert_close(H @ v, want, rtol=0, atol=0)
        yield

    for change in (
        lambda: model[0].weight.data.mul_(1.5),
        lambda: model[1].running_mean.data.add_(1),
        lambda: model.train(),
        lambda: batch[0].mul_(2),
    ):
        check = follows()
        next(check)
        change()
        next(check)


@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
def test_one_batch_is_recorded_once_and_once_to_compare(name, device):
    model, batch = make(name, device=device)
    calls = []

    def counted(model, batch):
        calls.append(1)
        return loss(model, batch)

    H = fm.Hessian(model, counted, batch)
    v = torch.ones(H.shape[0], dtype=torch.float64, device=device)
    for _ in range(4):
        H @ v
    assert len(calls) == 2


def test_hooks_on_parameters_do_not_change_products(device):
    model, batch = make("mlp", device=device)
    v = torch.ones(
        sum(p.numel() for p in model.parameters()), dtype=torch.float64, device=device
    )
    want = fm.Hessian(model, loss, batch) @ v
    handle = model[0].weight.register_hook(lambda g: 10 * g)
    torch.testing.assert_close(fm.Hessian(model, loss, batch) @ v, want)
    loss(model, batch).backward()
    scaled = model[0].weight.grad.clone()
    handle.remove()
    model.zero_grad()
    loss(model, batch).backward()
    torch.testing.assert_close(scaled, 10 * model[0].weight.grad)


def test_memory_is_freed_with_the_operator(device):
    import weakref

    model, batch = make("mlp", device=device)
    H = fm.Hessian(model, loss, batch)
    H @ torch.ones(H.shape[0], dtype=torch.float64, device=device)
    graph = weakref.ref(H._kept.graph)
    del H
    assert graph() is None
