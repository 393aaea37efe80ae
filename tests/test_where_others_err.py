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


class Reused(nn.Module):
    """One layer, called twice on the way or once on each of two inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x, other=None):
        if other is None:
            return self.layer(self.layer(x).tanh())
        return self.layer(x).tanh() - self.layer(other).tanh()


class Positions(nn.Module):
    """A table whose rows are looked up once for the whole batch."""

    def __init__(self):
        super().__init__()
        self.tokens, self.table = nn.Embedding(7, 5), nn.Embedding(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        places = torch.arange(ids.shape[1])[None]
        return self.head((self.tokens(ids) + self.table(places)).tanh())


class WithoutItsModule(nn.Module):
    """Weights that no module's forward sees: of `F.linear`, and a gain."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x):
        x = self.first(x).tanh()
        if self.what == "gain":
            return self.last(x * self.gain)
        return nn.functional.linear(x * self.gain, self.last.weight, self.last.bias)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0])


class Flattened(nn.Module):
    """Tokens of all samples as the rows of one matrix."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).view(*x.shape[:2], 5)


def waves(model, batch):
    """`[batch]`: a loss whose gradient reaches everything."""
    return model(*batch).sin().flatten(1).sum(1)


def ids(high, *shape):
    return torch.randint(high, shape)


# What makes a model and its batch. Squared norms added up from the inputs and output
# gradients of modules, as dattri-llm 0.1.0 does, are not those of the samples there. It
# warns of tables that are looked up once for all, and its manual says that uses of one
# weight are taken for several weights; of the others it says nothing.
BY_MODULES = {
    "tied weights": lambda: (Tied(), ids(7, 6, 4)),
    "a layer called twice": lambda: (Reused(), torch.randn(6, 5)),
    "two towers": lambda: (Reused(), torch.randn(6, 5), torch.randn(6, 5)),
    "positions of all samples": lambda: (Positions(), ids(7, 6, 4)),
    "F.linear": lambda: (WithoutItsModule("F.linear"), torch.randn(6, 5)),
    "a parameter of its own": lambda: (WithoutItsModule("gain"), torch.randn(6, 5)),
    "an LSTM": lambda: (Recurrent(), torch.randn(4, 3, 4)),
    "attention": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        torch.randn(4, 3, 8),
    ),
    "tokens as rows": lambda: (Flattened(), torch.randn(6, 3, 4)),
    "ids without time": lambda: (
        nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 2)),
        ids(7, 6),
    ),
    "grouped convolution": lambda: (
        nn.Conv2d(4, 6, 3, groups=2),
        torch.randn(5, 4, 6, 6),
    ),
    "depthwise convolution": lambda: (
        nn.Conv2d(4, 4, 3, groups=4),
        torch.randn(5, 4, 6, 6),
    ),
    "circular padding": lambda: (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        torch.randn(5, 4, 6, 6),
    ),
    "grouped transposed convolution": lambda: (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        torch.randn(5, 4, 6, 6),
    ),
    "layer norm of a matrix": lambda: (nn.LayerNorm([3, 4]), torch.randn(5, 3, 4)),
    "batch norm at rest": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval(),
        torch.randn(6, 4),
    ),
}


@pytest.mark.parametrize("case", BY_MODULES)
def test_what_modules_do_not_see(case):
    torch.manual_seed(0)
    model, *batch = BY_MODULES[case]()
    check(model, waves, batch)


@pytest.mark.parametrize("case", BY_MODULES)
def test_dattri_llm_errs_there(case):
    """By more than 2 %, or its norms are of another number of samples."""
    pytest.importorskip("dattri_llm", reason="dattri-llm is not installed")
    torch.manual_seed(0)
    model, *batch = BY_MODULES[case]()
    want = flat(single_sample_gradients(model, waves, batch)).square().sum(1)
    got = norms_of_dattri_llm(model, waves, batch)
    errors = (got.double() - want).abs() / want if got.shape == want.shape else None
    assert errors is None or errors.max() > 0.02


def test_dattri_llm_is_called_as_it_should_be():
    pytest.importorskip("dattri_llm", reason="dattri-llm is not installed")
    torch.manual_seed(0)
    model, *batch = (
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)),
        torch.randn(5, 3, 4),
    )
    want = flat(single_sample_gradients(model, waves, batch)).square().sum(1)
    got = norms_of_dattri_llm(model, waves, batch)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def norms_of_dattri_llm(model, losses, batch):
    from dattri_llm.gradient import ops
    from dattri_llm.gradient.callbacks import CaptureCallback
    from dattri_llm.gradient.hooks import REGISTER_ALL, HookManager, HookManagerConfig

    caught = CaptureCallback()
    config = HookManagerConfig(linear_io=REGISTER_ALL)
    manager = HookManager(model, config=config, callbacks=[caught])
    with manager.collect(deregister_on_exit=True):
        losses(model, batch).sum().backward()
    found = caught.record.gradient
    parts = [
        ops.grad_norm_sq(found.data[name], found.layer_types[name])
        for name in found.layer_names
    ]
    return torch.stack(torch.broadcast_tensors(*parts)).sum(0)
