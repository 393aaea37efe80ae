"""Fused steps unlike the one before: the generic way, or the right result."""

import pytest
import torch
from fused_models import (
    STEPS,
    compare,
    data,
    fused,
    gradients,
    layers,
    losses_of,
    some_steps,
    step,
)
from torch import nn

import fastminima as fm
from fastminima.capture.graph.extension import learned

if learned() is None:
    pytest.skip("no native extension that reads tensors", allow_module_level=True)


def test_sizes_that_change_and_come_back(monkeypatch, by_python, host_reads):
    sizes = [(5, 17), (5, 17), (5, 17), (3, 17), (5, 9), (1, 17), (5, 17), (5, 17)]
    model = layers()
    losses = lambda k: losses_of(model, data(k, *sizes[k]))  # noqa: E731
    compare(monkeypatch, model, losses, len(sizes))
    assert by_python[-1] == [] or not host_reads


def test_numbers_that_change(monkeypatch):
    """A factor that is not part of the structure."""
    torch.manual_seed(0)
    model = nn.ParameterDict(
        {"w": torch.randn(6, 40), "b": torch.randn(40), "v": torch.randn(40, 40)}
    ).double()
    alphas = [1.0] * 6 + [2.0, 1.0, 1.0]

    def losses(k):
        x = data(k).double().flatten(0, 1)
        y = torch.addmm(model["b"], x, model["w"], alpha=alphas[k]).tanh()
        return (y @ model["v"]).unflatten(0, (5, 17)).square().sum((1, 2))

    found = some_steps(model, losses, len(alphas))
    for k, (stats, grads) in enumerate(found):
        model.zero_grad()
        expected, want = step(fm.GradientProbe(model), model, losses(k))
        torch.testing.assert_close(stats.sq_norms, expected.sq_norms)
        torch.testing.assert_close(grads, want)


def test_gradients_that_lie_apart_go_the_generic_way(
    monkeypatch, by_python, host_reads
):
    """The gradient of a sum is one number, seen everywhere."""
    torch.manual_seed(0)
    model = nn.Linear(6, 40)

    def losses(k):
        return model(data(k).flatten(0, 1)).sum(1).unflatten(0, (5, 17)).sum(1)

    compare(monkeypatch, model, losses)
    assert by_python == [[("generic", "AddmmBackward0")]] * STEPS or not host_reads


class Negative(torch.autograd.Function):
    """The identity, whose gradient is a view that is negated when it is read."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return torch._neg_view(-g)  # contiguous, as what is read usually is


def test_a_gradient_with_another_sign(monkeypatch, by_python, host_reads):
    """Norms are the same, gradients are not: what is read has to be what it says."""
    torch.manual_seed(0)
    model = nn.Linear(6, 40)

    def losses(k):
        rows = data(k).flatten(0, 1)
        y = Negative.apply(torch.addmm(model.bias, rows, model.weight.t()))
        return y.unflatten(0, (5, 17)).square().sum((1, 2))

    compare(monkeypatch, model, losses)
    want = torch.autograd.grad(losses(0).mean(), model.weight)[0]
    _, grads = some_steps(model, losses, 6)[-1]
    del grads
    step(fused(model), model, losses(0))
    torch.testing.assert_close(model.weight.grad, want)
    generic = [("generic", "AddmmBackward0")]
    assert all(seen == generic for seen in by_python) or not host_reads


def test_inputs_with_another_sign(monkeypatch, not_apart):
    torch.manual_seed(0)
    model = nn.Linear(6, 40)

    def losses(k):
        x = torch._neg_view(data(k))
        assert x.is_neg() and x.is_contiguous()
        return losses_of(model, x if k in (2, 5) else x.resolve_neg())

    compare(monkeypatch, model, losses)


def test_a_model_that_changes_its_dtype(monkeypatch):
    model = layers()
    probe, found = fused(model), []
    for k in range(12):
        if k in (5, 9):
            model.double() if k == 5 else model.float()
        x = data(k).to(model.columns.dtype)
        got = step(probe, model, losses_of(model, x))
        expected = step(fm.GradientProbe(model), model, losses_of(model, x))
        torch.testing.assert_close(got[0].sq_norms, expected[0].sq_norms)
        torch.testing.assert_close(got[1], expected[1])
        found.append(got)
    assert {stats.sq_norms.dtype for stats, _ in found} == {
        *(torch.float32, torch.float64)
    }


def test_autocast_and_half_precision_go_by_python(autocast, by_python, monkeypatch):
    model = layers()

    def losses(k):
        with autocast(dtype=torch.bfloat16):
            return model(data(k)).float().square().sum((1, 2))

    compare(monkeypatch, model, losses)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = layers(torch.bfloat16)
    compare(monkeypatch, half, lambda k: losses_of(half, data(k).bfloat16()).float())
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())


@pytest.mark.parametrize("name", ["first.weight", "first.bias", "columns"])
def test_a_parameter_that_is_frozen_for_a_while(name, repeated):
    """Before the forward pass, and since it."""
    model = layers()
    probe = fused(model)
    parameter = model.get_parameter(name)
    for k in range(18):
        is_frozen, since = k in (6, 12), k == 12
        if is_frozen and not since:
            parameter.requires_grad_(False)
        losses = losses_of(model, data(k))
        (want,) = [torch.autograd.grad(losses.mean(), model.mixed, retain_graph=True)]
        parameter.requires_grad_(not is_frozen)
        _, grads = step(probe, model, losses)
        assert (name in grads) != is_frozen
        torch.testing.assert_close(grads["mixed"], want[0])
        parameter.requires_grad_()
    assert repeated.count(True) >= 3


def test_a_hook_that_is_added_between_steps(repeated, fusions):
    model = layers()
    probe, seen = fused(model), []
    for k in range(12):
        if k == 7:
            handle = model.columns.register_hook(lambda g: seen.append(g.clone()))
        step(probe, model, losses_of(model, data(k)))
        if 7 <= k < 9:
            assert len(seen) == k - 6  # once a step
            assert torch.equal(seen[-1], model.columns.grad)
        if k == 9:
            handle.remove()
    assert any("columns" not in names for names in fusions)
    assert repeated[0] and not all(repeated)


def test_hooks_of_accumulators_fire_once_in_repeated_steps(repeated):
    model = layers()
    probe, seen, nodes = fused(model), [], []
    for name, p in model.named_parameters():
        (node,) = [p.expand_as(p).grad_fn.next_functions[0][0]]
        nodes.append(node)
        node.register_prehook(lambda g, n=name: seen.append((n, g[0].clone())))
    for k in range(STEPS):
        seen.clear()
        _, grads = step(probe, model, losses_of(model, data(k)))
        assert sorted(name for name, _ in seen) == sorted(grads)
        for name, grad in seen:
            assert torch.equal(grad, grads[name]), name
    assert any(repeated)


def test_an_optimizer_in_the_backward_pass_is_served_at_once():
    """Parameters are gone on with as soon as their last use has run."""
    model, other = layers(torch.float64), layers(torch.float64)
    order = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, n=name: order.append(n))
    probe = fused(model)
    for k in range(STEPS):
        order.clear()
        x = data(k).double()
        _, grads = step(probe, model, losses_of(model, x))
        assert sorted(order) == sorted(grads)
        assert order.index("mixed") < order.index("first.weight")
        other.zero_grad()
        losses_of(other, x).mean().backward()
        torch.testing.assert_close(grads, gradients(other))


def test_gradients_that_are_there_are_added_to(repeated):
    model = layers()
    probe = fused(model)
    for k in range(STEPS):
        _, grads = step(probe, model, losses_of(model, data(k)))
        before = {name: g.clone() for name, g in grads.items()}
        probe.backward(losses_of(model, data(k)))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, 2 * before[name])


def test_a_gradient_belongs_to_its_parameter_alone():
    """It is not written into by the next step."""
    model = layers()
    found = some_steps(model, lambda k: losses_of(model, data(k)))
    kept = [{n: g.clone() for n, g in grads.items()} for _, grads in found]
    step(fused(model), model, losses_of(model, data(99)))
    for (_, grads), was in zip(found, kept, strict=True):
        for name, grad in grads.items():
            assert torch.equal(grad, was[name])
    pointers = {g.data_ptr() for _, grads in found for g in grads.values()}
    assert len(pointers) == len(found) * len(found[0][1])


def test_an_error_in_the_pass_leaves_nothing_behind(monkeypatch):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("not today")

    model = layers()
    probe = fused(model)
    for _ in range(5):
        step(probe, model, losses_of(model, data(0)))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not today"):
            step(probe, model, losses_of(model, Bad.apply(data(1).requires_grad_())))
    model.zero_grad()
    compare(monkeypatch, model, lambda k: losses_of(model, data(k)))


@pytest.mark.parametrize("options", [{"keep_mean": True}, {"every": 2}], ids=str)
def test_other_options(options):
    model = layers()
    probe = fused(model, **options)
    for k in range(12):
        stats, grads = step(probe, model, losses_of(model, data(k)))
        model.zero_grad()
        losses_of(model, data(k)).mean().backward()
        torch.testing.assert_close(grads, gradients(model))
        if stats is not None and "keep_mean" in options:
            torch.testing.assert_close(stats.mean_grad, grads)


def test_inference_mode_makes_ordinary_gradients(not_apart):
    model = layers()
    probe = fused(model)
    for k in range(STEPS):
        losses = losses_of(model, data(k))
        model.zero_grad()
        with torch.inference_mode(k % 2 == 1):
            probe.backward(losses)
        made = (p.grad for name, p in model.named_parameters() if "norm" not in name)
        assert not any(grad.is_inference() for grad in made)


def test_second_moments_are_made_with_the_gradients():
    model = layers()
    probe = fused(model, measure=("norms", "second_moments"))
    expected = fm.GradientProbe(model, measure="second_moments")
    for k in range(STEPS):
        stats, grads = step(probe, model, losses_of(model, data(k)))
        other, want = step(expected, model, losses_of(model, data(k)))
        torch.testing.assert_close(grads, want)
        torch.testing.assert_close(stats.second_moments, other.second_moments)
