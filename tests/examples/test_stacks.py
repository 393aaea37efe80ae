"""Stacked replicas train as ordinary modules do, and not on each other."""

import pytest
import torch
import torch.nn.functional as F

from examples.common import measures, stacks, training
from examples.common.stacks import Stack

SIZES = (12, 9, 7, 4)
SEEDS = [3, 8, 5]
N = 60


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, SIZES[0], generator=generator)
    return x, torch.randint(0, SIZES[-1], (N,), generator=generator)


def trained(seeds, rates, problem, steps, momentum=0.0):
    x, y = problem
    stack = Stack.drawn(SIZES, seeds)
    orders = training.Orders(seeds, N)
    velocities = [torch.zeros_like(p) for p in stack.params]
    done = 0
    while done < steps:
        for index in training.minibatches(orders, 8):
            loss = stacks.cross_entropy(stack(x[index]), y[index])
            grads = stack.grads(loss)
            stacks.sgd_step(stack.params, grads, rates, velocities, momentum)
            done += 1
    return stack


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_as_the_ordinary_loop(problem, momentum):
    x, y = problem
    rates = torch.tensor([0.05, 0.1, 0.02])
    stack = trained(SEEDS, rates, problem, 21, momentum)
    for place, seed in enumerate(SEEDS):
        model = stacks.make_mlp(SIZES, seed)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=float(rates[place]), momentum=momentum
        )
        orders = training.Orders([seed], N)
        for _ in range(3):
            for index in training.minibatches(orders, 8):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index[0]]), y[index[0]]).backward()
                optimizer.step()
        for got, want in zip(
            stack.module(place).parameters(), model.parameters(), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_replica_does_not_depend_on_its_stack(problem):
    rates = torch.tensor([0.05, 0.1, 0.02])
    together = trained(SEEDS, rates, problem, 14)
    alone = trained([8], rates[1:2], problem, 14)
    torch.testing.assert_close(together.flat()[1], alone.flat()[0])


def test_a_replica_that_diverges_spoils_no_other(problem):
    together = trained(SEEDS, torch.tensor([0.05, 1e30, 0.02]), problem, 14)
    alone = trained([3, 5], torch.tensor([0.05, 0.02]), problem, 14)
    assert not together.flat()[1].isfinite().all()
    torch.testing.assert_close(together.flat()[[0, 2]], alone.flat())


def test_modules_and_back(problem):
    x, y = problem
    stack = Stack.drawn(SIZES, SEEDS)
    again = Stack.of([stack.module(place) for place in range(3)])
    for p, q in zip(stack.params, again.params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    for place in range(3):
        model = stack.module(place)
        want = measures.cross_entropy_loss(model, (x, y))
        torch.testing.assert_close(stack.mean_loss(x, y)[place], want)
        right = (model(x).argmax(dim=1) == y).float().mean()
        torch.testing.assert_close(stack.accuracy(x, y)[place], right)


def test_squared_loss_is_that_of_modules(problem):
    x, y = problem
    stack = Stack.drawn(SIZES, SEEDS)
    got = stack.mean_loss(x, y, stacks.squared_loss)
    want = [measures.squared_error(stack.module(i), (x, y)) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(want).detach())


def test_epochs_are_permutations_and_go_on_when_replicas_leave():
    orders, whole = training.Orders(SEEDS, 20), training.Orders(SEEDS, 20)
    for _ in range(3):
        found = orders()
        assert (found.sort(dim=1).values == torch.arange(20)).all()
        whole()
    orders.kept(torch.tensor([0, 2]))
    assert torch.equal(orders(), whole()[[0, 2]])


def test_quench_stops_each_replica_at_the_target(problem):
    x, y = problem
    stack = Stack.drawn(SIZES, SEEDS)
    start = stack.mean_loss(x, y)
    target = float(start.min()) - 0.05
    before = stack.flat().clone()
    steps = training.quench(stack, x, y, 0.05, target, most=500)
    after = stack.mean_loss(x, y)
    assert (steps > 0).all()
    assert (after <= target).all()
    fewer = Stack.drawn(SIZES, SEEDS)  # with a step less, none was there
    found = training.quench(fewer, x, y, 0.05, target, most=int(steps.min()) - 1)
    assert found.tolist() == [-1, -1, -1]
    assert not torch.equal(before, stack.flat())
    again = stack.flat().clone()
    assert training.quench(stack, x, y, 0.05, target).tolist() == [0, 0, 0]
    assert torch.equal(again, stack.flat())


def test_quench_says_who_did_not_get_there(problem):
    x, y = problem
    stack = Stack.drawn(SIZES, SEEDS)
    losses = stack.mean_loss(x, y)
    target = float(losses.min()) + 1e-6
    steps = training.quench(stack, x, y, 1e-9, target, most=3)
    assert sorted(steps.tolist()) == [-1, -1, 0]


def test_finite_differences_of_a_smooth_loss_are_the_norm():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(),
                                torch.nn.Linear(6, 3)).double()  # fmt: skip
    x = torch.randn(30, 5, dtype=torch.float64)
    y = torch.randint(0, 3, (30,))
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    found = measures.finite_difference_norm(model, (x, y), 1e-3, products=400)
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(before, after)

    def loss(flat):
        torch.nn.utils.vector_to_parameters(flat, model.parameters())
        return measures.cross_entropy_loss(model, (x, y))

    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def functional(flat):
        parts = flat.split([s.numel() for s in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, named, x), y)

    exact = torch.autograd.functional.hessian(functional, before).norm()
    # Relative error of the root of a mean of 400 squares: about 1/sqrt(2 * 400 / 8).
    assert found == pytest.approx(float(exact), rel=0.4)
    assert abs(found / float(exact) - 1) < 4 / (2 * 400 / 20) ** 0.5
