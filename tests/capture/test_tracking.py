"""Parameters that are frozen, replaced or created after a probe was made."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastminima as fm


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def losses_of(model):
    x, y = torch.randn(6, 6).double(), torch.randint(5, (6,))
    return cross_entropy(model(x), y, reduction="none")


def check(probe, model):
    losses = losses_of(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = [
        torch.autograd.grad(x, list(named.values()), retain_graph=True) for x in losses
    ]
    stats = probe.backward(losses)
    want = torch.stack([sum(g.square().sum() for g in of_x) for of_x in grads])
    torch.testing.assert_close(stats.sq_norms, want)
    assert list(stats.sq_norms_by_parameter) == list(named)
    assert stats.parameter_count == sum(p.numel() for p in named.values())
    model.zero_grad()


def unfreeze(model):
    model[0].requires_grad_(True)


def freeze(model):
    model[0].requires_grad_(False)


def replace_head(model):
    model[2] = nn.Linear(8, 5).double()


def widen(model):
    model[2] = nn.Linear(8, 7).double()


def add(model):
    model.append(nn.Linear(5, 5).double())


@pytest.mark.parametrize("change", [unfreeze, freeze, replace_head, widen, add])
def test_a_probe_follows_its_model(change):
    model = network()
    if change is unfreeze:
        model[0].requires_grad_(False)
    probe = fm.GradientProbe(model, per_parameter=True)
    check(probe, model)
    change(model)
    check(probe, model)
    check(probe, model)


@pytest.mark.parametrize("change", [unfreeze, freeze, replace_head, widen, add])
def test_a_probe_of_a_dict_says_so(change):
    model = network()
    if change is unfreeze:
        model[0].requires_grad_(False)
    named = dict(model.named_parameters())
    probe = fm.GradientProbe(named, per_parameter=True)
    probe.backward(losses_of(model))
    change(model)
    for _ in range(2):
        with pytest.raises(fm.CaptureError, match="Make a new probe"):
            probe.backward(losses_of(model))


def test_some_parameters_of_a_model_stay_some():
    model = network()
    probe = fm.GradientProbe({"w": model[2].weight})
    for _ in range(2):
        probe.backward(losses_of(model))
    model[0].requires_grad_(False)
    probe.backward(losses_of(model))


def test_a_direction_that_does_not_fit_any_more():
    model = network()
    size = sum(p.numel() for p in model.parameters())
    probe = fm.GradientProbe(model, directions={"v": torch.ones(size).double()})
    probe.backward(losses_of(model))
    widen(model)
    with pytest.raises(ValueError, match="'v'"):
        probe.backward(losses_of(model))


def test_statistics_are_in_the_order_of_the_model():
    model = network()
    probe = fm.GradientProbe(
        model, measure="second_moments", per_parameter=True, keep_mean=True
    )
    names = [name for name, _ in model.named_parameters()]
    for _ in range(2):
        stats = probe.backward(losses_of(model))
        for found in (
            stats.sq_norms_by_parameter,
            stats.second_moments,
            stats.mean_grad,
        ):
            assert list(found) == names
    probe.attach(losses := losses_of(model))
    losses.mean().backward()
    assert list(probe.collect().sq_norms_by_parameter) == names
