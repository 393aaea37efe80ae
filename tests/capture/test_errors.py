"""Bad input: a clear error, and the model as it was."""

import gc
import warnings

import placing
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm
from fastminima.capture.session.states import Nothing

X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture(autouse=True, scope="module")
def _on_the_device(device):
    global X, Y
    X, Y = X.to(device), Y.to(device)


def model_and_losses():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, F.cross_entropy(model(X), Y, reduction="none")


def untouched(model):
    return all(p.grad is None for p in model.parameters())


def test_loss_without_a_graph():
    model, losses = model_and_losses()
    with pytest.raises(fm.CaptureError, match="no graph"):
        fm.GradientProbe(model).backward(losses.detach())


def test_no_parameter_reached():
    model, _ = model_and_losses()
    other, losses = model_and_losses()
    with pytest.raises(fm.CaptureError, match="reaches none of the 4"):
        fm.GradientProbe(model).backward(losses)
    assert untouched(model)
    assert untouched(other)


def test_backward_already_run():
    model, losses = model_and_losses()
    probe = fm.GradientProbe(model)
    probe.backward(losses)
    for p in model.parameters():
        p.grad = None
    for again in (probe, fm.GradientProbe(model)):
        with pytest.raises(fm.CaptureError, match="already run"):
            again.backward(losses)
        with pytest.raises(fm.CaptureError, match="already run"):
            again.backward(losses.mean(), len(X))
        with pytest.raises(fm.CaptureError, match="already run"):
            again.audit(losses)
    assert untouched(model)


def test_retain_graph_allows_a_second_backward():
    model, losses = model_and_losses()
    probe = fm.GradientProbe(model)
    a = probe.backward(losses, retain_graph=True)
    b = probe.backward(losses)
    assert torch.equal(a.sq_norms, b.sq_norms)
    torch.testing.assert_close(a.mean_grad_sq_norm, b.mean_grad_sq_norm)


@pytest.mark.parametrize("batch_size", [5, 7, 3, 12])
def test_batch_size_that_is_not_the_models(batch_size):
    model, losses = model_and_losses()
    with pytest.raises(fm.CaptureError, match=f"No batch axis of size {batch_size}"):
        fm.GradientProbe(model).backward(losses.mean(), batch_size)
    assert untouched(model)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_impossible_batch_size(batch_size):
    model, losses = model_and_losses()
    with pytest.raises(ValueError, match="positive integer"):
        fm.GradientProbe(model).backward(losses.mean(), batch_size)


def test_scalar_loss_without_batch_size():
    model, losses = model_and_losses()
    with pytest.raises(ValueError, match=r"batch_size=len\(x\)"):
        fm.GradientProbe(model).backward(losses.mean())


def test_losses_of_two_dimensions():
    model, _ = model_and_losses()
    with pytest.raises(ValueError, match=r"shape \(6, 3\)"):
        fm.GradientProbe(model).backward(model(X))


def test_losses_and_another_batch_size():
    model, losses = model_and_losses()
    with pytest.raises(ValueError, match="there are 6 losses"):
        fm.GradientProbe(model).backward(losses, batch_size=5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"measure": "norm"}, "Unknown measure 'norm'"),
        ({"measure": ("norms", "hessian")}, "Unknown measure 'hessian'"),
        ({"mode": "fast"}, "Unknown mode"),
        ({"batchnorm": "ignore"}, "Unknown batchnorm"),
        ({"batch_dim": -1}, "batch_dim"),
        ({"directions": {"v": torch.zeros(3)}}, r"needs \(43,\)"),
        ({"directions": {"v": {"9.weight": torch.zeros(3)}}}, "not a tracked"),
        ({"directions": {"v": {"0.bias": torch.zeros(3)}}}, "has shape"),
    ],
)
def test_unknown_words(options, message):
    model, _ = model_and_losses()
    with pytest.raises(ValueError, match=message):
        fm.GradientProbe(model, **options)


def test_unknown_reduction_and_scale():
    model, losses = model_and_losses()
    probe = fm.GradientProbe(model)
    with pytest.raises(ValueError, match="Unknown reduction"):
        probe.backward(losses.mean(), 6, reduction="none")
    with pytest.raises(ValueError, match="scale"):
        probe.backward(losses, scale=0.0)


def test_model_without_parameters():
    with pytest.raises(ValueError, match="No trainable parameters"):
        fm.GradientProbe(nn.ReLU())
    with pytest.raises(TypeError, match="list"):
        fm.GradientProbe([nn.Parameter(torch.zeros(2))])


def test_complex_and_uninitialised_parameters():
    with pytest.raises(ValueError, match="complex64"):
        fm.GradientProbe({"w": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    with pytest.raises(ValueError, match="not initialised"), torch.device("cpu"):
        fm.GradientProbe(nn.LazyLinear(3))


def test_variance_of_one_sample():
    model, _ = model_and_losses()
    losses = F.cross_entropy(model(X[:1]), Y[:1], reduction="none")
    stats = fm.GradientProbe(model, measure="second_moments", keep_mean=True).backward(
        losses
    )
    for name in ("covariance_trace", "variance", "signal", "noise_scale"):
        with pytest.raises(ValueError, match="at least 2 samples, got 1"):
            getattr(stats, name)
    row = stats.to_dict()
    assert row["count"] == 1
    assert not {"covariance_trace", "variance", "signal", "noise_scale"} & set(row)


def test_batch_norm_in_training_names_the_module():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(fm.CaptureError, match=r'1 \(BatchNorm1d\).*batchnorm="rows"'):
        fm.GradientProbe(model).backward(model(X).square().sum(1))
    assert untouched(model)


def test_layer_that_mixes_samples():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model = nn.Sequential(nn.Linear(4, 5), Centred(), nn.Linear(5, 3))
    with pytest.raises(fm.CaptureError, match="do not each belong to one of the 6"):
        fm.GradientProbe(model).backward(model(X).square().sum(1))
    assert untouched(model)


def test_penalty_in_a_scalar_loss():
    model, losses = model_and_losses()
    penalty = sum(p.square().sum() for p in model.parameters())
    with pytest.raises(fm.CaptureError, match="keep penalties"):
        fm.GradientProbe(model).backward(losses.mean() + penalty, 6)
    assert untouched(model)


def test_penalty_in_every_samples_loss():
    model, losses = model_and_losses()
    probe = fm.GradientProbe(model)
    penalty = sum(p.square().sum() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        audit = probe.audit(losses + penalty)
    assert audit.ok, str(audit)


class _Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.second((hidden - hidden.mean(0)).tanh())


def test_audit_of_layers_that_mix_samples():
    """It cannot succeed, and says which layer it is about."""
    for model, named in (
        (_Centred(), "first"),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), "1"),
    ):
        losses = F.cross_entropy(model(X), Y, reduction="none")
        with pytest.raises(fm.CaptureError, match=named):
            fm.GradientProbe(model).audit(losses)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_losses_that_cancel_each_other(factor):
    """Their mean may have no gradient at all, and that of each loss is not zero."""
    model, losses = model_and_losses()
    with pytest.raises(fm.CaptureError, match="samples"):
        fm.GradientProbe(model).backward(losses - factor * losses.mean())
    assert untouched(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_region(device):
    if device.type == "apart":
        pytest.skip("compilers do not know the device `apart`")
    model, _ = model_and_losses()
    compiled = torch.compile(model, backend="aot_eager")
    with placing.lifted():
        losses = F.cross_entropy(compiled(X), Y, reduction="none")
    with pytest.raises(fm.CaptureError, match=r"torch\.compile"):
        fm.GradientProbe(model).backward(losses)
    assert untouched(model)
    fm.GradientProbe(model).backward(F.cross_entropy(model(X), Y, reduction="none"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(bad):
    model, _ = model_and_losses()
    x = X.clone()
    x[2, 1] = bad
    losses = F.cross_entropy(model(x), Y, reduction="none")
    stats = fm.GradientProbe(model).backward(losses)
    assert not stats.is_finite
    finite = torch.isfinite(stats.sq_norms)
    assert finite.tolist() == [True, True, False, True, True, True]


def test_all_losses_nan_then_a_good_step():
    model, losses = model_and_losses()
    probe = fm.GradientProbe(model)
    assert not probe.backward(losses * float("nan")).is_finite
    model.zero_grad()
    _, good = model, F.cross_entropy(model(X), Y, reduction="none")
    assert probe.audit(good).ok


def test_frozen_and_unused_parameters_are_absent():
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 3), "b": nn.Linear(3, 3), "unused": nn.Linear(2, 2)}
    )
    model["b"].weight.requires_grad_(False)
    probe = fm.GradientProbe(
        model, measure="second_moments", per_parameter=True, keep_mean=True
    )
    stats = probe.backward(model["b"](model["a"](X).tanh()).square().sum(1))
    reached = {"a.weight", "a.bias", "b.bias"}
    assert set(stats.sq_norms_by_parameter) == reached
    assert set(stats.second_moments) == reached
    assert set(stats.variance) == reached
    assert set(stats.mean_grad) == reached
    assert stats.parameter_count == 12 + 3 + 3 + 6


def test_only_some_parameters_watched():
    model, losses = model_and_losses()
    named = dict(model.named_parameters())
    probe = fm.GradientProbe({"w": named["2.weight"]}, per_parameter=True)
    stats = probe.backward(losses)
    assert list(stats.sq_norms_by_parameter) == ["w"]
    assert stats.parameter_count == 15
    assert all(p.grad is not None for p in model.parameters())


def test_collect_without_attach_and_without_backward():
    model, losses = model_and_losses()
    probe = fm.GradientProbe(model)
    with pytest.raises(fm.CaptureError, match="Nothing is attached"):
        probe.collect()
    probe.attach(losses.mean(), 6)
    with pytest.raises(fm.CaptureError, match="No backward pass reached"):
        probe.collect()


def test_detach_takes_back_an_attach():
    model, losses = model_and_losses()
    probe = fm.GradientProbe(model)
    probe.attach(losses.mean(), 6)
    probe.detach()
    probe.detach()
    losses.mean().backward(retain_graph=True)
    losses.mean().backward()  # a hook left would take it for an error
    with pytest.raises(fm.CaptureError, match="Nothing is attached"):
        probe.collect()


class Trouble(torch.autograd.Function):
    error = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if Trouble.error is not None:
            raise Trouble.error
        return g


class Troubled(nn.Module):
    def forward(self, x):
        return Trouble.apply(x)


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("attach", [False, True])
def test_exception_in_backward_leaves_nothing(error, attach):
    model = nn.Sequential(nn.Linear(4, 5), Troubled(), nn.Linear(5, 3))
    probe = fm.GradientProbe(model)
    accumulators = [
        p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()
    ]  # kept alive, as DistributedDataParallel does
    probe.backward(model(X).square().sum(1))
    before = [p.grad.clone() for p in model.parameters()]
    Trouble.error = error
    try:
        losses = model(X).square().sum(1)
        with pytest.raises(type(error)):
            if attach:
                probe.attach(losses.mean(), 6)
                losses.mean().backward()
            else:
                probe.backward(losses)
    finally:
        Trouble.error = None
    if attach:
        with pytest.raises(fm.CaptureError):
            # The loss that was attached never ran to its end.
            probe.attach(torch.zeros(3), None)
    del losses
    model.zero_grad()
    model(X).square().sum(1).mean().backward()
    assert isinstance(probe._pass, Nothing)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, was)
    assert probe.audit(model(X).square().sum(1)).ok
    del accumulators
    gc.collect()
