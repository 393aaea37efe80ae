"""Triton kernels of convolutions against the float64 reference, on any machine."""

from functools import partial

import pytest
import torch

from fastminima.ops import conv as ops
from fastminima.ops.conv_geometry import ConvGeometry
from fastminima.ops.triton import _settle, conv, conv_cost, conv_sizes
from fastminima.ops.triton.conv_gram import gram_sums
from fastminima.ops.triton.conv_sizes import operands
from tools.kernels.interpreter import interpreting

HALVES = [torch.float16, torch.bfloat16]
WAYS = ["direct", "gram", "shifts"]


def geometry(kernel, stride=1, padding=0, dilation=1, groups=1, transposed=False):
    def each(value):
        return value if isinstance(value, tuple) else (value,) * len(kernel)

    return ConvGeometry(
        *(kernel, each(stride), each(padding), each(dilation)),
        groups=groups,
        transposed=transposed,
        output_padding=each(0),
    )


# name: (geometry, batch, input channels, output channels, input space)
CASES = {
    "one pixel": (geometry((1, 1)), 3, 4, 6, (1, 1)),
    "3x3": (geometry((3, 3), padding=1), 2, 5, 7, (6, 5)),
    "one tap a block": (geometry((2, 1), padding=1), 2, 33, 17, (3, 4)),
    "two blocks of all": (geometry((1, 2)), 1, 66, 65, (6, 12)),
    "projection": (geometry((1, 1), stride=2), 2, 6, 10, (5, 4)),
    "stride 2": (geometry((3, 3), stride=2, padding=1), 2, 3, 4, (7, 6)),
    "stride over kernel": (geometry((2, 2), stride=3, dilation=2), 2, 3, 4, (9, 9)),
    "mixed": (geometry((3, 2), (2, 3), (1, 2), (1, 2)), 2, 4, 5, (5, 9)),
    "groups": (geometry((3, 3), padding=1, groups=3), 2, 6, 9, (4, 5)),
    "depth-wise": (geometry((2, 3), padding=1, groups=3), 2, 3, 6, (3, 4)),
    "1-D": (geometry((4,), stride=2, padding=1), 3, 4, 5, (13,)),
    "1-D depth-wise": (geometry((3,), dilation=2, groups=6), 2, 6, 6, (37,)),
    "3-D": (geometry((2, 1, 2), (1, 2, 1), 1, (1, 1, 2)), 2, 3, 4, (3, 4, 5)),
    "transposed": (
        *(geometry((3, 2), stride=2, padding=1, groups=2, transposed=True),),
        *(2, 4, 6, (3, 4)),
    ),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SOME = pytest.mark.parametrize(
    "case",
    [CASES["stride 2"], (geometry((2, 2), padding=1, groups=2), 2, 2, 4, (2, 3))],
    ids=["stride 2", "depth-wise"],
)
# Sums of up to 400 products and of their squares, in float32.
ROOM = {"rtol": 1e-5, "atol": 1e-4}


def draw(case, dtype=torch.float32, batch=None):
    """Input and output gradient of the convolution of a case."""
    layer, cased_batch, c_in, c_out, space = case
    rows, image = (c_in, c_out) if layer.transposed else (c_out, c_in)
    weight = torch.zeros(rows, image // layer.groups, *layer.kernel_size)
    x = torch.randn(cased_batch if batch is None else batch, c_in, *space)
    out = torch.convolution(
        *(x, weight, None, layer.stride, layer.padding, layer.dilation),
        *(layer.transposed, layer.output_padding, layer.groups),
    )
    return x.to(dtype), torch.randn(out.shape).to(dtype)


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def norms_by(way, layer, x, g):
    """Squared norms of the weight gradients by the way that is named."""
    of = operands(x, g, layer)
    if way == "direct":
        return conv.direct_norms(of)
    tile = conv_cost.gram_tile(of.sizes, of.image.dtype, way == "shifts")
    return conv.gram_norms(of, tile)


def fused(layer, x, g):
    return conv.conv_fused(x, g, layer, True, True)


def check(got, want):
    for part, truth in zip(got, want, strict=True):
        torch.testing.assert_close(part, truth.float(), **ROOM)


def check_norms(place, way, layer, x, g):
    got = place(partial(norms_by, way, layer), x, g)
    want = ops.conv_sq_norms.reference(x.double(), g.double(), layer, False)[0]
    check([got], [want])


def check_fused(place, layer, x, g):
    got = place(partial(fused, layer), x, g)
    want = ops.conv_fused.reference(x.double(), g.double(), layer, True, True)
    check(got, want)


@ALL
def test_reference_of_fused_is_the_sum_of_the_others(case):
    layer, x, g = case[0], *(t.double() for t in draw(case, batch=3))
    grad, norms, bias, moment = ops.conv_fused.reference(x, g, layer, True, True)
    torch.testing.assert_close(grad, ops.conv_gradients.reference(x, g, layer).sum(0))
    torch.testing.assert_close(moment, ops.conv_second_moment.reference(x, g, layer))
    weight, of_bias = ops.conv_sq_norms.reference(x, g, layer, True)
    torch.testing.assert_close(norms, weight)
    torch.testing.assert_close(bias.square().sum(1), of_bias)
    assert ops.conv_fused.reference(x, g, layer, False, False)[2:] == (None, None)


@ALL
@pytest.mark.parametrize("way", WAYS)
def test_norms(place, case, way):
    check_norms(place, way, case[0], *draw(case))


@ALL
def test_fused(place, case):
    check_fused(place, case[0], *draw(case))


@SOME
@pytest.mark.parametrize("dtype", HALVES)
def test_halves(place, case, dtype):
    x, g = draw(case, dtype)
    # The two ways to a Gram matrix load alike.
    for way in ("direct", "gram" if dtype == torch.float16 else "shifts"):
        check_norms(place, way, case[0], x, g)
    check_fused(place, case[0], x, g)


@SOME
def test_layouts(place, case):
    layer, x, g = case[0], *draw(case)
    wide = torch.stack([g, g], -1)[..., 1]
    for strided in ((channels_last(x), channels_last(g)), (x.mT.contiguous().mT, wide)):
        for way in WAYS:
            check_norms(place, way, layer, *strided)
        check_fused(place, layer, *strided)
    broadcast = g[:, :1, :1, :1].expand_as(g)
    check_fused(place, layer, x, broadcast)


def test_packed_by_channel(place, monkeypatch):
    """What is requested often is copied to have its channels last."""
    case = (geometry((3, 3), padding=1), 1, 48, 32, (3, 3))
    layer, x, g = case[0], *draw(case)
    of = operands(x, g, layer)
    assert of.layout()["ROWS_BY_POSITION"] and of.layout()["IMAGE_BY_POSITION"]
    with interpreting():
        packed, _ = conv_cost.direct_tile(of, outputs=0)
    assert not any(packed.layout().values())
    assert torch.equal(packed.image, of.image) and torch.equal(packed.rows, of.rows)
    check_fused(place, layer, x, g)
    monkeypatch.setattr(conv_sizes, "_OFTEN", 1)
    check_norms(place, "shifts", layer, x, g)


@SOME
def test_a_program_walks_samples(place, case, monkeypatch):
    monkeypatch.setattr(conv_cost, "PROGRAMS", 2)
    layer, x, g = case[0], *draw(case, batch=3)
    assert conv_cost.chunks(3, 1) == 2
    check_fused(place, layer, x, g)
    monkeypatch.setattr(conv_cost, "_WORKSPACE", 1)  # one sample's Gram at a time
    check_norms(place, "shifts", layer, x, g)


@SOME
def test_offsets_in_64_bits(place, case, monkeypatch):
    monkeypatch.setattr(conv_sizes, "_NARROW", 0)
    x, g = draw(case, torch.bfloat16)
    assert operands(x, g, case[0]).layout()["WIDE"]
    for way in WAYS:
        check_norms(place, way, case[0], x, g)
    check_fused(place, case[0], x, g)


@ALL
def test_empty_batch(place, case):
    layer, x, g = case[0], *draw(case, torch.bfloat16, batch=0)
    check_fused(place, layer, x, g)
    norms, bias = place(conv.conv_sq_norms, x, g, layer, True)
    assert norms.shape == bias.shape == (0,)
    moment = place(conv.conv_second_moment, x, g, layer)
    want = torch.zeros(layer.weight_shape(x, g))
    torch.testing.assert_close(moment, want)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_launchers_of_the_table(place, dtype):
    case = CASES["stride 2"]
    x, g = draw(case, dtype)
    args = (x, g, case[0])
    wide = (x.double(), g.double(), case[0])
    got = place(conv.conv_sq_norms, *args, True)
    check(got, ops.conv_sq_norms.reference(*wide, True))
    assert conv.conv_sq_norms(x[:0], g[:0], case[0], False)[1] is None
    moment = place(conv.conv_second_moment, *args)
    check([moment], [ops.conv_second_moment.reference(*wide)])
    got = place(conv.conv_fused, *args, False, False)
    check(got[:2], ops.conv_fused.reference(*wide, False, False)[:2])
    assert got[2:] == (None, None)
    for op in (ops.conv_sq_norms, ops.conv_second_moment, ops.conv_fused):
        assert "triton" in op.backends("cuda", dtype)


def test_input_and_gradient_of_two_dtypes(place):
    layer, x, g = CASES["3x3"][0], *draw(CASES["3x3"])
    check_fused(place, layer, x.bfloat16(), g)
    check_norms(place, "gram", layer, x, g.half())


def cancelling():
    """Positions that cancel to 1e-4 of their sizes in the first of two samples."""
    layer = geometry((3, 3), padding=1)
    x, g = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)
    x[0] = 1 + 1e-4 * torch.randn(3, 6, 6)
    g[0, :, [0, -1]] = 0  # at the rim, zeros of the padding do not cancel
    g[0, :, :, [0, -1]] = 0
    g[0, :, 1:-1, 1:-1] -= g[0, :, 1:-1, 1:-1].mean(dim=(1, 2), keepdim=True)
    return layer, x, g


@pytest.mark.parametrize("way", ["gram", "shifts"])
def test_cancelling_positions_are_done_again(place, way):
    layer, x, g = cancelling()
    want = ops.conv_sq_norms.reference(x.double(), g.double(), layer, False)[0]
    of = operands(x, g, layer)
    tile = conv_cost.gram_tile(of.sizes, of.image.dtype, way == "shifts")
    gram = place(
        lambda x, g: gram_sums(operands(x, g, layer), tile)[:, 0].sum(dim=1), x, g
    )
    error = (gram - want).abs() / want
    assert error[0] > 1e-3 > error[1]
    got = place(partial(norms_by, way, layer), x, g)
    assert torch.equal(got[1], gram[1])
    # The gradient carries an error of eps times the sizes that cancel.
    torch.testing.assert_close(got, want.float(), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("most", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (5, torch.float32)]
)
def test_every_number_of_programs_makes_all_of_a_gradient(
    place, monkeypatch, most, dtype
):
    """Of several tiles, in groups; the samples with zeros everywhere hold."""
    monkeypatch.setattr(_settle, "MOST", most)
    layer = geometry((3, 3), padding=1, groups=2)
    x, g = torch.randn(3, 128, 4, 4), torch.randn(3, 150, 4, 4)
    g[1] = 0
    x[0] = 1  # and gradients that cancel where no padding is near
    g[0] -= g[0].mean(dim=(1, 2), keepdim=True)
    x, g = x.to(dtype), g.to(dtype)
    want = ops.conv_sq_norms.reference(x.double(), g.double(), layer, False)[0]
    got = place(partial(norms_by, "gram", layer), x, g)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_samples_that_are_not_finite_stay_alone(place, way):
    case = CASES["3x3"]
    layer, x, g = case[0], *draw(case, batch=4)
    x[0, 0, 3, 3], x[2, 0, 3, 3] = float("nan"), float("inf")
    g[1] = 0
    got = place(partial(norms_by, way, layer), x, g)
    assert got[0].isnan() and got[1] == 0 and got[3].isfinite()
    # Infinity times the zeros beside the rows of a tile would not be a number.
    want = ops.conv_sq_norms.reference(x.double(), g.double(), layer, False)[0]
    torch.testing.assert_close(got[2:], want[2:].float(), **ROOM)


def test_ways_are_chosen_by_cost():
    def way(channels, side, kernel=3, groups=1, dtype=torch.bfloat16):
        layer = geometry((kernel, kernel), padding=kernel // 2, groups=groups)
        x = torch.empty(8, channels, side, side, dtype=dtype, device="meta")
        tile = conv_cost.fastest_gram(operands(x, x, layer))
        return "direct" if tile is None else ("shifts" if tile.shifts else "gram")

    assert way(64, 56) == "direct"
    assert way(512, 14) != "direct"
    assert way(512, 14, dtype=torch.float32) == "shifts"
    assert way(1024, 7, kernel=1) == "gram"
    assert way(256, 7, groups=256) == "direct"
