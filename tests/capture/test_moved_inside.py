"""Rows that are moved inside a region that runs again, where nothing says so."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

import fastminima as fm


class Taken(torch.autograd.Function):
    """Rows by an index that the function keeps."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx, g):
        (order,) = ctx.saved_tensors
        return torch.zeros_like(g).index_add(0, order, g), None


def by_product(x, order):
    rows = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return rows[order] @ x


def by_assignment(x, order):
    out = torch.zeros(2 * len(x), 4, dtype=x.dtype, device=x.device)
    start = int(order.argmin())
    out[start : start + len(x)] = x
    return out[: len(x)] + out[len(x) :]  # what went over the end comes in again


WAYS = {
    "own function": Taken.apply,
    "product": by_product,
    "table": lambda x, order: embedding(order, x),
    "index": lambda x, order: x[order],
    "assignment": by_assignment,
}


class Moved(nn.Module):
    """The loss n is that of another sample in some steps."""

    def __init__(self, way, starts_there):
        super().__init__()
        self.first, self.layer = nn.Linear(3, 4), nn.Linear(4, 4)
        self.way, self.starts_there = WAYS[way], starts_there

    def inside(self, h, order):
        h = h if self.starts_there else h.sin()
        return self.layer(self.way(h, order)).tanh()

    def forward(self, x, order):
        h = self.first(x).flatten(0, 1)
        h = checkpoint(self.inside, h, order, use_reentrant=True)
        return h.unflatten(0, x.shape[:2]).square().sum((1, 2))

    def exact(self, x, order):
        h = self.inside(self.first(x).flatten(0, 1), order)
        losses = h.unflatten(0, x.shape[:2]).square().sum((1, 2))
        parameters = list(self.parameters())
        grads = (
            torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses
        )
        return torch.stack([sum(g.square().sum() for g in found) for found in grads])


@pytest.mark.parametrize("starts_there", [True, False], ids=["input", "inside"])
@pytest.mark.parametrize("way", WAYS)
def test_each_step_is_read_as_it_is(way, starts_there):
    torch.manual_seed(0)
    model = Moved(way, starts_there).double()
    probe = fm.GradientProbe(model)
    for by in (5, 5, 5, 10, 0, 5, 5, 15):
        x = torch.randn(4, 5, 3).double()
        order = torch.arange(20).roll(by)
        want = model.exact(x, order)
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = probe.backward(model(x, order)).sq_norms
        torch.testing.assert_close(got, want)
