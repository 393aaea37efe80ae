"""Functions written in Python: a backward that cannot be differentiated is refused."""

import pytest
import torch

import fastminima as fm

from .cases import loss, losses, output_loss, outputs
from .test_symmetry import Call, two_layers


def function(forward, backward):
    """A function that keeps its input in both ways."""

    class Written(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.x = x.detach().clone()
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return backward(ctx, grad)

    return Written.apply


def square(x):
    return x * x


def without_grad(ctx, grad):
    with torch.no_grad():
        return 2 * grad * ctx.saved_tensors[0]


def kernel(ctx, grad):
    out = torch.empty_like(ctx.x)
    out.copy_((2 * grad * ctx.x).detach())
    return out


def in_place(ctx, grad):
    with torch.no_grad():
        return ctx.x.mul_(2 * grad)


def on_the_host(ctx, grad):
    result = 2 * grad.detach().cpu().numpy() * ctx.x.cpu().numpy()
    return torch.from_numpy(result).to(grad)


def detached(ctx, grad):
    return 2 * grad * ctx.x


def data(ctx, grad):
    return 2 * grad * ctx.saved_tensors[0].data


def linear_kernel(ctx, grad):
    return (2 * grad).detach()


WITHOUT_GRAPH = {
    "no_grad": (square, without_grad),
    "kernel": (square, kernel),
    "in place": (square, in_place),
    "NumPy": (square, on_the_host),
    "linear kernel": (lambda x: 2 * x, linear_kernel),
}
DETACHED = {"detach()": (square, detached), ".data": (square, data)}
HONEST = {
    "square": (square, lambda ctx, g: 2 * g * ctx.saved_tensors[0]),
    "straight through": (torch.round, lambda ctx, g: g),
    "clipped": (torch.round, lambda ctx, g: g * (ctx.x.abs() <= 1)),
    "reversed": (lambda x: x.view_as(x), lambda ctx, g: -0.5 * g),
    "random": (lambda x: x.view_as(x), lambda ctx, g: g * torch.rand_like(g)),
}


def operators(model, batch):
    return {
        "Hessian": fm.Hessian(model, loss, batch),
        "several": fm.Hessian(model, loss, [batch, batch]),
        "GaussNewton": fm.GaussNewton(model, outputs, output_loss, batch),
        "GradientCovariance": fm.GradientCovariance(model, losses, batch),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WITHOUT_GRAPH)
@pytest.mark.parametrize(
    "kind", ["Hessian", "several", "GaussNewton", "GradientCovariance"]
)
def test_backward_without_a_graph(kind, name, dtype, device):
    model, batch = two_layers(device, Call(function(*WITHOUT_GRAPH[name])), dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    message = r"WrittenBackward \(layer '0', 0\.\w+\).*without a graph.*saved_tensors"
    with pytest.raises(ValueError, match=message):
        fm.top_eigenpairs(operators(model, batch)[kind])
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DETACHED)
def test_backward_that_forgets_its_inputs(name, dtype, device):
    """The Hessian would be symmetric all the same, and wrong."""
    model, batch = two_layers(device, Call(function(*DETACHED[name])), dtype)
    made = operators(model, batch)
    for kind in ("Hessian", "several"):
        with pytest.raises(ValueError, match="depends on its inputs in a way"):
            fm.trace(made[kind])
    for kind in ("GaussNewton", "GradientCovariance"):  # need it once
        fm.top_eigenpairs(made[kind], max_products=5, rtol=10.0)
    last = fm.Hessian(model[:2], lambda m, b: m(b[0]).mean(), batch)
    with pytest.raises(ValueError, match="depends on its inputs"):
        fm.trace(last)


def test_function_in_the_loss_of_gauss_newton(device):
    model, batch = two_layers(device, torch.nn.Identity())
    bad, good = function(square, detached), function(*HONEST["square"])
    G = fm.GaussNewton(model, outputs, lambda o, b: bad(o).mean(), batch)
    with pytest.raises(ValueError, match="depends on its inputs"):
        fm.trace(G)
    G = fm.GaussNewton(model, outputs, lambda o, b: good(o).mean(), batch)
    want = fm.GaussNewton(model, outputs, lambda o, b: o.square().mean(), batch)
    assert fm.trace(G).value == pytest.approx(fm.trace(want).value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HONEST)
def test_honest_functions_are_not_refused(name, dtype, device):
    model, batch = two_layers(device, Call(function(*HONEST[name])), dtype)
    for operator in operators(model, batch).values():
        # One product or two: "random" is not the same in each, and is refused later on.
        fm.top_eigenpairs(operator, max_products=6, rtol=10.0, miss=1.0)
    if name == "square" and dtype == torch.float64:
        plain, _ = two_layers(device, Call(square))
        want = fm.trace(fm.Hessian(plain, loss, batch)).value
        got = fm.trace(fm.Hessian(model, loss, batch)).value
        assert got == pytest.approx(want)
