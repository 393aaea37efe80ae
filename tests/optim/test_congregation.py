"""Congregation: the steps of its members, its restarts, and exact resumption."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import fastminima as fm


class Point(nn.Module):
    """One number, drawn from [-2, 2]."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.empty(()).uniform_(-2, 2))

    def forward(self, inputs):
        return self.a + 0 * inputs


def wells(prediction, target):
    """Minima near -1, of cost -.3, and near 1, of cost .3."""
    a = prediction.mean()
    return (a.square() - 1).square() + 0.3 * a


def points(*values, **options):
    """A congregation of points at these places."""
    settings = {"loss": wells, "lr": 0.05, "tau": 0.5, "check": 1, **options}
    members = len(values) // settings.get("congregations", 1)
    congregation = fm.optim.Congregation(Point, members, **settings)
    (group,) = congregation.param_groups
    with torch.no_grad():
        group["params"][0].copy_(torch.tensor(values))
    return congregation


def train(congregation, steps=1, batch=None):
    x = torch.zeros(1) if batch is None else batch
    for _ in range(steps):
        congregation.zero_grad()
        congregation.losses(x, x).sum().backward()
        congregation.step()


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def batches(count, size=8):
    x = torch.randn(count, size, 3)
    return list(zip(x, x.prod(2, keepdim=True), strict=True))


def mse(prediction, target):
    return (prediction - target).square().mean()


def fit(congregation, stream):
    for x, y in stream:
        congregation.zero_grad()
        congregation.losses(x, y).sum().backward()
        congregation.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_members_take_the_steps_of_sgd(momentum):
    stream = batches(20)
    tau = 0.1
    congregation = fm.optim.Congregation(
        network, 3, 0.1, loss=mse, momentum=momentum, tau=tau
    )
    models = [congregation.member(i) for i in range(3)]
    starts = torch.stack([next(m.parameters())[0, 0] for m in models])
    assert len(starts.unique()) == 3
    fit(congregation, stream)
    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
        cost = mean = 0.0
        for x, y in stream:
            optimizer.zero_grad()
            loss = mse(model(x), y)
            loss.backward()
            grad = torch.cat([p.grad.flatten() for p in model.parameters()])
            mean = (1 - tau) * mean + tau * grad
            cost = (1 - tau) * cost + tau * loss.item()
            optimizer.step()
        for got, want in zip(
            congregation.member(i).parameters(), model.parameters(), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        weight = 1 - (1 - tau) ** 20
        assert congregation.costs[i].item() == pytest.approx(cost / weight, rel=1e-4)
        assert congregation.gradient_norms[i].item() == pytest.approx(
            mean.norm().item() / weight, rel=1e-3
        )
    assert congregation.ages.tolist() == [20] * 3


def test_an_unfit_member_starts_anew():
    """Age above 4 / .5 = 8: at the ninth step, and only the one in the higher well."""
    congregation = points(0.96, -1.04, momentum=0.3)
    train(congregation, 8)
    assert congregation.restarts.tolist() == [0, 0]
    train(congregation)
    assert congregation.restarts.tolist() == [1, 0]
    assert congregation.ages.tolist() == [0, 9]
    assert math.isnan(congregation.costs[0])
    (state,) = congregation.state.values()
    assert state["mean_grad"][0] == state["momentum_buffer"][0] == 0
    assert state["momentum_buffer"][1] != 0
    assert congregation.best == 1
    assert abs(congregation.member(0).a.item()) <= 2
    assert congregation.member(0).a.item() != pytest.approx(0.96, abs=1e-3)
    train(congregation)
    assert congregation.costs[0].isfinite()


def test_restarts_are_drawn_from_the_seed():
    first, again, other = (points(0.96, -1.04, seed=s) for s in (1, 1, 2))
    before = torch.get_rng_state()
    for congregation in (first, again, other):
        train(congregation, 9)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.member(0).a == again.member(0).a != other.member(0).a


def test_the_best_and_its_equals_stay():
    congregation = points(-1.04, -1.04, margin=0.0)
    train(congregation, 50)
    assert congregation.restarts.tolist() == [0, 0]
    assert congregation.best == 0
    alone = points(0.96)
    train(alone, 50)
    assert alone.restarts.tolist() == [0]


def test_who_has_not_converged_or_is_within_the_margin_stays():
    for options in ({"tolerance": 0.0}, {"margin": 1.0}):
        congregation = points(0.96, -1.04, **options)
        train(congregation, 20)
        assert congregation.restarts.tolist() == [0, 0], options


def test_only_old_members_are_compared():
    """A young member in the better well is no reason yet, and not yet the best."""
    congregation = points(0.96, 0.96)
    train(congregation, 20)
    congregation._restart(1)
    (group,) = congregation.param_groups
    group["params"][0].detach()[1] = -1.04
    train(congregation, 8)
    assert congregation.costs[1] < congregation.costs[0] - 0.5
    assert congregation.restarts.tolist() == [0, 1]
    assert congregation.best == 0
    train(congregation)
    assert congregation.restarts.tolist() == [1, 1]
    assert congregation.best == 1


@pytest.mark.parametrize(
    ("options", "when"), [({"check": 7}, 14), ({"period": 25}, 25)]
)
def test_hasty_and_clocked(options, when):
    congregation = points(0.96, -1.04, **options)
    train(congregation, when - 1)
    assert congregation.restarts.sum() == 0
    train(congregation)
    assert congregation.restarts.tolist() == [1, 0]


def test_a_broken_member_starts_anew():
    congregation = points(-1.0, math.inf, math.nan)
    train(congregation)
    assert congregation.restarts.tolist() == [0, 1, 1]
    assert congregation.best == 0
    train(congregation, 3)
    assert congregation.costs.isfinite().all()


def test_best_before_any_is_old():
    congregation = points(1.0, -1.0, -1.0)
    assert congregation.best == 0
    train(congregation)
    assert congregation.best == 1


def test_clip():
    congregation = points(1.9, -0.9, lr=0.01, clip=(-0.8, 0.5))
    train(congregation)
    (group,) = congregation.param_groups
    assert group["params"][0].tolist() == pytest.approx([0.5, -0.8], abs=1e-6)


def test_new_members_are_clipped():
    options = {"members": 8, "lr": 0.1, "loss": wells, "clip": (-0.5, 0.5)}
    congregation = fm.optim.Congregation(Point, **options)
    (values,) = congregation.param_groups[0]["params"]
    assert values.abs().max() == 0.5
    assert congregation.member(0).a.abs() <= 0.5
    for _ in range(8):
        congregation._restart(0)
        assert values.abs().max() <= 0.5


def test_a_look_without_gradients_is_no_training():
    congregation = points(0.5, -0.5)
    x = torch.zeros(1)
    costs = congregation.losses(x, x)
    costs.sum().backward()
    with torch.no_grad():
        congregation.losses(x + 1e9, x)
        congregation.losses(x * math.nan, x)
    congregation.step()
    torch.testing.assert_close(congregation.costs, costs.detach())
    with torch.no_grad():
        congregation.losses(x, x)
    with pytest.raises(RuntimeError, match="of this step"):
        congregation.step()


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_the_best_has_a_finite_cost(broken):
    congregation = fm.optim.Congregation(
        Point,
        3,
        0.0,
        loss=lambda prediction, _: torch.where(
            prediction.mean() > 1, broken, prediction.mean().square()
        ),
        tau=0.5,
        check=100,
    )
    (values,) = congregation.param_groups[0]["params"]
    with torch.no_grad():
        values.copy_(torch.tensor([1.5, 0.9, 0.1]))
    train(congregation)
    assert congregation.best == 2
    train(congregation, 10)
    congregation._ages[2] = 1  # the only old ones are the broken one and a worse one
    assert congregation.best == 1
    congregation._ages[1] = 1
    assert congregation.best == 2


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))]
)
def test_copies_go_on_by_themselves(copied, momentum):
    stream = batches(30)
    options = {"loss": mse, "momentum": momentum, "tau": 0.4, "tolerance": 1.0}
    first = fm.optim.Congregation(network, 3, 0.05, margin=0.01, check=3, **options)
    fit(first, stream[:10])
    second = copied(first)
    before = copy.deepcopy(first.state_dict())
    fit(second, stream[10:])
    same(first.state_dict(), before)
    fit(first, stream[10:])
    assert first.restarts.sum() > 0
    same(second.state_dict(), first.state_dict())


def test_resuming_gives_the_same_bits():
    stream = batches(60)
    options = {"loss": mse, "momentum": 0.5, "tau": 0.4, "tolerance": 1.0, "check": 3}

    def made(seed=0):
        return fm.optim.Congregation(
            network, 3, 0.05, margin=0.01, seed=seed, **options
        )

    whole = made()
    fit(whole, stream)
    assert whole.restarts.sum() > 3
    for stop in (1, 30, 31):
        first = made()
        fit(first, stream[:stop])
        state = copy.deepcopy(first.state_dict())
        before = copy.deepcopy(state)
        second = made(seed=5)
        second.load_state_dict(state)
        fit(second, stream[stop:])
        same(second.state_dict(), whole.state_dict())
        same(state, before)
        assert second.best == whole.best


@pytest.mark.usefixtures("on_the_cpu")
def test_a_state_can_be_saved():
    congregation = points(0.96, -1.04, momentum=0.3)
    train(congregation, 9)
    saved = io.BytesIO()
    torch.save(congregation.state_dict(), saved)
    saved.seek(0)
    same(torch.load(saved, weights_only=True), congregation.state_dict())


def same(got, want):
    """Nested states, bit by bit."""
    assert type(got) is type(want)
    if isinstance(got, torch.Tensor):
        assert torch.equal(got, want)
    elif isinstance(got, dict):
        assert got.keys() == want.keys()
        for key in got:
            same(got[key], want[key])
    elif isinstance(got, list):
        for mine, other in zip(got, want, strict=True):
            same(mine, other)
    else:
        assert got == want


def test_buffers_belong_to_members():
    def made():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    congregation = fm.optim.Congregation(made, 2, 0.1, loss=mse)
    models = [congregation.member(i) for i in range(2)]
    stream = batches(3)
    fit(congregation, stream)
    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x, y in stream:
            optimizer.zero_grad()
            mse(model(x), y).backward()
            optimizer.step()
        got = congregation.member(i)
        torch.testing.assert_close(got.state_dict(), model.state_dict())
    congregation._restart(1)
    assert congregation.member(1)[1].num_batches_tracked == 0
    assert congregation.member(0)[1].num_batches_tracked == 3


def test_frozen_parameters_stay():
    def made():
        model = network()
        model[0].requires_grad_(False)
        return model

    congregation = fm.optim.Congregation(made, 2, 0.1, loss=mse)
    before = [congregation.member(i) for i in range(2)]
    fit(congregation, batches(3))
    for i in range(2):
        got = congregation.member(i)
        assert torch.equal(got[0].weight, before[i][0].weight)
        assert not torch.equal(got[2].weight, before[i][2].weight)


def test_schedulers_and_closures():
    stream = batches(4)
    congregation = fm.optim.Congregation(network, 2, 0.1, loss=mse)
    other = copy.deepcopy(congregation.state_dict())
    schedule = torch.optim.lr_scheduler.ExponentialLR(congregation, 0.5)
    for x, y in stream:
        congregation.zero_grad()
        congregation.losses(x, y).sum().backward()
        congregation.step()
        schedule.step()
    second = fm.optim.Congregation(network, 2, torch.tensor(0.1), loss=mse)
    second.load_state_dict(other)
    for step, (x, y) in enumerate(stream):

        def closure(x=x, y=y):
            second.zero_grad()
            losses = second.losses(x, y)
            losses.sum().backward()
            return losses.detach()

        second.param_groups[0]["lr"] = 0.1 * 0.5**step
        assert second.step(closure).shape == (2,)
    for got, want in zip(
        second.member(1).parameters(), congregation.member(1).parameters(), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_congregations_side_by_side():
    """Each has its own stream and its own comparisons."""
    both = fm.optim.Congregation(network, 3, 0.1, loss=mse, congregations=2)
    x = torch.randn(2, 5, 3)
    y = torch.randn(2, 5, 1)
    losses = both.losses(x, y).detach()
    want = [
        [mse(both.member(i, c)(x[c]), y[c]).item() for i in range(3)] for c in range(2)
    ]
    torch.testing.assert_close(losses, torch.tensor(want))
    both.step()
    assert both.costs.shape == both.ages.shape == both.restarts.shape == (2, 3)
    two = points(0.96, -1.04, -1.04, 0.96, congregations=2)
    train(two, 9, torch.zeros(2, 1))
    assert two.restarts.tolist() == [[1, 0], [0, 1]]
    assert two.bests == [1, 0]
    with pytest.raises(ValueError, match="have that leading dimension"):
        both.losses(x[:1], y[:1])


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.empty(()).uniform_(-10, 10))

    def forward(self, x):
        return torch.sin(self.a * x)


def success(members, period=None, repetitions=100):
    """Share of congregations that find a = 2 for f = sin(a x), from a in [-10, 10]."""
    congregation = fm.optim.Congregation(
        Sine,
        members,
        lr=0.1,
        loss=mse,
        tau=0.02,
        period=period,
        clip=(-10, 10),
        congregations=repetitions,
    )
    noise = torch.Generator().manual_seed(5)
    for _ in range(1500):
        x = torch.empty(repetitions, 16, device="cpu").uniform_(-3, 3, generator=noise)
        x = x.to(congregation.param_groups[0]["params"][0].device)
        congregation.zero_grad()
        congregation.losses(x, torch.sin(2 * x)).sum().backward()
        congregation.step()
    best = [
        congregation.member(b, c).a.item() for c, b in enumerate(congregation.bests)
    ]
    return sum(abs(a - 2) < 0.2 for a in best) / repetitions


@pytest.mark.slow
def test_more_members_find_the_minimum_more_often():
    """Here .10, .50, .87, clocked .65; standard error at most .05."""
    one, two, four = (success(members) for members in (1, 2, 4))
    assert one + 0.2 < two
    assert two + 0.2 < four
    assert success(4, period=750) + 0.1 < four


def test_step_needs_losses():
    congregation = points(0.0, 1.0)
    with pytest.raises(RuntimeError, match=r"Call losses\(inputs, targets\)"):
        congregation.step()
    train(congregation)
    with pytest.raises(RuntimeError, match="of this step"):
        congregation.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members must be at least 1"),
        ({"congregations": 0}, "congregations must be at least 1"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"margin": -1.0}, "margin must be"),
        ({"check": 0}, "check must be"),
        ({"period": 0}, "period must be"),
        ({"seed": -1}, "seed must be"),
        ({"members": 2.5}, "members must be an integer, got 2.5"),
        ({"congregations": 1.5}, "congregations must be an integer"),
        ({"check": 2.5}, "check must be an integer"),
        ({"period": 2.5}, "period must be an integer"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"clip": (1.0, -1.0)}, "clip must be"),
        ({"make_model": nn.Identity}, "nothing to train"),
    ],
)
def test_arguments_are_checked(options, message):
    settings = {"make_model": Point, "members": 2, "lr": 0.1, "loss": wells, **options}
    with pytest.raises(ValueError, match=message):
        fm.optim.Congregation(**settings)


def test_other_errors():
    congregation = fm.optim.Congregation(
        network, 2, 0.1, loss=nn.MSELoss(reduction="none")
    )
    with pytest.raises(ValueError, match=r"of shape \(8, 1\)"):
        congregation.losses(*batches(1)[0])
    with pytest.raises(ValueError, match="got member 2"):
        congregation.member(2)
    state = points(1.0, 2.0).state_dict()
    with pytest.raises(
        ValueError, match=r"has 2 members in each of 1 .* here are 1 in"
    ):
        points(1.0).load_state_dict(state)
    with pytest.raises(ValueError, match="here are 1 in each of 2"):
        points(1.0, 2.0, congregations=2).load_state_dict(state)
    state.pop("members")
    with pytest.raises(ValueError, match="has no 'members'"):
        points(1.0, 2.0).load_state_dict(state)
