"""The comparison under batch normalisation, on networks where the truth is known."""

import dataclasses
import random

import pytest
import torch
from torch import nn

import fastminima as fm
from examples.engine.outcome import HELD
from examples.three_factors import batchnorm
from examples.three_factors.batchnorm import EXPERIMENT, compare_batchnorm


def drawn(batches, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, 5, 5, generator=generator)
    y = torch.arange(200) % 3
    return x, y, torch.randint(200, (batches, size), generator=generator)


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), *layers, nn.Flatten(), nn.Linear(36, 3))


def test_without_mixing_all_agree():
    x, y, index = drawn(200, 6)
    found = compare_batchnorm(network(nn.Tanh()), x, y, index)
    for form in ("rows", "frozen", "evaluated", "left_out", "evaluated_observed"):
        # 200 gradients in some 10 directions: an error of 4 % expected.
        assert found[form] == pytest.approx(found["observed"], rel=0.15), form


def test_leaving_out_is_the_variance_where_samples_do_not_mix():
    x, y, _ = drawn(1, 2)
    model = network(nn.Tanh())
    losses = nn.functional.cross_entropy(model(x[:9]), y[:9], reduction="none")
    want = float(fm.GradientProbe(model).backward(losses).covariance_trace)
    model.zero_grad()
    got = batchnorm._jackknife(model, x[:9], y[:9])
    assert got == pytest.approx(want, rel=1e-3)


def test_changes_nothing():
    x, y, index = drawn(4, 6)
    model = network(nn.BatchNorm2d(4), nn.ReLU())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compare_batchnorm(model, x, y, index)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


class Silent:
    def progress(self, fraction):
        assert 0 <= fraction <= 1.01

    def load(self):
        return None

    def save(self, state):
        pass


def test_a_task_gives_a_row_a_size():
    s = dataclasses.replace(
        EXPERIMENT.settings("quick", "digits"), train_size=200, sizes=(4, 8), batches=6
    )
    task = EXPERIMENT.tasks(s)[0]
    rows = EXPERIMENT.run(s, task, Silent())
    assert len(rows) == EXPERIMENT.rows(s, task) == 2
    assert [r["batch_size"] for r in rows] == [4, 8]
    verdict = EXPERIMENT.judge(s, rows, EXPERIMENT.expected(s))
    assert "vgg5" in verdict.table
    EXPERIMENT.draw(s, rows)


def test_the_verdict_follows_the_rows():
    rng = random.Random(0)
    s = EXPERIMENT.settings("laptop", "digits")
    rows = [
        {
            "network": task["network"],
            "seed": seed,
            "batch_size": size,
            "status": "finished",
            "train_loss": 1.0,
            "noise_scale": 1.0,
            "observed": 10 * rng.gauss(1, 0.03),
            "evaluated_observed": 15 * rng.gauss(1, 0.03),
            "evaluated": 15.0,
            "left_out": 11.0,
            "rows": 14.0,
            "frozen": 18.0,
        }
        for task in EXPERIMENT.tasks(s)
        for seed in task["seeds"]
        for size in s.sizes
    ]
    assert EXPERIMENT.judge(s, rows, len(rows)).outcome == HELD
    nulls = EXPERIMENT.nulls(rows, 0)
    assert len(nulls) == 3
    for name, changed in nulls.items():
        assert EXPERIMENT.judge(s, changed, len(rows)).outcome != HELD, name
    for r in rows[: len(rows) // 2]:
        r["status"] = "diverged"
    assert EXPERIMENT.judge(s, rows, len(rows)).outcome != HELD
