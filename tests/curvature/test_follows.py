"""A kept graph is recorded anew when anything has changed that it was made from."""

import dataclasses
import functools
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm

from .cases import loss, make, output_loss, outputs

TEMPERATURE = 1.0
SETTINGS = {"weights": [1.0, 2.0]}
TABLE = torch.ones(3, dtype=torch.float64)


class Config:
    slope = 1.0


@dataclasses.dataclass
class Options:
    factor: float
    nested: dict


class Net(nn.Module):
    """Reads its own attributes: numbers, tensors, lists, dictionaries, a function."""

    offset = 0.0

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 3)
        self.act = nn.Tanh()
        self.scale, self.power = 1.0, [1, 1]
        self.shift = torch.zeros(5, dtype=torch.float64)
        self.array = np.ones(5)
        self.options = {"gain": {"value": 1.0}}
        self.function = torch.tanh
        self.space = types.SimpleNamespace(bias=0.0)
        self.register_buffer("mask", torch.ones(5, dtype=torch.float64))

    def forward(self, x):
        hidden = self.act(self.first(x) * self.scale + self.shift.to(x))
        hidden = hidden ** self.power[0] * self.options["gain"]["value"]
        hidden = hidden * torch.from_numpy(self.array).to(x) + self.space.bias
        return (
            self.last(self.function(hidden * self.mask)) + self.offset * hidden[:, :3]
        )


def dense(operator):
    size = operator.shape[0]
    return operator @ torch.eye(size, dtype=operator.dtype, device=operator.device)


def check(model, closure, batch, change):
    """After `change` the kept operator is the one that would be made now."""
    H = fm.Hessian(model, closure, batch)
    old = dense(H)
    graph = H._kept.graph
    torch.testing.assert_close(dense(H), old, rtol=0, atol=0)
    assert H._kept.graph is graph
    change()
    new = dense(H)
    want = dense(fm.Hessian(model, closure, batch))
    torch.testing.assert_close(new, want, rtol=0, atol=0)
    assert (new - old).abs().max() > 1e-6


def setting(owner, name, value):
    return lambda: setattr(owner, name, value)


def add_hook(net):
    net.first.register_forward_hook(lambda m, i, o: 2 * o)


def data_write(tensor):
    tensor.data.mul_(1.5)


MODEL_CHANGES = {
    "number": lambda net: setattr(net, "scale", 2.0),
    "list item": lambda net: net.power.__setitem__(0, 2),
    "tensor attribute in place": lambda net: net.shift.add_(1),
    "tensor attribute by .data": lambda net: net.shift.data.add_(1),
    "tensor attribute replaced": lambda net: setattr(net, "shift", net.shift + 1),
    "array refilled": lambda net: net.array.fill(2),
    "nested dictionary": lambda net: net.options["gain"].update(value=2.0),
    "function": lambda net: setattr(net, "function", torch.sigmoid),
    "lambda": lambda net: setattr(net, "function", lambda x: x.sin()),
    "namespace": lambda net: setattr(net.space, "bias", 1.0),
    "activation replaced": lambda net: setattr(net, "act", nn.Sigmoid()),
    "layer inserted": lambda net: setattr(
        net, "act", nn.Sequential(nn.Tanh(), nn.Tanh())
    ),
    "forward hook": add_hook,
    "pre-hook": lambda net: net.last.register_forward_pre_hook(
        lambda m, i: (2 * i[0],)
    ),
    "buffer by .data": lambda net: data_write(net.mask),
    "weight by .data": lambda net: data_write(net.last.weight),
    "head replaced": lambda net: setattr(
        net, "last", nn.Linear(5, 3).to(net.last.weight)
    ),
    "weight replaced": lambda net: setattr(
        net.last, "weight", nn.Parameter(2 * net.last.weight.detach())
    ),
    "forward replaced": lambda net: setattr(net.act, "forward", torch.sin),
    "mode and dropout": lambda net: net.act.append(nn.Dropout(0.5)),
}


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_changes_of_the_model(name, device):
    torch.manual_seed(0)
    net = Net().to(device, torch.float64)
    if name == "mode and dropout":
        net.act = nn.Sequential(nn.Tanh())
    _, (x, y) = make("mlp", device=device)
    check(net, loss, (x, y), lambda: MODEL_CHANGES[name](net))


def test_changes_of_classes_and_globals(monkeypatch, device):
    net = Net().to(device, torch.float64)
    _, batch = make("mlp", device=device)
    check(net, loss, batch, lambda: monkeypatch.setattr(Net, "offset", 1.0))
    monkeypatch.undo()

    def reads(model, batch):
        factor = TEMPERATURE * SETTINGS["weights"][0] * Config.slope
        return F.cross_entropy(model(batch[0]) * factor * TABLE.to(device), batch[1])

    here = globals()
    for change in (
        lambda: monkeypatch.setitem(here, "TEMPERATURE", 3.0),
        lambda: SETTINGS["weights"].__setitem__(0, 2.0),
        lambda: monkeypatch.setattr(Config, "slope", 2.0),
        lambda: TABLE.data.mul_(2),
    ):
        check(net, reads, batch, change)
        check(net, lambda m, b: reads(m, b), batch, lambda c=change: TABLE.data.mul_(3))


def test_changes_of_what_closures_hold(device):
    model, batch = make("mlp", device=device)
    weight, table = [1.0], torch.ones(3, dtype=torch.float64, device=device)
    teacher, _ = make("mlp", device=device)
    holder = types.SimpleNamespace(weight=1.0)

    class Trainer:
        weight = 1.0

        def loss(self, model, batch):
            return self.weight * loss(model, batch)

    def held(model, batch):
        return (
            weight[0]
            * holder.weight
            * F.cross_entropy(model(batch[0]) * table, batch[1])
        )

    def distilled(model, batch):
        with torch.no_grad():
            target = teacher(batch[0])
        return (model(batch[0]) - target).square().square().mean()

    def scaled(factor, model, batch):
        return factor["value"] * loss(model, batch)

    factor, trainer = {"value": 1.0}, Trainer()
    for closure, change in (
        (held, lambda: weight.__setitem__(0, 2.0)),
        (held, setting(holder, "weight", 3.0)),
        (held, lambda: table.data.mul_(2)),
        (distilled, lambda: data_write(teacher[0].weight)),
        (functools.partial(scaled, factor), lambda: factor.update(value=2.0)),
        (trainer.loss, setting(trainer, "weight", 2.0)),
    ):
        check(model, closure, batch, change)


def batch_changes(device):
    _, (x, y) = make("mlp", device=device)
    array = x.cpu().numpy().copy()
    options = Options(1.0, {"deep": [1.0, (2.0,)]})
    batches = {
        "number": {"x": x, "y": y, "factor": 1.0},
        "string": {"x": x, "y": y, "kind": "plain"},
        "array": {"x": x, "y": y, "array": np.ones(3)},
        "objects": {"x": x, "y": y, "array": np.array([1.0, None], dtype=object)},
        "dataclass": {"x": x, "y": y, "options": options},
        "nested": {"x": x, "y": y, "deep": {"a": [{"factor": 1.0}]}},
        "shared memory": {"x": torch.from_numpy(array), "y": y},
        "by .data": {"x": x.clone(), "y": y},
        "key": {"x": x, "y": y},
    }
    changes = {
        "number": lambda b: b.update(factor=3.0),
        "string": lambda b: b.update(kind="doubled"),
        "array": lambda b: b["array"].fill(2.0),
        "objects": lambda b: b["array"].__setitem__(0, 2.0),
        "dataclass": lambda b: b["options"].nested["deep"].__setitem__(0, 2.0),
        "nested": lambda b: b["deep"]["a"][0].update(factor=2.0),
        "shared memory": lambda b: array.__setitem__(slice(None), 2 * array),
        "by .data": lambda b: b["x"].data.mul_(2),
        "key": lambda b: b.update(factor=2.0),
    }
    return batches, changes


def of_mapping(model, b):
    factor = b.get("factor", 1.0) * (2.0 if b.get("kind") == "doubled" else 1.0)
    if "array" in b:
        factor = factor * b["array"][0]
    if "options" in b:
        factor = factor * b["options"].nested["deep"][0]
    if "deep" in b:
        factor = factor * b["deep"]["a"][0]["factor"]
    x = b["x"].to(next(model.parameters()))
    return factor * F.cross_entropy(model(x), b["y"])


@pytest.mark.parametrize("name", batch_changes("cpu")[0])
def test_changes_of_the_batch(name, device):
    model, _ = make("mlp", device=device)
    batches, changes = batch_changes(device)
    check(model, of_mapping, batches[name], lambda: changes[name](batches[name]))


def test_gauss_newton_and_covariance_follow_too(device):
    net = Net().to(device, torch.float64)
    _, batch = make("mlp", device=device)

    def rows(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    for make_operator in (
        lambda: fm.GaussNewton(net, outputs, output_loss, batch),
        lambda: fm.GradientCovariance(net, rows, batch),
    ):
        operator = make_operator()
        old = dense(operator)
        net.scale *= 2
        torch.testing.assert_close(dense(operator), dense(make_operator()))
        assert not torch.allclose(dense(operator), old)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].requires_grad_(False),
        lambda m: m.append(nn.Linear(3, 3).double()),
        lambda m: m.__setitem__(2, nn.Linear(5, 4).double()),
        lambda m: m.float(),
    ],
    ids=["frozen", "added", "another shape", "another dtype"],
)
def test_another_set_of_parameters_is_an_error(change):
    model, batch = make("mlp")
    H = fm.Hessian(model, loss, batch)
    dense(H)
    change(model)
    with pytest.raises(ValueError, match=r"parameters have changed.*new operator"):
        H @ torch.ones(38, dtype=torch.float64)
    with pytest.raises(ValueError, match="have changed"):
        fm.top_eigenpairs(H)


def test_frozen_parameters_are_named():
    model, batch = make("mlp")
    H = fm.Hessian(model, loss, batch)
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'2.weight' was frozen or removed.*\(2 in"):
        H @ torch.ones(38, dtype=torch.float64)
    model[2].requires_grad_(True)
    dense(H)
    model[0] = nn.Linear(3, 6).double()
    with pytest.raises(
        ValueError, match=r"'0.weight' went from \(5, 3\).* to \(6, 3\)"
    ):
        H @ torch.ones(38, dtype=torch.float64)


def test_what_nothing_shows_is_found_by_the_loss(tmp_path, device):
    model, batch = make("mlp", device=device)
    path = tmp_path / "factor"
    path.write_text("1.0")

    def read(model, batch):
        return float(path.read_text()) * loss(model, batch)

    H = fm.Hessian(model, read, batch)
    old = dense(H)
    path.write_text("3.0")
    pairs = fm.top_eigenpairs(H, rtol=1e-6)  # a solver begins with a look
    torch.testing.assert_close(
        pairs.values[0], 3 * torch.linalg.eigvalsh(old)[-1].cpu(), rtol=1e-6, atol=0
    )
    path.write_text("5.0")
    v = torch.ones(38, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="what the closure reads has changed"):
        for _ in range(40):
            H @ v
    torch.testing.assert_close(H @ v, 5 * old @ v)


def test_missing_values_in_the_batch_are_no_change(device):
    model, (x, y) = make("mlp", device=device)
    x[0, 0] = float("nan")
    calls = []

    def cleaned(model, batch):
        calls.append(1)
        return loss(model, (torch.nan_to_num(batch[0]), batch[1]))

    H = fm.Hessian(model, cleaned, (x, y))
    for _ in range(4):
        dense(H)
    assert len(calls) == 2


def test_counters_do_not_record_anew(device):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            self.last = super().forward(x)
            return self.last

    model = Counting(3, 3).to(device, torch.float64)
    _, batch = make("mlp", device=device)
    H = fm.Hessian(model, loss, batch)
    for _ in range(3):
        H @ torch.ones(12, dtype=torch.float64, device=device)
    assert model.calls == 0  # attributes are as they were, too
    assert not hasattr(model, "last")


def test_large_things_that_closures_hold_cost_little(monkeypatch, device):
    """Only so much is copied or walked; the rest is known by identity and length."""
    model, batch = make("mlp", device=device)
    monkeypatch.setattr("fastminima.curvature._state._COPIED_BYTES", 100)
    table = torch.ones(3, dtype=torch.float64, device=device)
    history, corpus = list(range(30_000)), np.ones(1000)

    def held(model, batch):
        scale = len(history) / 30_000 * corpus[0]
        return scale * F.cross_entropy(model(batch[0]) * table, batch[1])

    H = fm.Hessian(model, held, batch)
    dense(H)
    snapshot = H._kept.snapshot
    assert len(snapshot._reads.marks) < 2000
    assert snapshot._arrays == [None]
    assert snapshot._copies[-1] is not None  # the table
    check(model, held, batch, lambda: table.data.mul_(2))
    check(model, held, batch, lambda: history.extend(range(10)))
