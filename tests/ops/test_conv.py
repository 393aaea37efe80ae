"""Convolution statistics: the reference against autograd, the kernels against it."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fastminima import _native
from fastminima.ops.conv import (
    ConvGeometry,
    conv_dots,
    conv_fused,
    conv_gradients,
    conv_gram,
    conv_second_moment,
    conv_sq_norms,
)
from fastminima.ops.native import conv as conv_native

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


@pytest.mark.parametrize("limit", [300, 3000, 60000])
@pytest.mark.parametrize("name", CASES)
def test_references_in_pieces(monkeypatch, name, limit):
    """Of the batch, of the weight and of positions, the last ones smaller."""

    def statistics():
        return [
            conv_gradients.reference(x, g, conv),
            conv_second_moment.reference(x, g, conv),
            conv_gram.reference(x, g, conv),
            conv_dots.reference(x, g, conv, v),
            *conv_sq_norms.reference(x, g, conv, True),
            *conv_fused.reference(x, g, conv, True, True),
        ]

    conv, x, g = CASES[name][0], *draw(CASES[name], batch=7)
    x, g = x.double(), g.double()
    v = torch.randn(conv.weight_shape(x, g), dtype=torch.float64)
    whole = statistics()
    monkeypatch.setattr("fastminima.ops._pieces.LIMIT", limit)
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


def ways_to_norms(dtype):
    """Every implementation, and both native ways where the op would choose one."""
    for backend in conv_sq_norms.backends("cpu", dtype):
        yield backend, conv_sq_norms.on(backend, "cpu", dtype)
    for isa in _native.available_isas():
        for way in (conv_native.direct_sq_norms, conv_native.gram_sq_norms):
            yield f"{way.__name__} {isa}", partial(way, _native.kernels_for(isa))


def check_norms(x, g, conv, **tolerance):
    want = conv_sq_norms.reference(x.double(), g.double(), conv, True)
    for name, way in ways_to_norms(x.dtype):
        got = way(x, g, conv, True)
        for part, truth in zip(got, want, strict=True):
            torch.testing.assert_close(
                *(part, truth.to(x.dtype)),
                msg=lambda m, n=name: f"{n}: {m}",
                **tolerance,
            )
        assert way(x, g, conv, False)[1] is None


# A dot product of n <= 1024 terms that cancel to their root mean square errs by about
# sqrt(n) eps of them, 4e-6; its square by twice that, less in the mean over a weight.
SINGLE = {"rtol": 1e-5, "atol": 1e-5}


@ALL
def test_norms_in_every_way(case):
    x, g = draw(case)
    check_norms(x, g, case[0])
    check_norms(x.float(), g.float(), case[0], **SINGLE)


@ALL
def test_second_moment_in_every_way(case):
    x, g = draw(case)
    want = conv_second_moment.reference(x, g, case[0])
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for backend in conv_second_moment.backends("cpu", dtype):
            got = conv_second_moment.on(backend, "cpu", dtype)(
                x.to(dtype), g.to(dtype), case[0]
            )
            # An element can be small by cancellation: it is compared with the largest.
            torch.testing.assert_close(
                *(got.double(), want),
                rtol=rtol,
                atol=rtol * want.max().item(),
                msg=lambda m, b=backend: f"{b}: {m}",
            )


@ALL
def test_empty_batch(case):
    x, g = draw(case, torch.float32, batch=0)
    for _, way in ways_to_norms(torch.float32):
        weight, bias = way(x, g, case[0], True)
        assert weight.shape == bias.shape == (0,)
    for backend in conv_second_moment.backends("cpu", torch.float32):
        moment = conv_second_moment.on(backend, "cpu", torch.float32)(x, g, case[0])
        torch.testing.assert_close(moment, torch.zeros(weight_shape(case)))
    assert conv_gradients(x, g, case[0]).shape == (0, *weight_shape(case))
    assert conv_gram(x, g, case[0]).shape == (0, 0)


@pytest.mark.parametrize("name", ["same 3x3", "stride 2", "groups", "transposed 2"])
def test_any_strides(name):
    case = CASES[name]
    x, g = draw(case, torch.float32)
    layouts = (
        (x.to(memory_format=torch.channels_last), g.contiguous()),
        (x, g.to(memory_format=torch.channels_last)),
        (x.flip(3).flip(3).mT.contiguous().mT, torch.stack([g, g], -1)[..., 0]),
        (x.expand_as(x), g[:, :1, :1, :1].expand_as(g)),
    )
    for strided_x, strided_g in layouts:
        check_norms(strided_x, strided_g, case[0], **SINGLE)
        want = conv_second_moment.reference(
            strided_x.double(), strided_g.double(), case[0]
        )
        got = conv_second_moment(strided_x, strided_g, case[0])
        assert got.sub(want).abs().max() < 1e-5 * want.max()


def test_fewer_samples_than_threads():
    case = CASES["large"]
    x, g = draw(case, batch=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        check_norms(x, g, case[0])
    finally:
        torch.set_num_threads(before)


def test_cancelling_positions():
    """Contributions that cancel to 1e-3 of their sizes keep float32's accuracy."""
    conv, x, g = CASES["same 3x3"][0], *draw(CASES["same 3x3"])
    x = torch.ones_like(x) + 1e-3 * torch.randn_like(x)
    g = g - g.mean(dim=(2, 3), keepdim=True)
    g[:, :, [0, -1]] = 0  # at the rim, zeros of the padding do not cancel
    g[:, :, :, [0, -1]] = 0
    g[:, :, 1:-1, 1:-1] -= g[:, :, 1:-1, 1:-1].mean(dim=(2, 3), keepdim=True)
    x, g = x.float(), g.float()
    sizes = conv_gradients.reference(x.double().abs(), g.double().abs(), conv)
    truth = conv_sq_norms.reference(x.double(), g.double(), conv, False)[0]
    assert (truth < 1e-5 * sizes.flatten(1).square().sum(1)).all()
    # |dW| carries an error of eps times the sizes that cancel, its square twice that.
    eps = torch.finfo(torch.float32).eps
    bound = 4 * eps * (sizes.flatten(1).square().sum(1) / truth).sqrt().max()
    for name, way in ways_to_norms(torch.float32):
        norms = way(x, g, conv, False)[0].double()
        assert (norms >= 0).all(), name
        assert ((norms - truth).abs() / truth).max() < bound, name


def test_zero_gradients_and_those_that_are_not_finite():
    case = CASES["same 3x3"]
    x, g = draw(case, torch.float32)
    x[0, 0, 4, 4] = float("nan")  # scratch of the first sample is used again
    g[1] = 0
    for name, way in ways_to_norms(torch.float32):
        weight = way(x, g, case[0], False)[0]
        assert weight[0].isnan(), name
        assert weight[1] == 0, name
        assert weight[2].isfinite(), name


def test_same_bits_every_time():
    case = CASES["large"]
    x, g = draw(case, torch.float32, batch=9)
    for name, way in ways_to_norms(torch.float32):
        first, second = way(x, g, case[0], True), way(x, g, case[0], True)
        assert torch.equal(first[0], second[0]), name
        assert torch.equal(first[1], second[1]), name
    assert torch.equal(
        conv_second_moment(x, g, case[0]), conv_second_moment(x, g, case[0])
    )
