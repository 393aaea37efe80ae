"""Rows that data routes: measured once, then followed by the indices of each step."""

import warnings

import pytest
import torch
from cases import CASES
from oracles import flat, single_sample_gradients
from torch import nn

import fastminima as fm
from fastminima.capture.reading import attempt

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def measured(monkeypatch):
    """Counts the measurements."""
    calls = []
    measure = attempt.measure_samples

    def counting(*args, **options):
        calls.append(args)
        return measure(*args, **options)

    monkeypatch.setattr(attempt, "measure_samples", counting)
    return calls


def agrees(probe, model, losses, batch):
    want = flat(single_sample_gradients(model, losses, batch)).square().sum(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = probe.backward(losses(model, batch)).sq_norms
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    model.zero_grad()


@pytest.mark.parametrize("name", ["experts", "experts grouped", "experts selected"])
def test_experts_are_measured_once(name, measured):
    case = BY_NAME[name]
    model, _ = case.make()
    probe = fm.GradientProbe(model)
    for seed in range(4):
        _, batch = case.make(seed)
        agrees(probe, model, case.losses, batch)
    assert len(measured) == 1


def test_experts_with_sequences_of_any_length(measured):
    case = BY_NAME["experts"]
    model, _ = case.make()
    probe = fm.GradientProbe(model)
    for time in (5, 6, 7, 8, 9, 5, 11):
        agrees(probe, model, case.losses, (torch.randn(4, time, 6),))
    assert len(measured) == 3
    agrees(probe, model, case.losses, (torch.randn(3, 7, 6),))
    assert len(measured) == 3


class Routed(nn.Module):
    """Rows go through a layer in some order, and come back in some way."""

    def __init__(self, way):
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.layer = nn.Linear(6, 6)
        self.way = way

    def forward(self, x, order):
        rows = self.before(x).flatten(0, 1).tanh()
        order = order.flatten()
        taken = rows[order]
        if self.way == "cut":
            taken = taken[: len(taken) - 3]
            order = order[: len(taken)]
        out = self.layer(taken).sin()
        if self.way == "slices":
            out = torch.cat([out[2:], out[:2]])
            order = order.roll(-2)
        if self.way == "put":
            back = torch.zeros_like(rows)
            back[order] = out
        elif self.way == "accumulated":
            where = order, torch.zeros_like(order)
            back = rows[:, None].index_put((where), out, accumulate=True)[:, 0]
        elif self.way == "twice":
            inverse = order.argsort()
            back = out[inverse] + (out * out.detach())[inverse]
        elif self.way in ("cut", "add"):
            back = rows.index_add(0, order, out)
        else:
            back = out.index_select(0, order.argsort())
        return back.view_as(x)


WAYS = ["select", "put", "add", "accumulated", "twice", "slices", "cut"]


@pytest.mark.parametrize("way", WAYS)
def test_orders_that_change(way, measured):
    torch.manual_seed(0)
    model, x = Routed(way), torch.randn(4, 5, 6)
    probe = fm.GradientProbe(model)
    for _ in range(4):
        order = torch.randperm(20)
        losses = model(x, order).sin().sum((1, 2))
        gradients = [
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for loss in losses
        ]
        want = [sum(g.square().sum() for g in of_one) for of_one in gradients]
        got = probe.backward(losses).sq_norms
        torch.testing.assert_close(got, torch.stack(want))
    # Rows cut by slices are not followed, and cannot be taken for others.
    assert len(measured) == (4 if way in ("slices", "cut") else 1)


@pytest.mark.parametrize("back", [True, False])
def test_samples_that_change_places(back, measured):
    """What is flattened on the way is not followed."""
    torch.manual_seed(0)
    layer, head, x = nn.Linear(6, 4), nn.Linear(4, 4), torch.randn(4, 5, 6)
    model = nn.ModuleList([layer, head])
    probe = fm.GradientProbe(model)
    for _ in range(4):
        order = torch.randperm(4)
        h = head(layer(x)[order].tanh())
        losses = (h[order.argsort()] if back else h).sin().sum((1, 2))
        want = []
        for loss in losses:
            grads = torch.autograd.grad(
                loss, list(model.parameters()), retain_graph=True
            )
            want.append(sum(g.square().sum() for g in grads))
        got = probe.backward(losses).sq_norms
        torch.testing.assert_close(got, torch.stack(want))
    assert len(measured) == 4


def test_a_table_indexed_by_other_numbers_is_not_measured_again(measured):
    case = BY_NAME["indexed tables"]
    model, _ = case.make()
    probe = fm.GradientProbe(model)
    for seed in range(3):
        agrees(probe, model, case.losses, case.make(seed)[1])
    assert len(measured) == 1


def autograd_agrees(probe, model, losses):
    want = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        want.append(sum(g.square().sum() for g in grads))
    torch.testing.assert_close(probe.backward(losses).sq_norms, torch.stack(want))
    model.zero_grad()


@pytest.mark.parametrize("first", ["in order", "shuffled"])
def test_whole_samples_change_places(first, measured):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 4)])
    probe = fm.GradientProbe(model)
    orders = [torch.randperm(5) for _ in range(4)]
    if first == "in order":
        orders[0] = torch.arange(5)
    for order in orders:
        h = model[0](torch.randn(5, 6))[order].tanh()
        autograd_agrees(probe, model, model[1](h).sin().sum(1))
    assert len(measured) == 1


def test_rows_dropped_and_doubled(measured):
    """Experts with room for a few tokens, and tokens that several samples share."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 4)])
    probe = fm.GradientProbe(model)
    for _ in range(4):
        rows = model[0](torch.randn(20, 6)).tanh()
        kept = torch.randperm(20)[:15]
        back = torch.zeros(20, 4).index_add(0, kept, model[1](rows[kept]).sin())
        autograd_agrees(probe, model, back.view(4, 5, 4).cos().sum((1, 2)))
    assert len(measured) == 1
    rows = model[0](torch.randn(20, 6)).tanh()
    shared = torch.cat([torch.arange(19), torch.zeros(1, dtype=torch.long)])
    losses = model[1](rows[shared]).view(4, 5, 4).cos().sum((1, 2))
    with pytest.raises(fm.CaptureError, match="belong to one of the 4 samples"):
        probe.backward(losses)


@pytest.mark.parametrize("batch, time", [(3, 7), (4, 9), (2, 5), (3, 3)])
def test_only_the_first_token_is_seen(batch, time, measured):
    """Rows 0, 7, 14 fit two layouts of three samples; the view [3, 7] fits one."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    probe = fm.GradientProbe(model)
    for _ in range(3):
        x = torch.randn(batch, time, 6)
        autograd_agrees(probe, model, model(x).tanh()[:, 0].sin().sum(1))
    assert len(measured) == 1


@pytest.mark.parametrize("heads", [2, 4])
def test_parts_assigned_to_features(heads, measured):
    """Slices are not shown: as many heads as samples could be those."""
    torch.manual_seed(0)
    model = nn.Linear(6, 6 * heads)
    probe = fm.GradientProbe(model)
    for _ in range(3):
        h = model(torch.randn(4, 5, 6)).view(4, 5, heads, 6).transpose(1, 2)
        out = h.new_empty(4, heads, 5, 6)
        out[..., :2] = h[..., 4:]
        out[..., 2:] = h[..., :4].sin()
        autograd_agrees(probe, model, out.sin().sum((1, 2, 3)))
    assert len(measured) == (1 if heads == 2 else 3)


def test_a_parameter_assigned_to_the_first_row(measured):
    """The assigned [3, 4] does not say along which dim of [3, 5, 4] it goes."""
    torch.manual_seed(0)
    model = nn.ParameterDict(
        {
            "token": nn.Parameter(torch.randn(4)),
            "weight": nn.Parameter(torch.randn(6, 4)),
        }
    )
    probe = fm.GradientProbe(model)
    for _ in range(3):
        h = torch.randn(3, 5, 6) @ model["weight"]
        h[:, 0] = model["token"]
        autograd_agrees(probe, model, h.sin().cumsum(1).cos().sum((1, 2)))
    assert len(measured) == 3


def test_activation_in_place(measured):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    probe = fm.GradientProbe(model)
    for _ in range(3):
        autograd_agrees(probe, model, model(torch.randn(4, 3, 6)).sin().sum((1, 2)))
    assert len(measured) == 1


@pytest.mark.parametrize("kind", ["linear", "words"])
def test_distances_between_samples_are_refused(kind):
    """The second tower meets each sample of the first as one thing, but is data."""
    torch.manual_seed(0)
    ids, x = torch.randint(9, (4, 3)), torch.randn(4, 6)
    towers = nn.ModuleList([nn.Linear(6, 5), nn.Embedding(9, 5), nn.Linear(6, 5)])
    second = towers[1](ids).mean(1) if kind == "words" else towers[2](x)
    distances = (towers[0](x)[:, None] - second[None]).square().sum(2)
    with pytest.raises(fm.CaptureError, match="do not each belong"):
        fm.GradientProbe(towers).backward(distances.logsumexp(1))
