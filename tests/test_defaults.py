"""Defaults of PyTorch that are not the usual ones change nothing.

Models and batches are on the CPU in float32; what the package makes without saying
where, or of what dtype, would be on `meta` or in float64, and is found. More of it:
`pytest tests/capture --default-device meta`, or `--default-dtype float64`.
"""

import math
import warnings

import placing
import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn.functional import mse_loss

import fastminima as fm
from fastminima.capture.session import fused

BY_NAME = {case.name: case for case in CASES}
DEFAULTS = {"device": {"device": "meta"}, "dtype": {"dtype": torch.float64}}
MEASURES = ("norms", "second_moments", "gram")


@pytest.fixture(params=DEFAULTS)
def defaults(request):
    """A context in which the package meets other defaults."""
    return lambda: placing.defaults(**DEFAULTS[request.param])


def numbers(stats):
    """Everything that a step's statistics hold, by name."""
    found = dict(stats.to_dict())
    for name in ("sq_norms", "gram"):
        if getattr(stats, name) is not None:
            found[name] = getattr(stats, name)
    for name, values in (stats.second_moments or {}).items():
        found[f"second_moments.{name}"] = values
    return found


def same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype, name
            assert got[name].device == value.device, name
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")


def probed(case, way, **options):
    model, batch = case.make()
    probe = fm.GradientProbe(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):  # measured, then known
            losses = case.losses(model, batch)
            if way == "attach":
                probe.attach(losses)
                losses.mean().backward()
                stats = probe.collect()
            else:
                stats = probe.backward(losses)
        if way == "audit":
            assert probe.audit(case.losses(model, batch), samples=2).ok
    return numbers(stats)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_all_measures(name, defaults):
    options = {"measure": MEASURES, "per_parameter": True, "keep_mean": True}
    want = probed(BY_NAME[name], "backward", **options)
    with defaults():
        got = probed(BY_NAME[name], "backward", **options)
    same(got, want)


@pytest.mark.parametrize("way", ["attach", "audit", "fused", "sample", "directions"])
@pytest.mark.parametrize(
    "name", ["mixed", "tied head", "mha batch first", "experts", "group norm", "gru"]
)
def test_other_ways(name, way, defaults):
    options = {
        "fused": {"mode": "fused"},
        "sample": {"sample": 2},
        "directions": {"measure": ("norms", "second_moments")},
    }.get(way, {})
    if way == "directions":
        count = sum(p.numel() for p in BY_NAME[name].make()[0].parameters())
        options["directions"] = {"v": torch.linspace(-1, 1, count)}
    want = probed(BY_NAME[name], way, **options)
    with defaults():
        got = probed(BY_NAME[name], way, **options)
    same(got, want)


def regression():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return model, (torch.randn(8, 4), torch.randn(8, 2))


def loss(model, batch):
    return mse_loss(model(batch[0]), batch[1])


def curvature():
    model, batch = regression()
    each = lambda m, b: (m(b[0]) - b[1]).square().mean(1)  # noqa: E731
    hessian = fm.Hessian(model, loss, batch)
    covariance = fm.GradientCovariance(model, each, batch)
    pairs = fm.top_eigenpairs(hessian, k=2)
    return {
        "eigenvalues": torch.as_tensor(pairs.values),
        "covariance": torch.as_tensor(fm.top_eigenpairs(covariance, k=1).values),
        "trace": float(fm.trace(hessian, seed=0).value),
        "norm": float(fm.frobenius_norm(hessian, seed=0).value),
        "xtrace": fm.trace(hessian, 24, method="xtrace").value,
        "log": fm.log_determinant(hessian, damping=9.0, products=24).value,
        "stability": fm.stability_ratio(hessian, 0.1, 2, products=24).value,
        "noise": fm.hessian_noise_scale(hessian, covariance, products=24).value,
        "along": fm.noise_along(covariance, pairs).variances,
        "product": hessian @ torch.linspace(-1, 1, hessian.shape[0]),
    }


def langevin():
    model, batch = regression()
    torch.manual_seed(1)
    optimizer = fm.optim.Langevin(model.parameters(), 0.1, 0.01, 0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def monitored():
    model, (x, y) = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = fm.GradientProbe(model, measure=MEASURES)
    variance = fm.MinibatchVariance(model)
    found = {}
    for step in range(3):
        optimizer.zero_grad()
        stats = probe.backward((model(x) - y).square().mean(1))
        variance.update(len(x))
        optimizer.step()
        found |= {f"{step}.{name}": v for name, v in stats.to_dict().items()}
    found["noise"] = fm.noise_scale([stats, stats])
    factors = fm.three_factors(optimizer, stats)
    found |= {"temperature": factors.temperature, "trace": variance.covariance_trace}
    return found


@pytest.mark.parametrize("run", [curvature, langevin, monitored])
def test_what_is_made_of_them(run, defaults):
    want = run()
    with defaults():
        got = run()
    same(got, want)


@pytest.mark.parametrize(
    ("kind", "call"),
    [("device", "torch.arange(3)"), ("dtype", "torch.zeros(3)")],
)
def test_a_planted_default_is_found(kind, call, monkeypatch):
    """A tensor that a rule makes without saying where, or of what dtype."""
    scope = {"torch": torch, "honest": fused.find_fusion}
    source = (
        f"def planted(*args, **options):\n    assert {call}.sum() >= 0\n"
        "    return honest(*args, **options)"
    )
    exec(compile(source, fused.__file__, "exec"), scope)
    monkeypatch.setattr(
        "fastminima.capture.session.attach.find_fusion", scope["planted"]
    )
    probed(BY_NAME["mixed"], "backward", mode="fused")
    error = NotImplementedError if kind == "device" else AssertionError
    with placing.defaults(**DEFAULTS[kind]), pytest.raises((error, RuntimeError)):
        probed(BY_NAME["mixed"], "backward", mode="fused")


def test_the_defaults_are_those_of_before():
    with placing.defaults("meta", torch.float64):
        assert torch.zeros(3).dtype == torch.float32
        assert torch.zeros(3).device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32
    assert math.isfinite(torch.zeros(()).item())
