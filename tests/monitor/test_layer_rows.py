"""Columns of layers, against gradients of single samples."""

import json
import math

import pytest
import torch
from oracles import single_sample_gradients
from torch import nn

import fastminima as fm
from fastminima.monitor.layers import Grouping, layer_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x + self.scale * self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.head(self.blocks(x)) + self.shift


def losses(model, batch):
    return model(batch[0]).square().sum(1)


LAYERS = {
    "layer": [
        *("(own)", "blocks.0", "blocks.0.up", "blocks.0.down"),
        *("blocks.1", "blocks.1.up", "blocks.1.down", "head"),
    ],
    "block": ["(own)", "blocks.0", "blocks.1", "head"],
    1: ["(own)", "blocks", "head"],
    2: ["(own)", "blocks.0", "blocks.1", "head"],
}


def logged(**options):
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(6, 4, dtype=torch.float64)
    stats = fm.GradientProbe(model, per_parameter=True).backward(losses(model, (x,)))
    return model, x, fm.monitor.Monitor(**options).log(0, stats)


@pytest.mark.parametrize("by", [*LAYERS, "parameter"])
def test_against_single_samples(by):
    model, x, row = logged(by=by)
    grads = single_sample_gradients(model, losses, (x,))
    names = list(grads) if by == "parameter" else LAYERS[by]
    found = dict.fromkeys(c.split("/")[1] for c in row if c.startswith("layers/"))
    assert sorted(found) == sorted(names)
    whole = sum(g.var(0).sum() for g in grads.values()).item()
    for layer in names:
        mine = [g.flatten(1) for n, g in grads.items() if layer_of(n, by) == layer]
        g = torch.cat(mine, 1)
        trace, power = g.var(0).sum().item(), g.mean(0).square().sum().item()
        want = {
            "sq_norm": g.square().sum(1).mean().item(),
            "mean_grad_sq_norm": power,
            "covariance_trace": trace,
            "signal": power - trace / 6,
            "noise_scale": trace / (power - trace / 6),
            "share": trace / whole,
        }
        got = {name: row[f"layers/{layer}/{name}"] for name in want}
        assert got == pytest.approx(want, rel=1e-9), layer


def test_layers_add_up_to_the_whole():
    _, _, row = logged(by="block")
    for name in ("mean_grad_sq_norm", "covariance_trace", "signal"):
        parts = [
            x
            for c, x in row.items()
            if c.startswith("layers/") and c.endswith(f"/{name}")
        ]
        assert sum(parts) == pytest.approx(row[f"gradient/{name}"])


def test_pattern_and_none():
    _, _, row = logged(layers=r"\.up$|head")
    found = {c.split("/")[1] for c in row if c.startswith("layers/")}
    assert found == {"blocks.0.up", "blocks.1.up", "head"}
    share = sum(x for c, x in row.items() if c.endswith("/share"))
    assert 0 < share < 1  # of the whole, not of what is shown
    _, _, row = logged(by=None)
    assert not [c for c in row if c.startswith("layers/")]


def test_intervals_where_they_are_asked_for():
    torch.manual_seed(0)
    model = Model()
    probe = fm.GradientProbe(model, per_parameter=True)
    monitor = fm.monitor.Monitor(by="block", layer_intervals=True)
    for step in range(25):
        x = torch.randn(32, 4) + 1
        row = monitor.log(step, probe.backward(losses(model, (x,))))
    low, ratio, high = (
        row[f"layers/head/noise_scale_{end}"] for end in ("low", "smoothed", "high")
    )
    assert 0 < low < ratio < high < math.inf


@pytest.mark.parametrize("bad", ["module", 0, True, -1])
def test_unknown_grouping(bad):
    with pytest.raises(ValueError, match="by must be one of"):
        Grouping(bad)


def test_pattern_that_is_none():
    with pytest.raises(ValueError, match="is no pattern"):
        fm.monitor.Monitor(layers="(")


def test_one_sample_has_norms_alone():
    model = Model()
    probe = fm.GradientProbe(model, per_parameter=True)
    row = fm.monitor.Monitor(by=1).log(
        0, probe.backward(losses(model, (torch.ones(1, 4),)))
    )
    assert {c for c in row if c.startswith("layers/head")} == {
        "layers/head/sq_norm",
        "layers/head/mean_grad_sq_norm",
    }


def test_a_layer_without_gradient_leaves_the_row_finite():
    model = Model()
    nn.init.zeros_(model.head.weight)
    probe = fm.GradientProbe(model, per_parameter=True)
    row = fm.monitor.Monitor().log(
        0, probe.backward(losses(model, (torch.randn(5, 4),)))
    )
    assert math.isnan(row["layers/blocks.0.up/noise_scale"])
    assert row["is_finite"]


def test_a_model_in_wrappers_has_its_own_layers(tmp_path):
    """As in torch.compile, whose names begin otherwise; the regular expression too."""
    rows = []
    for wrapped in (Model(), fm.compile(Model(), backend="eager")):
        options = {"layers": "^blocks", "to": tmp_path / str(len(rows))}
        with fm.monitor.watch(wrapped, **options) as w:
            rows.append(w.backward(losses(wrapped, [torch.randn(3, 4)])))
    assert rows[0].keys() == rows[1].keys()
    runs = [json.loads((tmp_path / n / "run.json").read_text()) for n in "01"]
    names = [[layer["name"] for layer in run["layers"]] for run in runs]
    assert names[0] == names[1]
    assert "blocks.0.up" in names[0]
