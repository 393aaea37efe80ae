"""What is attached is what runs: the gradient that arrives at the loss says it."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastminima as fm

N = 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def losses_of(model, seed=1):
    torch.manual_seed(seed)
    x, y = torch.randn(N, 6).double(), torch.randint(5, (N,))
    return cross_entropy(model(x), y, reduction="none")


def single_gradients(model, losses):
    parameters = list(model.parameters())
    grads = (torch.autograd.grad(x, parameters, retain_graph=True) for x in losses)
    return torch.stack([torch.cat([g.reshape(-1) for g in of_x]) for of_x in grads])


MEASURES = ("norms", "second_moments", "gram")


def check(stats, want):
    torch.testing.assert_close(stats.sq_norms, want.square().sum(1))
    torch.testing.assert_close(stats.gram, want @ want.T)
    torch.testing.assert_close(stats.mean_grad_sq_norm, want.mean(0).square().sum())
    torch.testing.assert_close(stats.covariance_trace, want.var(0).sum())
    moments = torch.cat([t.reshape(-1) for t in stats.second_moments.values()])
    torch.testing.assert_close(moments, want.square().mean(0))


VECTOR = {
    "mean": lambda losses, model: losses.mean(),
    "sum": lambda losses, model: losses.sum(),
    "twice the mean": lambda losses, model: 2 * losses.mean(),
    "mean of twice": lambda losses, model: (2 * losses).mean(),
    "negative": lambda losses, model: -losses.mean(),
    "accumulated": lambda losses, model: losses.mean() / 4,
    "GradScaler": lambda losses, model: torch.amp.GradScaler(
        "cpu", init_scale=2.0**10
    ).scale(losses.mean()),
    "weighted": lambda losses, model: (torch.linspace(1, 2, N) * losses).mean(),
    "masked": lambda losses, model: losses[:3].mean(),
    "squared": lambda losses, model: losses.square().mean(),
    "penalty": lambda losses, model: (
        losses.mean() + 0.1 * sum(p.square().sum() for p in model.parameters())
    ),
    "penalty on some": lambda losses, model: (
        losses.sum() + (model[0].weight.sum() - 1) ** 2
    ),
}


@pytest.mark.parametrize("way", VECTOR)
def test_a_vector_of_losses(way):
    model = network()
    losses = losses_of(model)
    want = single_gradients(model, losses)
    total = VECTOR[way](losses, model)
    grads = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    probe = fm.GradientProbe(model, measure=MEASURES)
    probe.attach(losses)
    total.backward()
    check(probe.collect(), want)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)
        assert not p._backward_hooks


SCALAR = {
    "as it is": lambda loss, model: loss,
    "twice": lambda loss, model: 2 * loss,
    "squared": lambda loss, model: loss**2,
    "GradScaler": lambda loss, model: torch.amp.GradScaler(
        "cpu", init_scale=2.0**10
    ).scale(loss),
    "penalty": lambda loss, model: (
        loss + 0.1 * sum(p.square().sum() for p in model.parameters())
    ),
}


@pytest.mark.parametrize("way", SCALAR)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scalar_loss(way, reduction):
    model = network()
    losses = losses_of(model)
    want = single_gradients(model, losses)
    probe = fm.GradientProbe(model, measure=MEASURES)
    loss = getattr(losses, reduction)()
    probe.attach(loss, batch_size=N, reduction=reduction)
    SCALAR[way](loss, model).backward()
    check(probe.collect(), want)


@pytest.mark.parametrize("is_vector", [False, True])
def test_scale_is_what_the_loss_was_multiplied_with_before(is_vector):
    model = network()
    losses = losses_of(model)
    want = single_gradients(model, losses)
    loss = losses / 4 if is_vector else losses.mean() / 4
    size = None if is_vector else N
    probe = fm.GradientProbe(model, measure=MEASURES)
    probe.attach(loss, size, scale=1 / 4)
    (3 * loss.mean()).backward(retain_graph=True)
    check(probe.collect(), want)
    grad = model[0].weight.grad / 3
    model.zero_grad()
    check(probe.backward(loss, size, scale=1 / 4), want)
    torch.testing.assert_close(model[0].weight.grad, grad)


def test_another_loss_on_the_same_activations_is_refused_after_the_pass():
    model = network()
    x = torch.randn(N, 6).double()
    hidden = model[1](model[0](x))
    losses = model[2](hidden).square().sum(1)
    total = losses.mean() + hidden.abs().sum()
    want = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    probe = fm.GradientProbe(model)
    probe.attach(losses)
    total.backward()  # training is not disturbed
    with pytest.raises(fm.CaptureError, match="same activations"):
        probe.collect()
    for p, grad in zip(model.parameters(), want, strict=True):
        assert torch.equal(p.grad, grad)


def test_a_pass_over_another_loss_does_not_count():
    model = network()
    hidden = model[1](model[0](torch.randn(N, 6).double()))
    first, second = model[2](hidden).square().sum(1), model[2](hidden).sin().sum(1)
    want = single_gradients(model, first)
    probe = fm.GradientProbe(model, measure=MEASURES)
    probe.attach(first)
    second.mean().backward(retain_graph=True)
    first.mean().backward(retain_graph=True)
    second.mean().backward()
    check(probe.collect(), want)


def test_only_a_pass_over_another_loss():
    model = network()
    hidden = model[1](model[0](torch.randn(N, 6).double()))
    first, second = model[2](hidden).square().sum(1), model[2](hidden).sin().sum(1)
    probe = fm.GradientProbe(model)
    probe.attach(first)
    second.mean().backward()
    with pytest.raises(fm.CaptureError, match="No backward pass reached"):
        probe.collect()


def test_a_second_pass_over_the_attached_loss():
    model = network()
    losses = losses_of(model)
    probe = fm.GradientProbe(model)
    probe.attach(losses)
    losses.mean().backward(retain_graph=True)
    with pytest.raises(fm.CaptureError, match="second backward pass"):
        losses.mean().backward()


def test_a_pass_in_another_thread():
    model = network()
    losses = losses_of(model)
    want = single_gradients(model, losses)
    probe = fm.GradientProbe(model, measure=MEASURES)
    probe.attach(losses)
    weights = torch.linspace(1, 2, N)
    thread = threading.Thread(target=lambda: (weights * losses).mean().backward())
    thread.start()
    thread.join()
    check(probe.collect(), want)


def test_sharing_a_node_with_the_weighted_pass_leaves_no_hook_behind():
    model = network()
    losses = losses_of(model)
    probe = fm.GradientProbe(model)
    probe.attach(losses)
    (torch.linspace(1, 2, N) * losses).mean().backward(retain_graph=True)
    probe.collect()
    root = weakref.ref(losses)
    del losses
    assert root() is None


def test_an_attached_graph_is_gone_with_its_probe():
    model = network()
    losses = losses_of(model)
    probe = fm.GradientProbe(model)
    probe.attach(losses)
    probe.detach()
    root = weakref.ref(losses)
    del losses, probe
    gc.collect()
    assert root() is None


class Vector(nn.Module):
    """The node of its losses is one where a parameter meets data."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.randn(6))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x @ self.v + self.b


def test_a_weighted_vector_whose_own_node_is_a_use():
    """Hooks of a node that runs are called still when the session has closed."""
    torch.manual_seed(0)
    model, x = Vector(), torch.randn(4, 6)
    probe = fm.GradientProbe(model)
    losses = model(x)
    probe.attach(losses)
    (losses * torch.arange(1.0, 5.0)).mean().backward()
    want = x.square().sum(1) + 1
    torch.testing.assert_close(probe.collect().sq_norms, want)


def test_a_loss_that_was_multiplied_by_zero(device):
    """On a device the factor is not looked at: what is divided by it is no number."""
    model, x = Vector(), torch.randn(4, 6)
    probe = fm.GradientProbe(model)
    losses = model(x)
    probe.attach(losses)
    (0.0 * losses.mean()).backward()
    if device.type == "cpu":
        with pytest.raises(fm.CaptureError, match="multiplied by zero"):
            probe.collect()
        return
    stats = probe.collect()
    assert stats.sq_norms.isnan().all() and stats.mean_grad_sq_norm.isnan()
    assert not stats.is_finite


class Canary(torch.autograd.Function):
    """Holds an object for as long as the graph lives."""

    @staticmethod
    def forward(ctx, x, held):
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_an_attached_graph_does_not_wait_for_the_garbage_collector():
    class Held:
        pass

    model, held = nn.Linear(6, 3), Held()
    alive = weakref.ref(held)
    probe = fm.GradientProbe(model)
    gc.collect()
    gc.disable()
    try:
        losses = Canary.apply(model(torch.randn(4, 6)), held).square().sum(1)
        del held
        probe.attach(losses)
        losses.mean().backward()
        probe.collect()
        del losses
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("steps", [1, 6], ids=["first", "known"])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_a_pass_that_a_hook_runs_inside_is_not_this_one(steps, keep_mean):
    """It has gradients for the same parameters, and comes before those of the pass."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 5), nn.Linear(5, 3)
    model = nn.Sequential(first, nn.Tanh(), last)
    x, y = torch.randn(6, 4), torch.randn(7, 4)
    probe = fm.GradientProbe(model, keep_mean=keep_mean)

    def stats(inner):
        model.zero_grad()
        inside = first(x).tanh()
        if inner is not None:
            inside.register_hook(lambda g: inner.backward())
        losses = last(inside).square().sum(1)
        probe.attach(losses)
        losses.mean().backward()
        return probe.collect()

    for _ in range(steps):
        expected = stats(None)
    got = stats(model(y).square().sum())
    torch.testing.assert_close(got.mean_grad_sq_norm, expected.mean_grad_sq_norm)
    assert torch.equal(got.sq_norms, expected.sq_norms)
    again = stats(None)
    torch.testing.assert_close(again.mean_grad_sq_norm, expected.mean_grad_sq_norm)
