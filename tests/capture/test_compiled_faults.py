"""Compiled regions whose own code is read: what was wrong once."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastminima as fm

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _placed(compiling):
    """Models and batches are moved one by one."""


def sq_norms_of(losses, model):
    """Of each sample's gradient, by backward passes through the compiled code itself.

    So that random numbers are those of the step. The region must keep what it saved, as
    those of `fm.compile` do.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        found.append(sum(g.square().sum() for g in grads))
    return torch.stack(found)


def test_two_probes_watch_one_pass(device):
    model = nn.Linear(6, 3).to(device)
    x = torch.randn(5, 6).to(device)
    want = fm.GradientProbe(model).backward(model(x).sin().sum(1)).sq_norms
    fast = fm.compile(model, backend="aot_eager")
    whole, part = fm.GradientProbe(model), fm.GradientProbe({"w": model.weight})
    for _ in range(2):
        out = fast(x)
        losses = out.sin().sum(1)
        whole.attach(losses)
        part.attach(losses)
        losses.mean().backward()
        found = part.collect().sq_norms
        torch.testing.assert_close(whole.collect().sq_norms, want)
        assert (found < want).all()
        assert "fastminima.receiver" not in out.grad_fn.metadata


class Checkpointed(nn.Module):
    """Blocks with dropout that are computed again in the backward pass."""

    def __init__(self, context_fn=None):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2)
        )
        self.options = {} if context_fn is None else {"context_fn": context_fn}

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.options)
        return x


def saves_products(context, operation, *args, **kwargs):
    if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def selective():
    return create_selective_checkpoint_contexts(saves_products)


@pytest.mark.parametrize("context_fn", [None, selective], ids=["all", "selective"])
def test_checkpoints_with_dropout_inside_a_region(context_fn, device):
    """What is run uncompiled, to find the rows, draws the same numbers again."""
    model = Checkpointed(context_fn).to(device)
    x = torch.randn(5, 3, 8).to(device)
    fast, probe = fm.compile(model, backend="aot_eager"), fm.GradientProbe(model)
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses = fast(x).sin().flatten(1).sum(1)
        want = sq_norms_of(losses, model)
        torch.manual_seed(seed)
        got = probe.backward(fast(x).sin().flatten(1).sum(1))
        torch.testing.assert_close(got.sq_norms, want)


class Shuffled(nn.Module):
    """Rows of data in an order that is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x, order):
        return self.layer(x.flatten(0, 1)[order]).tanh()


def test_rows_that_are_put_in_order_behind_a_region(device):
    """In another order in each step, which the graph around the region shows."""
    model, x = Shuffled().to(device), torch.randn(4, 4, 6).to(device)
    fast, probe = fm.compile(model, backend="aot_eager"), fm.GradientProbe(model)
    want = fm.GradientProbe(model).backward(
        model(x, torch.arange(16).to(device)).reshape(4, 24).sin().sum(1)
    )
    for order in (torch.arange(16), torch.arange(16).view(4, 4).T.flatten()) * 2:
        order = order.to(device)
        out = fast(x, order)[order.argsort()]
        got = probe.backward(out.reshape(4, 24).sin().sum(1))
        torch.testing.assert_close(got.sq_norms, want.sq_norms)


def test_regions_that_hold_no_tracked_parameter(device):
    """A compiled loss, activation, frozen part: nothing in them has to run again."""
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]).to(device)
    first, second = model
    between = fm.compile(lambda x: F.dropout(x.sin(), 0.3), backend="aot_eager")
    frozen = fm.compile(
        nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))
        .requires_grad_(False)
        .to(device),
        backend="aot_eager",
    )

    class Powers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x):
            return F.dropout(x * self.weight.exp(), 0.3)

    # Tracked by nobody, and no use that is known.
    untracked = fm.compile(Powers().to(device), backend="aot_eager")
    loss = fm.compile(lambda x: F.dropout(x, 0.3).sin().sum(1), backend="aot_eager")
    probe = fm.GradientProbe(model)
    x = torch.randn(5, 6).to(device)
    for seed in (0, 1):
        found = []
        for read in (sq_norms_of, lambda losses, _: probe.backward(losses).sq_norms):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "A compiled region")
                out = second(untracked(frozen(between(first(x)))))
                found.append(read(loss(out), model))
        torch.testing.assert_close(*found)


class Tokens(nn.Module):
    """A parameter that is broadcast over samples, and is not where there is one."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 3, 6))
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return F.dropout(self.layer(x) + self.positions.tanh(), 0.3)


def test_a_batch_of_one_sample(device):
    model, x = Tokens().to(device), torch.randn(4, 3, 6).to(device)
    probe = fm.GradientProbe(model)
    for dynamic in (False, True):
        fast = fm.compile(model, backend="aot_eager", dynamic=dynamic)
        for seed in (0, 1):
            found = []
            for read in (
                sq_norms_of,
                lambda losses, _: probe.backward(losses).sq_norms,
            ):
                torch.manual_seed(seed)
                found.append(read(fast(x[:1]).sin().flatten(1).sum(1), model))
            torch.testing.assert_close(*found)


class Distances(nn.Module):
    """A table of distances, looked up once for all samples and added in two layers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 2)

    def forward(self, x):
        place = torch.arange(x.shape[1], device=x.device)
        bias = self.table(place[:, None] - place + 4).permute(2, 0, 1)[None]
        for _ in range(2):
            heads = x.unflatten(2, (2, 3)).transpose(1, 2)
            weights = F.dropout((heads @ heads.mT + bias).softmax(-1), 0.3)
            x = x + (weights @ heads).transpose(1, 2).flatten(2)
        return x


def test_positions_that_several_layers_share(device):
    model, x = Distances().to(device), torch.randn(4, 5, 6).to(device)
    fast = fm.compile(model, backend="aot_eager", fullgraph=True)
    probe = fm.GradientProbe(model)
    for seed in (0, 1):
        found = []
        for read in (sq_norms_of, lambda losses, _: probe.backward(losses).sq_norms):
            torch.manual_seed(seed)
            found.append(read(fast(x).sin().flatten(1).sum(1), model))
        torch.testing.assert_close(*found)


class LookedUp(nn.Module):
    """Rows of a table some of which are hidden, in ways that say so differently."""

    def __init__(self, how):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 6))
        self.layer = nn.Linear(6, 6)
        self.how = how

    def forward(self, x, ids):
        return self.layer((x + self.how(self.table, x, ids)).tanh())


def every_other(x):
    return torch.arange(x.shape[1], device=x.device)[:, None] % 2 == 1


HIDDEN = {
    "a row from the end": lambda t, x, i: torch.where(x[..., :1] > 0, 0.0, t[i - 9]),
    "a mask of all samples": lambda t, x, i: t[i - 9].masked_fill(every_other(x), 0.0),
    "rows of all samples": lambda t, x, i: torch.where(
        every_other(x), 0.0, t[i[0] - 9]
    ),
    "columns": lambda t, x, i: torch.where(every_other(x.mT)[:, 0], 0.0, t[i]),
    "padding": lambda t, x, i: F.embedding(i, t, 2).masked_fill(x[:, :1, :1] > 0, 0.0),
    "positions": lambda t, x, i: F.embedding(i[0], t, 2).masked_fill(every_other(x), 0),
}


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("how", HIDDEN.values(), ids=HIDDEN)
def test_rows_of_a_table_that_are_hidden(how, backend, device):
    torch.manual_seed(0)
    model = LookedUp(how).to(device)
    x, ids = torch.randn(4, 5, 6), torch.randint(9, (4, 5))
    x, ids = x.to(device), ids.to(device)
    want = fm.GradientProbe(model, per_parameter=True).backward(
        model(x, ids).square().sum((1, 2))
    )
    fast = fm.compile(model, backend=backend)
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(2):
        got = probe.backward(fast(x, ids).square().sum((1, 2)))
        for name, norms in want.sq_norms_by_parameter.items():
            torch.testing.assert_close(got.sq_norms_by_parameter[name], norms)
