"""Layers that mix the samples by themselves are refused, whatever comes after them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm


def probe_of(model, **options):
    return fm.GradientProbe(model, **options)


def losses_of(out):
    weight = torch.linspace(0.5, 1.5, out[0].numel())
    return (out.flatten(1) * weight).square().sum(1)


class Norm(nn.Module):
    """A normalisation over images [batch, 2, 5] laid out as `[1, batch * 2, 5]`."""

    def __init__(self, kind, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.kind, self.options = kind, options

    def forward(self, x):
        flat = x.reshape(1, 8, 5)
        return self.kind(flat, weight=self.weight, **self.options).view(4, 2, 5)


class OfColumns(nn.Module):
    """Batch normalisation of samples that lie along the last dim."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):  # [batch, 3]
        return self.norm(x.T[None])[0].T


REFUSED = {
    "rows of several samples": (lambda: nn.LayerNorm((4, 3)), (4, 3)),
    "groups of two samples": (lambda: Norm(F.group_norm, num_groups=2), (4, 2, 5)),
    "columns": (OfColumns, (4, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_norm_over_the_samples(name):
    build, shape = REFUSED[name]
    model = build()
    with pytest.raises(fm.CaptureError, match="statistics over several samples"):
        probe_of(model).backward(losses_of(model(torch.randn(shape))))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:No rule")
@pytest.mark.parametrize(
    "build, shape",
    [
        (lambda: nn.LayerNorm((4, 3)), (4, 4, 3)),
        (lambda: Norm(F.group_norm, num_groups=4), (4, 2, 5)),
        (lambda: Norm(F.group_norm, num_groups=8), (4, 2, 5)),
        (lambda: OfColumns().eval(), (4, 3)),
    ],
    ids=["rows of one sample", "a group each", "two groups each", "in evaluation mode"],
)
def test_norm_within_the_samples(build, shape):
    model = build()
    losses = losses_of(model(torch.randn(shape)))
    assert probe_of(model).audit(losses, samples=4).ok


@pytest.mark.filterwarnings("ignore:No rule")
def test_norm_that_begins_to_mix():
    model, x = OfColumns().eval(), torch.randn(4, 3)
    probe = probe_of(model)
    probe.backward(losses_of(model(x)))
    with pytest.raises(fm.CaptureError, match=r"norm \(BatchNorm1d\) takes its stat"):
        probe.backward(losses_of(model.train()(x)))


@pytest.mark.filterwarnings("ignore:No rule")
def test_norms_of_single_samples_whose_gradients_are_not_numbers():
    """Rows of NaN fit any layout, one over the normalised dims too."""
    norm = nn.LayerNorm((3, 4))
    images = torch.randn(3, 3, 4)
    images[1] = float("nan")
    stats = probe_of(norm).backward(losses_of(torch.stack([norm(x) for x in images])))
    assert not stats.is_finite


def test_rows_of_a_norm_over_columns():
    model = OfColumns()
    losses = losses_of(model(torch.randn(4, 3)))
    grads = torch.stack(
        [
            torch.cat(torch.autograd.grad(loss, model.parameters(), retain_graph=True))
            for loss in losses
        ]
    )
    with pytest.warns(UserWarning, match="No rule for (Native|Cudnn)BatchNorm"):
        stats = probe_of(model, batchnorm="rows").backward(losses)
    torch.testing.assert_close(stats.sq_norms, grads.square().sum(1))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_divided_by_counts_in_the_batch(kind):
    model = kind(5, 3, scale_grad_by_freq=True)
    ids = torch.randint(5, (4, 6))
    with pytest.raises(fm.CaptureError, match="scale_grad_by_freq"):
        probe_of(model).backward(losses_of(model(ids)))
    one = losses_of(model(ids[:1]))
    (grad,) = torch.autograd.grad(one[0], model.weight, retain_graph=True)
    with pytest.warns(UserWarning, match="No rule"):
        stats = probe_of(model).backward(one)
    torch.testing.assert_close(stats.sq_norms, grad.square().sum()[None])


def test_counts_in_a_table_that_all_samples_share():
    model = nn.Embedding(3, 6, scale_grad_by_freq=True)
    x, places = torch.randn(4, 5, 6), torch.tensor([0, 1, 1, 2, 2])
    assert probe_of(model).audit(losses_of(x * model(places)), samples=4).ok


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout):
    model = nn.Linear(3, 2)
    rows = [torch.randn(n, 3) for n in (2, 4, 3)]
    out = model(torch.nested.nested_tensor(rows, layout=layout))
    losses = torch.nested.to_padded_tensor(out, 0.0).square().sum((1, 2))
    with pytest.raises(fm.CaptureError, match="nested tensors"):
        probe_of(model).backward(losses)


def test_no_sample():
    model = nn.Linear(3, 2)
    with pytest.raises(fm.CaptureError, match="empty"):
        probe_of(model).backward(model(torch.randn(0, 3)).sum(1))


@pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no such loss"
)
@pytest.mark.filterwarnings("ignore:No rule")
def test_loss_in_chunks():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])

    def loss_of(rows, retain):
        options = nn.LinearCrossEntropyOptions(allow_retain_graph=retain)
        model = nn.LinearCrossEntropyLoss(3, 2, options=options)
        return model, model(x[:rows], y[:rows])

    for retain in (False, True):
        model, loss = loss_of(4, retain)
        with pytest.raises(fm.CaptureError, match="vector of per-sample losses"):
            probe_of(model).backward(loss, 4)
    model, loss = loss_of(1, False)
    with pytest.raises(fm.CaptureError, match="allow_retain_graph=True"):
        probe_of(model).backward(loss, 1)
    model, loss = loss_of(1, True)
    stats = probe_of(model).backward(loss, 1)
    torch.testing.assert_close(
        stats.sq_norms[0], model.linear.weight.grad.square().sum()
    )
