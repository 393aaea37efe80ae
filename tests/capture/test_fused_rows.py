"""mode="fused" with one row a sample: second moments and gradients by one call."""

import copy

import pytest
import torch
from oracles import flat, single_sample_gradients
from torch import nn

import fastminima as fm
from fastminima import _native

BATCH = 70  # enough for our products, and no multiple of their blocks
IS_OURS = _native.best_isa in ("avx512", "avx2")


class Rows(nn.Module):
    """Layers with a bias and without one, a product, a narrow head."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second = nn.Linear(130, 70), nn.Linear(70, 60, bias=False)
        self.third = nn.Parameter(torch.randn(60, 65) / 8)
        self.head = nn.Linear(65, 3)
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.second(self.activation(self.first(x))))
        return self.head(self.activation(x @ self.third))


NAMES = {"first.weight", "first.bias", "second.weight", "third"}  # the head is small


def losses_of(model, x):
    return model(x).square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
def test_statistics_and_gradients(activation, dtype, fusions, host_reads):
    torch.manual_seed(0)
    model, x = Rows(activation), torch.randn(BATCH, 130)
    want = flat(single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x]))
    model, x = model.to(dtype), x.to(dtype)
    plain = copy.deepcopy(model)
    losses_of(plain, x).mean().backward()
    probe = fm.GradientProbe(model, mode="fused", measure="second_moments")
    for _ in range(3):
        model.zero_grad()
        stats = probe.backward(losses_of(model, x))
    assert fusions == [NAMES if IS_OURS and host_reads else set()] * 3
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    names = dict(model.named_parameters())
    got = torch.cat([stats.second_moments[n].flatten() for n in names]).double()
    moments = want.square().mean(0)
    torch.testing.assert_close(got, moments, rtol=rtol, atol=rtol * moments.max())
    norms = want.square().sum(1)
    torch.testing.assert_close(stats.sq_norms.double(), norms, rtol=rtol, atol=0)
    grads = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    exact = want.mean(0)
    torch.testing.assert_close(grads, exact, rtol=rtol, atol=rtol * exact.abs().max())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-6 * q.grad.norm()
        assert p.grad.stride() == q.grad.stride()


def test_norms_alone_and_few_samples_share_nothing(fusions):
    model, x = Rows(torch.relu), torch.randn(BATCH, 130)
    fm.GradientProbe(model, mode="fused").backward(losses_of(model, x))
    few = fm.GradientProbe(model, mode="fused", measure="second_moments")
    few.backward(losses_of(model, x[:40]))
    assert fusions == [set(), set()]


def test_a_batch_of_another_size_is_decided_anew(fusions, host_reads):
    model, x = Rows(torch.relu), torch.randn(2 * BATCH, 130)
    probe = fm.GradientProbe(model, mode="fused", measure="second_moments")
    for count in (BATCH, 40, 2 * BATCH, BATCH):
        model.zero_grad()
        probe.backward(losses_of(model, x[:count]))
        want = torch.autograd.grad(
            losses_of(model, x[:count]).mean(), list(model.parameters())
        )
        for p, g in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, g)
    ours = NAMES if IS_OURS and host_reads else set()
    assert fusions == [ours, set(), ours, ours]
