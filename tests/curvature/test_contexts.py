"""Ambient modes that a product may be asked for in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastminima as fm

from .cases import loss, make


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cuda", torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast", "autocast on a GPU"],
)
def test_product_is_the_same_in_any_mode(context, device):
    model, batch = make("attention", torch.float32, device)
    size = sum(p.numel() for p in model.parameters())
    v = torch.randn(size, dtype=torch.float32, device=device)
    want = fm.Hessian(model, loss, batch) @ v
    with context():
        got = fm.Hessian(model, loss, batch) @ v
    torch.testing.assert_close(got.clone(), want, rtol=0, atol=0)


def test_autocast_inside_the_closure_counts(device):
    model, batch = make("mlp", torch.float32, device)

    def cast(model, batch):
        with torch.autocast(device.type, torch.bfloat16):
            return loss(model, batch)

    size = sum(p.numel() for p in model.parameters())
    v = torch.randn(size, dtype=torch.float32, device=device)
    want = fm.Hessian(model, loss, batch) @ v
    got = fm.Hessian(model, cast, batch) @ v
    assert 0 < (got - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_stock_encoder_layers_in_every_mode(is_training, frozen, device):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2))
    model = model.to(device).train(is_training)
    model[1].requires_grad_(not frozen)
    x = torch.randn(4, 5, 3, device=device)
    H = fm.Hessian(model, lambda m, x: m(x).square().mean(), x)
    u, v = torch.randn(2, H.shape[0], device=device)
    left, right = u @ (H @ v), v @ (H @ u)
    # Rounding of two float32 inner products.
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_attention_forced_to_be_fused_still_raises_elsewhere(device):
    """The switch is local: outside, the backends are what they were."""
    model, batch = make("attention", torch.float32, device)
    fm.Hessian(model, loss, batch) @ torch.ones(
        sum(p.numel() for p in model.parameters()), dtype=torch.float32, device=device
    )
    assert torch.backends.cuda.flash_sdp_enabled()
    q = torch.randn(1, 1, 4, 8, device=device, dtype=torch.float32).requires_grad_()
    out = F.scaled_dot_product_attention(q, q, q)
    assert "ScaledDotProduct" in type(out.grad_fn).__name__


def test_checkpointed_layers(device):
    model, batch = make("mlp", device=device)

    def checkpointed(model, batch):
        hidden = checkpoint(model[:2], batch[0], use_reentrant=False)
        return F.cross_entropy(model[2](hidden), batch[1])

    v = torch.randn(
        sum(p.numel() for p in model.parameters()), dtype=torch.float64, device=device
    )
    want = fm.Hessian(model, loss, batch) @ v
    torch.testing.assert_close(fm.Hessian(model, checkpointed, batch) @ v, want)


def test_checkpointed_weight_norm(device):
    """What is computed again is what was computed: with the norm written out."""
    model, batch = make("mlp", device=device)
    nn.utils.parametrizations.weight_norm(model[0])
    v = torch.ones(
        sum(p.numel() for p in model.parameters()), dtype=torch.float64, device=device
    )

    def checkpointed(model, batch):
        return F.cross_entropy(
            checkpoint(model, batch[0], use_reentrant=False), batch[1]
        )

    want = fm.Hessian(model, loss, batch) @ v
    torch.testing.assert_close(fm.Hessian(model, checkpointed, batch) @ v, want)


def test_reentrant_checkpoint_is_named(device):
    model, batch = make("mlp", device=device)
    x = batch[0].requires_grad_()
    H = fm.Hessian(model, lambda m, x: checkpoint(m, x, use_reentrant=True).sum(), x)
    with pytest.raises(ValueError, match=r"reentrant checkpoint.*use_reentrant=False"):
        H @ torch.ones(38, dtype=torch.float64, device=device)


def test_compiled_model_runs_eagerly(device):
    pytest.importorskip("torch._dynamo")
    model, batch = make("mlp", device=device)
    compiled = torch.compile(model, backend="aot_eager")
    v = torch.randn(
        sum(p.numel() for p in model.parameters()), dtype=torch.float64, device=device
    )
    want = fm.Hessian(model, loss, batch) @ v
    torch.testing.assert_close(fm.Hessian(compiled, loss, batch) @ v, want)
