"""The sharpness along a training run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def make(device):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)
    )
    batch = torch.randn(256, 20), torch.randint(5, (256,))
    return model.to(device), tuple(t.to(device) for t in batch)


def step(model, batch, rate=0.1):
    model.zero_grad()
    loss(model, batch).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= rate * p.grad


def test_warm_calls_take_few_products(device):
    model, batch = make(device)
    sharpness = fm.SharpnessProbe(model, loss)
    for _ in range(20):
        step(model, batch)
    cold = sharpness(batch)
    assert cold.converged
    for _ in range(15):
        step(model, batch)
        warm = sharpness(batch)
        assert warm.converged
        assert warm.products <= 5
        assert warm.residuals.item() <= 0.01 * warm.values.item()
        H = fm.Hessian(model, loss, batch)
        true = fm.top_eigenpairs(H, rtol=1e-4).values.item()
        assert warm.values.item() == pytest.approx(true, rel=0.01)


def test_several_eigenvalues(device):
    model, batch = make(device)
    sharpness = fm.SharpnessProbe(model, loss, k=3)
    for _ in range(3):
        step(model, batch)
        pairs = sharpness(batch)
    H = fm.Hessian(model, loss, batch)
    true = torch.linalg.eigvalsh(H @ torch.eye(H.shape[0], device=device))[-3:].flip(0)
    torch.testing.assert_close(pairs.values, true.cpu(), rtol=0.01, atol=0)


class Curves(nn.Module):
    """A loss whose Hessian is diag(curvatures), whatever the parameters are."""

    def __init__(self, curvatures):
        super().__init__()
        self.register_buffer("curvatures", torch.tensor(curvatures))
        self.weight = nn.Parameter(torch.ones(len(curvatures)))


def bowl(model, batch):
    return 0.5 * (model.curvatures * model.weight.square()).sum() * batch.mean()


def test_direction_that_overtakes_is_found_at_a_cold_start(device):
    model = Curves([1.0] + [0.01] * 400).to(device)
    batch = torch.ones(1, device=device)
    sharpness = fm.SharpnessProbe(model, bowl, cold_every=4)
    assert sharpness(batch).values.item() == pytest.approx(1, rel=0.01)
    model.curvatures[100] = 1.2
    later = [sharpness(batch).values.item() for _ in range(4)]
    assert later[-1] == pytest.approx(1.2, rel=0.01)


def test_reset_and_another_model_size_start_cold(device):
    model, batch = make(device)
    sharpness = fm.SharpnessProbe(model, loss)
    cold = sharpness(batch).products
    assert sharpness(batch).products < cold
    sharpness.reset()
    assert sharpness(batch).products > 5
    model[0].requires_grad_(False)
    assert sharpness(batch).vectors.shape == (1, 32 * 32 + 32 + 165)


def test_arguments():
    with pytest.raises(ValueError, match="cold_every must be at least 1, got 0"):
        fm.SharpnessProbe(nn.Linear(1, 1), loss, cold_every=0)
