"""Parts, sums, multiples and preconditioned forms of operators, against dense ones."""

import math

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.theory import edge_of_stability


def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


@pytest.fixture
def problem(device):
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 3), nn.Tanh())
    model = nn.Sequential(*layers, nn.Linear(3, 2)).double().to(device)
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    return model, (x.to(device), y.to(device))


@pytest.fixture
def hessian(problem):
    return fm.Hessian(problem[0], loss, problem[1])


def dense(operator):
    size = operator.shape[0]
    eye = torch.eye(size, dtype=operator.dtype, device=operator.device)
    return operator @ eye


def test_steps_of_an_optimizer_on_a_device_are_not_waited_for():
    """Of fused and capturable ones; nothing can be read from "meta" at all."""
    model = nn.Linear(2, 1, device="meta")
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        step = torch.zeros((), dtype=torch.float32, device="meta")
        optimizer.state[p] = {"step": step, "exp_avg_sq": torch.zeros_like(p)}
    assert fm.preconditioner(model, optimizer).device.type == "meta"


def test_sums_and_multiples(problem, hessian):
    model, batch = problem
    covariance = fm.GradientCovariance(
        model, lambda m, b: (m(b[0]) - b[1]).square().mean(1), batch
    )
    H, C = dense(hessian), dense(covariance)
    combined = 2 * hessian - covariance * 0.5 + -hessian
    torch.testing.assert_close(dense(combined), H - 0.5 * C)
    assert combined.names == hessian.names
    pairs = fm.top_eigenpairs(combined)
    truth = torch.linalg.eigvalsh(H - 0.5 * C)[-1]
    assert pairs.converged
    assert float(pairs.values[0]) == pytest.approx(float(truth), rel=1e-2)


@pytest.mark.parametrize(
    ("chosen", "places"),
    [
        (["0"], [0, 1]),
        (["2"], [2, 3]),
        (["2.0.bias", "0.weight"], [0, 3]),
        (["3", "0.bias"], [1, 4, 5]),
    ],
)
def test_blocks(hessian, chosen, places):
    whole = dense(hessian)
    parts = torch.arange(len(whole)).split(list(hessian.sizes))
    index = torch.cat([parts[place] for place in places]).to(whole.device)
    block = hessian.block(*chosen)
    torch.testing.assert_close(dense(block), whole[index][:, index])
    assert block.names == tuple(hessian.names[place] for place in places)
    torch.testing.assert_close(block.gradient, hessian.gradient[index])
    truth = float(torch.linalg.eigvalsh(whole[index][:, index])[-1])
    found = fm.top_eigenpairs(block)
    assert float(found.values[0]) == pytest.approx(truth, rel=1e-2)
    twice = (2 * hessian).block(*chosen).block(block.names[0])
    size = block.sizes[0]
    first = index[:size] if block.names[0] == hessian.names[places[0]] else index
    torch.testing.assert_close(dense(twice), 2 * whole[first][:, first])


def test_a_block_for_each_layer(hessian):
    blocks = hessian.blocks()
    assert list(blocks) == ["0", "2.0", "3"]
    assert sum(b.shape[0] for b in blocks.values()) == hessian.shape[0]
    total = sum(fm.trace(b, products=100).value for b in blocks.values())
    assert total == pytest.approx(float(dense(hessian).trace()))


def test_preconditioned(hessian):
    H = dense(hessian)
    diagonal = torch.linspace(0.1, 3, len(H)).to(H)
    found = hessian.preconditioned(diagonal)
    half = diagonal.rsqrt()
    torch.testing.assert_close(dense(found), half[:, None] * H * half)
    values = torch.linalg.eigvals(H / diagonal[:, None]).real
    pairs = fm.top_eigenpairs(found)
    assert float(pairs.values[0]) == pytest.approx(float(values.max()), rel=1e-2)


RATE = 1e-2
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=RATE),
    "AdamW": lambda p: torch.optim.AdamW(
        p, lr=RATE, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0
    ),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=RATE, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=RATE),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=RATE),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_optimizers_divide_by(problem, make):
    """The step that was taken, times it, is the gradient, or the mean of gradients."""
    model, batch = problem
    optimizer = make(model.parameters())
    for _ in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    taken = torch.cat(
        [
            ((old - p.detach()) / RATE).flatten()
            for old, p in zip(before, model.parameters(), strict=True)
        ]
    )
    by = [optimizer.state[p].get("exp_avg", p.grad) for p in model.parameters()]
    want = torch.cat([x.flatten() for x in by])
    divisor = fm.preconditioner(model, optimizer)
    torch.testing.assert_close(taken * divisor, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda H: H.block("nine"), "No trainable parameter is named"),
        (lambda H: H.block("0") + H, "same parameters"),
        (lambda H: H * math.inf, "finite"),
        (lambda H: H.preconditioned(torch.ones(2).double()), "diagonal must be a"),
        (
            lambda H: H.preconditioned(torch.zeros(H.shape[0]).to(H.device)),
            "positive and finite",
        ),
        (lambda H: H.block("0") @ torch.ones(3), "cannot multiply"),
    ],
)
def test_errors(hessian, change, message):
    with pytest.raises(ValueError, match=message):
        change(hessian)


def test_optimizers_that_are_not_known(problem):
    model, batch = problem
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=r"no state for '0\.weight'"):
        fm.preconditioner(model, adam)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss(model, batch).backward()
    sgd.step()
    with pytest.raises(ValueError, match="What SGD divides by is not known"):
        fm.preconditioner(model, sgd)


def test_it_says_what_it_is(hessian):
    size = hessian.shape[0]
    assert repr(hessian + hessian) == f"Combination({size} x {size})"
    assert repr(hessian.block("3")) == "Block(8 x 8)"


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("is_averaged", [False, True])
def test_edge_of_stability(momentum, is_averaged):
    """Of `torch.optim.SGD` on a bowl: below it comes to rest, above it does not."""
    dampening = momentum if is_averaged else 0.0
    edge = edge_of_stability(0.1, momentum, dampening)
    for share, is_stable in ((0.98, True), (1.02, False)):
        w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=momentum, dampening=dampening)
        for _ in range(3000):
            optimizer.zero_grad()
            (0.5 * share * edge * w.square()).sum().backward()
            optimizer.step()
            if abs(float(w.detach())) > 1e6:
                break
        assert (abs(float(w.detach())) < 1e-3) == is_stable


def test_products_are_counted_below(problem, hessian):
    """With those by which the operators compare themselves."""
    model, batch = problem
    other = fm.Hessian(model, loss, batch)
    alone = fm.top_eigenpairs(hessian)
    both = fm.top_eigenpairs(fm.Hessian(model, loss, batch) + other)
    assert alone.products and both.products > alone.products
    assert both.noise < 1e-12 and both.converged


def test_what_rounds_below_rounds_above(device):
    """A preconditioned matrix in bfloat16 is as little symmetric as the one below."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).to(device)
    batch = torch.randn(40, 6).to(device), torch.randn(40, 1).to(device)

    def rounded(model, batch):
        with torch.autocast(device.type, torch.bfloat16):
            found = model(batch[0])
        return (found.float() - batch[1]).square().mean()

    H = fm.Hessian(model, rounded, batch)
    diagonal = torch.linspace(0.5, 2, H.shape[0]).to(device)
    found = fm.top_eigenpairs(H.preconditioned(diagonal), rtol=0.1)
    exact = fm.top_eigenpairs(fm.Hessian(model, loss, batch).preconditioned(diagonal))
    assert float(found.values[0]) == pytest.approx(float(exact.values[0]), rel=0.1)
