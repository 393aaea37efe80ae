"""Critical sharpness: brackets that hold, few evaluations, a model left as it was."""

import math

import pytest
import torch
from torch import nn

import fastminima as fm


class Bowl(nn.Module):
    """A parameter whose loss is quadratic."""

    def __init__(self, matrix, point):
        super().__init__()
        self.point = nn.Parameter(point)
        self.register_buffer("matrix", matrix)

    def forward(self, _):
        return 0.5 * self.point @ self.matrix @ self.point


def bowl(seed, size, device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    point = torch.randn(size, generator=generator, dtype=torch.float64)
    return Bowl((root @ root.T).to(dtype), point.to(dtype)).to(device)


def value_of(model, batch):
    return model(batch)


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


@pytest.fixture
def classifier(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    return model, (torch.randn(200, 20), torch.randint(10, (200,)))


def grown(model, loss, batch, direction, eta):
    """How much larger the loss is after a step."""
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        start = loss(model, batch).double()
        for p, part in zip(model.parameters(), direction, strict=True):
            p.sub_(part, alpha=eta)
        found = loss(model, batch).double() - start
        for p, kept in zip(model.parameters(), before, strict=True):
            p.copy_(kept)
    return float(found)


@pytest.mark.parametrize("start", [None, 1e-6, 1.0, 1e5])
@pytest.mark.parametrize("size", [1, 2, 40])
def test_of_a_quadratic_loss(size, start, device):
    for seed in range(10):
        model = bowl(seed, size, device)
        g = (model.matrix @ model.point).detach()
        truth = float(g @ model.matrix @ g / (g @ g))
        found = fm.critical_sharpness(model, value_of, None, start=start)
        assert found.converged and found.evaluations <= 12
        assert found.lower <= truth <= found.upper <= 1.0501 * found.lower
        assert found.lower <= found.value <= found.upper
        assert found.learning_rate == pytest.approx(2 / found.value)


def test_along_any_direction(device):
    model = bowl(0, 30, device)
    g = (model.matrix @ model.point).detach()
    u = torch.linspace(-1, 1, 30, dtype=torch.float64).to(device)
    u = u * torch.sign(u @ g)
    truth = float(u @ model.matrix @ u / (g @ u))
    for direction in (u, [u], {"point": u}):
        found = fm.critical_sharpness(model, value_of, None, direction)
        assert found.lower <= truth <= found.upper and found.converged
        assert found.evaluations <= 12


def test_within_an_autocast(classifier, device):
    """Casts of weights are those of each point, and then of the present one again."""
    model, (x, y) = classifier
    batch = x.to(device), y.to(device)
    plain = fm.critical_sharpness(model, cross_entropy, batch)
    with torch.autocast(device.type, torch.bfloat16):
        before = model(batch[0])
        found = fm.critical_sharpness(model, cross_entropy, batch)
        after = model(batch[0])
    assert found.value == pytest.approx(plain.value, rel=0.1)
    assert torch.equal(before, after)


def test_few_evaluations_along_a_run(classifier):
    """As Kalra et al. count them, and without a gradient."""
    model, batch = classifier
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    last, evaluations = None, []
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        direction = [p.grad for p in model.parameters()]
        last = fm.critical_sharpness(model, cross_entropy, batch, direction, start=last)
        evaluations.append(last.evaluations)
        assert last.converged
        for eta, is_larger in ((2 / last.lower, True), (2 / last.upper, False)):
            grows = grown(model, cross_entropy, batch, direction, eta) > 0
            assert grows == is_larger
        optimizer.step()
    assert sorted(evaluations)[15] <= 5 and max(evaluations) <= 8


def test_between_a_forward_and_a_backward_pass(classifier):
    model, batch = classifier
    loss = cross_entropy(model, batch)
    want = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert fm.critical_sharpness(model, cross_entropy, batch).converged
    loss.backward()
    for p, g in zip(model.parameters(), want, strict=True):
        assert torch.equal(p.grad, g)


class Noisy(nn.Module):
    """Dropout and a normalisation that counts."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(20, 16), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        return self.last(nn.functional.dropout(self.norm(self.first(x)).relu(), 0.5))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(classifier, device, fails):
    _, batch = classifier
    model = Noisy().to(device)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    calls = []

    def loss(model, batch):
        calls.append(1)
        if fails and len(calls) == 4:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            fm.critical_sharpness(model, loss, batch)
    else:
        assert fm.critical_sharpness(model, loss, batch).converged
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_where_no_second_derivative_is(device):
    """Of attention in its fast form, in bfloat16."""
    torch.manual_seed(1)
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).to(device)
    model = model.bfloat16()
    x = torch.randn(4, 6, 16).bfloat16()

    def loss(model, x):
        return model(x).float().square().mean() + model(x.flip(1)).float().mean()

    found = fm.critical_sharpness(model, loss, x)
    assert found.value > 0 and found.lower < found.upper


def test_what_is_no_number_counts_as_larger(device):
    model = nn.Linear(1, 1, bias=False).to(device)
    with torch.no_grad():
        model.weight.fill_(2.0)

    def loss(model, _):  # no number from zero on
        return (model.weight.sum() - 1.5).log().negative() * -1

    found = fm.critical_sharpness(model, loss, None, [torch.ones(1, 1)], start=0.1)
    assert found.learning_rate == pytest.approx(0.5, rel=0.05)
    assert math.isfinite(found.value)


def test_a_loss_that_only_rounds(device):
    """Losses that differ in their last place alone are not called converged."""
    model = bowl(0, 5, device, torch.float32)

    def loss(model, _):
        return 1e-6 * model(None) + 100.0

    try:
        found = fm.critical_sharpness(model, loss, None)
    except ValueError as error:
        assert "does not grow" in str(error)
    else:
        assert not found.converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rtol": 0.0}, "rtol"),
        ({"max_evaluations": 2}, "max_evaluations"),
        ({"start": -1.0}, "start"),
        ({"start": math.inf}, "start"),
        ({"direction": torch.zeros(5)}, "largest element of the direction is 0"),
        ({"direction": torch.full((5,), math.nan)}, "largest element"),
        ({"direction": torch.ones(4)}, r"vector \[5\]"),
        ({"direction": {"other": torch.ones(5)}}, "lacks"),
        ({"direction": [torch.ones(2)]}, "not shaped"),
        ({"loss": lambda model, batch: model.point}, "scalar"),
        ({"loss": lambda model, batch: model(batch) * math.nan}, "is nan"),
    ],
)
def test_errors(change, message, device):
    model = bowl(0, 5, device, torch.float32)
    given = {"loss": value_of, **change}
    if isinstance(given.get("direction"), torch.Tensor):
        given["direction"] = given["direction"].to(device)
    with pytest.raises(ValueError, match=message):
        fm.critical_sharpness(model, given.pop("loss"), None, **given)


def test_a_direction_that_goes_down_for_ever(device):
    model = nn.Linear(1, 1, bias=False).to(device)

    def loss(model, _):
        return model.weight.sum()

    with pytest.raises(ValueError, match="does not grow"):
        fm.critical_sharpness(model, loss, None, [torch.ones(1, 1)])


def test_what_it_says():
    found = fm.CriticalSharpness(2.0, 1.9, 2.1, 1.0, 4, True)
    assert repr(found) == "CriticalSharpness(2 in [1.9, 2.1], 4 evaluations)"
