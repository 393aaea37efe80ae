"""Functions of users, whose `ctx` may say where rows go."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import fastminima as fm


class Take(torch.autograd.Function):
    """Rows by an index, kept as a saved tensor, an attribute, or a list of numbers."""

    @staticmethod
    def forward(ctx, x, index, kept):
        ctx.rows = len(x)
        if kept == "saved":
            ctx.save_for_backward(index)
        elif kept == "attribute":
            ctx.index = index
        elif kept == "matrix":
            ctx.matrix = torch.eye(len(x), dtype=x.dtype, device=x.device)[index]
        else:
            ctx.numbers = index.tolist()
        return x[index]

    @staticmethod
    def backward(ctx, g):
        if hasattr(ctx, "matrix"):
            return ctx.matrix.T @ g, None, None
        index = getattr(ctx, "index", None)
        if index is None and hasattr(ctx, "numbers"):
            index = torch.tensor(ctx.numbers, device=g.device)
        if index is None:
            (index,) = ctx.saved_tensors
        out = g.new_zeros(ctx.rows, g.shape[1])
        return out.index_add(0, index, g), None, None


class Rectified(torch.autograd.Function):
    """Element by element, with a mask that changes in every step."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x > 0)
        ctx.slope = 0.1
        return x.where(x > 0, ctx.slope * x)

    @staticmethod
    def backward(ctx, g):
        (is_positive,) = ctx.saved_tensors
        return g.where(is_positive, ctx.slope * g)


class Unpadded(nn.Module):
    """Tokens without padding, then sums over each sample."""

    def __init__(self, kept, checkpointed=False):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.kept, self.checkpointed = kept, checkpointed

    def forward(self, ids, lengths):
        rows, time = ids.shape
        where = torch.arange(time) < lengths[:, None]
        index = where.flatten().nonzero().flatten()
        sample = index // time

        def inner(x):
            taken = Take.apply(x, index, self.kept)
            h = torch.tanh(self.layer(taken))
            return h.new_zeros(rows, 8).index_add(0, sample, h)

        x = self.table(ids).flatten(0, 1)
        if self.checkpointed:
            return self.head(checkpoint(inner, x, use_reentrant=False))
        return self.head(inner(x))


def single_norms(losses, model):
    parameters = list(model.parameters())
    grads = (torch.autograd.grad(x, parameters, retain_graph=True) for x in losses)
    return torch.stack([sum(g.square().sum() for g in of_x) for of_x in grads])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kept", ["saved", "attribute", "numbers", "matrix"])
@pytest.mark.parametrize(
    "lengths",
    [
        [[3] * 4, [4, 2, 3, 3], [2, 4, 4, 2]],
        [[2] * 4, [3] * 4, [4] * 4, [5] * 4, [4, 2, 5, 1]],
    ],
)
def test_lengths_that_fit_and_then_do_not(lengths, kept, checkpointed):
    torch.manual_seed(0)
    model = Unpadded(kept, checkpointed).double()
    probe = fm.GradientProbe(model)
    for of_batch in lengths:
        ids = torch.randint(9, (4, 6))

        def losses(ids=ids, of_batch=of_batch):
            out = model(ids, torch.tensor(of_batch))
            return cross_entropy(out, torch.tensor([0, 1, 2, 1]), reduction="none")

        model.zero_grad()
        got = probe.backward(losses()).sq_norms
        torch.testing.assert_close(got, single_norms(losses(), model))


def test_an_activation_is_measured_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    probe = fm.GradientProbe(model)
    for _ in range(3):
        x = torch.randn(6, 5)
        probe.backward(model[1](Rectified.apply(model[0](x))).square().sum(1))
    (known,) = probe._reader._structures.values()
    assert known.recalls == 2
