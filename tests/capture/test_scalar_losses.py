"""Where the samples of a scalar loss are is shown, not taken from a size."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastminima as fm

N, T, V = 4, 6, 9


def rows(losses, model):
    """`[N, P]`: gradients one by one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for loss in losses:
        grads = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
        pairs = zip(grads, parameters, strict=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        found.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(found)


def check(model, loss, losses, **options):
    """A scalar loss, and what each sample gives to it times their number."""
    want = rows(losses, model)
    stats = fm.GradientProbe(model).backward(loss, batch_size=len(losses), **options)
    torch.testing.assert_close(stats.sq_norms, want.square().sum(1))
    torch.testing.assert_close(stats.covariance_trace, want.var(0).sum())


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def tokens_in_context():
    torch.manual_seed(0)
    layers = (nn.Embedding(V, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, V))
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("counts", [(2, 2, 2, 2), (2, 0, 1, 1), (1, 1, 2, 0), (1,) * 4])
def test_as_many_selected_tokens_as_samples(counts):
    model = tokens_in_context()
    ids = torch.randint(V, (N, T))
    chosen = torch.zeros(N, T, dtype=torch.bool)
    for n, count in enumerate(counts):
        chosen[n, torch.randperm(T)[:count]] = True
    logits = model(ids)
    loss = cross_entropy(logits[chosen], ids[chosen])
    per_token = cross_entropy(logits.mT, ids, reduction="none") * chosen
    check(model, loss, per_token.sum(1) * N / chosen.sum())


REORDERED = {
    "shuffled": lambda losses: losses[torch.tensor([3, 0, 5, 1, 4, 2])].mean(),
    "flipped": lambda losses: losses.flip(0).mean(),
    "sorted": lambda losses: (losses.sort().values * torch.linspace(1, 2, 6)).mean(),
    "summed up": lambda losses: losses.cumsum(0)[-1] / 6,
    "rolled": lambda losses: losses.roll(2).mean(),
    "in order": lambda losses: losses.mean(),
    "weighted": lambda losses: (losses * torch.linspace(0, 1, 6)).sum(),
}


@pytest.mark.parametrize("way", REORDERED)
def test_samples_in_another_order_next_to_the_loss(way):
    model = perceptron()
    x, y = torch.randn(6, 6).double(), torch.randint(5, (6,))
    losses = cross_entropy(model(x), y, reduction="none")
    loss = REORDERED[way](losses)
    (weight,) = torch.autograd.grad(loss, losses, retain_graph=True)
    check(model, loss, losses * weight * 6)


def test_sums_over_classes_as_many_as_samples():
    model = perceptron()
    x = torch.randn(5, 6).double()
    y = torch.tensor([2, 0, 2, 4, 0])
    out = model(x)
    losses = cross_entropy(out, y, reduction="none")
    by_class = torch.zeros(5).double().index_add(0, y, losses)
    check(model, by_class.square().sum(), losses * 2 * by_class.detach()[y] * 5)


def test_as_many_time_steps_as_samples_transposed():
    model = tokens_in_context()
    ids = torch.randint(V, (T, T))
    per_token = cross_entropy(model(ids).mT, ids, reduction="none")
    # Weighted by time: the first tensor with a dim of that size is [time, rows].
    loss = (per_token.t() * torch.linspace(1, 2, T)[:, None]).mean()
    losses = (per_token * torch.linspace(1, 2, T)).mean(1)
    check(model, loss, losses)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_a_loop_over_samples(order):
    """Each call of a layer has one sample: the order of calls is theirs."""
    torch.manual_seed(0)
    layer, head = nn.Linear(6, 3).double(), nn.Linear(3, 2).double()
    model = nn.ModuleList([layer, head])
    x = torch.randn(4, 6).double()
    hidden = torch.cat([layer(row[None]) for row in x]).tanh()
    losses = head(hidden).square().sum(1)
    check(model, losses[order].mean(), losses)


@pytest.mark.parametrize("time", [3, 4, 5, 8])
def test_rows_of_time_before_samples(time):
    """As many time steps as samples, or twice as many: either may be the samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(time, 4, 6).double()
    losses = model(x.reshape(-1, 6)).view(time, 4).t().square().mean(1)
    if time % 4:
        check(model, losses.mean(), losses)
    else:
        with pytest.raises(fm.CaptureError, match="vector of per-sample losses"):
            fm.GradientProbe(model).backward(losses.mean(), batch_size=4)


def test_the_axis_is_shown_again_where_an_order_changes():
    model = perceptron()
    probe = fm.GradientProbe(model)
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = torch.randn(6, 6).double(), torch.randint(5, (6,))
        order = torch.arange(6) if seed == 0 else torch.randperm(6)
        losses = cross_entropy(model(x), y, reduction="none")
        want = rows(losses, model).square().sum(1)
        stats = probe.backward(losses[order].mean(), batch_size=6)
        torch.testing.assert_close(stats.sq_norms, want)


SUMMED = {
    "by the loss function": lambda out, y: cross_entropy(out, y, reduction="sum"),
    "of its losses": lambda out, y: cross_entropy(out, y, reduction="none").sum(),
}
NOT_SUMMED = {
    "mean": cross_entropy,
    "divided": lambda out, y: cross_entropy(out, y, reduction="sum") / len(y),
    "weighted": lambda out, y: REORDERED["weighted"](
        cross_entropy(out, y, reduction="none")
    ),
}


@pytest.mark.parametrize("way", SUMMED)
def test_a_sum_that_is_taken_for_a_mean_is_told(way):
    model = perceptron()
    x, y = torch.randn(6, 6).double(), torch.randint(5, (6,))
    probe = fm.GradientProbe(model)
    with pytest.warns(UserWarning, match="sum over its samples .*reduction=.sum"):
        wrong = probe.backward(SUMMED[way](model(x), y), batch_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = probe.backward(SUMMED[way](model(x), y), batch_size=6, reduction="sum")
    torch.testing.assert_close(wrong.sq_norms, right.sq_norms * 36)


@pytest.mark.parametrize("way", NOT_SUMMED)
def test_other_scalars_are_not(way):
    model = perceptron()
    x, y = torch.randn(6, 6).double(), torch.randint(5, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.GradientProbe(model).backward(NOT_SUMMED[way](model(x), y), batch_size=6)
