"""`every=k`: which steps are probed, and that the others are plain backward passes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastminima as fm


def losses_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator)
    y = torch.randint(0, 3, (6,), generator=generator)
    return cross_entropy(model(x), y, reduction="none")


def test_backward_probes_the_first_and_each_kth_step():
    model = nn.Linear(4, 3)
    probe = fm.GradientProbe(model, every=3)
    always = fm.GradientProbe(model)
    for step in range(7):
        model.zero_grad()
        want = always.backward(losses_of(model, step))
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        got = probe.backward(losses_of(model, step))
        assert (got is not None) == (step % 3 == 0)
        if got is not None:
            torch.testing.assert_close(got.sq_norms, want.sq_norms, rtol=0, atol=0)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert torch.equal(p.grad, grad)


def test_attach_and_collect_rest_together():
    model = nn.Linear(4, 3)
    probe = fm.GradientProbe(model, every=2)
    found = []
    for step in range(4):
        loss = losses_of(model, step).mean()
        probe.attach(loss, batch_size=6)
        loss.backward()
        found.append(probe.collect())
    assert [stats is not None for stats in found] == [True, False, True, False]
    with pytest.raises(fm.CaptureError, match="Nothing is attached"):
        probe.collect()


def test_a_resting_step_reads_no_graph(monkeypatch):
    model = nn.Linear(4, 3)
    probe = fm.GradientProbe(model, every=2)
    probe.backward(losses_of(model))
    monkeypatch.setattr(probe, "_attacher", None)  # reading would raise AttributeError
    assert probe.backward(losses_of(model)) is None
    with pytest.raises(AttributeError):
        probe.backward(losses_of(model))


def test_scale_changes_no_gradient_on_any_step():
    model = nn.Linear(4, 3)
    probe = fm.GradientProbe(model, every=2)
    probe.backward(losses_of(model))
    model.zero_grad()
    probe.backward(losses_of(model), scale=8.0)
    scaled = model.weight.grad.clone()
    model.zero_grad()
    losses_of(model).mean().backward()
    assert torch.equal(scaled, model.weight.grad)


def test_bad_arguments_are_refused_on_resting_steps_too():
    model = nn.Linear(4, 3)
    probe = fm.GradientProbe(model, every=2)
    probe.backward(losses_of(model))
    with pytest.raises(ValueError, match="needs its number of samples"):
        probe.backward(losses_of(model).mean())


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_must_be_a_positive_integer(every):
    with pytest.raises(ValueError, match="every must be a positive integer"):
        fm.GradientProbe(nn.Linear(2, 2), every=every)


def test_an_error_of_attach_on_a_resting_step():
    model = nn.Linear(4, 3)
    probe = fm.GradientProbe(model, every=2)
    probe.backward(losses_of(model))
    with pytest.raises(ValueError, match="batch_size"):
        probe.attach(losses_of(model), batch_size=3)
    assert probe.collect() is None
