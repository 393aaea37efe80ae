"""The loss's own Hessian in closed form, beside double backward, in float64."""

import pytest
import torch
import torch.nn.functional as F
from bytes_held import held

import fastminima as fm
from fastminima.curvature._graph import GradientGraph
from fastminima.curvature.gauss_newton import _curvature
from fastminima.curvature.rop.softmax import LogSoftmax

from .cases import make, output_loss, outputs

CLASSES, ROWS = 5, 12


def _soft(y):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(*y.shape, CLASSES, generator=generator).double().softmax(-1)


def _masked(o, y):
    """A mean over the tokens that are not masked."""
    mask = torch.arange(len(y)) % 3 > 0
    each = F.cross_entropy(o, y, reduction="none")
    return (each * mask).sum() / mask.sum()


def _shifted(o, y):
    """Tokens that predict the next one, as language models have it."""
    tokens, ids = o.view(3, 4, CLASSES), y.view(3, 4)
    return F.cross_entropy(tokens[:, :-1].reshape(-1, CLASSES), ids[:, 1:].reshape(-1))


def _images(o, y):
    """Classes in the second dim."""
    return F.cross_entropy(
        o.view(2, 3, 2, CLASSES).permute(0, 3, 1, 2), y.view(2, 3, 2)
    )


def _weighted(reduction, smoothing):
    weight = torch.linspace(0.5, 2, CLASSES).double()
    return lambda o, y: F.cross_entropy(
        o, y, weight, ignore_index=2, reduction=reduction, label_smoothing=smoothing
    ).sum()


def _distilled(o, y):
    teacher = _soft(y)
    soft = F.kl_div((o / 2).log_softmax(-1), teacher, reduction="batchmean")
    return 0.3 * F.cross_entropy(o, y) + 0.7 * 4 * soft


CLOSED = {
    **{
        f"{reduction}, smoothing {smoothing}": _weighted(reduction, smoothing)
        for reduction in ("mean", "sum", "none")
        for smoothing in (0.0, 0.1)
    },
    "plain": F.cross_entropy,
    "probabilities": lambda o, y: F.cross_entropy(o, _soft(y)),
    "one dim more": lambda o, y: F.cross_entropy(
        o.view(4, 3, CLASSES).transpose(1, 2), y.view(4, 3)
    ),
    "images": _images,
    "shifted": _shifted,
    "unmasked tokens": _masked,
    "picked rows": lambda o, y: F.cross_entropy(o[y > 1], y[y > 1]),
    "gathered": lambda o, y: -o.log_softmax(1).gather(1, y[:, None]).mean(),
    "indexed": lambda o, y: -o.log_softmax(1)[torch.arange(len(y)), y].sum() / 7,
    "scaled and added": lambda o, y: (
        3 * F.cross_entropy(o, y) - F.cross_entropy(o[:, :3], y.clamp(max=2)) / 4
    ),
    "distilled": _distilled,
    "cast": lambda o, y: F.cross_entropy(o.float(), y).double(),
    "penalised": lambda o, y: F.cross_entropy(o, y) + 1e-2 * o.square().sum(1).mean(),
    "squared": lambda o, y: F.mse_loss(o, _soft(y)),
    "squared, summed": lambda o, y: F.mse_loss(o, _soft(y), reduction="sum") / len(y),
    "squared, of each": lambda o, y: (
        F.mse_loss(o, _soft(y), reduction="none").sum(1) * (y + 1)
    ).mean(),
    "written out": lambda o, y: 0.5 * (_soft(y) - o).pow(2).sum(1).mean(),
    "squares of a part": lambda o, y: (o[:, 0] - y).square().mean(),
    "each a sigmoid": lambda o, y: F.binary_cross_entropy_with_logits(
        o, _soft(y), pos_weight=torch.linspace(1, 2, CLASSES).double()
    ),
    "huber": lambda o, y: F.huber_loss(o, 2 * _soft(y), delta=0.5),
}
OTHERS = {
    "log of a sum": lambda o, y: (o.logsumexp(1) - o[:, 0]).mean(),
    "between predictions": lambda o, y: F.mse_loss(o[:6], o[6:].sin()),
    "norms": lambda o, y: o.norm(dim=1).mean(),
}


def problem(dtype=torch.float64):
    torch.manual_seed(1)
    o = (2 * torch.randn(ROWS, CLASSES, dtype=dtype)).requires_grad_()
    return o, torch.arange(ROWS) % CLASSES


@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_same_as_double_backward(name):
    o, y = problem()
    loss = {**CLOSED, **OTHERS}[name](o, y)
    closed = _curvature(loss, o, is_closed=True)
    truth = GradientGraph((loss,), (o,))
    assert (closed.reason is None) == (name in CLOSED)
    rtol = 1e-6 if name == "cast" else 1e-12
    for _ in range(2):  # the first product also compares slopes
        v = torch.randn_like(o)
        want, got = truth.product([v])[0], closed.product([v])[0]
        assert float((want - got).norm()) <= rtol * float(want.norm())
        assert (closed.reason is None) == (name in CLOSED)
    torch.testing.assert_close(closed.gradient()[0], truth.gradient()[0].detach())


def test_products_are_apart():
    """A later one does not write over what an earlier one gave, nor over its vector."""
    o, y = problem()
    loss = CLOSED["scaled and added"](o, y)
    graph = _curvature(loss, o, is_closed=True)
    v, w = torch.randn_like(o), torch.randn_like(o)
    before, kept = v.clone(), graph.product([v])[0]
    first = kept.clone()
    graph.product([w])
    assert torch.equal(kept, first)
    assert torch.equal(v, before)


def test_what_names_say_is_not_asked():
    """A function of that name that computes something else is what it computes."""

    def cross_entropy(o, y):
        return (F.nll_loss(o.log_softmax(1), y) + 1).square()

    o, y = problem()
    loss = cross_entropy(o, y)
    v = torch.randn_like(o)
    want = GradientGraph((loss,), (o,)).product([v])[0]
    torch.testing.assert_close(
        _curvature(loss, o, is_closed=True).product([v])[0], want
    )


def test_hooks_give_way():
    """What acts on gradients is not in the nodes."""
    o, y = problem()
    found = o.log_softmax(1)
    found.register_hook(lambda g: 2 * g)
    loss = F.nll_loss(found, y)
    graph = _curvature(loss, o, is_closed=True)
    v = torch.randn_like(o)
    got = graph.product([v])[0]
    assert "hook" in str(graph.reason)
    torch.testing.assert_close(got, GradientGraph((loss,), (o,)).product([v])[0])


@pytest.mark.parametrize("is_single", [True, False])
def test_compared_once(monkeypatch, is_single):
    """An operator whose closed form is off makes its products by double backward."""
    model, batch = make("mlp")
    data = batch if is_single else [batch, batch]
    v = torch.randn(38).double()
    operator = fm.GaussNewton(model, outputs, output_loss, data)
    want = operator @ v
    assert operator._is_by_tangents

    exact = LogSoftmax.changes
    monkeypatch.setattr(
        LogSoftmax, "changes", lambda *args: [1.1 * x for x in exact(*args)]
    )
    operator = fm.GaussNewton(model, outputs, output_loss, data)
    for _ in range(2):
        torch.testing.assert_close(operator @ v, want)
    assert not operator._is_by_tangents


def test_memory():
    """Of predictions over many classes, a product holds less at a time."""
    torch.manual_seed(0)
    o = torch.randn(64, 1000, requires_grad=True)
    loss = F.cross_entropy(o, torch.arange(64))
    taken = []
    for graph in (_curvature(loss, o, is_closed=c) for c in (True, False)):
        v = torch.randn_like(o)
        graph.product([v])
        taken.append(held(lambda g=graph, v=v: g.product([v])).most)
    assert taken[0] <= o.numel() * 4 * 1.1
    assert taken[1] >= 2 * taken[0]
