"""Gradients of chosen samples, beside a loop over batches of one."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastminima as fm


class Tied(nn.Module):
    """Tied and frozen parameters, one that is not used, a checkpointed block."""

    def __init__(self, sparse=False):
        super().__init__()
        self.table = nn.Embedding(11, 6, sparse=sparse)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6))
        self.head = nn.Linear(6, 11, bias=False)
        if not sparse:
            self.head.weight = self.table.weight
        self.unused = nn.Parameter(torch.zeros(3))
        self.block[0].bias.requires_grad_(False)

    def forward(self, tokens):
        x = checkpoint(self.block, self.table(tokens), use_reentrant=False)
        return self.head(x)

    def losses(self, tokens):
        logits = self(tokens)[:, :-1].mT
        return nn.functional.cross_entropy(
            logits, tokens[:, 1:], reduction="none"
        ).mean(1)


@pytest.mark.parametrize("sparse", [False, True])
def test_beside_batches_of_one(sparse):
    torch.manual_seed(0)
    model, tokens = Tied(sparse).double(), torch.randint(11, (7, 5))
    chosen = [5, 0, -1, 5]
    found = fm.sample_gradients(model, model.losses(tokens), chosen)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert list(found) == [name for name in names if name != "unused"]
    for at, n in enumerate(chosen):
        model.zero_grad()
        model.losses(tokens[n][None]).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                grad = p.grad.to_dense()
                torch.testing.assert_close(found[name][at], grad, rtol=1e-9, atol=1e-12)


def test_the_step_goes_on_as_if_nothing_had_been():
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(11, (7, 5))
    probe = fm.GradientProbe(model)
    for _ in range(4):  # so that the graph is known, and read by a program
        probe.backward(model.losses(tokens))
    model.zero_grad()
    want = probe.backward(model.losses(tokens))
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    losses = model.losses(tokens)
    loss = losses.mean()
    probe.attach(loss, batch_size=7)
    top = want.sq_norms.topk(2).indices
    singles = fm.sample_gradients(model, losses, top)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    stats = probe.collect()
    assert torch.equal(stats.sq_norms, want.sq_norms)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    norms = sum(g.flatten(1).square().sum(1) for g in singles.values())
    torch.testing.assert_close(norms, stats.sq_norms[top])


def test_a_sample_that_does_not_reach_a_parameter_has_zeros():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    losses = torch.stack([a.sum(), b.sum() * 2])
    found = fm.sample_gradients({"a": a, "b": b}, losses, [0, 1])
    assert found["a"].tolist() == [[1, 1], [0, 0]]
    assert found["b"].tolist() == [[0, 0], [2, 2]]
    assert list(fm.sample_gradients({"a": a}, losses, [1])) == ["a"]
    c = nn.Parameter(torch.ones(1))
    assert fm.sample_gradients({"c": c}, losses, [1]) == {}


def test_refusals():
    model = nn.Linear(3, 1)
    losses = model(torch.ones(4, 3)).squeeze(1)
    with pytest.raises(ValueError, match=r"vector of per-sample losses.* shape \(\)"):
        fm.sample_gradients(model, losses.mean(), [0])
    with pytest.raises(ValueError, match="grad_fn None"):
        fm.sample_gradients(model, losses.detach(), [0])
    with pytest.raises(ValueError, match="no sample 4 among 4"):
        fm.sample_gradients(model, losses, [0, 4])
    with pytest.raises(ValueError, match="No sample was chosen"):
        fm.sample_gradients(model, losses, [])
    with pytest.raises(TypeError):
        fm.sample_gradients(model, losses, [0.5])
    losses.mean().backward()
    with pytest.raises(fm.CaptureError):
        fm.sample_gradients(model, losses, [0])
