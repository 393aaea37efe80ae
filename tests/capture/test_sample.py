"""`sample=m`: exact statistics of some samples, and the mean gradient of all."""

import warnings

import pytest
import torch
from cases import CASES
from oracles import flat, single_sample_gradients
from torch import nn

import fastminima as fm

BY_NAME = {case.name: case for case in CASES}


def probed(model, losses, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fm.GradientProbe(model, **options).backward(losses)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_statistics_are_those_of_the_samples_drawn(name):
    case = BY_NAME[name]
    model, batch = case.make()
    options = {"measure": ("norms", "second_moments", "gram"), "keep_mean": True}
    direction = torch.randn(sum(p.numel() for p in model.parameters()))
    options |= {"per_parameter": True, "directions": {"v": direction}}
    whole = probed(model, case.losses(model, batch), **options)
    want = flat(single_sample_gradients(model, case.losses, batch))
    model.zero_grad()
    part = probed(model, case.losses(model, batch), sample=2, **options)
    chosen = part.samples
    assert part.count == len(chosen) == min(2, whole.count)
    assert part.mean_count == part.all_count == whole.count
    assert len(set(chosen.tolist())) == 2
    close = {"rtol": 1e-4, "atol": 1e-5 * float(whole.sq_norms.max())}
    torch.testing.assert_close(part.sq_norms, whole.sq_norms[chosen], **close)
    torch.testing.assert_close(part.gram, whole.gram[chosen][:, chosen], **close)
    torch.testing.assert_close(part.dots["v"], whole.dots["v"][chosen], **close)
    for parameter, norms in whole.sq_norms_by_parameter.items():
        got = part.sq_norms_by_parameter[parameter]
        torch.testing.assert_close(got, norms[chosen], **close)
    moments = want[chosen].square().mean(0)
    for name_, p in model.named_parameters():
        of_p, moments = moments[: p.numel()], moments[p.numel() :]
        if name_ in part.second_moments:
            torch.testing.assert_close(
                part.second_moments[name_].flatten().double(), of_p, **close
            )
    torch.testing.assert_close(part.mean_grad_sq_norm, whole.mean_grad_sq_norm)
    for parameter, mean in whole.mean_grad.items():
        torch.testing.assert_close(part.mean_grad[parameter], mean)


def network(n=64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(n, 6) * torch.rand(n, 1) * 3, torch.randint(3, (n,))

    def losses():
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    return model, losses


def test_the_trace_is_unbiased_and_its_error_right():
    """400 draws of 8 out of 64: the mean within four standard errors, the error too."""
    model, losses = network()
    want = probed(model, losses()).covariance_trace.item()
    probe = fm.GradientProbe(model, sample=8)
    drawn = [probe.backward(losses()) for _ in range(400)]
    traces = torch.stack([stats.covariance_trace for stats in drawn]).double()
    standard_error = traces.std() / len(drawn) ** 0.5
    assert abs(traces.mean() - want) < 4 * standard_error
    signals = torch.stack([stats.signal for stats in drawn]).double()
    exact = probed(model, losses()).signal
    assert abs(signals.mean() - exact) < 4 * signals.std() / len(drawn) ** 0.5
    # The variance of the estimates against the mean of their estimated variances, whose
    # own scatter over 400 draws is some 5 % (heavy tails included).
    stated = torch.stack([s.covariance_trace_error for s in drawn]).double()
    ratio = (traces.var() / stated.square().mean()).item()
    assert 0.75 < ratio < 1.3
    assert {tuple(s.samples.tolist()) for s in drawn[:5]} > {
        tuple(drawn[0].samples.tolist())
    }


def test_small_batches_and_one_sample():
    model, losses = network(4)
    whole = probed(model, losses())
    assert whole.covariance_trace_error == 0
    all_of_them = probed(model, losses(), sample=9)
    assert torch.equal(all_of_them.sq_norms, whole.sq_norms)
    assert all_of_them.samples is all_of_them.mean_count is None
    one = probed(model, losses(), sample=1)
    assert one.count == 1
    assert one.covariance_trace.isfinite()
    with pytest.raises(ValueError, match="2 samples"):
        _ = one.covariance_trace_error
    row = one.to_dict()
    assert row["mean_count"] == 4
    assert "covariance_trace" in row
    assert "covariance_trace_error" not in row
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="sample"):
            fm.GradientProbe(model, sample=bad)


def test_nothing_changes_for_training():
    model, losses = network()
    losses().mean().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    state = torch.get_rng_state()
    probed(model, losses(), sample=3)
    assert torch.equal(torch.get_rng_state(), state)
    for p, g in zip(model.parameters(), want, strict=True):
        assert torch.equal(p.grad, g)


def test_sums_of_sampled_statistics():
    """Each part weighs by the samples behind its mean, not by those looked at."""
    model, losses = network(12)
    whole = probed(model, losses(), keep_mean=True)
    model.zero_grad()
    probe = fm.GradientProbe(model, keep_mean=True, sample=3)
    a = probe.backward(losses()[:8])
    b = probe.backward(losses()[8:])
    total = a + b
    assert (total.count, total.mean_count) == (6, 12)
    for name, mean in whole.mean_grad.items():
        torch.testing.assert_close(total.mean_grad[name], mean)
    torch.testing.assert_close(total.mean_grad_sq_norm, whole.mean_grad_sq_norm)


@pytest.mark.parametrize("batchnorm", ["rows", "frozen"])
def test_with_batch_normalisation(batchnorm):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)
    )
    x = torch.randn(9, 4)
    whole = probed(model, model(x).square().sum(1), batchnorm=batchnorm)
    part = probed(model, model(x).square().sum(1), batchnorm=batchnorm, sample=4)
    torch.testing.assert_close(part.sq_norms, whole.sq_norms[part.samples])


def test_factors_are_those_of_the_whole_batch():
    """The batch size of a step is not the number of samples that were looked at."""
    model, losses = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stats = probed(model, losses(), sample=8)
    factors = fm.three_factors(optimizer, stats)
    assert factors.batch_size == 64
    torch.testing.assert_close(fm.noise_scale(stats), stats.noise_scale)
    with fm.monitor.Monitor() as monitor:
        row = monitor.log(0, stats, optimizer=optimizer)
    assert row["factors/batch_size"] == 64
    assert row["gradient/count"] == 8
    one = probed(model, losses(), sample=1)
    assert "gradient/covariance_trace" in fm.monitor.Monitor().log(1, one)
