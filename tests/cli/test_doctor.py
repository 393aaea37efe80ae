"""What the doctor foresees of attention, compiled regions and unreadable graphs."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastminima as fm
from fastminima.cli import attention_checks
from fastminima.cli.doctor import examine
from fastminima.cli.target import Target


class Attention(nn.Module):
    """One head of attention, by a function of queries, keys and values."""

    def __init__(self, attend, width=8):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 3)
        self.attend = attend

    def forward(self, x):
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
        return self.head(self.attend(q, k, v)[:, 0].mean(1))


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(8, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x))).mean(1)


class Once(torch.autograd.Function):
    """Stands for a package's kernel: values, whose backward has no derivative."""

    @staticmethod
    def forward(ctx, q, k, v):
        return v.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return None, None, g


def plain(q, k, v):
    return (q @ k.mT / 3).softmax(-1) @ v


def activation(x):
    return 2 * x.tanh()


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model, batch):
    return losses(model, batch).mean()


BATCH = torch.randn(4, 6, 8), torch.tensor([0, 1, 2, 0])


def found(model, loss=losses, batch=BATCH, *, subject=None):
    torch.manual_seed(0)
    everything = examine(Target(model, loss, batch))
    return [f for f in everything if subject in (None, f.subject)]


def the(subject, *given, **options):
    (one,) = found(*given, **options, subject=subject)
    return one


def test_fused_attention_is_read_and_recorded():
    model = Attention(F.scaled_dot_product_attention)
    one = the("attention", model)
    assert one.verdict == "ok" and "FlashAttentionForCpu: once" in one.what
    assert {f.verdict for f in found(model)} == {"ok"}


def test_attention_by_products_names_the_switch():
    model = Attention(F.scaled_dot_product_attention)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        one = the("attention", model)
    assert one.verdict == "note" and "by plain products: once" in one.what
    assert "Switched off in torch.backends.cuda: flash" in one.why
    assert one.remedy == "torch.backends.cuda.enable_flash_sdp(True)."
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q @ k.mT))
    one = the("attention", model)
    assert "No fused kernel takes these arguments" in one.why


@pytest.mark.parametrize(("most", "verdict"), [(4 * 6 * 6 * 4, "slow"), (600, "note")])
def test_attention_written_out_is_slow_where_scores_are_large(
    most, verdict, monkeypatch
):
    monkeypatch.setattr(attention_checks, "_LARGE", most)
    model = Attention(plain)
    model.config = types.SimpleNamespace(_attn_implementation="eager")
    one = the("attention", model)
    assert one.verdict == verdict
    assert "softmax (attn_implementation='eager'): once" in one.what
    assert 'attn_implementation="sdpa"' in one.remedy


def test_a_softmax_that_is_no_attention_is_left_alone():
    assert found(Between(lambda x: x.softmax(-1)), subject="attention") == []


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("FlashAttnFunc", "flash-attn"),
        ("_fMHA", "xformers"),
        ("FlexAttentionAutogradOp", "flex_attention"),
    ],
)
def test_attention_of_packages(name, package):
    """By the names that their functions have; curvature is refused, and really so."""
    kernel = type(name, (Once,), {})
    model = Attention(kernel.apply)
    one = the("attention", model)
    assert one.verdict == "note" and one.what == f"{package}: once"
    assert the("curvature", model).verdict == "refused"
    assert the("per-sample gradients", model).verdict == "ok"
    assert found(model, subject="functions of your own") == []


@pytest.mark.parametrize("loss", [losses, mean_loss])
def test_compiled_regions_are_told_by_what_the_probe_does(loss):
    torch._dynamo.reset()
    model = Between(activation)
    opaque = torch.compile(model, backend="aot_eager")
    one = the("torch.compile", opaque, loss)
    assert one.verdict == "refused" and "1 region (the model)" in one.what
    assert "fm.compile" in one.remedy
    assert found(opaque, loss, subject="per-sample gradients") == []  # said once
    marked = fm.compile(model, backend="aot_eager")
    one = the("torch.compile", model, lambda model, batch: loss(marked, batch))
    assert one.verdict == "ok" and "read inside compiled code" in one.what
    assert the("per-sample gradients", marked, loss).verdict == "ok"


def test_a_compiled_function_without_parameters_is_refused_too():
    torch._dynamo.reset()
    model = Between(torch.compile(activation, backend="aot_eager"))
    assert the("torch.compile", model).verdict == "refused"
    model.between = fm.compile(activation, backend="aot_eager")
    assert the("torch.compile", model).verdict == "ok"


def test_a_compiled_region_that_runs_again_is_slow():
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    torch._dynamo.reset()
    own = aot_autograd(fw_compiler=boxed_nop, bw_compiler=boxed_nop)
    fast = fm.compile(Between(activation), backend=own)
    one = the("torch.compile", fast)
    assert one.verdict == "slow" and "its backend is none of those" in one.why
    assert found(fast, subject="warning") == []


def test_what_is_compiled_and_ran_uncompiled():
    model = torch.compile(Between(activation), backend="eager")
    assert the("torch.compile", model).verdict == "note"


def test_a_reentrant_checkpoint_is_read_though_no_audit_goes_through_it():
    class Again(Between):
        def forward(self, x):
            x = x.clone().requires_grad_()
            return checkpoint(super().forward, x, use_reentrant=True)

    model = Again(activation)
    assert the("checkpoint", model).verdict == "slow"
    assert "can be read, of 4" in the("per-sample gradients", model).what


def centred(x):
    return x - x.mean(0, keepdim=True)


def rotated(x):
    return torch.view_as_real(1j * torch.view_as_complex(x.unflatten(-1, (4, 2))))


@pytest.mark.parametrize("loss", [losses, mean_loss])
@pytest.mark.parametrize(
    ("between", "said"),
    [
        (centred, "do not each belong to one of the 4 samples"),
        (lambda x: rotated(x).flatten(-2), "complex numbers"),
        (lambda x: F.batch_norm(x.mT, None, None, training=True).mT, "normalisation"),
    ],
)
def test_what_a_probe_refuses_is_foreseen_of_a_mean_too(between, said, loss):
    one = the("per-sample gradients", Between(between), loss)
    assert one.verdict == "refused" and said in one.why


def test_graphs_that_differ_from_step_to_step():
    class LeftOut(Between):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x if self.calls % 2 else x.tanh() + 1)

    # Of the data alone no gradient is taken, so its nodes are in no graph.
    assert found(LeftOut(activation), subject="graph") == []

    class Deeper(Between):
        calls = 0

        def forward(self, x):
            self.calls += 1
            deeper = self.between if self.calls % 2 else activation
            return self.last(deeper(self.first(x))).mean(1)

    one = the("graph", Deeper(torch.relu))
    assert one.verdict == "slow" and "nodes, then" in one.what


def test_losses_of_tokens_are_pointed_out():
    def tokens(model, batch):
        return model.first(batch[0]).square().mean(-1).flatten()

    (one,) = found(Between(activation), tokens, subject="loss")
    assert one.what == "24 losses for a batch of 4"
    model = Between(activation)
    unknown = Target(model, lambda m, b: tokens(m, BATCH), None, is_batch_known=False)
    assert [f for f in examine(unknown) if f.subject == "loss"] == []


def test_float16_says_that_losses_are_scaled():
    model = Between(activation).half()
    batch = BATCH[0].half(), BATCH[1]
    assert "pass scale=" in the("dtype", model, batch=batch).remedy
