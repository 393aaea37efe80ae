"""Operators that are not symmetric, or lack a derivative, are refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastminima as fm
from fastminima.curvature import SymmetryWatch

from . import oracles
from .cases import loss, losses, make, output_loss, outputs


def ones(operator):
    return torch.ones(operator.shape[0], dtype=operator.dtype, device=operator.device)


class Once(torch.autograd.Function):
    """A square whose backward may not be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x


class Unit(torch.autograd.Function):
    """x / |x|, whose backward takes the length for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm(dim=-1, keepdim=True)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        length = x.norm(dim=-1, keepdim=True).detach()
        y = x / length
        return (grad - y * (grad * y).sum(-1, keepdim=True)) / length


class Soft(torch.autograd.Function):
    """A softmax that detaches half of its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, grad):
        y = ctx.saved_tensors[0].softmax(-1)
        return y * (grad - (grad * y.detach()).sum(-1, keepdim=True))


class Doubled(torch.autograd.Function):
    """A sine with a backward of its own backward, which is wrong."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return DoubledBackward.apply(grad, *ctx.saved_tensors)


class DoubledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return grad * x.cos()

    @staticmethod
    def backward(ctx, second):
        grad, x = ctx.saved_tensors
        return 1.1 * second * x.cos(), -second * grad * x.sin()


class Host(torch.autograd.Function):
    """A square computed by NumPy."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().cpu().numpy() ** 2).to(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * grad.cpu().numpy() * x.cpu().numpy()).to(x)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def two_layers(device, middle, dtype=torch.float64):
    torch.manual_seed(4)
    layers = nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, 3)
    model = nn.Sequential(*layers).to(device, dtype)
    x = torch.randn(12, 4, dtype=dtype, device=device)
    return model, (x, torch.randint(3, (12,), device=device))


def clipped(x):
    if x.requires_grad:
        x.register_hook(lambda g: g.clamp(-1e-3, 2e-3))
    return x


ASYMMETRIC = {
    "hook": clipped,
    "length taken for constant": Unit.apply,
    "half of softmax": Soft.apply,
    "wrong double backward": Doubled.apply,
}
SOLVERS = {
    "eigenpairs": lambda H: fm.top_eigenpairs(H),
    "power": lambda H: fm.top_eigenpairs(H, method="power"),
    "several": lambda H: fm.top_eigenpairs(H, 3),
    "trace": lambda H: fm.trace(H, 20),
    "exact trace": lambda H: fm.trace(H, 1000),
    "norm": lambda H: fm.frobenius_norm(H, 20),
    "density": lambda H: fm.spectral_density(H, steps=8),
    "matrix": lambda H: H @ torch.eye(H.shape[0], dtype=H.dtype, device=H.device),
    "columns": lambda H: [H @ torch.randn_like(ones(H)) for _ in range(4)],
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ASYMMETRIC)
def test_asymmetric_operators_are_refused(name, solver, device):
    model, batch = two_layers(device, Call(ASYMMETRIC[name]))
    H = fm.Hessian(model, loss, batch)
    with pytest.raises(ValueError, match=r"Hessian is not symmetric.*hooks"):
        SOLVERS[solver](H)
    parts = fm.Hessian(model, loss, [batch, batch])
    with pytest.raises(ValueError, match="not symmetric"):
        SOLVERS[solver](parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_asymmetry_is_seen_in_narrow_types(dtype, device):
    model, batch = two_layers(device, Call(Doubled.apply), dtype)
    named = r"not symmetric.*torch.autograd.Function here: Doubled"
    with pytest.raises(ValueError, match=named):
        fm.top_eigenpairs(fm.Hessian(model, loss, batch))
    with pytest.raises(ValueError, match="not symmetric"):
        fm.SharpnessProbe(model, loss)(batch)


def test_matrices_of_others(device):
    matrix = torch.randn(30, 30, dtype=torch.float64, device=device)
    for solver in ("eigenpairs", "power", "several", "trace", "density", "exact trace"):
        with pytest.raises(ValueError, match="type Tensor is not symmetric"):
            SOLVERS[solver](matrix)
        SOLVERS[solver](matrix + matrix.T)
    almost = matrix + matrix.T
    almost[0, 1] += 1e-3
    with pytest.raises(ValueError, match="not symmetric"):
        fm.trace(almost)


@pytest.mark.parametrize("cls", ["Hessian", "GaussNewton", "GradientCovariance"])
def test_once_differentiable_is_named(cls, device):
    model, batch = two_layers(device, Call(Once.apply))
    closures = {"GaussNewton": (outputs, output_loss), "Hessian": (loss,)}
    operator = getattr(fm, cls)(model, *closures.get(cls, (losses,)), batch)
    with pytest.raises(ValueError, match=r"OnceBackward \(layer '0', 0\.\w+\).*drop"):
        operator @ ones(operator)
    # As the last of all, where it would make a zero matrix.
    last = fm.Hessian(model[:1], lambda m, b: Once.apply(m(b[0])).mean(), batch)
    with pytest.raises(ValueError, match="is Once, whose backward is marked"):
        last @ ones(last)


class Table(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.head = table, nn.Linear(4, 3)

    def forward(self, ids):
        rows = torch.tanh(self.table(ids))
        return self.head(rows if rows.dim() == 2 else rows.sum(1))


class Distances(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Linear(4, 3), function
        self.centres = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return -self.function(self.first(x), self.centres)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 3)

    def forward(self, x):
        q = self.query(x)[:, None, None]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, q, q)[:, 0, 0]


@pytest.mark.parametrize("cls", ["Hessian", "GaussNewton", "GradientCovariance"])
@pytest.mark.parametrize(
    ("make_model", "inputs", "message"),
    [
        (
            lambda: Table(nn.Embedding(5, 4, sparse=True)),
            "ids",
            r"'table'.*sparse=False",
        ),
        (
            lambda: Table(nn.EmbeddingBag(5, 4)),
            "ids",
            r"EmbeddingBagBackward0 \(layer 'table'.*nn.Embedding",
        ),
        (lambda: Table(nn.EmbeddingBag(5, 4, sparse=True)), "ids", r"'table'"),
        (
            lambda: Table(nn.Embedding(5, 4, scale_grad_by_freq=True)),
            "ids",
            r"scale_grad_by_freq=True",
        ),
        (
            lambda: Distances(torch.cdist),
            "rows",
            r"CdistBackward0 \((parameter 'centres'|layer 'first').*square",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), Call(Host.apply)),
            "rows",
            r"HostBackward \(layer '0'",
        ),
    ],
)
def test_nodes_are_named_with_their_layer(make_model, inputs, message, cls, device):
    model = make_model().to(device)
    x = torch.randint(5, (6, 2)) if inputs == "ids" else torch.randn(6, 4)
    batch = x.to(device), torch.randint(3, (6,), device=device)
    closures = {"GaussNewton": (outputs, output_loss), "Hessian": (loss,)}
    operator = getattr(fm, cls)(model, *closures.get(cls, (losses,)), batch)
    with pytest.raises(ValueError, match=message):
        fm.top_eigenpairs(operator)


def test_fused_attention_chosen_by_the_closure_is_named():
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    H = fm.Hessian(Fused(), loss, batch)
    with pytest.raises(
        ValueError, match=r"ScaledDotProduct\w+ \(layer 'query'.*sdpa_kernel"
    ):
        H @ ones(H)


class WrittenOut(nn.Module):
    """Weight norm of a linear layer by elementary operations."""

    def __init__(self, layer, weight):
        super().__init__()
        self.bias = layer.bias
        self.g, self.v = (nn.Parameter(w.detach().clone()) for w in weight)
        self.dims = [d for d in (0, 1) if self.g.shape[d] == 1]

    def forward(self, x):
        norm = self.v.norm(dim=self.dims, keepdim=True)
        return F.linear(x, self.g * self.v / norm, self.bias)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_is_right(dim, old, device):
    model, batch = two_layers(device, nn.Identity())
    if old:
        nn.utils.weight_norm(model[0], dim=dim)
        weight = model[0].weight_g, model[0].weight_v
    else:
        nn.utils.parametrizations.weight_norm(model[0], dim=dim)
        parts = model[0].parametrizations.weight
        weight = parts.original0, parts.original1
    if weight[0].dim() == 0:
        weight = weight[0].reshape(1, 1), weight[1]
    plain = nn.Sequential(WrittenOut(model[0], weight), *model[1:])
    got, want = fm.Hessian(model, loss, batch), fm.Hessian(plain, loss, batch)
    value = fm.top_eigenpairs(want, rtol=1e-6).values
    torch.testing.assert_close(fm.top_eigenpairs(got, rtol=1e-6).values, value)
    torch.testing.assert_close(fm.trace(got).value, fm.trace(want).value)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(layer, device):
    torch.manual_seed(0)
    model = layer(3, 4).to(device, torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)
    H = fm.Hessian(model, lambda m, x: m(x)[0].square().mean(), x)
    fm.trace(H, products=12)
    want = oracles.hessian(model, lambda m, x: m(x)[0].square().mean(), [x], [1])
    dense = H @ torch.eye(H.shape[0], dtype=H.dtype, device=device)
    torch.testing.assert_close(dense, want, rtol=1e-5, atol=1e-7)


def test_watch_compares_consecutive_products():
    matrix = torch.randn(20, 20, dtype=torch.float64)
    watch = SymmetryWatch()
    u, v = torch.randn(2, 20, dtype=torch.float64)
    assert watch.look(u, matrix @ u, None) is None
    assert watch.look(2 * u, matrix @ (2 * u), None) is None  # parallel
    suspicion = watch.look(v, matrix @ v, None)
    assert suspicion is not None
    assert suspicion.gap == pytest.approx(float(2 * (u @ matrix @ v - v @ matrix @ u)))
    assert suspicion.is_confirmed_by(matrix @ (2 * u), matrix @ v)
    assert not suspicion.is_confirmed_by(matrix.T @ (2 * u), matrix @ v)


def test_model_is_left_alone_by_the_second_look(device):
    model, batch = two_layers(device, Call(Soft.apply))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match="not symmetric"):
        fm.top_eigenpairs(fm.Hessian(model, loss, batch))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert addresses == [p.data_ptr() for p in model.parameters()]


def test_cases_are_symmetric_enough(device):
    model, batch = make("attention", torch.float32, device)
    H = fm.Hessian(model, loss, batch)
    dense = H @ torch.eye(H.shape[0], dtype=torch.float32, device=device)
    assert (dense - dense.T).norm() < 1e-5 * dense.norm()
