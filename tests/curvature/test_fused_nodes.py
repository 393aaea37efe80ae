"""PyTorch's fused functions: right to second order, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm

CTC = torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
BAGS = torch.tensor([[0, 1], [2, 2]])


class Applied(nn.Module):
    """A function of a batch and some parameters."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([0.6 * torch.randn(shape) for shape in shapes])

    def forward(self, x):
        return self.function(x, *self.weights)


def loss(model, batch):
    y = model(batch)
    y = y[0] if isinstance(y, tuple) else y
    return y.square().mean() + y.sin().mean()


def layer(make):
    return lambda: make().double()


def applied(function, *shapes):
    return lambda: Applied(function, *shapes).double()


def _weight_norm(dim):
    return lambda x, v, g: F.linear(x, torch._weight_norm(v, g, dim))


RIGHT = {
    "weight norm": applied(_weight_norm(0), (3, 6), (3, 1)),
    "weight norm along": applied(_weight_norm(1), (3, 6), (1, 6)),
    "weight norm of all": applied(_weight_norm(-1), (3, 6), ()),
    "weight norm interface": applied(
        lambda x, v, g: F.linear(x, torch._weight_norm_interface(v, g)[0]),
        *((3, 6), (3, 1)),
    ),
    "weight norm hook": layer(lambda: nn.utils.weight_norm(nn.Linear(6, 3))),
    "weight norm parametrized": layer(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    ),
    "hardsigmoid": applied(lambda x, w: F.hardsigmoid(2 * x @ w), (6, 3)),
    "hardsigmoid in place": applied(
        lambda x, w: F.hardsigmoid(2 * x @ w, inplace=True), (6, 3)
    ),
    "hardsigmoid layer": layer(
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Hardsigmoid())
    ),
    "hardswish": applied(lambda x, w: F.hardswish(2 * x @ w), (6, 3)),
    "rms norm": applied(lambda x, w, g: F.rms_norm(x @ w, (6,), g), (6, 6), (6,)),
    "layer norm": applied(lambda x, w, g: F.layer_norm(x @ w, (6,), g), (6, 6), (6,)),
    "lstm cell": layer(lambda: nn.LSTMCell(6, 3)),
    "gru": layer(lambda: nn.GRU(6, 3)),
    "lstm": layer(lambda: nn.LSTM(6, 3, num_layers=2)),
    "distances by products": applied(
        lambda x, w: torch.cdist(x, w, compute_mode="use_mm_for_euclid_dist"), (3, 6)
    ),
    "grid sample": applied(
        lambda x, w, g: F.grid_sample(w, g.tanh(), align_corners=False),
        *((2, 2, 5, 5), (2, 3, 3, 2)),
    ),
    "attention": applied(
        lambda x, w: F.scaled_dot_product_attention(x @ w[0], x @ w[1], x @ w[2]),
        (3, 6, 4),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", RIGHT)
def test_second_derivatives_are_those_of_the_gradient(name, device):
    torch.manual_seed(0)
    model = RIGHT[name]().to(device)
    x = torch.randn(4, 6, dtype=torch.float64, device=device)
    H = fm.Hessian(model, loss, x)
    found = H @ torch.eye(H.shape[0], dtype=torch.float64, device=device)
    torch.testing.assert_close(found, found.T)
    # Central differences of h and 2h leave h^4 and eps / h.
    torch.testing.assert_close(found, _by_differences(model, x), rtol=1e-5, atol=1e-8)


def _by_differences(model, x, h=1e-4):
    parameters = list(model.parameters())
    start = torch.cat([p.detach().reshape(-1) for p in parameters])

    def gradient(point):
        with torch.no_grad():
            nn.utils.vector_to_parameters(point, parameters)
        grads = torch.autograd.grad(loss(model, x), parameters)
        return torch.cat([g.reshape(-1) for g in grads])

    columns = []
    for e in torch.eye(len(start), dtype=start.dtype, device=start.device):
        near, far = (
            gradient(start + s * e) - gradient(start - s * e) for s in (h, 2 * h)
        )
        columns.append((8 * near - far) / (12 * h))
    return torch.stack(columns, dim=1)


REFUSED = {
    "cdist": (
        applied(lambda x, w: torch.cdist(x, w, p=1.0), (3, 6)),
        "CdistBackward0.*Write the distances out",
    ),
    "ctc": (
        applied(
            lambda x, w: F.ctc_loss((x @ w).reshape(4, 1, 5).log_softmax(-1), *CTC),
            (6, 5),
        ),
        "CtcLossBackward0.*freeze the layers",
    ),
    "embedding bag": (
        applied(lambda x, w: F.embedding_bag(BAGS, w), (4, 3)),
        r"EmbeddingBagBackward0.*nn\.Embedding",
    ),
    "weighted embedding bag": (
        applied(
            lambda x, w, s: F.embedding_bag(BAGS, w, mode="sum", per_sample_weights=s),
            *((4, 3), (2, 2)),
        ),
        r"EmbeddingBagBackward0.*nn\.Embedding",
    ),
    "operator of the weight norm": (
        applied(
            lambda x, v, g: F.linear(x, torch.ops.aten._weight_norm(v, g, 0)),
            *((3, 6), (3, 1)),
        ),
        r"WeightNormInterfaceBackward0.*is wrong.*torch\._weight_norm",
    ),
    "drawn from a gamma distribution": (
        applied(lambda x, w: torch._standard_gamma((x * w).exp()), (6,)),
        "StandardGammaBackward0.*Draw outside",
    ),
    "shuffled channels": (
        applied(
            lambda x, w: torch.native_channel_shuffle((x * w).reshape(2, 4, 3, 1), 2),
            (6,),
        ),
        r"native_channel_shuffle \(layer 'weights', weights\.0\).*reshape",
    ),
    "margins": (
        applied(
            lambda x, w: F.multi_margin_loss(x @ w, torch.tensor([0, 2, 1, 1])), (6, 3)
        ),
        r"MultiMarginLossBackward0.*clamp\(min=0\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_those_without_a_second_derivative_are_named(name):
    make, says = REFUSED[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 6, dtype=torch.float64)
    H = fm.Hessian(model, loss, x)
    with pytest.raises(ValueError, match=says):
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    audit = H.audit()
    assert not audit.ok


def test_an_operation_of_ones_own_without_a_second_formula_is_named():
    @torch.library.custom_op("fastminima_tests::sine", mutates_args=())
    def sine(x: torch.Tensor) -> torch.Tensor:
        return x.sin().clone()

    @torch.library.custom_op("fastminima_tests::sine_backward", mutates_args=())
    def sine_backward(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return g * x.cos()

    sine.register_autograd(
        lambda ctx, g: sine_backward(g, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    model = applied(lambda x, w: sine(x * w), (6,))()
    H = fm.Hessian(model, loss, torch.randn(4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"sine.*layer 'weights'.*autograd formula"):
        H @ torch.ones(6, dtype=torch.float64)
    assert not H.audit().ok


def test_values_and_gradients_stay_the_same(device):
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, device=device)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    with fm.twice_differentiable():
        rewritten = F.hardsigmoid(leaf)
    plain = F.hardsigmoid(other)
    torch.testing.assert_close(rewritten, plain)
    one = torch.ones_like(x)
    grads = (
        torch.autograd.grad(y, z, one)[0]
        for y, z in ((rewritten, leaf), (plain, other))
    )
    torch.testing.assert_close(*grads)
