"""Ways to make Hessian products: the same matrix by each."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm
from fastminima.curvature._engines import saved_bytes
from fastminima.curvature._graph import GradientGraph


class Mixed(nn.Module):
    """Convolution, norm, attention, a tied weight and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.tied = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(F.gelu(self.conv(x)).transpose(1, 2))
        x = F.scaled_dot_product_attention(self.tied(x), x, self.tied(x))
        return self.head(self.drop(x).mean(1))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mixed(device, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, dtype=dtype)
    batch = x.to(device), torch.randint(3, (6,)).to(device)
    return Mixed().to(device, dtype), batch


EXACT = ("tangents", "cached", "recompute", "forward_over_reverse")


@pytest.mark.parametrize("engine", EXACT)
def test_products_are_the_same(engine, device):
    model, batch = mixed(device)
    torch.manual_seed(5)
    expected = fm.Hessian(model, loss, batch)
    torch.manual_seed(5)
    H = fm.Hessian(model, loss, batch, engine=engine)
    assert H.engine == engine
    v = torch.randn(H.shape[0], 3, dtype=torch.float64, device=device)
    torch.testing.assert_close(H @ v, expected @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(H.gradient, expected.gradient)
    top, other = (fm.top_eigenpairs(h).values for h in (expected, H))
    torch.testing.assert_close(top, other, rtol=1e-8, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("engine", EXACT)
def test_several_batches(engine, device):
    model, (x, y) = mixed(device)
    model.eval()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    whole = fm.Hessian(model, loss, (x, y))
    H = fm.Hessian(model, loss, batches, engine=engine)
    v = torch.randn(H.shape[0], dtype=torch.float64, device=device)
    torch.testing.assert_close(H @ v, whole @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", EXACT)
def test_parameters_that_move_are_followed(engine, device):
    model, batch = mixed(device)
    model.eval()
    H = fm.Hessian(model, loss, batch, engine=engine)
    v = torch.randn(H.shape[0], dtype=torch.float64, device=device)
    before = H @ v
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    after = fm.Hessian(model, loss, batch) @ v
    assert not torch.allclose(before, after)
    torch.testing.assert_close(H @ v, after, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", EXACT)
def test_checkpointed_parts(engine, device):
    model, batch = mixed(device)

    def checkpointed(model, batch):
        part = torch.utils.checkpoint.checkpoint(model, batch[0], use_reentrant=False)
        return F.cross_entropy(part, batch[1])

    torch.manual_seed(5)
    expected = fm.Hessian(model, loss, batch)
    torch.manual_seed(5)
    H = fm.Hessian(model, checkpointed, batch, engine=engine)
    v = torch.randn(H.shape[0], dtype=torch.float64, device=device)
    torch.testing.assert_close(H @ v, expected @ v, rtol=1e-10, atol=1e-12)


def test_memory_decides(device):
    model, batch = mixed(device)
    v = torch.ones(sum(p.numel() for p in model.parameters()), device=device).double()
    little = fm.Hessian(model, loss, batch, memory=1000)
    assert little.engine == "auto"
    torch.manual_seed(0)
    expected = fm.Hessian(model, loss, batch)
    torch.testing.assert_close((little @ v).shape, (expected @ v).shape)
    usual = "tangents" if device.type == "cpu" else "cached"
    assert (little.engine, expected.engine) == ("recompute", usual)
    assert little._kept is None
    assert expected._kept is not None


def test_tangents_that_are_wrong_give_way(device, monkeypatch):
    """They are compared with double backward before they are trusted."""
    model, batch = mixed(device)
    model.eval()
    expected = fm.Hessian(model, loss, batch, engine="cached")
    v = torch.randn(expected.shape[0], dtype=torch.float64, device=device)

    def wrong(graph, parts, only=None):
        return [2 * part for part in parts]

    monkeypatch.setattr("fastminima.curvature.rop.graph.TangentGraph.product", wrong)
    H = fm.Hessian(model, loss, batch, engine="tangents")
    for _ in range(2):
        torch.testing.assert_close(H @ v, expected @ v, rtol=1e-10, atol=1e-12)
    assert H.engine == "cached"


def test_bytes_of_a_graph():
    """Of a layer: its inputs, the output that the loss is of, and their gradients."""
    w = nn.Parameter(torch.ones(8, 8))
    x = torch.ones(1000, 8)
    graph = GradientGraph(((x @ w).square().mean(),), (w,))
    size = 4 * 8000
    assert 2 * size <= saved_bytes(graph) <= 5 * size


def test_tangents_keep_no_graph():
    model, batch = mixed(torch.device("cpu"))
    H = fm.Hessian(model, loss, batch, engine="forward_over_reverse")
    v = torch.ones(H.shape[0], dtype=torch.float64)

    def tensors_after(products):
        for _ in range(products):
            _ = H @ v
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    settled = tensors_after(15)  # the first pairs are looked at
    assert tensors_after(5) <= settled


def test_a_parameter_that_is_not_read_from_the_model_is_noticed(device):
    """It has no tangent."""
    model, batch = mixed(device)
    head = model.head.weight

    def other(model, batch):
        return loss(model, batch) + head.square().sum()

    H = fm.Hessian(model, other, batch, engine="forward_over_reverse")
    with pytest.raises(ValueError, match="from elsewhere than its model"):
        _ = H @ torch.ones(H.shape[0], dtype=torch.float64, device=device)


class Held(nn.Module):
    """A target that the loss holds constant, one tensor for each way to say so."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.body = nn.Linear(4, 4)

    def forward(self, x):
        x = self.body(x).tanh()
        if self.way == "detach":
            return x - x.detach().square()
        with torch.no_grad() if self.way == "no_grad" else torch.inference_mode():
            target = x.square()
        return x - target.clone()


class Scaled(nn.Module):
    """Divides by a running size, which every evaluation moves."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.register_buffer("size", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        x = self.body(x).tanh()
        self.size.mul_(0.5).add_(x.detach().norm())
        return x / self.size


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.body(x[:, None])[0]


class Rescaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4, max_norm=0.5)

    def forward(self, x):
        return self.table((x[:, :2] > 0).long()).tanh() * x[:, None]


@pytest.mark.parametrize(
    "make",
    [
        *(lambda way=way: Held(way) for way in ("detach", "no_grad", "inference")),
        Scaled,
        Recurrent,
        Rescaled,
        lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    ],
    ids=["detach", "no_grad", "inference", "moves", "lstm", "max_norm", "spectral"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tangents_follow_what_gradients_follow(make, dtype, device):
    """What a loss holds constant or moves on is the same in each evaluation."""
    torch.manual_seed(0)
    model = make().to(device, dtype)
    x = torch.randn(8, 4, device=device, dtype=dtype)
    expected, H = (
        fm.Hessian(model, lambda m, x: m(x).square().mean(), x, engine=engine)
        for engine in ("cached", "forward_over_reverse")
    )
    v = torch.randn(H.shape[0], dtype=dtype, device=device)
    buffers = [b.clone() for b in model.buffers()]
    for _ in range(2):
        torch.testing.assert_close(H @ v, expected @ v)
    assert all(map(torch.equal, buffers, model.buffers()))


def test_differences_are_of_one_buffer(device):
    """An evaluation that moves a buffer does not change the next one."""
    torch.manual_seed(0)
    model = Scaled().to(device, torch.float64)
    x = torch.randn(8, 4, device=device, dtype=torch.float64)

    def fixed(model, x):
        return (model(x) * model.size.detach()).square().mean()

    expected = fm.Hessian(model, fixed, x)
    H = fm.Hessian(model, fixed, x, engine="finite_differences")
    v = torch.randn(H.shape[0], dtype=torch.float64, device=device)
    torch.testing.assert_close(H @ v, expected @ v, rtol=1e-5, atol=1e-8)
    assert torch.equal(H @ v, H @ v)


def test_operation_without_a_forward_derivative(device):
    model = nn.EmbeddingBag(5, 3, mode="max").to(device)
    ids = torch.randint(5, (4, 2), device=device)

    def bag(model, ids):
        return model(ids).square().mean()

    H = fm.Hessian(model, bag, ids, engine="forward_over_reverse")
    with pytest.raises(ValueError, match="forward derivative"):
        _ = H @ torch.ones(H.shape[0], device=device)


def test_finite_differences(device):
    """Near the product on a smooth loss, and no more symmetric than kinks let it be."""
    model, batch = mixed(device)
    model.eval()
    H = fm.Hessian(model, loss, batch)
    D = fm.Hessian(model, loss, batch, engine="finite_differences", step=1e-5)
    v = torch.randn(H.shape[0], dtype=torch.float64, device=device)
    torch.testing.assert_close(D @ v, H @ v, rtol=1e-4, atol=1e-7)
    before = [p.clone() for p in model.parameters()]
    far = fm.Hessian(model, loss, batch, engine="finite_differences", step=0.5)
    assert not torch.allclose(far @ v, H @ v, rtol=1e-2)
    after = list(model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))
    zero = D @ torch.zeros_like(v)
    assert not zero.any()


def test_step_of_differences_is_as_long_as_precision_asks(device):
    """Of what is computed, not of the parameters."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    x, y = torch.randn(16, 4, device=device), torch.zeros(16, device=device).long()

    def low(model, batch):
        with torch.autocast(device.type, torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    v = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    expected = fm.Hessian(model, loss, (x, y)) @ v
    found = fm.Hessian(model, low, (x, y), engine="finite_differences") @ v
    assert (found - expected).norm() < 0.2 * expected.norm()
    with torch.autocast(device.type, torch.bfloat16):
        before = model(x)
        H = fm.Hessian(model, loss, (x, y), engine="finite_differences")
        torch.testing.assert_close(H @ v, expected, rtol=0.1, atol=1e-3)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "cache"}, "engine must be one of"),
        ({"memory": 0}, "positive number of bytes"),
        ({"memory": 10, "engine": "cached"}, "engine='auto' decides"),
        ({"step": 0.1}, "finite_differences"),
        ({"engine": "finite_differences", "step": 0.0}, "positive number"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        fm.Hessian(nn.Linear(2, 2), loss, torch.ones(2, 2), **options)
