"""A bias' norms come with the weight's kernel where that runs, and start none."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastminima as fm
from fastminima.capture.session import hooks
from fastminima.ops import broadcast, conv, dense


@pytest.fixture
def calls(monkeypatch):
    """The ops that were called; programs, which call kernels, are switched off."""
    monkeypatch.setattr(hooks, "program_of", lambda *_: None)
    seen = []

    class Counted:
        def __init__(self, op):
            self.op = op

        def __call__(self, *args, **kwargs):
            is_of_samples = len(args[0]) == 1  # which are 4
            seen.append("sum of samples" if is_of_samples else self.op.name)
            return self.op(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.op, name)

    for module, names in (
        (dense, ("sequence_sq_norms", "row_sq_norms", "sequence_fused")),
        (conv, ("conv_sq_norms", "conv_fused")),
        (broadcast, ("sum_over_time", "sum_over_space")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    return seen


def step(model, x, calls, **options):
    probe = fm.GradientProbe(model, **options)
    for _ in range(2):
        model.zero_grad()
        calls.clear()
        probe.backward(model(x).square().flatten(1).sum(1))
    return calls


SEQUENCE = nn.Linear(32, 8), torch.randn(4, 16, 32)
IMAGES = nn.Conv2d(3, 4, 3), torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("layer", "x", "kernel"),
    [(*SEQUENCE, "sequence_sq_norms"), (*IMAGES, "conv_sq_norms")],
    ids=["linear", "convolution"],
)
@pytest.mark.parametrize("measure", ["norms", "second_moments"])
def test_one_kernel_gives_both(layer, x, kernel, measure, calls):
    found = step(layer, x, calls, measure=measure)
    assert found.count(kernel) == 1
    assert measure != "norms" or found == [kernel]


@pytest.mark.parametrize(
    ("layer", "x", "kernel"),
    [(*SEQUENCE, "sequence_fused"), (*IMAGES, "conv_fused")],
    ids=["linear", "convolution"],
)
def test_one_kernel_gives_both_and_the_gradient(layer, x, kernel, calls):
    assert step(layer, x, calls, mode="fused") == [kernel, "sum of samples"]


@pytest.mark.parametrize("mode", ["observe", "fused"])
@pytest.mark.parametrize(
    ("layer", "x", "kernel"),
    [(*SEQUENCE, "sum_over_time"), (*IMAGES, "sum_over_space")],
    ids=["linear", "convolution"],
)
def test_a_weight_that_is_normalised_on_its_way_needs_no_norms(
    layer, x, kernel, mode, calls
):
    model = weight_norm(type(layer)(*arguments(layer)))
    assert step(model, x, calls, mode=mode) == [kernel]


def arguments(layer):
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size
