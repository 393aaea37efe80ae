"""`watch` beside optimizers that step by signs."""

import copy
import json
import math

import pytest
import torch
from oracles import flat, single_sample_gradients
from torch import nn
from torch.nn import functional as F

import fastminima as fm
from fastminima.monitor.signs import _root_bias
from fastminima.quantities import takes_signs


class Lion(torch.optim.Optimizer):
    """Chen et al. (2023), algorithm 2, with the state that packages have."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (first * m + (1 - first) * p.grad).sign())
                m.mul_(second).add_(p.grad, alpha=1 - second)


class SignSGD(torch.optim.SGD):
    """Bernstein et al. (2018), algorithm 2: options and state are those of SGD."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                p.sub_(group["lr"] * m.sign())


OPTIMIZERS = {
    "lion": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
    "signsgd": lambda p: SignSGD(p, lr=0.01, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def setup(kind, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return model, OPTIMIZERS[kind](model.parameters())


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches(count, size=8):
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(size, 6, generator=random, dtype=torch.float64)
        yield x, (x[:, 0] > 0).long()


def train(model, optimizer, watch, data):
    for batch in data:
        optimizer.zero_grad()
        watch.backward(losses(model, batch))
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("lion", True), ("signsgd", True), ("sgd", "sign"), ("adam", "sign")],
)
def test_moments_are_those_of_single_gradients(kind, asked):
    model, optimizer = setup(kind)
    w = fm.monitor.watch(model, optimizer, precondition=asked)
    data = list(batches(3))
    train(model, optimizer, w, data[:2])
    states = [optimizer.state[p] for p in model.parameters()]
    names = ("exp_avg", "momentum_buffer")
    held = [next(s[n] for n in names if n in s) for s in states]
    signs = torch.cat([m.flatten() for m in held]).sign()
    g = flat(single_sample_gradients(copy.deepcopy(model), losses, data[2]))
    row = w.backward(losses(model, data[2]))
    total = g.std(0).sum().item() / _root_bias(7)
    gain = (g.mean(0) @ signs).item()
    assert row["gradient/sign_deviation"] == pytest.approx(total)
    assert row["gradient/sign_signal"] == pytest.approx(gain)
    scale = math.copysign((total / gain) ** 2, gain)
    assert row["gradient/sign_noise_scale"] == pytest.approx(scale)
    assert "gradient/preconditioned_noise_scale" not in row
    assert ("factors/ratio" in row) == (kind == "sgd")


def test_there_is_none_before_the_first_step_and_averages_go_on():
    model, optimizer = setup("lion")
    w = fm.monitor.watch(model, optimizer, precondition=True)
    first = w.backward(losses(model, next(batches(1))))
    assert "gradient/sign_noise_scale" not in first
    train(model, optimizer, w, batches(8))
    other = fm.monitor.watch(model, optimizer, precondition=True)
    other.load_state_dict(json.loads(json.dumps(w.state_dict())))
    batch = next(batches(1))
    rows = [one.backward(losses(model, batch)) for one in (w, other)]
    assert rows[0] == rows[1]
    assert math.isfinite(rows[0]["gradient/sign_noise_scale_high"])


def test_what_cannot_be_had_says_why():
    model, _ = setup("sgd")
    plain = torch.optim.RMSprop(model.parameters(), lr=0.1)
    w = fm.monitor.watch(model, plain, precondition="sign")
    train(model, plain, w, batches(1))
    with pytest.raises(ValueError, match=r"RMSprop keeps no momentum .* precondition="):
        w.backward(losses(model, next(batches(1))))
    with pytest.raises(ValueError, match="Unknown steps 'signs'"):
        fm.monitor.watch(model, plain, precondition="signs")


def test_an_optimizer_that_keeps_nothing_is_named_once():
    model, _ = setup("sgd")
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    w = fm.monitor.watch(model, plain, precondition="sign")
    with pytest.warns(UserWarning, match="SGD keeps no state after 10 rows") as told:
        train(model, plain, w, batches(24))
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["lion", "signsgd"])
def test_without_it_rows_say_what_to_do(kind):
    """Options that look like those of SGD are not taken for it."""
    model, optimizer = setup(kind)
    w = fm.monitor.watch(model, optimizer)
    with pytest.warns(UserWarning, match=r"by the signs .*precondition=True\) gives"):
        row = w.backward(losses(model, next(batches(1))))
    assert "factors/ratio" not in row
    assert "sharpness/two_over_lr" not in row


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *[(n, True) for n in ("Lion", "FusedLion", "Lion8bit", "Signum", "signSGD")],
        *[(n, False) for n in ("SGD", "Stallion", "Signature", "AdamW", "Redesign")],
    ],
)
def test_names(name, wanted):
    kind = type(name, (torch.optim.SGD,), {})
    assert takes_signs(kind([torch.zeros(1)], lr=0.1)) is wanted
