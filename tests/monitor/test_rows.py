"""What is in a row, and the running average of the noise scale."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.monitor.rows import sharpness_row
from fastminima.monitor.smoothing import SmoothedNoiseScale


def statistics(sq_norms=(1.0, 4.0, 16.0, 25.0), mean=2.5):
    return fm.GradientStatistics(
        count=len(sq_norms),
        parameter_count=10,
        sq_norms=torch.tensor(sq_norms),
        mean_grad_sq_norm=torch.tensor(mean),
    )


def sgd(lr=0.1, **options):
    return torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=lr, **options)


def test_every_number_by_hand():
    stats = statistics()
    pairs = fm.Eigenpairs(
        torch.tensor([3.0, 2.0]), torch.eye(2), torch.tensor([0.1, 0.2]), 7, True
    )
    loss = torch.tensor(1.5, requires_grad=True)
    row = fm.monitor.Monitor(dataset_size=100).log(
        5,
        stats,
        loss=loss,
        optimizer=sgd(momentum=0.5),
        batch_size=8,
        sharpness=pairs,
        extra={"epoch": 2},
    )
    trace = (46 - 4 * 2.5) / 3
    signal = 2.5 - trace / 4
    ratio = 0.1 / (1 - 0.5) * (1 / 8 - 1 / 100)
    want = {
        "step": 5,
        "loss": 1.5,
        "gradient/count": 4,
        "gradient/mean_grad_sq_norm": 2.5,
        "gradient/norm_max": 5.0,
        "gradient/norm_median": 3.0,
        "gradient/covariance_trace": trace,
        "gradient/signal": signal,
        "gradient/noise_scale": trace / signal,
        "gradient/noise_scale_smoothed": trace / signal,
        "gradient/noise_scale_low": 0.0,
        "gradient/noise_scale_high": math.inf,
        "factors/learning_rate": 0.1,
        "factors/momentum": 0.5,
        "factors/weight_decay": 0.0,
        "factors/batch_size": 8,
        "factors/ratio": ratio,
        "factors/temperature": ratio * trace / 10 / 2,
        "sharpness/eigenvalue_1": 3.0,
        "sharpness/residual_1": 0.1,
        "sharpness/eigenvalue_2": 2.0,
        "sharpness/residual_2": 0.2,
        "sharpness/products": 7,
        "sharpness/converged": True,
        "sharpness/two_over_lr": 2 * 1.5 / 0.1,
        "epoch": 2,
        "is_finite": True,
    }
    assert list(row) == list(want)
    assert row == pytest.approx(want, rel=1e-6)


def test_one_sample_has_no_covariance():
    row = fm.monitor.Monitor().log(0, statistics((4.0,)), optimizer=sgd())
    assert set(row) == {
        "step",
        "gradient/count",
        "gradient/mean_grad_sq_norm",
        "gradient/norm_max",
        "gradient/norm_median",
        "factors/learning_rate",
        "factors/momentum",
        "factors/weight_decay",
        "factors/batch_size",
        "is_finite",
    }


def test_nothing_measured_is_no_row(tmp_path):
    path = tmp_path / "x.jsonl"
    assert fm.monitor.Monitor(path).log(3, None, loss=1.0) is None
    assert not path.exists()


def test_groups_with_different_learning_rates_are_announced_once():
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": lr} for lr in (0.1, 1)]
    monitor = fm.monitor.Monitor()
    with pytest.warns(UserWarning, match="no temperature: .*different learning") as w:
        for step in range(3):
            row = monitor.log(step, statistics(), optimizer=torch.optim.SGD(groups))
    assert len(w) == 1
    assert row["factors/learning_rate_0"] == 0.1
    assert row["factors/learning_rate_1"] == 1
    assert "factors/ratio" not in row


def test_dataset_smaller_than_the_batch():
    with pytest.raises(ValueError, match="dataset_size 3 is smaller than batch_size 4"):
        fm.monitor.Monitor(dataset_size=3).log(0, statistics(), optimizer=sgd())


def test_not_finite_is_valid_json_and_does_not_stay_in_the_average(tmp_path):
    path = tmp_path / "x.jsonl"
    monitor = fm.monitor.Monitor(path)
    bad = statistics((1.0, math.nan, 2.0, math.inf), math.inf)
    rows = [monitor.log(i, s) for i, s in enumerate([statistics(), bad, statistics()])]

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = path.read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["is_finite"] for row in found] == [True, False, True]
    assert found[1]["gradient/norm_max"] is None
    assert found[1]["gradient/count"] == 4
    smoothed = [row["gradient/noise_scale_smoothed"] for row in rows]
    assert smoothed == pytest.approx([smoothed[0]] * 3)
    assert math.isnan(fm.monitor.read(path)[1]["gradient/norm_max"])
    assert fm.monitor.read(path)[2] == pytest.approx(
        {name: math.nan if x is None else x for name, x in found[2].items()},
        nan_ok=True,
    )


def test_smoothing_averages_before_it_divides():
    """Two samples a step: single ratios are far off, the ratio of averages is not."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.0, 0.5], dtype=torch.float64)  # |mean|^2 = 1.25
    truth = 2 * 3.0**2 / 1.25  # of Gaussian gradients, sigma = 3 in two dimensions
    smoothed, single = SmoothedNoiseScale(0.9995), []
    for _ in range(20000):
        noise = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        g = mean + 3 * noise
        trace = g.var(0).sum().item()
        signal = g.mean(0).square().sum().item() - trace / 2
        found = smoothed.update(trace, signal)
        single.append(trace / signal)
    # The window is 4000 steps: standard error of tr 18 sqrt(1/4000) = 0.28, of the
    # signal about 10 / sqrt(4000) = 0.16 of 1.25, so 13 % of the ratio, twice that
    # at most in what follows.
    assert abs(found / truth - 1) < 0.26
    assert abs(sum(single) / len(single) / truth - 1) > 0.5


def test_smoothing_follows_the_newest():
    smoothed = SmoothedNoiseScale(0.5)
    for noise, signal in ((8.0, 1.0), (4.0, 2.0), (math.nan, 1.0)):
        found = smoothed.update(noise, signal)
    assert found == (8 / 4 + 4 / 2) / (1 / 4 + 2 / 2)
    assert math.isnan(SmoothedNoiseScale(0.9).update(1.0, 0.0))


@pytest.mark.parametrize("smoothing", [1.0, -0.1])
def test_smoothing_outside_its_range(smoothing):
    with pytest.raises(ValueError, match="smoothing must be at least 0 and below 1"):
        fm.monitor.Monitor(smoothing=smoothing)


def test_norms_not_measured():
    row = fm.monitor.Monitor().log(0, replace(statistics(), sq_norms=None))
    assert set(row) == {
        *("step", "is_finite", "gradient/count", "gradient/mean_grad_sq_norm")
    }


def test_sharpness_alone():
    pairs = fm.Eigenpairs(torch.ones(1), torch.ones(1, 1), torch.zeros(1), 3, False)
    row = fm.monitor.Monitor().log(0, None, sharpness=pairs)
    assert row["sharpness/eigenvalue_1"] == 1.0
    assert row["sharpness/converged"] is False


def test_what_bounds_eigenvalues_where_that_is_known():
    values, vectors = torch.tensor([3.0]), torch.ones(1, 2)
    row = sharpness_row(fm.Eigenpairs(values, vectors, values / 30, 7, True))
    assert not {"sharpness/upper", "sharpness/noise"} & row.keys()
    known = fm.Eigenpairs(values, vectors, values / 30, 7, True, 3.2, 1e-7)
    row = sharpness_row(known)
    assert (row["sharpness/upper"], row["sharpness/noise"]) == (3.2, 1e-7)
