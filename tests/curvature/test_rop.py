"""Products by tangents against double backward over the same graph."""

import re

import pytest
import torch
import torch.nn.functional as F
from bytes_held import held
from cases import CASES as MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastminima as fm
from fastminima.curvature._graph import GradientGraph
from fastminima.curvature._guard import differentiable
from fastminima.curvature.rop import EitherGraph, NotCovered, TangentGraph

from . import cases

NOT_COVERED = {"own function"}  # written in Python


class ByTangents(fm.Hessian):
    """The operator, with products made in the other way."""

    def _make(self, roots):
        return TangentGraph(roots, self._layout.parameters)


def graphs(loss, parameters):
    """Both graphs of `loss()`."""
    with differentiable(torch.device("cpu")):
        root = loss()
        return GradientGraph((root,), parameters), TangentGraph((root,), parameters)


def drawn(parameters):
    return [torch.randn_like(p) for p in parameters]


def compare(loss, parameters, rtol=1e-12, count=2):
    """Several products: the first is checked, the next leave out what nobody reads."""
    parameters = tuple(parameters)
    truth, found = graphs(loss, parameters)
    for _ in range(count):
        parts = drawn(parameters)
        want, got = truth.product(parts), found.product(parts)
        scale = max(float(w.norm()) for w in want if w is not None)
        assert scale > 0
        for w, g in zip(want, got, strict=True):
            zero = torch.zeros(())
            gap = (zero if w is None else w) - (zero if g is None else g)
            assert float(gap.norm()) <= rtol * scale
    for w, g in zip(truth.gradient(), found.gradient(), strict=True):
        torch.testing.assert_close(g, None if w is None else w.detach())


@pytest.mark.parametrize("case", MODELS, ids=[case.name for case in MODELS])
def test_same_as_double_backward(case):
    model, inputs = case.make()
    model.double()
    batch = [x.double() if x.is_floating_point() else x for x in inputs]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss():
        return case.losses(model, batch).mean()

    if case.name in NOT_COVERED:
        with pytest.raises(NotCovered):
            graphs(loss, tuple(parameters))
        return
    compare(loss, parameters)


@pytest.mark.parametrize("name", cases.CASES)
def test_same_operator(name):
    model, batch = cases.make(name)
    v = torch.randn(fm.Hessian(model, cases.loss, batch).shape[0], 3).double()
    want = fm.Hessian(model, cases.loss, batch) @ v
    torch.testing.assert_close(ByTangents(model, cases.loss, batch) @ v, want)
    several = cases.unequal(batch)
    want = fm.Hessian(model, cases.loss, several) @ v
    torch.testing.assert_close(ByTangents(model, cases.loss, several) @ v, want)


ACTIVATIONS = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x * 1, inplace=True),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "leaky": F.leaky_relu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "log sigmoid": F.logsigmoid,
    "tanh in place": lambda x: (x * 1).tanh_(),
    "exp": torch.exp,
    "log": lambda x: (x.square() + 1).log(),
    "sqrt": lambda x: (x.square() + 1).sqrt(),
    "rsqrt": lambda x: (x.square() + 1).rsqrt(),
    "power": lambda x: x**3,
    "reciprocal": lambda x: 1 / (x.square() + 1),
    "quotient": lambda x: x / (1 + x.square().sum(-1, keepdim=True)),
    "by one of its own": lambda x: x.sin() / x.exp().mean(),
    "times its own": lambda x: x * torch.sigmoid(x) * x.mean(0),
    "times a mask": lambda x: x * (x > 0),
    "softmax": lambda x: x.softmax(0) * x,
    "log softmax": lambda x: x.log_softmax(-1) * x,
    "norm": lambda x: F.normalize(x, dim=-1),
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "layer norm of two dims": lambda x: F.layer_norm(x.view(4, 2, 3), (2, 3)),
    "rms norm": lambda x: F.rms_norm(x, (6,)),
    "group norm": lambda x: F.group_norm(x, 2),
    "masked": lambda x: x.masked_fill(x > 0.5, -1.0).softmax(-1) * x,
    "joined": lambda x: torch.cat([x, x.sin(), x[:, :2]], 1),
    "cumulative": lambda x: x.cumsum(1) * x,
    "largest": lambda x: x.amax(1) * x.mean(1),
    "linear at the end": lambda x: x.sum(1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions(name):
    torch.manual_seed(0)
    first, last = nn.Linear(3, 6).double(), nn.Linear(3, 6).double()
    x = torch.randn(4, 3).double()
    act = ACTIVATIONS[name]
    parameters = [*first.parameters(), *last.parameters()]

    def weighed(y):
        # Differently in each place: layer norm's sums are constant.
        return (y * torch.linspace(0.5, 2, y.numel()).view(y.shape)).sum()

    compare(lambda: (weighed(act(first(x))) * weighed(act(last(x)))).sin(), parameters)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions(stride, dilation, groups):
    """Of images on both sides of what is small."""
    torch.manual_seed(0)
    for size, padding, kernel in (
        (3, 1, 3),
        (4, 2, 3),
        (5, 0, 1),
        (9, 1, 3),
        (13, 2, 5),
    ):
        if size + 2 * padding <= dilation * (kernel - 1):
            continue
        below = nn.Conv2d(2, 4, 1).double()
        layer = nn.Conv2d(
            *(4, 6, kernel, stride, padding, dilation), groups=groups
        ).double()
        x = torch.randn(3, 2, size, size).double()
        compare(
            lambda b=below, c=layer, x=x: c(b(x).tanh()).square().mean(),
            [*below.parameters(), *layer.parameters()],
        )


@pytest.mark.parametrize("kind", ["causal", "mask", "bool", "grouped", "full"])
def test_attention(kind):
    torch.manual_seed(0)
    q, k, v = (nn.Linear(6, width).double() for width in (12, 6, 6))
    x = torch.randn(3, 5, 6).double()
    options = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.randn(5, 5).double()},
        "bool": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(-1)},
        "grouped": {"enable_gqa": True},
        "full": {},
    }[kind]
    heads = 4 if kind == "grouped" else 2
    split = [heads, 2, 2]

    def loss():
        parts = [
            layer(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for layer, n in zip((q, k, v), split, strict=True)
        ]
        if kind != "grouped":
            parts[0] = parts[0][..., :3]
        return F.scaled_dot_product_attention(*parts, **options).square().mean()

    compare(loss, [p for layer in (q, k, v) for p in layer.parameters()])


def test_losses():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    x, y = torch.randn(6, 3).double(), torch.randint(4, (6,))
    weight = torch.rand(4).double()
    y[2] = -100  # ignored
    for loss in (
        lambda: F.cross_entropy(layer(x), y),
        lambda: F.cross_entropy(layer(x), y, weight, label_smoothing=0.1),
        lambda: F.mse_loss(layer(x).tanh(), x[:, :1].expand(6, 4)),
        lambda: F.binary_cross_entropy_with_logits(
            layer(x), x[:, :1].expand(6, 4).relu()
        ),
        lambda: F.huber_loss(layer(x).sin(), x[:, :1].expand(6, 4)),
        lambda: (
            F.cross_entropy(layer(x), y)
            + sum(p.square().sum() for p in layer.parameters())
        ),
        lambda: layer(x).logsumexp(1).mean(),
        lambda: (layer.weight.t() @ layer.weight).square().sum(),  # no data
    ):
        compare(loss, layer.parameters())


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (5, 1), (5, 4)])
def test_what_is_added_to_a_product(shape):
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(shape).double())
    weight = nn.Parameter(torch.randn(3, 4).double())
    x = torch.randn(5, 3).double()
    for turned in (False, True):
        if turned and len(shape) != 2:
            continue

        def loss(turned=turned):
            added = bias.t().contiguous().t() if turned else bias
            return torch.addmm(added, x, weight).sin().square().sum()

        compare(loss, [bias, weight])
    if shape == (5, 4):
        first, last = nn.Linear(5, 4).double(), nn.Parameter(torch.randn(4, 5).double())
        compare(
            lambda: torch.addmm(last.t(), x, weight).tanh().matmul(first.weight).sum(),
            [last, weight, first.weight],
        )


@pytest.mark.parametrize(
    "left_out", ["0.weight", "2.bias", "4.weight", "7", "8.weight"]
)
def test_frozen(left_out):
    """Whatever does not require a gradient, by itself or alone among its layer's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.GELU()),
        *(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 6), nn.LayerNorm(6)),
        nn.Linear(6, 2),
    ).double()
    x = torch.randn(5, 2, 4, 4).double()
    for only in (False, True):
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(left_out) == only)
        parameters = [p for p in model.parameters() if p.requires_grad]
        compare(lambda: model(x).square().sum().sqrt(), parameters)


def test_scaled_product():
    layer = nn.Linear(3, 4).double()
    x = torch.randn(5, 3).double()
    compare(
        lambda: (
            torch.addmm(layer.bias, x, layer.weight.t(), alpha=2, beta=3).sin().sum()
        ),
        layer.parameters(),
    )


def test_overwritten_tensors_are_noticed():
    torch.manual_seed(0)
    model, batch = cases.make("mlp")
    factor = torch.ones(3).double()

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]) * factor, batch[1])

    _, graph = graphs(lambda: loss(model, batch), tuple(model.parameters()))
    parts = drawn(tuple(model.parameters()))
    graph.product(parts)
    factor.mul_(2)
    with pytest.raises(RuntimeError, match=r"inplace operation.*MulBackward0"):
        graph.product(parts)
    v = torch.randn(38).double()
    mine, other = ByTangents(model, loss, batch), fm.Hessian(model, loss, batch)
    torch.testing.assert_close(mine @ v, other @ v)
    factor.mul_(2)
    torch.testing.assert_close(mine @ v, other @ v)


def test_parameters_of_two_dtypes():
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 2)
    x = torch.randn(5, 3).double()
    parameters = [*first.parameters(), *last.parameters()]
    compare(lambda: last(first(x).tanh().float()).square().mean(), parameters, 1e-5)


def test_single_precision():
    torch.manual_seed(0)
    model, batch = cases.make("attention", torch.float32)
    compare(lambda: cases.loss(model, batch), model.parameters(), rtol=2e-6)


def test_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)),
        nn.Softmax(-1),
    )
    x = torch.randn(32, 8)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    compare(loss, model.parameters(), rtol=0.05)


def test_products_are_apart():
    """One does not write over another, nor over the gradient."""
    torch.manual_seed(0)
    model, batch = cases.make("mlp")
    parameters = tuple(model.parameters())
    _, graph = graphs(lambda: cases.loss(model, batch), parameters)
    parts = drawn(parameters)
    kept = [*graph.gradient(), *graph.product(parts)]
    before = [t.clone() for t in kept]
    graph.product(drawn(parameters))
    for t, b in zip(kept, before, strict=True):
        torch.testing.assert_close(t, b, rtol=0, atol=0)
    again = graph.product(parts)
    for t, b in zip(again, before[len(parameters) :], strict=True):
        torch.testing.assert_close(t, b, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1.01, -1.0])
def test_hooks_are_noticed(scale):
    model, batch = cases.make("mlp")

    def loss():
        hidden = model[:2](batch[0])
        hidden.register_hook(lambda grad: scale * grad)
        return F.cross_entropy(model[2](hidden), batch[1])

    parameters = tuple(model.parameters())
    _, graph = graphs(loss, parameters)
    with pytest.raises(NotCovered, match="hook"):
        graph.product(drawn(parameters))


def test_a_small_gradient_is_no_hook():
    """Near a minimum the slope is rounding of what it is a sum of."""
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    layer = nn.Linear(5, 1)
    with torch.no_grad():
        y = layer(x) + torch.randn(64, 1)
        wide = torch.cat([x, torch.ones(64, 1)], 1).double()
        best = torch.linalg.lstsq(wide, y.double()).solution.float()
        layer.weight.copy_(best[:5].T)
        layer.bias.copy_(best[5])
    compare(lambda: (layer(x) - y).square().mean(), layer.parameters(), 1e-6, count=20)


class Detached(torch.autograd.Function):
    """The identity, in Python."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.detach()


def assigned(x):
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, 1:].exp()
    return out


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (Detached.apply, "DetachedBackward is no operation"),
        (lambda x: checkpoint(torch.exp, x, use_reentrant=False), "hooks"),
        (assigned, "CopySlices"),
        (lambda x: torch.addcmul(x, x.exp(), x.sin()), "Addcmul.* made from another"),
    ],
)
def test_not_covered(act, said):
    layer = nn.Linear(3, 4)
    x = torch.randn(5, 3)
    with pytest.raises(NotCovered, match=said):
        graphs(lambda: act(layer(x)).square().mean(), tuple(layer.parameters()))


class WhereRight(fm.Hessian):
    """The operator, by tangents where they are right."""

    def _make(self, roots):
        self.made = EitherGraph(roots, self._layout.parameters, GradientGraph)
        return self.made


def halved(model, batch):
    hidden = model[:2](batch[0])
    hidden.register_hook(lambda grad: 0.5 * grad)
    return F.cross_entropy(model[2](hidden), batch[1])


def checkpointed(model, batch):
    hidden = checkpoint(model[:2], batch[0], use_reentrant=False)
    return F.cross_entropy(model[2](hidden), batch[1])


@pytest.mark.parametrize("loss", [halved, checkpointed, cases.loss])
def test_gives_way(loss):
    model, batch = cases.make("mlp")
    mine, other = WhereRight(model, loss, batch), fm.Hessian(model, loss, batch)
    v = torch.randn(other.shape[0]).double()
    try:
        want = other @ v
    except ValueError as problem:  # hooked gradients are those of no loss
        with pytest.raises(ValueError, match=re.escape(str(problem)[:40])):
            mine @ v
    else:
        torch.testing.assert_close(mine @ v, want)
        torch.testing.assert_close(mine.gradient, other.gradient)
    assert (mine.made.reason is None) == (loss is cases.loss)


def test_several_roots_are_not_covered():
    layer = nn.Linear(3, 4)
    with pytest.raises(NotCovered, match="20 elements"):
        TangentGraph((layer(torch.randn(5, 3)),), tuple(layer.parameters()))


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_memory(kind):
    """A product holds no more at a time than one by double backward."""
    torch.manual_seed(0)
    model = {
        "mlp": lambda: nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
        ),
        "conv": lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), nn.Flatten()),
            nn.Linear(1352, 8),
        ),
        "attention": lambda: nn.Sequential(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(512, 8),
        ),
    }[kind]()
    shape = {"mlp": (512, 64), "conv": (8, 3, 32, 32), "attention": (8, 16, 32)}[kind]
    x, parameters = torch.randn(shape), tuple(model.parameters())
    parts = drawn(parameters)
    taken = []
    for graph in graphs(lambda: model(x).square().mean(), parameters):
        graph.product(parts)
        taken.append(held(lambda g=graph: list(g.product(parts))).most)
    assert taken[1] <= taken[0]
