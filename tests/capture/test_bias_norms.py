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


def sequence():
    return nn.Linear(32, 8), torch.randn(4, 16, 32)


def images():
    return nn.Conv2d(3, 4, 3), torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "kernel"),
    [(sequence, "sequence_sq_norms"), (images, "conv_sq_norms")],
    ids=["linear", "convolution"],
)
@pytest.mark.parametrize("measure", ["norms", "second_moments"])
def test_one_kernel_gives_both(make, kernel, measure, calls):
    found = step(*make(), calls, measure=measure)
    assert found.count(kernel) == 1
    assert measure != "norms" or found == [kernel]


@pytest.mark.parametrize(
    ("make", "kernel"),
    [(sequence, "sequence_fused"), (images, "conv_fused")],
    ids=["linear", "convolution"],
)
def test_one_kernel_gives_both_and_the_gradient(make, kernel, calls):
    assert step(*make(), calls, mode="fused") == [kernel, "sum of samples"]


@pytest.mark.parametrize("mode", ["observe", "fused"])
@pytest.mark.parametrize(
    ("make", "kernel"),
    [(sequence, "sum_over_time"), (images, "sum_over_space")],
    ids=["linear", "convolution"],
)
def test_a_weight_that_is_normalised_on_its_way_needs_no_norms(
    make, kernel, mode, calls
):
    layer, x = make()
    assert step(weight_norm(layer), x, calls, mode=mode) == [kernel]
