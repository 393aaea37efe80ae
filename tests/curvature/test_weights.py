"""Several batches are weighed by what the loss is a mean over, or refused."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm

from .cases import loss, make, output_loss, outputs, unequal

Pair = collections.namedtuple("Pair", "x y")


def dense(operator):
    size = operator.shape[0]
    return operator @ torch.eye(size, dtype=operator.dtype, device=operator.device)


class Graph(nn.Module):
    """A graph network; a batch is (edges [2, E], nodes [N, 4], labels [N])."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, edges, x):
        hidden = torch.tanh(self.first(x))
        hidden = hidden.index_add(0, edges[1], hidden[edges[0]])
        return self.last(hidden)


def graphs(device):
    torch.manual_seed(0)
    return [
        (
            torch.randint(n, (2, 3 * n), device=device),
            torch.randn(n, 4, dtype=torch.float64, device=device),
            torch.randint(3, (n,), device=device),
        )
        for n in (30, 4)
    ]


def graph_loss(model, batch):
    return F.cross_entropy(model(batch[0], batch[1]), batch[2])


def test_tensors_that_disagree_on_the_leading_size(device):
    model, data = Graph().to(device, torch.float64), graphs(device)
    H = fm.Hessian(model, graph_loss, data)
    with pytest.raises(
        ValueError, match=r"sizes \[2, 4, 4\] in one, \[2, 30, 30\] in.*count="
    ):
        dense(H)
    with pytest.raises(ValueError, match=r"sizes \[2, 4, 4\]"):
        fm.SharpnessProbe(model, graph_loss)(data)
    counted = dense(fm.Hessian(model, graph_loss, data, count=lambda b: len(b[2])))
    each = [dense(fm.Hessian(model, graph_loss, batch)) for batch in data]
    torch.testing.assert_close(counted, (30 * each[0] + 4 * each[1]) / 34)


def test_disagreement_does_not_matter_between_batches_alike(device):
    model, batch = make("mlp", device=device)
    classes = torch.ones(3, dtype=torch.float64, device=device)

    def closure(model, batch):
        return F.cross_entropy(model(batch[1]), batch[2], weight=batch[0])

    data = [(classes, batch[0][i : i + 5], batch[1][i : i + 5]) for i in (0, 5)]
    got = dense(fm.Hessian(model, closure, data))
    torch.testing.assert_close(got, dense(fm.Hessian(model, loss, batch)))
    data[1] = (classes, batch[0][5:9], batch[1][5:9])
    with pytest.raises(ValueError, match=r"sizes \[3, 4, 4\] in one, \[3, 5, 5\]"):
        dense(fm.Hessian(model, closure, data))


class Recurrent(nn.Module):
    """Time first: [T, B, 3] to [T, B, 3]."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


def time_first(device):
    torch.manual_seed(0)
    return [
        (
            torch.randn(6, n, 3, dtype=torch.float64, device=device),
            torch.randint(3, (6, n), device=device),
        )
        for n in (7, 2)
    ]


def time_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def test_samples_along_the_second_dimension(device):
    model, data = Recurrent().to(device, torch.float64), time_first(device)
    H = fm.Hessian(model, time_loss, data)
    with pytest.raises(
        ValueError, match=r"second dimension of the tensors \(7\).*count="
    ):
        dense(H)
    counted = dense(fm.Hessian(model, time_loss, data, count=lambda b: b[1].shape[1]))
    whole = tuple(torch.cat(parts, dim=1) for parts in zip(*data, strict=True))
    torch.testing.assert_close(counted, dense(fm.Hessian(model, time_loss, whole)))
    data = [(x, y[0]) for x, y in data]
    last = fm.Hessian(model, lambda m, b: F.cross_entropy(m(b[0])[-1], b[1]), data)
    with pytest.raises(ValueError, match=r"sizes \[6, 2\] in one, \[6, 7\]"):
        dense(last)


def summed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def over_a_constant(model, batch):
    return summed(model, batch) / 8


def masked(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)


def weighted(model, batch):
    classes = torch.tensor([1.0, 5.0, 0.2]).to(batch[0])
    return F.cross_entropy(model(batch[0]), batch[1], weight=classes)


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (summed, r"is a sum, not a mean.*reduc|is a sum.*count="),
        (over_a_constant, "is a sum"),
        (masked, r"of 8 rows, the first 2 weigh .*unmasked items.*count="),
        (weighted, "weighted classes"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_that_are_no_mean_over_rows(closure, message, dtype, device):
    model, batch = make("mlp", dtype, device)
    batch[1][:8] = torch.tensor([1, 2, 0, 0, 0, 1, 2, 1])
    dense(fm.Hessian(model, closure, batch))  # one batch weighs itself
    parts = unequal(batch)
    for operator in (
        fm.Hessian(model, closure, parts),
        fm.GaussNewton(model, outputs, lambda o, b: closure(lambda x: o, b), parts),
    ):
        with pytest.raises(ValueError, match=message):
            fm.top_eigenpairs(operator)


def test_count_takes_any_weight(device):
    model, batch = make("mlp", device=device)
    parts = unequal(batch)
    counted = fm.Hessian(model, masked, parts, count=lambda b: int((b[1] != 0).sum()))
    torch.testing.assert_close(dense(counted), dense(fm.Hessian(model, masked, batch)))


def penalised(model, batch):
    return loss(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())


def rooted(model, batch):
    return loss(model, batch).sqrt()


def perplexity(model, batch):
    return loss(model, batch).exp()


def contrastive(model, batch):
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z), device=z.device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("closure", [loss, penalised, rooted, perplexity, contrastive])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda b: b,
        list,
        lambda b: Pair(*b),
        lambda b: {0: b[0], 1: b[1], "names": ["a"] * len(b[0])},
        lambda b: (b[0], b[1], torch.tensor(0.5), "kind"),
    ],
    ids=["tuple", "list", "namedtuple", "mapping", "more"],
)
def test_honest_losses_are_not_refused(closure, wrap, dtype, device):
    for seed in range(3):
        model, batch = make("mlp", dtype, device)
        batch[0].add_(0.1 * seed)
        parts = [wrap(part) for part in unequal(batch)]
        H = fm.Hessian(model, closure, parts)
        got = H @ torch.ones(38, dtype=H.dtype, device=device)
        assert torch.isfinite(got).all()


@pytest.mark.parametrize("name", ["batch_norm", "attention", "encoder", "conv", "tied"])
def test_cases_over_several_batches(name, device):
    model, batch = make(name, device=device)
    size = sum(p.numel() for p in model.parameters())
    v = torch.ones(size, dtype=torch.float64, device=device)
    parts = unequal(batch)
    got = fm.Hessian(model, loss, parts) @ v
    each = [fm.Hessian(model, loss, part) @ v for part in parts]
    torch.testing.assert_close(got, (8 * each[0] + 2 * each[1]) / 10)
    got = fm.GaussNewton(model, outputs, output_loss, parts) @ v
    assert torch.isfinite(got).all()


def test_random_numbers_are_those_without_the_look(device):
    """The look at the weights draws nothing that the passes would miss."""
    model, batch = make("mlp", device=device)
    model.insert(1, nn.Dropout(0.5))
    parts = unequal(batch)
    torch.manual_seed(0)
    first = dense(fm.Hessian(model, loss, parts))
    torch.manual_seed(0)
    counted = dense(fm.Hessian(model, loss, parts, count=lambda b: len(b[1])))
    torch.testing.assert_close(first, counted, rtol=0, atol=0)
