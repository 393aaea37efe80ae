"""Operators on attention that keeps no scores: equal to those on its plain form."""

import contextlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from bytes_held import held
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastminima as fm
from fastminima.curvature import _attention as attention
from fastminima.curvature._functions import look_at_functions
from fastminima.ops import _pieces
from fastminima.ops import attention as ops

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture
def taken(monkeypatch):
    """Take attention of every size, and count the calls that are."""
    found = []
    forward = attention.SoftmaxAttention.forward

    def counted(ctx, q, *rest):
        found.append(tuple(q.shape))
        return forward(ctx, q, *rest)

    monkeypatch.setattr(attention.SoftmaxAttention, "forward", staticmethod(counted))
    monkeypatch.setattr(attention, "LARGE", -1)
    return found


@contextlib.contextmanager
def by_triton():
    """The ops by their kernels, interpreted on the CPU."""
    from tools.kernels.interpreter import interpreting

    chosen = [getattr(ops, name) for name in ops.__all__ if name.startswith("atten")]
    key = "cpu", torch.float32
    try:
        for op in chosen:
            op._chosen[key] = op.on("triton", "cuda", torch.float32)
        with interpreting() as report:
            yield report
    finally:
        for op in chosen:
            op._chosen.clear()


class Decoder(nn.Module):
    """Attention over `heads` heads, of which `groups` have keys of their own."""

    def __init__(self, heads=4, groups=2, mask=None):
        super().__init__()
        self.heads, self.groups, self.mask = heads, groups, mask
        self.embed = nn.Embedding(7, 4 * heads)
        self.query = nn.Linear(4 * heads, 4 * heads)
        self.both = nn.Linear(4 * heads, 8 * groups)
        self.head = nn.Linear(4 * heads, 3)

    def forward(self, ids):
        x = self.embed(ids)
        q = self.query(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        k, v = (
            t.unflatten(-1, (self.groups, 4)).transpose(1, 2)
            for t in self.both(x).chunk(2, -1)
        )
        out = F.scaled_dot_product_attention(
            q, k, v, self.mask, is_causal=self.mask is None, enable_gqa=True
        )
        return self.head((x + out.transpose(1, 2).flatten(2)).tanh()).mean(1)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def operators(model, batch):
    yield fm.Hessian(model, loss, batch)
    yield fm.GaussNewton(
        model, lambda m, b: m(b[0]), lambda out, b: F.cross_entropy(out, b[1]), batch
    )


def compared(model, batch, monkeypatch):
    """Products with the operators, as they are and by the plain form."""
    count = sum(p.numel() for p in model.parameters())
    dtype = next(model.parameters()).dtype
    v = torch.randn(count, dtype=dtype)
    found = [A @ v for A in operators(model, batch)]
    with monkeypatch.context() as patch:
        patch.setattr(attention, "LARGE", 1 << 60)
        return zip(found, [A @ v for A in operators(model, batch)], strict=True)


def masks(time):
    seen = torch.rand(time, time) > 0.4
    seen[2] = False
    return {"causal": None, "seen": seen, "bias": torch.randn(4, 1, time)}


@pytest.mark.parametrize("kind", ["causal", "seen", "bias"])
def test_products_are_those_of_the_plain_form(taken, monkeypatch, kind):
    mask = masks(6)[kind]
    mask = mask.double() if kind == "bias" else mask
    model = Decoder(mask=mask).double()
    batch = torch.randint(7, (3, 6)), torch.randint(3, (3,))
    for got, want in compared(model, batch, monkeypatch):
        torch.testing.assert_close(got, want)
    assert set(taken) == {(3, 4, 6, 4)}


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("kind", ["causal", "seen"])
def test_products_by_the_kernels(taken, monkeypatch, kind):
    model = Decoder(2, 1, masks(5)[kind]).float()
    batch = torch.randint(7, (1, 5)), torch.randint(3, (1,))
    with by_triton() as report:
        for got, want in compared(model, batch, monkeypatch):
            torch.testing.assert_close(got, want, rtol=1.3e-6, atol=1e-6)
    assert {launch.kernel for launch in report.per_launch} == {
        *("attention_kernel", "query_gradients_kernel", "key_gradients_kernel"),
        *("tangent_kernel", "query_tangents_kernel", "key_tangents_kernel"),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_products_on_a_gpu(monkeypatch, dtype):
    """Of the same model; float64 and float16 go by the references there."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = Decoder().double()
    batch = torch.randint(7, (3, 70)), torch.randint(3, (3,))
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    want = fm.Hessian(model, loss, batch) @ v
    model = model.to("cuda", dtype)
    moved = [x.cuda() for x in batch]
    exact = v.cuda().to(torch.float64 if dtype == torch.float64 else torch.float32)
    got = (fm.Hessian(model, loss, moved) @ exact).cpu().double()
    error = float((got - want).norm() / want.norm())
    assert error < 100 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize(
    ("groups", "is_causal", "is_masked"),
    [(2, False, False), (1, True, False), (1, False, True)],
)
def test_derivatives(taken, groups, is_causal, is_masked):
    shapes = (2, 2, 4, 3), (2, groups, 5, 3), (2, groups, 5, 2)
    inputs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    mask = masks(5)["seen"][:4] if is_masked else None

    def attend(q, k, v):
        return attention.attend(q, k, v, mask, is_causal=is_causal, enable_gqa=True)

    assert gradcheck(attend, inputs)
    assert gradgradcheck(attend, inputs)
    assert taken


def test_a_third_derivative_is_refused(taken):
    q = torch.randn(1, 1, 3, 2, dtype=torch.float64).requires_grad_()
    value = attention.attend(q, q, q).square().sum()
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, q, create_graph=True)
        value = grad.square().sum()
    with pytest.raises(NotImplementedError, match="third derivative of attention"):
        torch.autograd.grad(value, q)


def test_jacobian_products_take_no_second_derivative(taken, monkeypatch):
    model = Decoder().double()
    batch = torch.randint(7, (3, 6)), torch.randint(3, (3,))
    hessian, gauss_newton = operators(model, batch)
    calls = []
    monkeypatch.setattr(ops, "attention_gradients_tangent", _noting(calls))
    gauss_newton @ torch.ones(gauss_newton.shape[0], dtype=torch.float64)
    assert not calls
    hessian @ torch.ones(hessian.shape[0], dtype=torch.float64)
    assert calls


def _noting(calls):
    run = ops.attention_gradients_tangent

    def noted(*args):
        calls.append(len(args))
        return run(*args)

    return noted


def test_it_passes_the_look_at_functions(taken):
    model = Decoder().double()
    batch = torch.randint(7, (3, 6)), torch.randint(3, (3,))
    names = {id(p): name for name, p in model.named_parameters()}

    def evaluate():
        with attention_everywhere():
            return (loss(model, batch),)

    look_at_functions(evaluate, list(model.parameters()), names, is_second=True)
    assert len(taken) == 3


@contextlib.contextmanager
def attention_everywhere():
    from fastminima.curvature._rewrites import Rewrites

    with sdpa_kernel(SDPBackend.MATH), Rewrites():
        yield


def test_it_costs_no_look_of_its_own(taken):
    """Two evaluations that are compared, and none for a function of the package."""
    model = Decoder().double()
    batch = torch.randint(7, (3, 6)), torch.randint(3, (3,))
    H = fm.Hessian(model, loss, batch)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert len(taken) == 2


def test_modules_with_heads_are_reached(taken, monkeypatch):
    layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(7, 8), layer, nn.Flatten(), nn.Linear(40, 3))
    batch = torch.randint(7, (3, 5)), torch.randint(3, (3,))
    for got, want in compared(model.double(), batch, monkeypatch):
        torch.testing.assert_close(got, want)
    assert set(taken) == {(3, 2, 5, 4)}


def test_checkpointed_layers_are_computed_again_the_same_way(taken, monkeypatch):
    model = Decoder().double()
    batch = torch.randint(7, (3, 6)), torch.randint(3, (3,))

    def checkpointed(model, batch):
        out = checkpoint(model, batch[0], use_reentrant=False)
        return F.cross_entropy(out, batch[1])

    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    got = fm.Hessian(model, checkpointed, batch) @ v
    torch.testing.assert_close(got, fm.Hessian(model, loss, batch) @ v)
    assert taken


def test_an_autocast_inside_the_closure_is_followed(taken):
    model = Decoder().float()
    batch = torch.randint(7, (3, 6)), torch.randint(3, (3,))
    dtypes = []

    def mixed(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.randn(1, 1, 3, 4)
            dtypes.append(F.scaled_dot_product_attention(x, x, x).dtype)
            return F.cross_entropy(model(batch[0]).float(), batch[1])

    H = fm.Hessian(model, mixed, batch)
    got = H @ torch.ones(H.shape[0])
    want = fm.Hessian(model, loss, batch) @ torch.ones(H.shape[0])
    assert set(dtypes) == {torch.bfloat16} and taken
    # bfloat16 products are off by a few per cent.
    assert float((got - want).norm()) < 0.1 * float(want.norm())


Q = (1, 2, 4, 3)
LEFT_ALONE = {
    "dropout": (Q, Q, {"dropout_p": 0.5}),
    "three dims": (Q[1:], Q[1:], {}),
    "heads spread": (Q, (1, 1, 4, 3), {}),
    "a mask with a gradient": (Q, Q, {"attn_mask": "trained"}),
    "no queries": ((1, 2, 0, 3), Q, {}),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_what_is_not_covered_goes_the_usual_way(taken, what):
    queries, keys, options = LEFT_ALONE[what]
    q, k = torch.randn(queries), torch.randn(keys)
    if options.get("attn_mask"):
        options = {"attn_mask": torch.zeros(4, 4).requires_grad_()}
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        got = attention.attend(q, k, k, **options)
        torch.manual_seed(1)
        want = F.scaled_dot_product_attention(q, k, k, **options)
    torch.testing.assert_close(got, want)
    assert not taken


def test_torch_func_and_forward_mode_go_the_usual_way(taken):
    q, v = torch.randn(Q), torch.randn(Q)

    def attend(q):
        return attention.attend(q, q, q).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        _, moved = torch.func.jvp(attend, (q,), (v,))
        grad = torch.func.grad(attend)(q)
    torch.testing.assert_close(moved, (grad * v).sum(), rtol=1e-4, atol=1e-4)
    assert not taken


def test_another_form_asked_for_inside_the_closure_is_left_alone(taken):
    q = torch.randn(Q, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = attention.attend(q, q, q)
    assert "ScaledDotProduct" in out.grad_fn.name()
    assert not taken


def test_small_scores_are_kept_on_a_cpu():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert "Attention" not in attention.attend(q, q, q).grad_fn.name()
        time = 1 + int((attention.LARGE / 4) ** 0.5)
        q = torch.randn(1, 1, time, 1, requires_grad=True)
        assert "Attention" in attention.attend(q, q, q).grad_fn.name()


def test_graphs_hold_no_scores(taken, monkeypatch):
    """Scores of the head are 256 KiB; with the plain form several of them are held."""
    scores = 4 * 256**2
    monkeypatch.setattr(_pieces, "LIMIT", scores)
    q = torch.randn(1, 1, 256, 4, requires_grad=True)

    def products():
        with sdpa_kernel(SDPBackend.MATH):
            out = attention.attend(q, q, q, is_causal=True)
            (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            return torch.autograd.grad(grad.sum(), q)

    few = held(products)
    assert few.most < scores, few
    monkeypatch.setattr(attention, "LARGE", 1 << 60)
    assert held(products).most > 4 * scores
