"""Statistics in pieces: exact, and no more held at a time than is allowed."""

import copy
import warnings

import pytest
import torch
from bytes_held import held
from cases import CASES
from torch import nn

import fastminima as fm
from fastminima.ops import _pieces

OPTIONS = {
    "measure": ("norms", "second_moments", "gram"),
    "per_parameter": True,
    "keep_mean": True,
}


def probed(model, losses, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fm.GradientProbe(model, **options).backward(losses)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pieces_of_everything(monkeypatch, case):
    """A few samples, rows or features at a time, the last of them fewer."""
    model, batch = case.make()
    model = model.double()
    batch = [t.double() if t.is_floating_point() else t for t in batch]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    options = OPTIONS | {"directions": {"v": torch.randn(parameters).double()}}
    again = copy.deepcopy(model)
    want = probed(model, case.losses(model, batch), **options)
    monkeypatch.setattr(_pieces, "LIMIT", 700)
    got = probed(again, case.losses(again, batch), **options)
    for name in ("sq_norms", "gram", "dots", "second_moments", "sq_norms_by_parameter"):
        torch.testing.assert_close(
            getattr(got, name),
            getattr(want, name),
            rtol=1e-9,
            atol=1e-12,
            msg=lambda m, name=name: f"{case.name}, {name}: {m}",
        )


class Experts(nn.Module):
    """Tokens in no order, padded to the sample that has most of them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x, rows):
        out = x.new_zeros(x.shape[0] * x.shape[1], 32)
        return out.index_add(0, rows, self.linear(x.flatten(0, 1)[rows])).view_as(x)


def experts():
    # 65 rows of one sample, one of each of the others.
    rows = torch.cat([torch.arange(64), torch.arange(1, 64) * 64])
    rows = rows[torch.randperm(len(rows))]
    model, x = Experts(), torch.randn(64, 64, 32)
    return model, lambda: model(x, rows).square().sum((1, 2))


def bilinear():
    model, x, y = nn.Bilinear(48, 48, 4), torch.randn(64, 48), torch.randn(64, 48)
    return model, lambda: model(x, y).square().sum(1)


def bag():
    model, ids = nn.EmbeddingBag(50, 128), torch.randint(50, (64, 25))
    return model, lambda: model(ids).square().sum(1)


def recurrent():
    model, x = nn.LSTM(16, 32, batch_first=True), torch.randn(64, 5, 16)
    return model, lambda: model(x)[0].square().sum((1, 2))


def tied_twice():
    model, x = nn.Linear(48, 48), torch.randn(64, 3, 48)
    return model, lambda: model(model(x) * x.sin()).square().sum((1, 2))


MODELS = [experts, bilinear, bag, recurrent, tied_twice]


@pytest.mark.parametrize("measure", ["norms", "second_moments", "gram"])
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_hooks_hold_no_more_than_allowed(monkeypatch, make, measure):
    """Beside what the plain step holds: a quarter of a MiB, and the results.

    A recurrence has no rule: its node is called again, which it can be where the graph
    is retained. PyTorch copies cuDNN's reserve (204800 bytes here) for such a call, in
    a plain step as well.
    """
    model, losses = make()

    def step(probe):
        model.zero_grad()
        if probe is None:
            losses().sum().backward(retain_graph=make is recurrent)
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe.backward(losses())

    probe = fm.GradientProbe(model, measure=measure)
    step(probe)  # measures rows
    monkeypatch.setattr(_pieces, "LIMIT", 1 << 18)
    plain = held(lambda: step(None)).most
    found = held(lambda: step(probe))
    assert found.most - plain <= _pieces.LIMIT, found
