"""Convolution statistics: the reference against autograd, the kernels against it."""

from dataclasses import replace

import pytest
import torch

from fastminima.ops.conv import (
    ConvGeometry,
    conv_dots,
    conv_gradients,
    conv_gram,
    conv_second_moment,
    conv_sq_norms,
)

HALVES = (torch.float16, torch.bfloat16)


def geometry(kernel, *, stride=1, padding=0, dilation=1, groups=1, output_padding=None):
    axes = len(kernel)

    def each(value):
        return value if isinstance(value, tuple) else (value,) * axes

    return ConvGeometry(
        kernel_size=kernel,
        stride=each(stride),
        padding=each(padding),
        dilation=each(dilation),
        groups=groups,
        transposed=output_padding is not None,
        output_padding=each(output_padding or 0),
    )


# name: (geometry, batch, input channels, output channels, input space)
CASES = {
    "same 3x3": (geometry((3, 3), padding=1), 3, 5, 7, (8, 8)),
    "5x5 pad 2": (geometry((5, 5), padding=2), 2, 3, 8, (11, 9)),
    "one pixel": (geometry((1, 1)), 3, 4, 6, (1, 1)),
    "kernel over image": (geometry((3, 3), padding=1), 4, 6, 5, (1, 1)),
    "2x2 image": (geometry((3, 3), padding=1), 5, 33, 18, (2, 2)),
    "valid": (geometry((3, 2)), 2, 3, 4, (7, 5)),
    "one channel": (geometry((3, 3), padding=1), 2, 1, 1, (5, 5)),
    "stride 3": (geometry((3, 3), stride=3, padding=1), 3, 4, 9, (10, 11)),
    "stride 2": (geometry((3, 3), stride=2, padding=1), 2, 16, 17, (16, 16)),
    "projection": (geometry((1, 1), stride=2), 2, 6, 10, (9, 8)),
    "dilation 2": (geometry((3, 3), padding=2, dilation=2), 2, 4, 5, (9, 9)),
    "mixed": (geometry((3, 2), stride=(2, 3), dilation=(1, 2)), 2, 4, 5, (9, 12)),
    "stride over dilation": (geometry((2, 2), stride=3, dilation=2), 2, 3, 4, (9, 9)),
    "groups": (geometry((3, 3), padding=1, groups=3), 2, 6, 9, (6, 7)),
    "depthwise 2": (geometry((3, 3), padding=1, groups=5), 3, 5, 10, (6, 6)),
    "1-D": (geometry((3,), padding=1), 3, 4, 5, (13,)),
    "1-D stride 2": (geometry((4,), stride=2, padding=1, groups=2), 3, 4, 6, (13,)),
    "3-D": (geometry((2, 3, 3), stride=(1, 2, 1), padding=1), 2, 3, 4, (4, 5, 6)),
    "transposed": (geometry((3, 3), padding=1, output_padding=0), 2, 4, 5, (5, 5)),
    "transposed 2": (
        *(geometry((3, 3), stride=2, padding=1, groups=2, output_padding=1),),
        *(3, 4, 6, (4, 5)),
    ),
    "transposed 1-D": (geometry((4,), stride=3, output_padding=2), 2, 3, 2, (5,)),
    "large": (geometry((3, 3), padding=1), 2, 48, 40, (4, 4)),
    "long": (geometry((3, 3), padding=1), 1, 9, 13, (33, 31)),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def weight_shape(case):
    conv, _, c_in, c_out, _ = case
    rows, image = (c_in, c_out) if conv.transposed else (c_out, c_in)
    return (rows, image // conv.groups, *conv.kernel_size)


def forward(conv, x, weight):
    return torch.convolution(
        *(x, weight, None, conv.stride, conv.padding, conv.dilation),
        *(conv.transposed, conv.output_padding, conv.groups),
    )


def draw(case, dtype=torch.float64, batch=None):
    """Input and output gradient of the convolution of a case."""
    conv, cased_batch, c_in, _, space = case
    x = torch.randn(cased_batch if batch is None else batch, c_in, *space).to(dtype)
    weight = torch.zeros(weight_shape(case), dtype=dtype)
    return x, torch.randn(forward(conv, x, weight).shape).to(dtype)


def autograd_gradients(case, x, g):
    """Weight gradient of each sample, one backward pass a sample."""
    weight = torch.zeros(weight_shape(case), dtype=x.dtype, requires_grad=True)
    return torch.stack(
        [
            torch.autograd.grad(forward(case[0], x[n : n + 1], weight), weight, g_n)[0]
            for n, g_n in enumerate(g.split(1))
        ]
    )


@ALL
def test_gradients_are_those_of_autograd(case):
    x, g = draw(case)
    torch.testing.assert_close(
        conv_gradients.reference(x, g, case[0]), autograd_gradients(case, x, g)
    )


@ALL
def test_references_agree_with_gradients(case):
    x, g = draw(case)
    grads = autograd_gradients(case, x, g)
    v = torch.randn_like(grads[0])
    weight, bias = conv_sq_norms.reference(x, g, case[0], True)
    torch.testing.assert_close(weight, grads.flatten(1).square().sum(1))
    torch.testing.assert_close(bias, g.flatten(2).sum(2).square().sum(1))
    moment = conv_second_moment.reference(x, g, case[0])
    torch.testing.assert_close(moment, grads.square().sum(0))
    gram = conv_gram.reference(x, g, case[0])
    torch.testing.assert_close(gram, grads.flatten(1) @ grads.flatten(1).T)
    dots = conv_dots.reference(x, g, case[0], v)
    torch.testing.assert_close(dots, (grads * v).flatten(1).sum(1))


def test_references_in_blocks(monkeypatch):
    def statistics():
        return [
            conv_second_moment.reference(x, g, conv),
            conv_gram.reference(x, g, conv),
            conv_sq_norms.reference(x, g, conv, False)[0],
        ]

    conv, x, g = CASES["same 3x3"][0], *draw(CASES["same 3x3"], batch=7)
    whole = statistics()
    monkeypatch.setattr("fastminima.ops.conv._BLOCK", 8000)  # three blocks of 7 samples
    torch.testing.assert_close(statistics(), whole)


@pytest.mark.parametrize("dtype", HALVES)
def test_references_accumulate_halves_in_float32(dtype):
    case = CASES["groups"]
    x, g = draw(case, dtype)
    x, g = x * 100, g * 100  # squared norms far beyond 65504
    wide = conv_sq_norms.reference(x.double(), g.double(), case[0], True)
    got = conv_sq_norms(x, g, case[0], True)
    torch.testing.assert_close(got, tuple(w.float() for w in wide))
    got = conv_gradients(x, g, case[0])
    want = conv_gradients.reference(x.double(), g.double(), case[0])
    # A sum of about 10 products of size 1e4, in float32.
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=0.05)
    assert conv_second_moment(x, g, case[0]).dtype == torch.float32
    assert conv_gram(x, g, case[0]).dtype == torch.float32
    assert conv_dots(x, g, case[0], got[0]).dtype == torch.float32


def test_sizes_that_do_not_belong_together():
    conv, x, g = CASES["valid"][0], *draw(CASES["valid"])
    with pytest.raises(ValueError, match="do not belong to"):
        conv_sq_norms(x[:, :, 1:], g, conv, False)
    with pytest.raises(ValueError, match="do not belong to"):
        conv_sq_norms(x[:1], g, conv, False)
    with pytest.raises(ValueError, match="do not belong to"):
        conv_sq_norms(x, g, replace(conv, groups=2), False)
