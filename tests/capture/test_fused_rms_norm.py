"""The rule for the RMSNorm kernel that only GPUs have, on a stand-in for its node."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastminima.capture.reading.plan import Slot
from fastminima.capture.rows.layout import IrregularLayout, RegularLayout
from fastminima.capture.rules import contributions_of

NAME = "FusedRmsNormBackward0"
EPS = 1e-5


def node_of(x, normalized):
    dims = tuple(range(-len(normalized), 0))
    rstd = (x.square().mean(dims, keepdim=True) + EPS).rsqrt()
    return SimpleNamespace(
        _saved_input=x, _saved_normalized_shape=normalized, _saved_result1=rstd
    )


@pytest.mark.parametrize("normalized", [(6,), (3, 6)])
@pytest.mark.parametrize("order", ["batch first", "time first", "any"])
def test_sample_gradients_are_those_of_the_composite(normalized, order):
    torch.manual_seed(0)
    x, g = torch.randn(2, 5, 4, *normalized).double()
    layer = nn.RMSNorm(normalized, eps=EPS).double()
    if order == "time first":
        layout, samples = RegularLayout(1, 1, 4, 1), x.unbind(1)
        of_samples = g.unbind(1)
    else:
        layout, samples, of_samples = RegularLayout(0, 1, 5, 1), x, g
    if order == "any":
        if len(normalized) > 1:
            pytest.skip("irregular rows are those of the last dim")
        labels = torch.arange(5, device="cpu")  # as those of all layouts
        layout = IrregularLayout(labels[:, None].expand(5, 4), 5)
    slot = Slot(1, (0, 0), normalized, ())
    found = contributions_of(NAME, node_of(x, normalized), [g], [layout], [slot])
    got = found[1].sq_norms()
    for norm, one, of_one in zip(got, samples, of_samples, strict=True):
        (want,) = torch.autograd.grad(layer(one), layer.weight, of_one)
        torch.testing.assert_close(norm, want.square().sum())


def test_samples_in_the_normalised_dims_have_no_rule():
    x, g = torch.randn(2, 5, 4, 6).double()
    slot = Slot(1, (0, 0), (6,), ())
    layout = RegularLayout(2, 1, 6, 1)
    assert contributions_of(NAME, node_of(x, (6,)), [g], [layout], [slot]) == {}
