"""Batch normalisation in training mode, in its three forms."""

import copy

import pytest
import torch
from oracles import flat
from torch import nn
from torch.func import functional_call

import fastminima as fm


class FrozenNorm(nn.BatchNorm2d):
    """Batch statistics as constants, by hand."""

    def forward(self, x):
        mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
        scale = self.weight / (var + self.eps).sqrt()
        shift = self.bias - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def network(norm, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        norm(3),
        nn.Flatten(),
    ).to(dtype)


def losses_of(model, x):
    return (model(x) * torch.linspace(0.5, 1, 27, dtype=x.dtype)).sin().sum(1)


@pytest.fixture
def x():
    return torch.randn(5, 3, 7, 7, dtype=torch.float64)


def test_frozen_is_the_gradient_with_constant_statistics(x):
    model = network(nn.BatchNorm2d)
    by_hand = network(FrozenNorm)
    by_hand.load_state_dict(model.state_dict())
    plain = copy.deepcopy(model)
    losses_of(plain, x).mean().backward()

    per_sample = [
        torch.autograd.grad(losses_of(by_hand, x)[n], list(by_hand.parameters()))
        for n in range(len(x))
    ]
    want = {
        name: torch.stack([grads[i] for grads in per_sample])
        for i, name in enumerate(dict(by_hand.named_parameters()))
    }
    probe = fm.GradientProbe(
        model, batchnorm="frozen", per_parameter=True, keep_mean=True
    )
    for attach in (False, True):
        model.zero_grad()
        losses = losses_of(model, x)
        if attach:
            loss = losses.mean()
            probe.attach(loss, len(x))
            loss.backward()
            stats = probe.collect()
        else:
            stats = probe.backward(losses)
        for name, g in want.items():
            torch.testing.assert_close(
                stats.sq_norms_by_parameter[name], g.flatten(1).square().sum(1)
            )
            torch.testing.assert_close(stats.mean_grad[name], g.mean(0))
        torch.testing.assert_close(stats.covariance_trace, flat(want).var(0).sum())
        # The training gradient is the ordinary one, bitwise.
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def test_rows_sum_to_the_ordinary_gradient(x):
    model = network(nn.BatchNorm2d)
    probe = fm.GradientProbe(model, batchnorm="rows", measure=("norms", "gram"))
    audit = probe.audit(losses_of(model, x))
    assert audit.ok, str(audit)
    assert all(row.norm_error is None for row in audit.rows)
    stats = probe.backward(losses_of(model, x))
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(stats.mean_grad_sq_norm, grad.square().sum())
    # sum_nm <g_n, g_m> = |sum_n g_n|^2
    torch.testing.assert_close(stats.gram.sum() / 25, grad.square().sum())


def test_rows_are_those_of_one_sample(x):
    """Row attribution below two normalisations, against masking by hand."""
    model = network(nn.BatchNorm2d)
    seen = {}
    first = model[0]
    first.register_full_backward_hook(lambda m, gi, go: seen.update(g=go[0]))
    stats = fm.GradientProbe(model, batchnorm="rows", per_parameter=True).backward(
        losses_of(model, x)
    )
    g = seen["g"] * len(x)
    for n in range(len(x)):
        _, weight, _ = torch.ops.aten.convolution_backward(
            g[n : n + 1], x[n : n + 1], first.weight, [4], [1, 1], [0, 0], [1, 1],
            False, [0, 0], 1, [False, True, False],
        )  # fmt: skip
        torch.testing.assert_close(
            stats.sq_norms_by_parameter["0.weight"][n], weight.square().sum()
        )


def test_error_is_the_default_and_eval_mode_is_fine(x):
    model = network(nn.BatchNorm2d)
    with pytest.raises(fm.CaptureError, match="2 layers"):
        fm.GradientProbe(model).backward(losses_of(model, x))
    model.eval()
    assert fm.GradientProbe(model).audit(losses_of(model, x)).ok


def test_frozen_audit_agrees(x):
    model = network(nn.BatchNorm2d)
    audit = fm.GradientProbe(model, batchnorm="frozen").audit(losses_of(model, x))
    assert audit.ok, str(audit)


def test_running_statistics_move_once(x):
    model = network(nn.BatchNorm2d)
    plain = copy.deepcopy(model)
    losses_of(plain, x).mean().backward()
    fm.GradientProbe(model, batchnorm="frozen").backward(losses_of(model, x))
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_without_affine_parameters(x):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten()
    ).double()

    def losses(model):
        return model(x).sin().sum(1)

    with pytest.raises(fm.CaptureError, match="NativeBatchNorm"):
        fm.GradientProbe(model).backward(losses(model))
    assert fm.GradientProbe(model, batchnorm="frozen").audit(losses(model)).ok


def test_minibatch_variance_needs_no_samples():
    """Several mini-batch gradients against the exact per-sample variance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(512, 4, dtype=torch.float64)

    def losses(batch):
        return functional_call(model, dict(model.named_parameters()), batch).square()[
            :, 0
        ]

    exact = fm.GradientProbe(model).backward(losses(x))
    generator = torch.Generator().manual_seed(1)
    estimates, signals = [], []
    for _ in range(200):
        variance = fm.MinibatchVariance(model)
        for size in (4, 8, 4, 16):
            model.zero_grad()
            index = torch.randint(512, (size,), generator=generator)
            losses(x[index]).mean().backward()
            variance.update(size)
        estimates.append(variance.covariance_trace)
        signals.append(variance.signal)
    for found, want in (
        (estimates, exact.covariance_trace * 511 / 512),  # drawn with replacement
        (signals, exact.mean_grad_sq_norm),
    ):
        found = torch.stack(found)
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - want) < 4 * error


def test_minibatch_variance_formula():
    model = nn.Linear(2, 1, bias=False).double()
    grads = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])]
    variance = fm.MinibatchVariance(model)
    for grad, size in zip(grads, (2, 6), strict=True):
        model.weight.grad = grad.double()
        variance.update(size)
    mean = (2 * grads[0] + 6 * grads[1]) / 8
    want = 2 * (grads[0] - mean).square().sum() + 6 * (grads[1] - mean).square().sum()
    torch.testing.assert_close(variance.covariance_trace, want.double())
    torch.testing.assert_close(
        variance.signal, (mean.square().sum() - want / 8).double()
    )
    torch.testing.assert_close(
        variance.noise_scale, variance.covariance_trace / variance.signal
    )
    variance.reset()
    with pytest.raises(ValueError, match="at least 2 mini-batches, got 0"):
        _ = variance.covariance_trace
    model.zero_grad()
    with pytest.raises(ValueError, match="has a gradient"):
        variance.update(4)
    with pytest.raises(ValueError, match="at least 1"):
        variance.update(0)
