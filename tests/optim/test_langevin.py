"""Langevin: its stationary density, its arithmetic, and exact resumption."""

import copy
import io
import math

import pytest
import torch

import fastminima as fm

MOMENTA = (0.0, 0.5, 0.9)


def quadratic_variance(momentum, noise, *, lr, temperature, curvature, walkers, steps):
    """Variance over walkers and late times of a run on L = curvature x^2 / 2."""
    x = torch.zeros(walkers, dtype=torch.float64, requires_grad=True)
    optimizer = fm.optim.Langevin([x], lr, temperature, momentum, generator=noise)
    total, seen = 0.0, 0
    for step in range(steps):
        x.grad = curvature * x.detach()
        optimizer.step()
        if step >= steps // 2 and step % 50 == 0:
            total, seen = total + x.detach().square().mean().item(), seen + 1
    return total / seen


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("relative_rate", [0.02, 0.5])
def test_stationary_variance_on_a_quadratic(momentum, relative_rate, generator):
    """temperature / c / (1 - lr c / (2 (1 + m))), the same for all m as lr -> 0."""
    curvature, temperature, walkers = 4.0, 0.7, 20_000
    lr = relative_rate / curvature
    got = quadratic_variance(
        momentum,
        generator(1),
        lr=lr,
        temperature=temperature,
        curvature=curvature,
        walkers=walkers,
        steps=600,
    )
    want = temperature / curvature / (1 - lr * curvature / (2 * (1 + momentum)))
    # At worst the averaged times are fully correlated: chi-squared with `walkers`.
    assert abs(got / want - 1) < 4 * math.sqrt(2 / walkers)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_density_of_a_quartic(momentum, generator):
    """E x^4 = temperature for L = x^4 / 4 (virial), E x^2 by quadrature."""
    x = torch.zeros(20_000, dtype=torch.float64, requires_grad=True)
    noise = generator(2)
    temperature, lr = 0.3, 0.03 * (1 - momentum)
    optimizer = fm.optim.Langevin([x], lr, temperature, momentum, generator=noise)
    fourth = []
    for step in range(1000):
        x.grad = x.detach() ** 3
        optimizer.step()
        if step >= 400:
            fourth.append(x.detach() ** 4)
    fourth = torch.stack(fourth).mean(dim=0)
    error = fourth.std() / math.sqrt(len(fourth))
    # The discretisation adds O(lr curvature) = 3 lr E x^2 / 2, below 3 %.
    assert abs(fourth.mean() - temperature) < 4 * error + 0.03 * temperature
    grid = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    weight = torch.exp(-(grid**4) / 4 / temperature)
    want = (grid**2 * weight).sum() / weight.sum()
    assert x.detach().square().mean() / want == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_at_temperature_zero_it_is_sgd(momentum):
    torch.manual_seed(3)
    ours = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    langevin = fm.optim.Langevin(ours, 0.1, 0.0, momentum)
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=momentum)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        langevin.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs)


def test_the_noise_of_one_step_has_the_documented_deviation():
    x = torch.zeros(100_000, requires_grad=True)
    x.grad = torch.ones_like(x)
    fm.optim.Langevin([x], lr=0.02, temperature=0.5).step()
    want = math.sqrt(2 * 0.02 * 0.5)
    assert abs(x.std().item() / want - 1) < 4 / math.sqrt(2 * len(x))
    assert abs(x.mean().item() + 0.02) < 4 * want / math.sqrt(len(x))


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("with_generator", [True, False])
def test_resumes_exactly(momentum, with_generator, generator, device):
    def make():
        torch.manual_seed(4)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
        noise = generator(5) if with_generator else None
        optimizer = fm.optim.Langevin(
            model.parameters(), 0.05, 0.3, momentum, generator=noise
        )
        return model, optimizer

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()

    default = torch.cuda if device.type == "cuda" else torch
    model, optimizer = make()
    train(model, optimizer, 7)
    file = io.BytesIO()
    torch.save(
        (model.state_dict(), optimizer.state_dict(), default.get_rng_state()), file
    )
    train(model, optimizer, 5)

    resumed, again = make()
    torch.manual_seed(99)
    file.seek(0)
    weights, state, rng = torch.load(file)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    if not with_generator:
        default.set_rng_state(rng)
    train(resumed, again, 5)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_loading_refuses_a_noise_that_would_not_continue(generator):
    x = torch.zeros(3, requires_grad=True)
    seeded = fm.optim.Langevin([x], 0.1, 0.1, generator=generator())
    plain = fm.optim.Langevin([x], 0.1, 0.1)
    with pytest.raises(ValueError, match=r"saved with a generator.*has none"):
        plain.load_state_dict(seeded.state_dict())
    with pytest.raises(ValueError, match=r"saved without a generator.*has one"):
        seeded.load_state_dict(plain.state_dict())


def test_copies_have_their_own_generator(generator):
    x = torch.zeros(3, requires_grad=True)
    optimizer = fm.optim.Langevin([x], 0.1, 0.1, generator=generator())
    other = copy.deepcopy(optimizer)
    before = optimizer.generator.get_state()
    other.param_groups[0]["params"][0].grad = torch.zeros(3)
    other.step()
    assert torch.equal(optimizer.generator.get_state(), before)
    assert not torch.equal(other.generator.get_state(), before)


def test_groups_have_their_own_options():
    hot = torch.zeros(50_000, requires_grad=True)
    cold = torch.zeros(50_000, requires_grad=True)
    groups = [{"params": [hot], "temperature": 2.0}, {"params": [cold], "lr": 0.5}]
    optimizer = fm.optim.Langevin(groups, lr=0.1, temperature=0.0)
    hot.grad, cold.grad = torch.zeros_like(hot), torch.ones_like(cold)
    optimizer.step()
    assert hot.std().item() == pytest.approx(math.sqrt(0.4), rel=0.02)
    assert torch.equal(cold, torch.full_like(cold, -0.5))


def test_closure_schedule_and_parameters_without_gradient():
    x = torch.ones(3, requires_grad=True)
    unused = torch.ones(3, requires_grad=True)
    optimizer = fm.optim.Langevin([x, unused], lr=0.5, temperature=0.0, momentum=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)

    def closure():
        optimizer.zero_grad()
        loss = x.square().sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.5
    torch.testing.assert_close(x.detach(), torch.full((3,), 0.5))
    optimizer.param_groups[0]["temperature"] = 1.0
    schedule.step()
    optimizer.step(closure)  # learning rate 0: neither gradient nor noise
    torch.testing.assert_close(x.detach(), torch.full((3,), 0.5))
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtypes(dtype):
    shapes = [(), (0,), (3,), (2, 3, 4)]
    params = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes]
    params.append(torch.zeros(4, 3, dtype=dtype).t().requires_grad_())
    params.append(torch.zeros(2, requires_grad=True))  # another dtype among them
    optimizer = fm.optim.Langevin(params, 0.1, 0.1, 0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(p.ne(0).all() and p.isfinite().all() for p in params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr.*-1.0"),
        ({"lr": math.nan}, "lr.*nan"),
        ({"temperature": -0.5}, "temperature.*-0.5"),
        ({"temperature": math.inf}, "temperature.*inf"),
        ({"momentum": 1.0}, "momentum.*below 1, got 1.0"),
    ],
)
def test_refuses_options(options, message):
    x = torch.zeros(3, requires_grad=True)
    good = {"lr": 0.1, "temperature": 0.1}
    with pytest.raises(ValueError, match=message):
        fm.optim.Langevin([x], **{**good, **options})
    with pytest.raises(ValueError, match=message):
        fm.optim.Langevin([{"params": [x], **options}], **good)


def test_refuses_complex_parameters_and_leaves_the_optimizer_usable():
    z = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match=r"complex64.*view_as_real"):
        fm.optim.Langevin([z], 0.1, 0.1)
    optimizer = fm.optim.Langevin([torch.zeros(3, requires_grad=True)], 0.1, 0.1)
    with pytest.raises(ValueError, match="complex64"):
        optimizer.add_param_group({"params": [z]})
    assert len(optimizer.param_groups) == 1


def test_refuses_sparse_gradients_before_anything_moves():
    dense = torch.zeros(3, requires_grad=True)
    table = torch.zeros(4, 2, requires_grad=True)
    optimizer = fm.optim.Langevin([dense, table], 0.1, 0.1)
    dense.grad = torch.ones(3)
    table.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(ValueError, match=r"sparse_coo.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.zeros(3))
