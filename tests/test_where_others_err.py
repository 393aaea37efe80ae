"""Cases where libraries in use return a wrong number without a word.

Each test computes the mistake too, so that it shows what it guards against.
"""

import pytest
import torch
from oracles import flat, single_sample_gradients
from torch import nn
from torch.func import functional_call, grad, vmap

import fastminima as fm


class Tied(nn.Module):
    """Embedding and output head share their weight."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(7, 5, padding_idx=padding_idx)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids).tanh())


def token_losses(model, batch):
    (ids,) = batch
    return model(ids).logsumexp(-1).sum(1)


def check(model, losses, batch, **options):
    want = flat(single_sample_gradients(model, losses, batch))
    stats = fm.GradientProbe(model, per_parameter=True, **options).backward(
        losses(model, batch)
    )
    torch.testing.assert_close(
        stats.sq_norms.double(), want.square().sum(1), rtol=1e-5, atol=1e-6
    )
    return stats, want


def test_tied_weights_are_one_parameter():
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(7, (6, 4))
    stats, _ = check(model, token_losses, (ids,))
    assert list(stats.sq_norms_by_parameter) == ["embedding.weight"]
    apart = Tied()
    apart.head.weight = nn.Parameter(model.head.weight.detach().clone())
    apart.embedding.weight = nn.Parameter(model.head.weight.detach().clone())
    separate = fm.GradientProbe(apart).backward(token_losses(apart, (ids,)))
    mistake = (separate.sq_norms - stats.sq_norms).abs() / stats.sq_norms
    assert mistake.max() > 0.05


def test_padding_tokens_contribute_nothing_to_the_table():
    torch.manual_seed(0)
    model = nn.Embedding(7, 5, padding_idx=2)
    ids = torch.randint(4, (6, 8))

    def losses(model, batch):
        return (model(batch[0]) + 0.5).square().sum((1, 2))

    stats, _ = check(model, losses, (ids,))
    ignored = nn.Embedding(7, 5)
    ignored.load_state_dict(model.state_dict())
    wrong = fm.GradientProbe(ignored).backward(losses(ignored, (ids,))).sq_norms
    assert ((wrong - stats.sq_norms) / stats.sq_norms).max() > 0.1


def test_grouped_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten())
    x = torch.randn(5, 4, 6, 6)
    check(model, lambda m, b: m(b[0]).sin().sum(1), (x,))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_moments_do_not_depend_on_the_reduction(reduction):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(10, 4)
    losses = model(x).square().sum(1)
    want = flat(
        single_sample_gradients(model, lambda m, b: m(b[0]).square().sum(1), (x,))
    )
    probe = fm.GradientProbe(model, measure="second_moments", keep_mean=True)
    stats = probe.backward(getattr(losses, reduction)(), 10, reduction)
    got = torch.cat([stats.second_moments[n].flatten() for n in ("weight", "bias")])
    torch.testing.assert_close(
        got.double(), want.square().mean(0), rtol=1e-5, atol=1e-6
    )
    variance = torch.cat([stats.variance[n].flatten() for n in ("weight", "bias")])
    torch.testing.assert_close(variance.double(), want.var(0), rtol=1e-4, atol=1e-5)


def test_batches_of_unequal_size_are_weighted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(10, 3, dtype=torch.float64)

    def loss(model, batch):
        return model(batch[0]).square().mean()

    whole, parts = (x,), [(x[:8],), (x[8:],)]
    v = torch.randn(fm.Hessian(model, loss, whole).shape[0], dtype=torch.float64)
    want = fm.Hessian(model, loss, whole) @ v
    torch.testing.assert_close(fm.Hessian(model, loss, parts) @ v, want)
    equal = sum(fm.Hessian(model, loss, part) @ v for part in parts) / 2
    assert (equal - want).norm() / want.norm() > 0.05


def test_agrees_with_vmap_of_grad():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )  # fmt: skip
    x, y = torch.randn(12, 3, 6, 6), torch.randint(10, (12,))

    def loss(parameters, x, y):
        logits = functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(logits, y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    want = flat(vmap(grad(loss), (None, 0, 0))(parameters, x, y))
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    stats = fm.GradientProbe(model, measure="gram").backward(losses)
    torch.testing.assert_close(
        stats.sq_norms, want.square().sum(1), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(stats.gram, want @ want.t(), rtol=1e-4, atol=1e-4)
