"""Uses of a parameter in which the samples are hard to tell apart."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm


def agrees(probe, named, losses):
    """Every parameter's norms are those that autograd finds, one loss at a time."""
    found = [
        torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        for loss in losses
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = probe.backward(losses)
    for name, grads in zip(named, zip(*found, strict=True), strict=True):
        want = torch.stack([g.square().sum() for g in grads])
        got = stats.sq_norms_by_parameter[name]
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def parameters(*shapes):
    return {
        f"p{i}": nn.Parameter(torch.rand(shape) + 0.5) for i, shape in enumerate(shapes)
    }


def squares(out):
    return (out.flatten(1) + 0.3).square().sum(1)


def test_repeats_that_interleave_the_samples():
    """Row n of the parameter is sample n's alone, and repeated along time."""
    named = parameters((4, 3))
    x = torch.randn(4, 4, 3)  # time, batch, 3: as many steps as samples
    probe = fm.GradientProbe(named, per_parameter=True)
    repeated = named["p0"].repeat(4, 1).view(4, 4, 3)
    agrees(probe, named, squares((repeated * x).transpose(0, 1)))
    repeated = named["p0"].repeat(4, 1).view(4, 4, 3)  # now one parameter for all
    agrees(probe, named, squares(repeated * x))


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w, x + w

    @staticmethod
    def backward(ctx, product, total):
        x, w = ctx.saved_tensors
        return product * w + total, (product * x + total).sum(0)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_function_with_outputs_that_nobody_uses(used):
    named = parameters((3,))
    outputs = TwoOutputs.apply(torch.randn(4, 3), named["p0"])
    probe = fm.GradientProbe(named, per_parameter=True)
    agrees(probe, named, squares(sum(outputs[i].tanh() for i in used)))


def test_bags_whose_bounds_move():
    """The bounds say which of the computed weights are whose."""
    named = parameters((3,), (5, 2))
    probe = fm.GradientProbe(named, per_parameter=True)
    for bounds in 3 * [[0, 2, 4, 6]] + [[0, 1, 4, 6], [0, 3, 3, 6]]:
        ids, x = torch.randint(5, (8,)), torch.randn(8, 3)
        bags = F.embedding_bag(
            ids,
            named["p1"],
            torch.tensor(bounds),
            mode="sum",
            per_sample_weights=(x @ named["p0"]).tanh(),
        )
        agrees(probe, named, squares(bags))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_bags_of_any_length(mode, last):
    named = parameters((5, 2))
    probe = fm.GradientProbe(named, per_parameter=True)
    for bounds in [[0, 2, 4, 6], [0, 0, 3, 8], [0, 5, 5, 5], [0, 1, 1, 7]]:
        bags = F.embedding_bag(
            torch.tensor([1, 1, 0, 3, 0, 0, 2, 1]),
            named["p0"],
            torch.tensor([*bounds, 8] if last else bounds),
            mode=mode,
            padding_idx=0,
            include_last_offset=last,
        )
        losses = squares(bags)
        assert probe.audit(losses).rows[0].rules == ("EmbeddingBagBackward0",)
        agrees(probe, named, losses)


def test_weights_of_bags_as_a_parameter():
    named = parameters((8,), (5, 2))
    probe = fm.GradientProbe(named, per_parameter=True)
    bags = F.embedding_bag(
        torch.randint(5, (8,)),
        named["p1"],
        torch.tensor([0, 3, 3, 6]),
        mode="sum",
        per_sample_weights=named["p0"],
    )
    agrees(probe, named, squares(bags))


ARITHMETIC = {
    "x - p": lambda x, p: x - p,
    "p - x": lambda x, p: p - x,
    "x - 3 p": lambda x, p: torch.sub(x, p, alpha=3),
    "x / p": lambda x, p: x / p,
    "p / x": lambda x, p: p / (x.abs() + 1),
    "one - p": lambda x, p: x * (1 - p),
    "(p x) / p": lambda x, p: (x * p).sin() / p,
}


@pytest.mark.parametrize("shape", [(4,), (3, 1), (1,), (4, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, shape):
    named = parameters(shape)
    x = torch.randn(4, 3, 4)
    out = ARITHMETIC[name](x, named["p0"])
    agrees(fm.GradientProbe(named, per_parameter=True), named, squares(out))


def pooled_by_sum(rows, mask):
    return (rows * mask.unsqueeze(2)).sum(1)


def pooled_by_maximum(rows, mask):
    return (rows * mask.unsqueeze(2)).abs().amax(1)


def pooled_where(rows, mask):
    return torch.where(mask.unsqueeze(2) > 0, rows, 0.0).sum(1)


def pooled_by_filling(rows, mask):
    shared = rows.expand(len(mask), -1, -1)
    return shared.masked_fill(mask.unsqueeze(2) == 0, -1e3).amax(1)


def pooled_by_a_product_of_columns(rows, mask):
    return (rows.T @ mask.T).T


def pooled_by_a_sparse_product(rows, mask):
    return torch.sparse.mm(mask.to_sparse(), rows)


def pooled_of_repeats(rows, mask):
    return pooled_by_sum(rows.repeat(4, 1, 1), mask)


def pooled_of_a_stack(rows, mask):
    return pooled_by_sum(torch.stack(4 * [rows]), mask)


def pooled_by_interpolation(rows, mask):
    nothing = torch.zeros(4, *rows.shape)
    return torch.lerp(nothing, rows, mask.unsqueeze(2)).sum(1)


@pytest.mark.parametrize(
    "pooled",
    [
        pooled_by_a_sparse_product,
        pooled_of_repeats,
        pooled_of_a_stack,
        pooled_by_interpolation,
        pooled_by_sum,
        pooled_by_maximum,
        pooled_where,
        pooled_by_filling,
        pooled_by_a_product_of_columns,
    ],
)
def test_rows_that_a_mask_gives_to_samples(pooled):
    """First as many rows for each sample, as if in regular order; then others."""
    named = parameters((3, 2))
    probe = fm.GradientProbe(named, per_parameter=True)
    for lengths in 4 * [[2, 2, 2, 2]] + [[1, 3, 2, 2], [3, 1, 1, 3]]:
        owner = torch.arange(4).repeat_interleave(torch.tensor(lengths))
        mask = (owner == torch.arange(4).unsqueeze(1)).float()  # [batch, rows]
        rows = torch.randn(8, 3) @ named["p0"]
        agrees(probe, named, squares(pooled(rows, mask)))


def test_rows_that_are_spread_within_the_samples_are_remembered():
    """Scales of samples and of features do not say whose a row is."""
    named = parameters((3, 3), (3,))
    probe = fm.GradientProbe(named, per_parameter=True)
    for _ in range(3):
        rows = torch.randn(3, 3, 3) @ named["p0"]
        rows = rows / rows.square().mean(2, keepdim=True).sqrt() * named["p1"]
        rows = rows + rows.mean(1, keepdim=True)
        agrees(probe, named, squares(rows))
    (known,) = probe._reader._structures.values()
    assert len(known._measured) == 1


class Scaled(torch.autograd.Function):
    """Arguments that are no tensors have a gradient, None, but no edge."""

    @staticmethod
    def forward(ctx, factor, x, is_scaled, w):
        ctx.save_for_backward(x, w)
        ctx.factor = factor if is_scaled else 1.0
        return x * w * ctx.factor

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return None, g * w * ctx.factor, None, (g * x * ctx.factor).sum(0)


@pytest.mark.parametrize("below", [False, True])
def test_a_function_with_arguments_that_are_no_tensors(below):
    torch.manual_seed(0)
    named = parameters((6,), (6, 6))
    x = torch.randn(5, 6)
    x = x @ named["p1"] if below else x
    used = named if below else {"p0": named["p0"]}
    losses = Scaled.apply(3.0, x, True, named["p0"]).sin().sum(1)
    agrees(fm.GradientProbe(used, per_parameter=True), used, losses)


def test_a_pass_for_some_inputs_only():
    """Nodes leave out what such a pass does not need, and a rule may need it."""
    named = parameters((6,), (6, 6))
    x = torch.randn(5, 6, requires_grad=True)
    losses = torch.maximum(x @ named["p1"], named["p0"]).sum(1)
    probe = fm.GradientProbe(named)
    probe.attach(losses)
    with pytest.raises(fm.CaptureError, match=r"\['p0'\] at Maximum"):
        losses.mean().backward(inputs=[x])
    probe.detach()


class Magnitudes(nn.Module):
    """Trainable lengths of frozen rows, under a mask that is nobody's buffer."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.length = nn.Parameter(torch.rand(4, 1) + 0.5)
        self.mask = [(torch.rand(4, 1) < 0.7).float()]

    def forward(self, x):
        return F.linear(x, self.rows * (self.length * self.mask[0]))


def test_frozen_directions():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    layer.parametrizations.weight.original1.requires_grad_(False)
    for model in (layer, Magnitudes()):
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        losses = model(torch.randn(5, 6)).sin().sum(1)
        agrees(fm.GradientProbe(model, per_parameter=True), named, losses)
