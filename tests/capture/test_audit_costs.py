"""What an audit says of the time that norms take."""

import time

import torch
from torch import nn

import fastminima as fm
from fastminima.capture.session.timed import stop_watch


def test_interruptions_are_not_counted_on_a_cpu():
    now = stop_watch([torch.device("cpu")])
    started = now()
    time.sleep(0.2)  # as when another program has the core
    assert now() - started < 0.1


def test_a_small_cost_is_not_said_to_be_none():
    model = nn.Linear(3, 2)
    audit = fm.GradientProbe(model).audit(model(torch.randn(4, 3)).square().sum(1))
    assert audit.cost > 0
    rows = [type(row)(**{**vars(row), "cost": 1e-4}) for row in audit.rows]
    cheap = fm.Audit(tuple(rows), (), audit.samples)
    assert "norms cost under 1% of" in str(cheap)
