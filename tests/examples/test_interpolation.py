"""Along the line: against quadratics of which everything is known, and on networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.common import interpolation, networks
from examples.common.interpolation import along_line, between, curvature_along


class Bowl(nn.Module):
    """Half theta^T A theta + x for every sample x."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x):
        matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        return x + self.theta @ matrix @ self.theta / 2


def given(scores, y):
    return scores[:, 0]


X = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
Y = torch.zeros(3, dtype=torch.int64)
FIRST, SECOND = Bowl([1.0, 0.0]), Bowl([-1.0, 2.0])
# delta = (-2, 2): delta^T A delta = 12; A theta at 0 is (3, 1), the slope -4.
BEND, SLOPE, HEIGHT = 12.0, -4.0, 1.5 + 3.0


def test_losses_of_a_quadratic():
    alphas = (-1.0, 0.0, 0.25, 1.0, 2.0)
    line = along_line(FIRST, SECOND, alphas, {"a": (X, Y)}, loss=given, piece=2)["a"]
    want = [HEIGHT + SLOPE * a + BEND * a**2 / 2 for a in alphas]
    assert line.losses == pytest.approx(want, rel=1e-12)
    assert line.alphas == alphas
    assert line.accuracies == (1.0,) * 5


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_curvature_of_a_quadratic(method):
    got = curvature_along(
        FIRST, SECOND, (X, Y), at=(-1, 0, 1), method=method, loss=given, piece=2
    )
    assert got == pytest.approx((BEND,) * 3, rel=1e-9)


def network(seed, dropout=0.4):
    x = torch.zeros(1, 1, 8, 8)
    model = networks.make("vgg5", seed, x, classes=3, dropout=dropout).double()
    model.train()
    with torch.no_grad():  # statistics that differ from those of a new network
        for _ in range(3):
            model(images(seed + 5))
    return model


def images(seed, count=48):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64) + 0.3


def labels(count=48):
    return torch.arange(count) % 3


def test_interpolated_ends_are_the_networks():
    first, second = network(0), network(1)
    x, y = images(9), labels()
    line = along_line(
        first, second, (0.0, 1.0), {"a": (x, y)}, statistics="interpolated", piece=7
    )["a"]
    for at, model in enumerate((first, second)):
        copied = copy.deepcopy(model).eval()
        scores = copied(x).detach()
        assert line.losses[at] == pytest.approx(float(F.cross_entropy(scores, y)))
        right = (scores.argmax(dim=1) == y).double().mean()
        assert line.accuracies[at] == pytest.approx(float(right))


def test_re_estimated_statistics_are_means_over_batches():
    model = between(network(0), network(1), 0.3)
    x = images(2, count=50)  # the last 2 are no whole batch
    conv = model[0]
    got = interpolation.re_estimate(copy.deepcopy(model), x, piece=12)
    batches = [conv(part).detach() for part in x[:48].split(12)]
    torch.testing.assert_close(
        got[1].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    )
    torch.testing.assert_close(
        got[1].running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    )
    assert got[1].momentum == 0.1
    assert not any(m.training for m in got.modules())
    one = interpolation.re_estimate(copy.deepcopy(model), x[:5], piece=12)
    torch.testing.assert_close(
        one[1].running_mean, conv(x[:5]).mean((0, 2, 3)).detach()
    )


def test_curvature_is_that_of_the_loss_along_the_line():
    """Exact second derivatives against small differences at frozen statistics."""
    first, second = network(0), network(1)
    x, y = images(3), labels()
    # Ends close to each other, so that no ReLU changes within the step.
    second = between(first, second, 1e-3)
    for alpha in (0.0, 1.0):
        model = interpolation.re_estimate(between(first, second, alpha), x, 24)
        losses = []
        for h in (-0.05, 0.0, 0.05):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for p, a, b in zip(
                    moved.parameters(),
                    first.parameters(),
                    second.parameters(),
                    strict=True,
                ):
                    p.add_(h * (b - a))
            losses.append(F.cross_entropy(moved(x), y).item())
        want = (losses[0] - 2 * losses[1] + losses[2]) / 0.05**2
        (got,) = curvature_along(first, second, (x, y), at=(alpha,), images=x, piece=24)
        assert got == pytest.approx(want, rel=1e-3)


def test_differences_are_those_of_the_line():
    first, second = network(0), network(1)
    x, y = images(3), labels()
    losses = along_line(
        first, second, (0.9, 1.0, 1.1), {"": (x, y)}, images=x, piece=24
    )[""].losses
    got = curvature_along(
        first,
        second,
        (x, y),
        at=(1.0,),
        method="difference",
        step=0.1,
        images=x,
        piece=24,
    )
    want = (losses[0] - 2 * losses[1] + losses[2]) / 0.01
    assert got == pytest.approx((want,), rel=1e-6)


@pytest.mark.parametrize("statistics", interpolation.STATISTICS)
def test_changes_nothing(statistics):
    first, second = network(0), network(1)
    second.eval()
    first(images(1)).sum().backward()
    before = [copy.deepcopy(m.state_dict()) for m in (first, second)]
    grads = [p.grad.clone() for p in first.parameters()]
    torch.manual_seed(0)
    options = {"images": images(2), "statistics": statistics, "piece": 24}
    data = (images(3), labels())
    one = along_line(first, second, (-1.0, 0.5, 2.0), {"a": data}, **options)
    curvature_along(first, second, data, **options)
    drawn = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), drawn)
    assert one == along_line(first, second, (-1.0, 0.5, 2.0), {"a": data}, **options)
    assert first.training and not second.training
    for model, state in zip((first, second), before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
    for p, grad in zip(first.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_a_negative_variance_is_zero():
    first, second = network(0), network(1)
    with torch.no_grad():
        second[1].running_var.zero_()
    assert float(between(first, second, 2.0)[1].running_var.max()) == 0


def test_mistakes_are_refused():
    first, second = network(0), network(1)
    data = (images(0), labels())
    with pytest.raises(ValueError, match="got None"):
        along_line(first, second, (0.5,), {"a": data})
    with pytest.raises(ValueError, match="'running'"):
        along_line(first, second, (0.5,), {"a": data}, statistics="running")
    with pytest.raises(ValueError, match="'third'"):
        curvature_along(first, second, data, method="third")
    with pytest.raises(ValueError, match="differ in bias, weight"):
        between(nn.Linear(2, 3), nn.Linear(2, 4), 0.5)
