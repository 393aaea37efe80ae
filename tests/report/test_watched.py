"""What `fm.monitor.watch` writes is what the page reads."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import fastminima as fm
from fastminima.report import open_run
from fastminima.report.page import payload, summary


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """40 steps of Adam; at step 30 sample 7 is scaled up by 1000."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "a"
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    rows = []
    with fm.monitor.watch(
        model,
        optimizer,
        to=folder,
        sharpness=10,
        eigenvalues=2,
        precondition=True,
        dataset_size=64,
    ) as watch:
        for step in range(40):
            order = torch.randperm(64)[:16]
            order[3] = 7
            losses = cross_entropy(model(x[order]), y[order], reduction="none")
            if step == 30:
                losses = losses * torch.where(order == 7, 1000.0, 1.0)
            optimizer.zero_grad()
            rows.append(watch.backward(losses, ids=[f"s{i}" for i in order.tolist()]))
            optimizer.step()
    return folder, rows


def test_every_row_arrives(watched):
    folder, rows = watched
    columns = open_run(folder).columns
    for name in set().union(*rows) - {"step"}:
        held = [row for row in rows if name in row]
        values = columns[name].values.tolist()
        assert len(values) == len(held), name
        for value, row in zip(values, held, strict=True):
            wanted = float(row[name])
            is_same = value == wanted if math.isfinite(wanted) else math.isnan(value)
            assert is_same, name


def test_every_figure_and_the_spike(watched):
    run = open_run(watched[0])
    found = payload(run)
    assert set(found["figures"]) >= {
        *("loss", "gradient-norms", "covariance-trace", "noise-scale"),
        *("preconditioned-noise-scale", "sharpness", "eigenvalues", "factors"),
        *("layers-share", "layers-sq_norm", "sample-norms"),
    }
    (layers,) = found["figures"]["layers-share"]["data"]
    assert [row[0] for row in layers["customdata"]] == ["0", "2"]
    assert "own-0" not in found["figures"]
    assert {spike["step"] for spike in run.spikes} == {30}
    assert all(spike["samples"][0]["id"] == "s7" for spike in run.spikes)
    pages = {section["id"]: section["html"] for section in found["sections"]}
    assert "<code>s7</code>" in pages["spikes"]
    assert "Adam" in pages["machine"]


def test_quantities_have_intervals(watched):
    folder, rows = watched
    found = {q["name"]: q for q in summary(open_run(folder))["quantities"]}
    scale = found["noise scale"]
    assert scale["interval"] == "95 % interval"
    assert scale["low"] == rows[-1]["gradient/noise_scale_low"]
    assert found["sharpness λ₁"]["step"] == 30
