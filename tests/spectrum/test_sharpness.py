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


def crossing(device, size=1000, second=5):
    """Curvatures of 1, of a bulk below .3, and of one that is still in it."""
    generator = torch.Generator("cpu").manual_seed(7)
    drawn = 0.1 * torch.randn(
        size, generator=generator, dtype=torch.float32, device="cpu"
    ).clamp(-3, 3)
    drawn[0], drawn[second] = 1.0, 0.9
    model = Curves(drawn.tolist()).to(device)
    return model, torch.ones(1, device=device)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("rate", [0.002, 0.005, 0.02, 0.05])
def test_crossing_is_noticed(rate, k, device):
    """An eigenvalue overtakes, at 3 products a call for one and 4 for two."""
    model, batch = crossing(device)
    sharpness = fm.SharpnessProbe(model, bowl, k)
    late, products = 0, []
    for call in range(49):
        model.curvatures[5] = 0.9 + rate * call
        pairs = sharpness(batch)
        true = model.curvatures.max().item()
        late += pairs.values[0].item() < 0.99 * true
        assert pairs.converged
        if call:
            products.append(pairs.products)
    assert late <= 3
    assert sum(products) / len(products) <= k + 2.2


def test_value_from_the_bulk_is_noticed(device):
    """One that no call had met before, the largest of all a few calls later."""
    model, batch = crossing(device)
    model.curvatures[5] = 0.0
    wrong = 0
    for seed in range(10):
        sharpness = fm.SharpnessProbe(model, bowl, seed=seed)
        for call in range(20):
            model.curvatures[17] = 0.1 * call
            value = sharpness(batch).values.item()
            wrong += value < 0.99 * model.curvatures.max().item()
        model.curvatures[17] = 0.0
    assert wrong <= 10  # 5 % of the calls


def moving(seed, size=100, calls=30):
    """Dense matrices that turn, one eigenvalue of which overtakes the others."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def drawn(*shape):
        return torch.randn(
            shape, generator=generator, dtype=torch.float64, device="cpu"
        )

    basis = torch.linalg.qr(drawn(size, size))[0]
    skew = drawn(size, size) / size**0.5
    turn = torch.matrix_exp(0.01 * (skew - skew.T))
    values = 0.2 * drawn(size).clamp(-2.5, 2.5)
    rate = 0.01 + 0.03 * torch.rand((), generator=generator, device="cpu").item()
    for call in range(calls):
        values[0], values[1] = 1.0, 0.6 + rate * call
        basis = basis @ turn
        yield (basis * values) @ basis.T, values.max().item()


class Turning(nn.Module):
    """A loss whose Hessian is the matrix given."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("matrix", torch.zeros(size, size, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float64))


def quadratic(model, batch):
    return 0.5 * model.weight @ (model.matrix @ model.weight) * batch.mean()


def test_few_calls_are_wrong_over_many_matrices():
    wrong = calls = 0
    model, batch = Turning(100), torch.ones(1, dtype=torch.float64)
    for seed in range(12):
        sharpness = fm.SharpnessProbe(model, quadratic, seed=seed)
        for matrix, true in moving(seed):
            model.matrix.copy_(matrix)
            pairs = sharpness(batch)
            calls += 1
            wrong += pairs.values.item() < 0.99 * true
            assert pairs.values.item() <= true * (1 + 1e-9)
    assert wrong <= 0.05 * calls


POLICIES = {
    "value": {"criterion": "value"},
    "budget": {"budget": 2},
    "both": {"criterion": "value", "budget": 2},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_fewer_products_are_as_seldom_wrong(policy):
    """At 2.2 products a call on matrices that turn, where all residuals take 3.1."""
    wrong = calls = products = 0
    model, batch = Turning(100), torch.ones(1, dtype=torch.float64)
    for seed in range(6):
        sharpness = fm.SharpnessProbe(model, quadratic, seed=seed, **POLICIES[policy])
        for call, (matrix, true) in enumerate(moving(seed)):
            model.matrix.copy_(matrix)
            pairs = sharpness(batch)
            calls += 1
            products += pairs.products if call else 0
            short = true - pairs.values.item()
            wrong += short > 0.01 * true
            assert short >= -1e-9 * true
            if pairs.converged and policy != "budget":
                assert pairs.errors.item() <= 0.01 * pairs.values.item()
    assert wrong <= 0.05 * calls
    assert products <= 2.5 * (calls - 6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rate", [0.002, 0.05])
def test_crossing_is_noticed_by_fewer_products(rate, policy, device):
    model, batch = crossing(device)
    sharpness = fm.SharpnessProbe(model, bowl, **POLICIES[policy])
    late, products = 0, []
    for call in range(49):
        model.curvatures[5] = 0.9 + rate * call
        pairs = sharpness(batch)
        late += pairs.values[0].item() < 0.99 * model.curvatures.max().item()
        products += [pairs.products] if call else []
    assert late <= 3
    assert sum(products) <= (2.0 if policy == "budget" else 1.6) * len(products)


def test_what_a_budget_leaves_is_no_warning(device, recwarn):
    model, batch = make(device)
    sharpness = fm.SharpnessProbe(model, loss, budget=2, rtol=1e-5)
    sharpness(batch)
    step(model, batch, rate=1.0)
    pairs = sharpness(batch)
    assert pairs.products == 2
    assert not pairs.converged
    assert not recwarn.list


def test_real_run_is_followed(device):
    """Full-batch gradient descent with momentum, where eigenvalues cross."""
    model, batch = make(device)
    sharpness = fm.SharpnessProbe(model, loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrong = 0
    for call in range(40):
        pairs = sharpness(batch)
        if call % 3 == 0:
            H = fm.Hessian(model, loss, batch)
            true = fm.top_eigenpairs(H, 2, rtol=1e-3).values[0].item()
            wrong += abs(pairs.values.item() / true - 1) > 0.01
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    assert wrong <= 1


def test_cold_calls_are_certified_and_warm_ones_say_that_they_are_not(device):
    model, batch = crossing(device, size=300)
    sharpness = fm.SharpnessProbe(model, bowl, cold_every=3)
    uppers = [sharpness(batch).upper for _ in range(6)]
    for call, upper in enumerate(uppers):
        assert (1 <= upper < 1.15) if call % 3 == 0 else upper == float("inf")
    H = fm.Hessian(model, bowl, batch)
    alone = fm.top_eigenpairs(H)
    sharpness.reset()
    cold = fm.SharpnessProbe(model, bowl)(batch)
    assert cold.products == alone.products


def test_residuals_of_warm_calls_are_those_of_products(device):
    model, batch = make(device)
    sharpness = fm.SharpnessProbe(model, loss, k=2)
    for _ in range(4):
        step(model, batch)
        pairs = sharpness(batch)
        H = fm.Hessian(model, loss, batch)
        for value, v, residual in zip(
            pairs.values, pairs.vectors, pairs.residuals, strict=True
        ):
            error = (H @ v - value.to(v) * v).norm().item()
            assert error == pytest.approx(residual.item(), rel=1e-2, abs=1e-6)
        gram = (pairs.vectors @ pairs.vectors.T).cpu()
        torch.testing.assert_close(gram, torch.eye(2), rtol=0, atol=1e-5)
        assert 0 < pairs.noise < 1e-5


def test_as_many_pairs_as_parameters(device):
    model = Curves([3.0, 2.0, -1.0]).to(device)
    batch = torch.ones(1, device=device)
    sharpness = fm.SharpnessProbe(model, bowl, k=3)
    for _ in range(3):
        pairs = sharpness(batch)
        assert pairs.converged
        assert pairs.values.tolist() == pytest.approx([3.0, 2.0, -1.0], rel=1e-4)


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
    with pytest.raises(ValueError, match=r"at least k \+ 1 = 3 products.*got 2"):
        fm.SharpnessProbe(nn.Linear(1, 1), loss, k=2, budget=2)
    with pytest.raises(ValueError, match=r"criterion must be .* got 'vectors'"):
        fm.SharpnessProbe(nn.Linear(1, 1), loss, criterion="vectors")
