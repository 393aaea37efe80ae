"""Every case against the float64 loop over single samples."""

import copy
import warnings

import pytest
import torch
from cases import CASES
from oracles import flat, single_sample_gradients

import fastminima as fm

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(params=sorted(BY_NAME))
def case(request):
    return BY_NAME[request.param]


def probed(model, losses, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fm.GradientProbe(model, **options).backward(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_statistics(case, dtype):
    model, batch = case.make()
    want = single_sample_gradients(model, case.losses, batch)
    model = model.to(dtype)
    batch = [t.to(dtype) if t.is_floating_point() else t for t in batch]
    plain = copy.deepcopy(model)
    direction = torch.randn(flat(want).shape[1], dtype=torch.float64)
    stats = probed(
        model,
        case.losses(model, batch),
        measure=("norms", "second_moments", "gram"),
        directions={"v": direction.to(dtype)},
        per_parameter=True,
        keep_mean=True,
    )
    # ReLU and softmax in float32 leave 1e-6 a layer; the worst case here is five deep.
    close = {"rtol": 2e-4 if dtype == torch.float32 else 1e-9, "atol": 0.0}

    def check(got, wanted, what):
        scale = wanted.abs().max().clamp_min(1e-30)
        torch.testing.assert_close(
            got.double() / scale,
            wanted / scale,
            rtol=close["rtol"],
            atol=close["rtol"] / 10,
            msg=lambda m: f"{case.name}, {what}: {m}",
        )

    gradients = flat(want)
    n = len(gradients)
    total_scale = gradients.square().sum(1).max()
    for name, g in want.items():
        got = stats.sq_norms_by_parameter[name].double()
        exact = g.reshape(n, -1).square().sum(1)
        floor = max(exact.max().item(), 1e-8 * total_scale.item())
        torch.testing.assert_close(
            got / floor, exact / floor, rtol=close["rtol"], atol=close["rtol"] / 10,
            msg=lambda m, name=name: f"{case.name}, {name}: {m}",
        )  # fmt: skip
    check(stats.sq_norms, gradients.square().sum(1), "norms")
    check(stats.gram, gradients @ gradients.t(), "gram")
    check(stats.dots["v"], gradients @ direction, "dots")
    check(flat_of(stats.second_moments, want), gradients.square().mean(0), "moments")
    check(flat_of(stats.mean_grad, want), gradients.mean(0), "mean")
    # A difference of second moments: rounding is relative to those, not to itself.
    scale = gradients.square().mean(0).max()
    check(
        flat_of(stats.variance, want) / scale + 1,
        gradients.var(0) / scale + 1,
        "variance",
    )
    check(stats.mean_grad_sq_norm, gradients.mean(0).square().sum(), "mean norm")
    check(stats.covariance_trace, gradients.var(0).sum(), "covariance trace")
    squares = stats.mean_grad_sq_norms_by_parameter
    check(
        torch.stack([squares[name] for name in want if name in squares]),
        torch.stack([want[n].mean(0).square().sum() for n in want if n in squares]),
        "mean norms",
    )
    assert squares.keys() == stats.mean_grad.keys()
    assert stats.count == n
    assert stats.parameter_count == gradients.shape[1]
    assert stats.is_finite
    # And the model's own gradients are bitwise what they are without the probe.
    case.losses(plain, batch).mean().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        else:
            assert torch.equal(p.grad, q.grad), f"{case.name}: {name}"


def flat_of(parts, like):
    zeros = {name: torch.zeros_like(g[0]) for name, g in like.items()}
    return torch.cat([parts.get(name, zero).flatten() for name, zero in zeros.items()])


def test_scalar_loss_and_sum(case):
    model, batch = case.make()
    want = probed(model, case.losses(model, batch)).sq_norms
    for reduction in ("mean", "sum"):
        loss = getattr(case.losses(model, batch), reduction)()
        stats = probed_scalar(model, loss, len(want), reduction)
        torch.testing.assert_close(stats.sq_norms, want, rtol=1e-4, atol=1e-6)


def probed_scalar(model, loss, batch_size, reduction):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fm.GradientProbe(model).backward(loss, batch_size, reduction)


def test_audit_agrees(case, device):
    model, batch = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = case.losses(model, batch)
        audit = fm.GradientProbe(model).audit(losses, samples=3)
    assert audit.ok, f"{case.name}\n{audit}"
    assert all(p.grad is None for p in model.parameters())
    uses_universal = any("universal" in row.rules for row in audit.rows)
    # GPUs have recurrent layers of one kernel, which have no rule.
    assert uses_universal == case.universal or device.type != "cpu", str(audit)
    losses.sum().backward()  # the graph is still usable


def test_second_step_uses_what_was_learned(case, monkeypatch):
    model, batch = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(model)
        for seed in (0, 1, 2):
            _, batch = case.make(seed)
            want = flat(single_sample_gradients(model, case.losses, batch))
            stats = probe.backward(case.losses(model, batch))
            torch.testing.assert_close(
                stats.sq_norms.double(), want.square().sum(1), rtol=1e-4, atol=1e-6
            )
