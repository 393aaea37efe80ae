"""Steps of fused models, with programs and without: what the tests of both compare."""

import copy
import warnings

import torch
from torch import nn

import fastminima as fm
from fastminima.capture.session import attach, hooks

__all__ = [
    "STEPS",
    "assert_same",
    "compare",
    "data",
    "fused",
    "gradients",
    "layers",
    "losses_of",
    "some_steps",
    "step",
]

STEPS = 7  # from the fifth on they are repeated


def without_programs(monkeypatch):
    monkeypatch.setattr(hooks, "program_of", lambda *_: None)
    monkeypatch.setattr(attach, "program_of", lambda *_: None)


def fused(model, **options):
    return fm.GradientProbe(model, mode="fused", per_parameter=True, **options)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(probe, model, losses):
    """Statistics of one step, and the gradients that it left."""
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = probe.backward(losses)
    return stats, gradients(model)


def assert_same(one, other):
    """The same bits, and gradients that lie in the same order."""
    (stats, grads), (expected, want) = one, other
    assert torch.equal(stats.sq_norms, expected.sq_norms)
    assert torch.equal(stats.mean_grad_sq_norm, expected.mean_grad_sq_norm)
    found = stats.sq_norms_by_parameter
    for name, norms in expected.sq_norms_by_parameter.items():
        assert torch.equal(found[name], norms), name
    assert grads.keys() == want.keys()
    for name, grad in want.items():
        assert torch.equal(grads[name], grad), name
        assert grads[name].stride() == grad.stride(), name
        assert not grads[name].is_inference() and not grads[name].requires_grad


def some_steps(model, losses, count=STEPS, **options):
    torch.manual_seed(1)
    probe = fused(model, **options)
    return [step(probe, model, losses(k)) for k in range(count)]


def compare(monkeypatch, model, losses, count=STEPS, **options):
    """Steps with programs and without them: the same bits."""
    state = copy.deepcopy(model.state_dict())
    found = some_steps(model, losses, count, **options)
    model.load_state_dict(state)
    with monkeypatch.context() as patch:
        without_programs(patch)
        for one, other in zip(
            found, some_steps(model, losses, count, **options), strict=True
        ):
            assert_same(one, other)


class Layers(nn.Module):
    """Weights [d_out, d_in] and [d_in, d_out], with bias and without."""

    def __init__(self, d_in=6, width=40, d_out=5):
        super().__init__()
        self.first = nn.Linear(d_in, width)
        self.norm = nn.LayerNorm(width)
        self.bare = nn.Linear(width, width, bias=False)
        self.columns = nn.Parameter(torch.randn(width, width) / 6)
        self.mixed = nn.Parameter(torch.randn(width, d_out) / 6)
        self.shift = nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        x = self.bare(self.norm(self.first(x)).tanh()) @ self.columns
        rows = x.flatten(0, 1)
        return torch.addmm(self.shift, rows, self.mixed).unflatten(0, x.shape[:2])


def layers(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return Layers(**sizes).to(dtype)


def data(seed, n=5, time=17, width=6):
    return torch.randn(n, time, width, generator=torch.Generator().manual_seed(seed))


def losses_of(model, x):
    return model(x).square().sum((1, 2))
