"""Closed gates: what is behind them when they open."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastminima as fm


class Gated(nn.Module):
    """A term behind a gate, by every way to multiply with nothing."""

    def __init__(self, way, mixes):
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)
        self.gate = nn.Parameter(torch.zeros(4 if way == "channels" else ()))
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.way, self.mixes, self.amount = way, mixes, 0.0

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        term = h.mean(0).expand_as(h) if self.mixes else h.sin()
        closed = self.amount == 0
        match self.way:
            case "parameter" | "channels":
                term = self.gate * term
            case "number":
                term = term * self.amount
            case "where":
                is_open = torch.full((len(x), 1), not closed)
                term = torch.where(is_open, term, h.detach())
            case "matrix":
                term = term @ self.weight
            case "alpha":
                return self.head(torch.add(h, term, alpha=self.amount))
            case "lerp":
                return self.head(torch.lerp(h, term, self.amount))
            case "ajar":
                term = term * max(self.amount, 1e-9)
        return self.head(h + term)

    def open(self, amount=0.3):
        self.amount = amount
        with torch.no_grad():
            self.gate.fill_(amount)
            self.weight.copy_(torch.randn(4, 4))


WAYS = ("parameter", "channels", "number", "where", "matrix", "alpha", "lerp", "ajar")


def single_norms(model, losses):
    parameters = list(model.parameters())
    found = []
    for loss in losses:
        grads = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
        found.append(sum(g.square().sum() for g in grads if g is not None))
    return torch.stack(found)


@pytest.mark.parametrize("way", WAYS)
def test_mixing_behind_a_gate_is_refused_when_it_opens(way):
    torch.manual_seed(0)
    model = Gated(way, mixes=True).double()
    probe = fm.GradientProbe(model)
    for step in range(3):
        x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
        losses = cross_entropy(model(x), y, reduction="none")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = probe.backward(losses, retain_graph=True).sq_norms
        is_told = any("multiplies by zero" in str(w.message) for w in said)
        assert is_told == (step == 0)  # once
        # A gate that is ajar lets 1e-9 of the other samples in.
        want = single_norms(model, losses)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)
    assert not probe._reader._structures  # each step is measured
    model.open()
    with pytest.raises(fm.CaptureError, match="do not each belong"):
        probe.backward(cross_entropy(model(x), y, reduction="none"))


@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_mix_is_measured_once(way):
    torch.manual_seed(0)
    model = Gated(way, mixes=False).double()
    probe = fm.GradientProbe(model)
    for step in range(4):
        if step == 2:
            model.open()
        x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
        losses = cross_entropy(model(x), y, reduction="none")
        got = probe.backward(losses, retain_graph=True).sq_norms
        torch.testing.assert_close(got, single_norms(model, losses))
        if step == 1:
            (known,) = probe._reader._structures.values()
    assert list(probe._reader._structures.values()) == [known]
    assert known.recalls == 3


def test_looking_behind_gates_changes_no_gradient():
    torch.manual_seed(0)
    model = Gated("parameter", mixes=False)
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    cross_entropy(model(x), y).backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    fm.GradientProbe(model).backward(cross_entropy(model(x), y, reduction="none"))
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, got, want))


def test_a_contrastive_term_before_its_warm_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    probe = fm.GradientProbe(model)

    def losses(amount):
        out = model(torch.randn(6, 5).double())
        contrast = (out @ out.mT).logsumexp(1) * amount
        return out.square().sum(1) + contrast

    with pytest.warns(UserWarning, match="multiplies by zero"):
        probe.backward(losses(0.0))
    with pytest.raises(fm.CaptureError):
        probe.backward(losses(0.1))


def test_a_scalar_loss_with_a_closed_term():
    torch.manual_seed(0)
    model = Gated("number", mixes=False).double()
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    losses = cross_entropy(model(x), y, reduction="none")
    want = fm.GradientProbe(model).backward(losses, retain_graph=True).sq_norms
    got = fm.GradientProbe(model).backward(losses.mean(), batch_size=6).sq_norms
    torch.testing.assert_close(got, want)
