"""SVAG: mean and variance of its gradient, its limit, and exact resumption."""

import copy
import itertools
import math

import pytest
import torch

import fastminima as fm


def move(gradients, l, lr=1.0):
    """How far one step goes, over lr / l: the combined gradient."""
    x = torch.zeros_like(gradients[0], requires_grad=True)
    svag = fm.optim.SVAG([x], lr, l)
    for gradient in gradients:
        x.grad = gradient.clone()
        svag.step()
    return -x.detach() * l / lr


@pytest.mark.parametrize("l", [1, 1.5, 2, 4, 16])
def test_mean_and_variance_by_enumeration(l, generator, device):
    """Over all pairs of batches of one sample: the mean, and l times the covariance."""
    gradients = torch.randn(
        6, 3, dtype=torch.float64, generator=generator(0), device=device
    )
    pairs = itertools.product(gradients, repeat=2)
    got = torch.stack([move(pair, l) for pair in pairs])
    torch.testing.assert_close(got.mean(0), gradients.mean(0))
    torch.testing.assert_close(
        got.T.cov(correction=0), l * gradients.T.cov(correction=0)
    )


def test_the_coefficients():
    g1, g2 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(move((g1, g2), 5), torch.tensor([2.0, -1.0]))


def train(optimizer, model, batches):
    for x, y in batches:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def problem(count):
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    x = torch.randn(count, 6, 4)
    return model, list(zip(x, x.sum(2, keepdim=True), strict=True))


def test_one_is_sgd_on_the_first_batch():
    model, batches = problem(12)
    other = copy.deepcopy(model)
    train(fm.optim.SVAG(model.parameters(), 0.1, 1), model, batches)
    train(torch.optim.SGD(other.parameters(), 0.1), other, batches[::2])
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(got, want)
    infinite = torch.full((2,), math.inf)
    assert torch.equal(move((torch.ones(2), infinite), 1), torch.ones(2))


@pytest.mark.parametrize("l", [1, 4])
def test_stationary_variance_on_a_quadratic(l, generator, device):
    """lr sigma^2 / 2 to first order for every l, exactly as an autoregression.

    x <- (1 - a) x - a xi with a = lr / l and var xi = l sigma^2 has the variance
    a l sigma^2 / (2 - a) = lr sigma^2 / (2 - lr / l).
    """
    lr, sigma, walkers = 0.1, 0.7, 20_000
    noise = generator(1)
    x = torch.zeros(walkers, dtype=torch.float64, requires_grad=True, device=device)
    svag = fm.optim.SVAG([x], lr, l)
    for _ in range(2 * l * 100):
        xi = torch.randn(walkers, dtype=x.dtype, generator=noise, device=device)
        x.grad = x.detach() + sigma * xi
        svag.step()
    got = x.detach().var().item() / (lr * sigma**2 / (2 - lr / l))
    assert abs(got - 1) < 4 * math.sqrt(2 / walkers)


def test_resuming_between_the_halves():
    model, batches = problem(20)
    other = copy.deepcopy(model)
    svag = fm.optim.SVAG(model.parameters(), 0.1, 3)
    train(svag, model, batches)
    for stop in (7, 8):
        half = copy.deepcopy(other)
        first = fm.optim.SVAG(half.parameters(), 0.1, 3)
        train(first, half, batches[:stop])
        state = copy.deepcopy(first.state_dict())
        second = fm.optim.SVAG(half.parameters(), 0.7, 2)
        second.load_state_dict(state)
        train(second, half, batches[stop:])
        for got, want in zip(half.parameters(), model.parameters(), strict=True):
            assert torch.equal(got, want)


def test_a_loaded_state_is_not_changed():
    x = torch.zeros(2, requires_grad=True)
    svag = fm.optim.SVAG([x], 0.1, 3)
    x.grad = torch.ones(2)
    svag.step()
    state = svag.state_dict()
    svag.load_state_dict(state)
    svag.step()
    assert torch.equal(state["state"][0]["first_grad"], torch.ones(2))
    assert not svag.state_dict()["state"]


def test_closure_is_called_twice():
    model, batches = problem(10)
    other = copy.deepcopy(model)
    train(fm.optim.SVAG(model.parameters(), 0.1, 3), model, batches)
    svag = fm.optim.SVAG(other.parameters(), 0.1, 3)
    stream = iter(batches)
    losses = []

    def closure():
        x, y = next(stream)
        svag.zero_grad()
        loss = (other(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss.detach()

    for _ in range(5):
        got = svag.step(closure)
        assert got.item() == pytest.approx(sum(losses[-2:]) / 2)
    for mine, want in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, want)
    svag.step()
    with pytest.raises(ValueError, match="first of this one was given"):
        svag.step(closure)


@pytest.mark.parametrize("reached", [(), (0,), (1,)])
def test_a_batch_that_does_not_reach_a_parameter(reached):
    x, other = (torch.zeros(2, requires_grad=True) for _ in range(2))
    svag = fm.optim.SVAG([x, other], 1.0, 5)
    for half in range(2):
        x.grad = torch.ones(2) if half in reached else None
        other.grad = torch.ones(2)
        svag.step()
    want = sum((2.0, -1.0)[half] for half in reached) / 5
    torch.testing.assert_close(-x.detach(), torch.full((2,), want))
    torch.testing.assert_close(-other.detach(), torch.full((2,), 0.2))


def test_groups_and_schedulers():
    x, other = (torch.zeros(2, requires_grad=True) for _ in range(2))
    rate = torch.tensor(0.5)
    groups = [{"params": [x]}, {"params": [other], "lr": rate}]
    svag = fm.optim.SVAG(groups, 1.0, 2)
    halving = torch.optim.lr_scheduler.ExponentialLR(svag, 0.5)
    for p in (x, other):
        p.grad = torch.ones(2)
    for want in (-0.5, -0.75):
        svag.step()
        svag.step()
        halving.step()
        torch.testing.assert_close(x.detach(), torch.full((2,), want))
        torch.testing.assert_close(other.detach(), torch.full((2,), want / 2))


@pytest.mark.parametrize(
    ("groups", "lr", "l", "message"),
    [
        ({}, -1.0, 2, "lr must be at least 0 and finite, got -1.0"),
        ({}, 0.1, 0.5, "l must be at least 1 and finite, got 0.5"),
        ({"l": 3}, 0.1, 2, "have one l, got 3 and 2"),
    ],
)
def test_arguments_are_checked(groups, lr, l, message):
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        fm.optim.SVAG([{"params": [x], **groups}], lr, l)


def test_refusals():
    x = torch.zeros(2, requires_grad=True)
    svag = fm.optim.SVAG([x], 0.1, 2)
    x.grad = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        svag.step()
    x.grad = torch.ones(2)
    svag.step()
    with pytest.raises(ValueError, match="between the two halves"):
        svag.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})


def test_a_closure_without_a_loss():
    x = torch.zeros(2, requires_grad=True)
    svag = fm.optim.SVAG([x], 1.0, 5)

    def closure():
        svag.zero_grad()
        x.sum().backward()

    assert svag.step(closure) is None
    torch.testing.assert_close(-x.detach(), torch.full((2,), 0.2))


def test_a_closure_that_raises_leaves_no_half_step():
    """The data end in the second half; the next epoch begins with a whole step."""
    x = torch.zeros(1, requires_grad=True)
    svag = fm.optim.SVAG([x], 1.0, 5)  # g = 2 g1 - g2
    stream = iter([100.0])

    def closure():
        slope = next(stream)
        svag.zero_grad()
        loss = slope * x.sum()
        loss.backward()
        return loss.detach()

    before = copy.deepcopy(svag.state_dict())
    with pytest.raises(StopIteration):
        svag.step(closure)
    assert x.item() == 0
    assert svag.state_dict() == before
    stream = iter([3.0, 1.0])
    svag.step(closure)
    assert x.item() == pytest.approx(-1)


def test_a_group_added_after_loading_has_the_loaded_l():
    def made(l):
        return fm.optim.SVAG([torch.zeros(1, requires_grad=True)], 0.1, l)

    svag = made(4)
    svag.load_state_dict(made(9).state_dict())
    for more in ({}, {"l": 9}):
        svag.add_param_group({"params": [torch.zeros(1, requires_grad=True)], **more})
    assert [group["l"] for group in svag.param_groups] == [9, 9, 9]
    with pytest.raises(ValueError, match="have one l, got 4 and 9"):
        svag.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "l": 4})
