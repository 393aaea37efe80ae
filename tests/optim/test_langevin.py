"""Langevin: its stationary density, its arithmetic, and exact resumption."""

import copy
import io
import math
import pickle

import pytest
import torch

import fastminima as fm

MOMENTA = (0.0, 0.5, 0.9)


def quadratic_variance(momentum, seed, *, lr, temperature, curvature, walkers, steps):
    """Variance over walkers and late times of a run on L = curvature x^2 / 2."""
    x = torch.zeros(walkers, dtype=torch.float64, requires_grad=True)
    optimizer = fm.optim.Langevin([x], lr, temperature, momentum, seed=seed)
    total, seen = 0.0, 0
    for step in range(steps):
        x.grad = curvature * x.detach()
        optimizer.step()
        if step >= steps // 2 and step % 50 == 0:
            total, seen = total + x.detach().square().mean().item(), seen + 1
    return total / seen


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("relative_rate", [0.02, 0.5])
def test_stationary_variance_on_a_quadratic(momentum, relative_rate):
    """temperature / c / (1 - lr c / (2 (1 + m))), the same for all m as lr -> 0."""
    curvature, temperature, walkers = 4.0, 0.7, 20_000
    lr = relative_rate / curvature
    got = quadratic_variance(
        momentum,
        seed=1,
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
def test_density_of_a_quartic(momentum):
    """E x^4 = temperature for L = x^4 / 4 (virial), E x^2 by quadrature."""
    x = torch.zeros(20_000, dtype=torch.float64, requires_grad=True)
    temperature, lr = 0.3, 0.03 * (1 - momentum)
    optimizer = fm.optim.Langevin([x], lr, temperature, momentum, seed=2)
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
    assert (x.detach().square().mean() / want).item() == pytest.approx(1, abs=0.05)


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


class Run:
    """A run with every way for the noise to go astray.

    Two groups, parameters without gradients, of two dtypes, and a group added late.
    """

    def __init__(self, momentum, seed):
        torch.manual_seed(4)
        make = torch.nn.Parameter
        self.used = make(torch.randn(4, 8)), make(torch.randn(8, dtype=torch.float64))
        self.idle, self.late = make(torch.randn(3)), make(torch.randn(5))
        groups = [
            {"params": [self.used[0], self.idle]},
            {"params": [self.used[1]], "lr": 0.03, "momentum": 0.0},
        ]
        self.optimizer = fm.optim.Langevin(groups, 0.05, 0.3, momentum, seed=seed)

    @property
    def parameters(self):
        return [*self.used, self.idle, self.late]

    def add_late(self):
        self.optimizer.add_param_group({"params": [self.late], "temperature": 0.1})

    def train(self, first, last):
        for step in range(first, last):
            self.optimizer.zero_grad()
            sum(p.square().sum() for p in self.used).backward()
            if step % 3 == 2:
                self.idle.grad = torch.ones_like(self.idle)
            if len(self.optimizer.param_groups) == 3:
                self.late.grad = self.late.detach().clone()
            self.optimizer.param_groups[0]["lr"] = 0.05 / (1 + step % 4)
            self.optimizer.step()


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("seed", [5, None])
def test_resumes_exactly(momentum, seed):
    run = Run(momentum, seed)
    run.train(0, 4)
    run.add_late()
    run.train(4, 9)
    file = io.BytesIO()
    torch.save((run.parameters, run.optimizer.state_dict()), file)
    run.train(9, 15)

    again = Run(momentum, 77)
    again.add_late()
    torch.manual_seed(99)
    file.seek(0)
    saved, state = torch.load(file)
    with torch.no_grad():
        for p, value in zip(again.parameters, saved, strict=True):
            p.copy_(value)
    again.optimizer.load_state_dict(state)
    again.train(9, 15)
    for a, b in zip(run.parameters, again.parameters, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_loading_refuses_a_state_without_its_seed():
    x = torch.zeros(3, requires_grad=True)
    sgd = torch.optim.SGD([x], 0.1).state_dict()
    optimizer = fm.optim.Langevin([x], 0.1, 0.1, seed=1)
    with pytest.raises(ValueError, match=r"no \['seed', 'steps_taken'\].*add them"):
        optimizer.load_state_dict(sgd)
    optimizer.load_state_dict({**sgd, "seed": 8, "steps_taken": 3})
    assert (optimizer.seed, optimizer.steps_taken) == (8, 3)


def step_from_zero(params, **options):
    """What one step at lr = 1 / 2 and temperature 1 makes of zeros: the noise."""
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = fm.optim.Langevin(params, 0.5, 1.0, **options)
    optimizer.step()
    return [p.detach() for p in params]


def zeros(*sizes, dtype=torch.float32):
    return [torch.zeros(s, dtype=dtype, requires_grad=True) for s in sizes]


def test_manual_seed_decides_where_no_seed_is_given():
    drawn = []
    for default in (6, 6, 7):
        torch.manual_seed(default)
        drawn.append(step_from_zero(zeros(100))[0])
    assert torch.equal(drawn[0], drawn[1]) and (drawn[0] != drawn[2]).all()


def test_a_seed_leaves_the_default_generator_alone():
    before = torch.get_rng_state()
    step_from_zero(zeros(100), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_noise_depends_on_index_and_element_only(momentum):
    """Not on groups, dtypes, strides, or on who else has a gradient."""
    options = {"seed": 3, "momentum": momentum}
    one = step_from_zero(zeros(40, (5, 6), 7), **options)
    first, second, third = zeros(40, (5, 6), 7, dtype=torch.float64)
    groups = [{"params": [first]}, {"params": [second, third]}]
    optimizer = fm.optim.Langevin(groups, 0.5, 1.0, **options)
    second.grad = torch.zeros_like(second)
    optimizer.step()
    torch.testing.assert_close(second.detach().float(), one[1])
    assert first.eq(0).all() and third.eq(0).all()
    strided = [*zeros(40), torch.zeros(6, 5).t().requires_grad_(), *zeros(7)]
    assert torch.equal(step_from_zero(strided, **options)[1], one[1])


def test_steps_have_new_noise_whether_or_not_a_parameter_took_part():
    x, y = zeros(1000, 1000)
    optimizer = fm.optim.Langevin([x, y], 0.5, 1.0, seed=2)
    y.grad = torch.zeros_like(y)
    optimizer.step()
    alone = y.detach().clone()
    x.grad = torch.zeros_like(x)
    optimizer.step()
    second = y.detach() - alone
    again = zeros(1000, 1000)
    for p in again:
        p.grad = torch.zeros_like(p)
    other = fm.optim.Langevin(again, 0.5, 1.0, seed=2)
    other.step()
    assert torch.equal(again[1], alone)
    other.step()
    torch.testing.assert_close(again[1].detach() - alone, second)
    torch.testing.assert_close(x.detach(), again[0].detach() - step_of(0, 2))


def step_of(step, seed):
    """The noise of the first of some parameters, of 1000 elements."""
    (x,) = zeros(1000)
    x.grad = torch.zeros_like(x)
    optimizer = fm.optim.Langevin([x], 0.5, 1.0, seed=seed)
    optimizer.steps_taken = step
    optimizer.step()
    return x.detach()


def test_copies_go_on_by_themselves():
    x = torch.zeros(300, requires_grad=True)
    x.grad = torch.zeros_like(x)
    optimizer = fm.optim.Langevin([x], 0.1, 0.1, 0.5, seed=1)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        mine = other.param_groups[0]["params"][0]
        mine.grad = torch.zeros_like(mine)
        other.step()
        assert (other.seed, other.steps_taken) == (1, 2)
    assert optimizer.steps_taken == 1
    optimizer.step()
    assert torch.equal(x, mine)


def temperatures(x, optimizer, steps, curvature=1.0):
    """Kinetic and potential temperature after each of some steps."""
    (group,) = optimizer.param_groups
    found = []
    for _ in range(steps):
        x.grad = curvature * x.detach()
        optimizer.step()
        velocity = optimizer.state[x]["velocity"]
        kinetic = velocity.square().mean() * (1 + group["momentum"]) / 2
        found.append((kinetic.item(), curvature * x.detach().square().mean().item()))
    return torch.tensor(found)


def test_a_changed_learning_rate_leaves_the_temperature():
    """A velocity in the units of gradients would be ten times too hot at first."""
    temperature, walkers = 0.7, 20_000
    x = torch.zeros(walkers, dtype=torch.float64, requires_grad=True)
    optimizer = fm.optim.Langevin([x], 0.01, temperature, 0.9, seed=1)
    temperatures(x, optimizer, 800)
    for lr in (0.01, 0.1, 0.01, 0.0, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        found = temperatures(x, optimizer, 150) / temperature
        assert (found - 1).abs().max() < 0.15, (lr, found)


def test_velocities_take_the_temperature_of_a_group_within_some_steps():
    x = torch.zeros(20_000, dtype=torch.float64, requires_grad=True)
    optimizer = fm.optim.Langevin([x], 0.01, 0.5, 0.9, seed=1)
    temperatures(x, optimizer, 100, curvature=0.0)
    optimizer.param_groups[0]["temperature"] = 2.0
    found = temperatures(x, optimizer, 100, curvature=0.0)[:, 0]
    want = 2 + (0.5 - 2) * 0.9 ** (2 * torch.arange(1, 101))
    # Of 20 000 squares: four standard errors are 4 % of the mean.
    torch.testing.assert_close(found, want, rtol=0.04, atol=0.0)


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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_graph_of_the_values_before_a_step_is_refused(dtype, momentum):
    """As with SGD: a step between two backward passes gives no wrong gradient."""
    for make in (
        lambda x: torch.optim.SGD([x], 0.1, momentum),
        lambda x: fm.optim.Langevin([x], 0.1, 0.2, momentum),
    ):
        x = torch.ones(5, dtype=dtype, requires_grad=True)
        optimizer = make(x)
        first, second = x.square().sum(), x.square().sum()
        first.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()


@pytest.mark.parametrize("seed", [1.5, "1", torch.tensor([1.5])])
def test_the_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match="seed must be an integer, got"):
        fm.optim.Langevin([torch.zeros(1, requires_grad=True)], 0.1, 0.1, seed=seed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -0.1, "lr must be at least 0"),
        ("lr", torch.tensor(math.nan), "lr must be at least 0"),
        ("temperature", -1.0, "temperature must be at least 0"),
        ("momentum", 1.0, "momentum must be at least 0 and below 1"),
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_options_are_checked_at_each_step(name, value, message, momentum):
    x, other = zeros(3, 3)
    groups = [{"params": [x]}, {"params": [other]}]
    optimizer = fm.optim.Langevin(groups, 0.1, 0.1, momentum)
    x.grad, other.grad = torch.ones_like(x), torch.ones_like(other)
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert x.eq(0).all() and optimizer.steps_taken == 0
