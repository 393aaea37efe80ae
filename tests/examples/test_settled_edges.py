"""Edges of stability: what is measured, and verdicts on made-up rows."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from examples.catalog import EXPERIMENTS
from examples.common import measures
from examples.edge_of_stability import following, judging
from examples.engine.outcome import HELD, NOT_HELD, UNDECIDED

NAMES = ("edge-gd", "edge-adam", "edge-sgd")
SEEDS = tuple(range(5))
SILENT = SimpleNamespace(progress=lambda fraction: None)
SMALL = {"samples": 64, "hidden": (6,), "looks": 2, "seeds": (0,)}


def small(name, **changes):
    """The quick preset on 64 digits, a network of 6 units and two looks."""
    experiment = EXPERIMENTS[name]
    made = experiment.settings("quick", "digits")
    if name == "edge-sgd":
        changes.setdefault("batches", 3)
    return experiment, replace(made, **{**SMALL, "steps": 6, **changes})


def ran(experiment, settings):
    rows = []
    for task in experiment.tasks(settings):
        rows += experiment.run(settings, task, SILENT)
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_runs_the_same_twice(name):
    first = {"first": 2} if name == "edge-adam" else {}
    experiment, settings = small(name, **first)
    rows = ran(experiment, settings)
    assert len(rows) == experiment.expected(settings)
    assert rows == ran(experiment, settings)
    verdict = experiment.judge(settings, rows, len(rows))
    assert verdict.outcome == UNDECIDED
    assert verdict.table
    experiment.draw(settings, rows).canvas.draw()


def test_a_rate_too_small_decides_nothing():
    """Whatever the number of seeds: none of the runs has come near the edge."""
    experiment, settings = small("edge-gd", rates=(1e-4,), seeds=SEEDS)
    rows = ran(experiment, settings)
    verdict = experiment.judge(settings, rows, len(rows))
    assert verdict.outcome == UNDECIDED
    assert "5 of the runs at η 0.0001 had not come to 0.8" in verdict.sentence


def dense_hessian(settings, seed):
    """Of the loss at the start, by one backward pass a row."""
    batch = following.samples(settings)
    model = following.network(settings, batch, seed).double()
    params = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in params.values()])

    def loss(vector):
        parts = vector.split([p.numel() for p in params.values()])
        shaped = {
            name: part.view_as(p)
            for (name, p), part in zip(params.items(), parts, strict=True)
        }

        def call(x):
            return torch.func.functional_call(model, shaped, (x,))

        return measures.squared_error(call, (batch[0].double(), batch[1]))

    return torch.autograd.functional.hessian(loss, flat)


def test_the_first_look_is_that_of_the_dense_hessian():
    experiment, settings = small("edge-gd", rates=(0.2,), hidden=(3,))
    (row,) = ran(experiment, settings)
    values = torch.linalg.eigvalsh(dense_hessian(settings, 0)).flip(0)
    got = [row[name][0] for name in ("sharpness", "second")]
    # Residuals of 1 % and four digits; at the start the values lie apart.
    torch.testing.assert_close(
        torch.tensor(got), 0.1 * values[:2].float(), rtol=1e-2, atol=0
    )
    assert row["edge"] == pytest.approx(10)
    other, settings = small("edge-sgd", rate=0.2, hidden=(3,), cells=((16, 0.0),))
    (row,) = ran(other, settings)
    assert row["lambda_max"][0] == pytest.approx(0.1 * float(values[0]), rel=1e-2)


def test_labels_drawn_anew():
    _, settings = small("edge-sgd", samples=1000)
    plain = following.samples(settings)[1]
    drawn = following.samples(settings, 0.5)[1]
    # Half of them, of which a tenth is as it was: .45 +- .016.
    assert 0.38 < (plain != drawn).float().mean() < 0.52
    assert torch.equal(following.samples(settings, 0.5)[1], drawn)


def test_following_counts_steps_that_raise_the_loss():
    """Beyond the edge the loss rises at every step, below at none."""
    settings = replace(small("edge-gd")[1], steps=8, looks=4, first=1)
    batch = following.samples(settings)
    for rate, rises in ((1e-3, 0.0), (10.0, 1.0)):
        model = following.network(settings, batch, 0)
        optimizer = torch.optim.SGD(model[-1:].parameters(), lr=rate)
        row = following.follow(
            settings, model, optimizer, lambda: batch, batch, dict, SILENT
        )
        assert row["step"] == [1, 2, 4, 6, 8]
        assert row["rises"][1:] == [rises] * 4


def wobble(seed, at):
    """Small numbers that differ from seed to seed and from look to look."""
    return 0.02 * ((7 * seed + 3 * at) % 5 - 2)


def path(seed, begin=0.3, end=1.0, looks=12):
    """A sharpness that rises in three looks, and stays."""
    rise = [begin + (end - begin) * min(1.0, at / 3) for at in range(looks)]
    return [v + wobble(seed, at) for at, v in enumerate(rise)]


def made_up(name, **way):
    """Rows as the claim has them; `way` is how the sharpness goes instead."""
    experiment = EXPERIMENTS[name]
    settings = experiment.settings("laptop", "digits")
    common = {"step": list(range(12)), "loss": [0.5**i for i in range(12)]}
    rows = []
    if name == "edge-sgd":
        for (size, random), seed in itertools.product(settings.cells, SEEDS):
            own = {"batch_size": size, "random": random, "seed": seed}
            own |= {"batch_sharpness": path(seed, **way), "error": [0.01] * 12}
            rows.append({**own, "lambda_max": path(seed, end=0.5), **common})
        return experiment, settings, rows
    for rate, seed in itertools.product(settings.rates, SEEDS):
        own = {"rate": rate, "seed": seed, "edge": 2 / rate, "rises": [0.3] * 12}
        own |= {name: path(seed, end=0.9) for name in ("second", "plain")}
        rows.append({**own, "sharpness": path(seed, **way), **common})
    return experiment, settings, rows


WAYS = {
    "as the claim has it": ({}, HELD),
    "hovers above": ({"end": 1.3}, NOT_HELD),
    "hovers below": ({"end": 0.83}, NOT_HELD),
    "between the bounds": ({"end": 0.9}, UNDECIDED),
    "does not get there": ({"end": 0.6}, UNDECIDED),
    "began there": ({"begin": 1.0}, UNDECIDED),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_verdicts_of_made_up_rows(name, way):
    changes, want = WAYS[way]
    experiment, settings, rows = made_up(name, **changes)
    verdict = experiment.judge(settings, rows, len(rows))
    assert verdict.outcome == want, verdict
    assert ("test nothing" in verdict.sentence) == ("there" in way)
    if want == HELD:
        nulls = experiment.nulls(rows, 0)
        assert len(nulls) >= 3
        for how, false in nulls.items():
            assert len(false) == len(rows)
            assert experiment.judge(settings, false, len(rows)).outcome != HELD, how
        assert experiment.judge(settings, rows[::2], len(rows)).outcome == UNDECIDED


def test_a_loss_that_does_not_fall_is_not_held():
    experiment, settings, rows = made_up("edge-gd")
    rows = [{**row, "loss": row["loss"][::-1]} for row in rows]
    assert experiment.judge(settings, rows, len(rows)).outcome == NOT_HELD


def test_missing_numbers_are_no_numbers():
    """An eigenvalue that did not converge leaves its run without a value."""
    row = {"sharpness": path(0)}
    assert judging.settled(row, "sharpness") == pytest.approx(1.0, abs=0.03)
    row["sharpness"][-1] = None
    assert judging.settled(row, "sharpness") != judging.settled(row, "sharpness")
    experiment, settings, rows = made_up("edge-adam")
    rows[0]["sharpness"][-1] = None
    verdict = experiment.judge(settings, rows, len(rows))
    assert verdict.outcome == UNDECIDED
    assert experiment.draw(settings, rows).axes
