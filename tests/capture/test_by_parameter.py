"""Squared norms of each parameter, on a graph that the extension knows by then."""

import pytest
import torch
from oracles import single_sample_gradients
from torch import nn

import fastminima as fm
from fastminima.capture.session.collector import Collector


class Net(nn.Module):
    """Parameters whose gradients come in another order than the model has them."""

    def __init__(self):
        super().__init__()
        self.last, self.unused = nn.Linear(5, 2), nn.Linear(2, 2)
        self.first, self.norm = nn.Linear(3, 5), nn.LayerNorm(5)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        hidden = self.norm(torch.tanh(self.first(x)))
        return self.last(hidden) * self.log_scale.exp()


def losses_of(model, batch):
    return model(batch[0]).square().sum(1)


def by_attach(probe, losses):
    probe.attach(losses)
    losses.mean().backward()
    return probe.collect()


def by_backward(probe, losses):
    return probe.backward(losses)


@pytest.mark.parametrize(
    ("measured", "mode"),
    [(by_attach, "observe"), (by_backward, "observe"), (by_backward, "fused")],
)
def test_known_graphs(measured, mode):
    torch.manual_seed(0)
    model = Net()
    probe = fm.GradientProbe(model, per_parameter=True, mode=mode)
    for _ in range(5):
        x = torch.randn(4, 3)
        model.zero_grad()
        stats = measured(probe, losses_of(model, [x]))
        singles = single_sample_gradients(model, losses_of, [x])
        singles = {n: g for n, g in singles.items() if not n.startswith("unused")}
        assert list(stats.sq_norms_by_parameter) == list(singles)
        assert list(stats.mean_grad_sq_norms_by_parameter) == list(singles)
        for name, grads in singles.items():
            want = grads.reshape(len(grads), -1).square().sum(1)
            got = stats.sq_norms_by_parameter[name].double()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
            want = grads.mean(0).square().sum()
            got = stats.mean_grad_sq_norms_by_parameter[name].double()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_the_extension_reads_them(monkeypatch):
    """No hook in Python for each parameter, which took 60 microseconds."""
    if fm._native.host() is None:
        pytest.skip("no native extension")
    model = Net()
    probe = fm.GradientProbe(model, per_parameter=True)
    x = torch.randn(4, 3)
    for _ in range(3):
        by_attach(probe, losses_of(model, [x]))
    monkeypatch.setattr(Collector, "take_gradients", None)
    by_attach(probe, losses_of(model, [x]))
    by_backward(probe, losses_of(model, [x]))
