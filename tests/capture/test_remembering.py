"""What is remembered about a graph must not outlive what it was learned from."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from oracles import flat, single_sample_gradients
from torch import nn

import fastminima as fm


def norms(model, losses):
    named = model if isinstance(model, dict) else dict(model.named_parameters())
    tensors = list(named.values())
    total = []
    for loss in losses:
        grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        total.append(sum(g.to_dense().square().sum() for g in grads if g is not None))
    return torch.stack(total)


def agrees(probe, model, losses, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = norms(model, losses)
        got = probe.backward(losses, **options).sq_norms
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [0.0, float("nan")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_first_step_without_gradients(case, first):
    """Rows of zeros or NaN fit any layout; the next step must find the right one."""
    model, batch = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(model)
        probe.backward(case.losses(model, batch) * first)
        model.zero_grad()
        got = probe.backward(case.losses(model, batch)).sq_norms
    want = flat(single_sample_gradients(model, case.losses, batch)).square().sum(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_a_gate_that_opens_later():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompts = nn.Parameter(torch.randn(4, 6))
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x):  # [4, 4, 6]
            return (x + self.gate * self.prompts.tanh()).sin()

    torch.manual_seed(0)
    model, x = Gated(), torch.randn(4, 4, 6)
    probe = fm.GradientProbe(model)
    agrees(probe, model, model(x).sum((1, 2)))
    with torch.no_grad():
        model.gate.fill_(0.7)
    agrees(probe, model, model(x).sum((1, 2)))


def test_pieces_of_changing_length():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(12, 6)
    probe = fm.GradientProbe(layer)
    for lengths in ([4, 4, 4], [2, 4, 6], [4, 4, 4], [6, 3, 3]):
        pieces = layer(x).tanh().split(lengths)
        agrees(probe, layer, torch.stack([p.mean(0) for p in pieces]).sin().sum(1))
        layer.zero_grad()


def test_axes_that_change_places():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3), torch.randn(4, 4, 6)
    probe = fm.GradientProbe(layer)
    for dim in (1, 0, 1):
        agrees(probe, layer, layer(x).tanh().sum(dim).sin().sum(1))
        layer.zero_grad()


@pytest.mark.parametrize("way", ["roll", "product", "embedding", "slices", "assign"])
def test_rows_moved_by_other_means(way):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(6, 6)
    probe = fm.GradientProbe(layer)
    for order in ([0, 1, 2], [2, 0, 1], [0, 1, 2], [1, 2, 0]):
        h = layer(x).tanh()
        rows = [2 * i + j for i in order for j in range(2)]
        if way == "roll":
            moved = h.roll(2 * order[0], 0)
        elif way == "product":
            moved = torch.eye(6)[rows] @ h
        elif way == "embedding":
            moved = F.embedding(torch.tensor(rows), h)
        elif way == "slices":
            moved = torch.cat([h[2 * i : 2 * i + 2] for i in order])
        else:
            moved = torch.zeros(6, 4)
            for place, i in enumerate(order):
                moved[2 * place : 2 * place + 2] = h[2 * i : 2 * i + 2]
        agrees(probe, layer, moved.view(3, 8).sin().sum(1))
        layer.zero_grad()


def test_ids_shared_by_the_batch_or_not():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 6)

        def forward(self, x, ids):
            return (x + self.table(ids)).sin()

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(4, 5, 6)
    probe = fm.GradientProbe(model)
    for ids in (torch.arange(5)[None], torch.randint(9, (4, 5)), torch.arange(5)[None]):
        agrees(probe, model, model(x, ids).sum((1, 2)))
        model.zero_grad()


def test_positions_of_growing_length():
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(9, 6))
    probe = fm.GradientProbe({"table": table})
    for time in (3, 4, 5, 6, 7, 3):
        x = torch.randn(4, time, 6)
        agrees(probe, {"table": table}, (x + table[:time]).sin().sum((1, 2)))


def test_direct_and_prepared_use_of_one_parameter():
    torch.manual_seed(0)
    w, x = nn.Parameter(torch.randn(6, 6)), torch.randn(5, 6)
    probe = fm.GradientProbe({"w": w})
    agrees(probe, {"w": w}, ((x @ w).tanh() @ (w / w.norm())).sum(1))


def test_expert_without_tokens():
    torch.manual_seed(0)
    expert, x = nn.Linear(6, 6), torch.randn(5, 6)
    nobody = torch.tensor([], dtype=torch.long)
    out = expert(x) + torch.zeros(5, 6).index_add(0, nobody, expert(x[:0]))
    agrees(fm.GradientProbe(expert), expert, out.sin().sum(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_scalar_parameters_and_scalar_rows(batch):
    torch.manual_seed(0)
    w, scale = nn.Parameter(torch.randn(6)), nn.Parameter(torch.tensor(0.3))
    named, x = {"w": w, "scale": scale}, torch.randn(batch, 6)
    losses = torch.stack([w.dot(row) for row in x]) * scale.exp()
    agrees(fm.GradientProbe(named), named, losses.sin())


def test_loss_of_two_parts_at_different_depths():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    x, target = torch.randn(5, 6), torch.ones(5, 4)
    h = model[0](x)
    each = model[1](h.tanh()).square().mean(1) + (h - target).square().mean(1)
    want = norms(model, each)
    h = model[0](x)
    loss = model[1](h.tanh()).square().mean() + F.mse_loss(h, target)
    got = fm.GradientProbe(model).backward(loss, batch_size=5).sq_norms
    torch.testing.assert_close(got, want)


def test_batch_axis_reduced_before_the_features():
    torch.manual_seed(0)
    layer, x, y = nn.Linear(6, 4), torch.randn(4, 6), torch.randn(4, 4)
    want = norms(layer, (layer(x) - y).square().sum(1))
    loss = (layer(x) - y).square().mean(0).sum()
    got = fm.GradientProbe(layer).backward(loss, batch_size=4).sq_norms
    torch.testing.assert_close(got, want)


def test_as_many_layers_as_samples():
    torch.manual_seed(0)
    lstm, x = nn.LSTM(6, 3, num_layers=2, bidirectional=True), torch.randn(5, 4, 6)
    with pytest.raises(fm.CaptureError, match="cannot be told"):
        fm.GradientProbe(lstm).backward(lstm(x)[1][0].square().mean(), batch_size=4)


def test_input_that_requires_grad():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    x = torch.randn(5, 6, requires_grad=True)
    want = norms(layer, layer(x).sin().sum(1))
    loss = layer(x).sin().sum(1).mean()
    got = fm.GradientProbe(layer).backward(loss, batch_size=5).sq_norms
    torch.testing.assert_close(got, want)


def test_frozen_statistics_and_a_scaled_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    x = torch.randn(5, 6)
    found = [
        fm.GradientProbe(model, batchnorm="frozen")
        .backward(model(x).sin().sum(1).mean() * c, batch_size=5, scale=c)
        .sq_norms
        for c in (1.0, 8.0)
    ]
    torch.testing.assert_close(*found)


def test_complex_numbers_are_refused_by_name():
    w = nn.Parameter(torch.randn(3))
    for batch in (1, 4):
        z = torch.randn(batch, 3) * (1 + 2j)
        losses = torch.view_as_real(z * 1j * w).sin().sum((1, 2))
        with pytest.raises(fm.CaptureError, match="complex"):
            fm.GradientProbe({"w": w}).backward(losses)


def test_two_passes_after_one_attach():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    loss = layer(torch.randn(5, 6)).square().mean()
    probe = fm.GradientProbe(layer)
    probe.attach(loss, 5)
    loss.backward(retain_graph=True)
    with pytest.raises(fm.CaptureError, match="second backward pass"):
        loss.backward()
    probe._detach()


def test_direction_of_parameters_not_reached():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    probe = fm.GradientProbe(model, directions={"v": {"b.bias": torch.ones(2)}})
    stats = probe.backward(model["a"](torch.randn(4, 3)).square().sum(1))
    assert torch.equal(stats.dots["v"], torch.zeros(4))


def test_dropped_connections_are_preparations():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    out = F.linear(x, F.dropout(layer.weight, 0.5), layer.bias)
    agrees(fm.GradientProbe(layer), layer, out.sin().sum(1))


def test_long_preparations_take_no_exponential_time():
    torch.manual_seed(0)
    w, x = nn.Parameter(torch.randn(6)), torch.randn(5, 6)
    v = w
    for _ in range(40):
        v = v - 0.1 * v.tanh()
    agrees(fm.GradientProbe({"w": w}), {"w": w}, (x * v).sin().sum(1))


@pytest.mark.parametrize(
    "sizes",
    [
        [(3, 4, 6), (3, 6, 4), (3, 3, 8), (3, 4, 6)],
        [(2, 4, 6), (3, 4, 6), (5, 4, 6), (7, 4, 6), (7, 6, 4), (4, 8, 3)],
    ],
)
def test_the_batch_in_the_middle_with_other_sizes_around_it(sizes):
    """Attention along the columns of images: as many pixels, another aspect ratio."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2)
    probe = fm.GradientProbe(model)
    for batch, height, width in sizes:
        x = torch.randn(batch, height, width, 8)
        columns = x.transpose(0, 1).reshape(height, batch * width, 8)
        out = model(columns, columns, columns, need_weights=False)[0]
        out = out.view(height, batch, width, 8).transpose(0, 1)
        agrees(probe, model, out.sin().flatten(1).sum(1))


def test_a_wrong_batch_size_after_many_right_ones():
    """Layouts carried over to new sizes do not make an axis of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    probe = fm.GradientProbe(model)
    for batch in (4, 6, 5, 7):
        probe.backward(model(torch.randn(batch, 3, 4)).square().mean(), batch)
    loss = model(torch.randn(8, 3, 4)).square().mean()
    with pytest.raises(fm.CaptureError, match="batch axis of size 4"):
        probe.backward(loss, batch_size=4)
    assert probe.backward(loss, batch_size=8).count == 8


@pytest.mark.parametrize(
    ("way", "steps"),
    [
        (lambda h, k: h.rot90(2, [0, 1] if k else [1, 2]), (0, 1, 0)),
        (lambda h, k: h.as_strided((4, 2, 3), (6, 3, 1) if k else (3, 12, 1)), (1, 0)),
        (lambda h, k: h.view(2, 2, 2, 3).diagonal(0, k, 2), (0, 1)),
    ],
    ids=["turned", "strided", "diagonal"],
)
def test_numbers_that_say_where_rows_go(way, steps):
    layer = nn.Linear(5, 3)
    probe = fm.GradientProbe(layer)
    for k in steps:
        out = way(layer(torch.randn(4, 2, 5)), k).sin().flatten(1).sum(1)
        agrees(probe, layer, out)


@pytest.mark.parametrize(
    "way",
    [
        lambda h, mixes: h.sort(0 if mixes else 1)[0],
        lambda h, mixes: h.cumsum(0 if mixes else 1),
        lambda h, mixes: h.softmax(0 if mixes else 1),
    ],
    ids=["sort", "sum", "softmax"],
)
def test_a_dim_that_becomes_the_batch(way):
    """After a step along another dim of that size, the samples are seen to mix."""
    layer = nn.Linear(5, 3)
    probe = fm.GradientProbe(layer)
    for mixes in (False, True):
        losses = way(layer(torch.randn(4, 4, 5)), mixes).sin().flatten(1).sum(1)
        if not mixes:
            agrees(probe, layer, losses)
            continue
        with pytest.raises(fm.CaptureError, match="mixes"):
            probe.backward(losses)
