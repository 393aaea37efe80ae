"""What is stated of eigenvalues and traces holds, against dense matrices in float64."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastminima as fm

ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def square(model, batch):
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


def logistic(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])


class Attention(nn.Module):
    """Grouped queries under a mask, written as users write it."""

    def __init__(self, masked, groups):
        super().__init__()
        self.masked, self.groups = masked, groups
        self.embed, self.norm = nn.Embedding(6, 8), nn.LayerNorm(8)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8 // groups)
        self.value, self.head = nn.Linear(8, 8 // groups), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        q, k, v = (
            layer(x).unflatten(-1, (-1, 2)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask = None
        if self.masked:
            time = torch.arange(ids.shape[1])
            mask = (time[:, None] - time).abs() < 3
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, enable_gqa=self.groups > 1
        )
        return self.head(x + mixed.transpose(1, 2).flatten(2)).mean(1)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer(3, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Quadratic(nn.Module):
    """A loss whose Hessian has these eigenvalues."""

    def __init__(self, eigenvalues):
        super().__init__()
        size = len(eigenvalues)
        q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
        values = torch.as_tensor(eigenvalues, dtype=torch.float64)
        self.register_buffer("matrix", (q * values) @ q.T)
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return 0.5 * self.weight @ (self.matrix @ self.weight) * x.mean()


def value_of(model, batch):
    return model(batch)


class Scaled(nn.Module):
    """A model whose loss is to be multiplied."""

    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.model(x)


def scaled_entropy(model, batch):
    return model.factor * F.cross_entropy(model(batch[0]), batch[1])


def rows(size=3, classes=3, count=20):
    return torch.randn(count, size), torch.randint(classes, (count,))


def tokens():
    return torch.randint(6, (8, 5)), torch.randint(3, (8,))


def images():
    return torch.randn(8, 2, 6, 6), torch.randint(3, (8,))


def mlp(act, width=6):
    return nn.Sequential(nn.Linear(3, width), act, nn.Linear(width, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(27, 3),
    )  # fmt: skip


def zeroed(model):
    """At the origin: a saddle of a network of two layers."""
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def quadratic(*eigenvalues):
    return lambda: (Quadratic(eigenvalues), value_of, torch.ones(4))


SITUATIONS = {
    "linear": lambda: (
        nn.Linear(4, 1),
        square,
        (torch.randn(30, 4), torch.randn(30, 1)),
    ),
    "linear, collinear": lambda: (
        nn.Linear(4, 1),
        square,
        (torch.randn(30, 1).expand(30, 4).clone(), torch.randn(30, 1)),
    ),
    "logistic": lambda: (
        nn.Linear(4, 1),
        logistic,
        (torch.randn(30, 4), torch.randint(2, (30,)).float()),
    ),
    "softmax": lambda: (nn.Linear(3, 3), entropy, rows()),
    "softmax, separable": lambda: (
        nn.Linear(3, 3, bias=False),
        entropy,
        (30 * torch.eye(3), torch.arange(3)),
    ),
    "tanh": lambda: (mlp(nn.Tanh()), entropy, rows()),
    "gelu": lambda: (mlp(nn.GELU()), entropy, rows()),
    "relu": lambda: (mlp(nn.ReLU()), entropy, rows()),
    "dead relu": lambda: (mlp(nn.ReLU()), entropy, (torch.zeros(5, 3), rows()[1][:5])),
    "leaky relu": lambda: (mlp(nn.LeakyReLU()), entropy, rows()),
    "squares of a network": lambda: (
        mlp(nn.Tanh()),
        square,
        (rows()[0], torch.randn(20, 3)),
    ),
    "saddle at the origin": lambda: (zeroed(mlp(nn.Tanh())), entropy, rows()),
    "one sample": lambda: (mlp(nn.Tanh()), entropy, rows(count=1)),
    "layer norm": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        entropy,
        rows(),
    ),
    "batch norm": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        entropy,
        rows(),
    ),
    "cnn": lambda: (cnn(), entropy, images()),
    "cnn, constant images": lambda: (
        cnn(),
        entropy,
        (torch.zeros(12, 2, 6, 6), torch.randint(3, (12,))),
    ),
    "attention": lambda: (Attention(False, 1), entropy, tokens()),
    "attention, masked": lambda: (Attention(True, 1), entropy, tokens()),
    "attention, grouped": lambda: (Attention(True, 2), entropy, tokens()),
    "rnn": lambda: (
        Recurrent(nn.RNN),
        entropy,
        (torch.randn(6, 4, 3), torch.randint(3, (6,))),
    ),
    "gru": lambda: (
        Recurrent(nn.GRU),
        entropy,
        (torch.randn(6, 4, 3), torch.randint(3, (6,))),
    ),
    "triple": quadratic(2.0, 2.0, 2.0, *[0.1] * 20),
    "double at both ends": quadratic(2.0, 2.0, -3.0, -3.0, *[0.0] * 12),
    "rank one": quadratic(1.0, *[0.0] * 30),
    "zero": quadratic(*[0.0] * 12),
    "negative": quadratic(-1.0, -1.1, -5.0, -7.0),
    "one parameter": quadratic(3.0),
    "two parameters": quadratic(3.0, -2.0),
    "close to the top": quadratic(1.0, 0.995, 0.99, 0.985, *np.linspace(-1, 0.9, 40)),
    "equal gaps": quadratic(*(0.9 ** np.arange(40))),
    "loss of 1e-20": lambda: (Scaled(mlp(nn.Tanh()), 1e-20), scaled_entropy, rows()),
    "loss of 1e-26": lambda: (Scaled(mlp(nn.Tanh()), 1e-26), scaled_entropy, rows()),
    "loss of 1e20": lambda: (Scaled(mlp(nn.Tanh()), 1e20), scaled_entropy, rows()),
}


def situation(name, dtype):
    """The model, loss and batch, and the dense Hessian in float64."""
    torch.manual_seed(11)
    model, loss, batch = SITUATIONS[name]()

    def to(x, dtype):
        if isinstance(x, tuple):
            return tuple(to(part, dtype) for part in x)
        return x.to(dtype) if x.is_floating_point() else x

    model = model.to(dtype)
    batch = to(batch, dtype)
    wide = copy.deepcopy(model).double()
    return model, loss, batch, dense(wide, loss, to(batch, torch.float64))


def dense(model, loss, batch):
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(model, batch)
    grads = torch.autograd.grad(value, parameters, create_graph=True)
    rows = []
    for g in torch.cat([g.reshape(-1) for g in grads]):
        if g.requires_grad:
            parts = torch.autograd.grad(
                g, parameters, retain_graph=True, allow_unused=True
            )
        else:
            parts = [None] * len(parameters)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if x is None else x).reshape(-1)
                    for x, p in zip(parts, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SITUATIONS)
def test_eigenvalues_are_as_stated(name, dtype):
    model, loss, batch, matrix = situation(name, dtype)
    true = torch.linalg.eigvalsh(matrix).numpy()
    scale = np.abs(true).max()
    loose = ROUNDING[dtype] * scale
    for which in ("largest", "smallest", "magnitude"):
        ranks = {"largest": true, "smallest": -true, "magnitude": np.abs(true)}[which]
        ranks = np.sort(ranks)[::-1]
        for k in {1, min(3, len(true))}:
            pairs = fm.top_eigenpairs(
                fm.Hessian(model, loss, batch), k, which, max_products=600
            )
            assert pairs.converged
            values = pairs.values.double().numpy()
            residuals = pairs.residuals.double().numpy()
            nearest = np.abs(true - values[:, None]).min(1)
            assert (nearest <= residuals + loose).all()
            errors = (
                pairs.vectors.double() @ matrix
                - pairs.values.double()[:, None] * pairs.vectors.double()
            )
            assert (errors.norm(dim=1).numpy() <= 1.01 * residuals + loose).all()
            upper = -pairs.upper if which == "smallest" else pairs.upper
            assert upper >= ranks[0] - loose
            found = {"largest": values, "smallest": -values}.get(which, np.abs(values))
            # Nothing beyond by more than ten tolerances, and nothing invented.
            slack = 0.1 * np.maximum(np.abs(found), 1e-3 * scale) + loose
            assert (ranks[:k] <= found + slack).all()
            assert (found <= ranks[:k] + residuals + loose).all()
            assert math.isnan(pairs.noise) or pairs.noise < 3e-5


@pytest.mark.parametrize("name", SITUATIONS)
def test_traces_are_as_stated(name):
    model, loss, batch, matrix = situation(name, torch.float32)
    true, loose = matrix.trace().item(), 1e-4 * matrix.norm().item()
    H = fm.Hessian(model, loss, batch)
    exact = fm.trace(H, 10_000)
    assert exact.value == pytest.approx(true, rel=1e-4, abs=loose)
    norm = fm.frobenius_norm(H, 10_000)
    assert norm.value == pytest.approx(matrix.norm().item(), rel=1e-4, abs=1e-300)
    if matrix.shape[0] > 12:
        low, high = fm.trace(H, 12).interval(0.9999)
        assert low - loose <= true <= high + loose


def test_closed_forms():
    """Of the mean of squares the Hessian is X^T X / n, of softmax known too."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 5).double(), torch.randn(40, 1).double()
    linear = nn.Linear(5, 1, bias=False).double()
    top = torch.linalg.eigvalsh(x.T @ x / 40)[-1].item()
    pairs = fm.top_eigenpairs(fm.Hessian(linear, square, (x, y)), rtol=1e-6)
    assert pairs.values.item() == pytest.approx(top, rel=1e-9)
    model, labels = nn.Linear(5, 3, bias=False).double(), torch.randint(3, (40,))
    p = model(x).softmax(1).detach()
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("nab,ni,nj->aibj", blocks, x, x).reshape(15, 15) / 40
    top = torch.linalg.eigvalsh(matrix)[-1].item()
    pairs = fm.top_eigenpairs(fm.Hessian(model, entropy, (x, labels)), rtol=1e-6)
    assert pairs.values.item() == pytest.approx(top, rel=1e-9)
    assert pairs.upper >= top


def test_more_pairs_than_the_rank():
    matrix = torch.zeros(30, 30, dtype=torch.float64)
    matrix[0, 0], matrix[1, 1] = 4.0, 2.0
    pairs = fm.top_eigenpairs(matrix, 5)
    assert pairs.converged
    want = torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(pairs.values, want, rtol=0, atol=1e-5)


def test_not_finite_is_an_error():
    model, loss, batch, _ = situation("tanh", torch.float32)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="non-finite"):
        fm.top_eigenpairs(fm.Hessian(model, loss, batch))
    with pytest.raises(ValueError, match="non-finite"):
        fm.SharpnessProbe(model, loss)(batch)
