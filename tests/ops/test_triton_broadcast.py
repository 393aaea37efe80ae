"""Sums of one tensor in Triton: against float64, and against their floors."""

import pytest
import torch
from ops.triton_cases import (
    DTYPES,
    LAYOUTS,
    assert_within,
    double,
    each_shape,
    far_apart,
    laid_out,
)

from fastminima.ops import broadcast, reduce
from fastminima.ops.triton import _time_tiles
from fastminima.ops.triton import broadcast as kernels
from fastminima.ops.triton import reduce as reduce_kernels
from tools.kernels.interpreter import Report, interpreting
from tools.kernels.place import Interpreter

SHAPES = [
    *[(3, 5, 7), (1, 1, 1), (2, 33, 70), (4, 1, 300), (2, 17, 256)],
    *[(0, 3, 4), (3, 0, 4), (3, 2, 0), (2, 6100, 3), (1, 2, 9000)],
]
ROUNDINGS = 24  # a term: its product, then log2 of its tile, and the tiles of a lane


def check(place, name, *args):
    reference = getattr(broadcast, name).reference
    want = reference(*double(*args))
    size = reference(*(a.abs() for a in double(*args)))
    assert_within(place(getattr(kernels, name), *args), want, size, ROUNDINGS)


@each_shape(SHAPES)
def test_sums(place, shape, dtype):
    g, x = laid_out("samples", shape, dtype), laid_out("times", shape, dtype)
    check(place, "sum_over_time", g)
    check(place, "sum_over_space", g)
    check(place, "product_over_time", g, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts(place, layout, other):
    g = laid_out(layout, (3, 21, 36), torch.bfloat16)
    x = laid_out(other, (3, 21, 36), torch.bfloat16)
    check(place, "product_over_time", g, x)
    check(place, "sum_over_space" if layout == other else "sum_over_time", g)


def test_one_row_for_all_times(place):
    check(place, "sum_over_time", torch.randn(2, 1, 9).expand(-1, 40, -1))
    check(place, "sum_over_space", torch.randn(2, 9, 1).expand(-1, -1, 40))


def test_half_precision_does_not_overflow(place):
    g = torch.full((2, 3000, 4), 300.0, dtype=torch.float16)
    want = torch.full((2, 4), 3000 * 300.0**2)
    torch.testing.assert_close(place(kernels.product_over_time, g, g), want)
    norm = place(reduce_kernels.sq_norm, g)
    torch.testing.assert_close(norm, want.sum())


@pytest.mark.parametrize("strides", [(2**30, 8, 1), (24, 2**30, 1), (24, 1, 2**28)])
def test_offsets_of_64_bits(strides):
    shape = (3, 3, 8) if strides[0] == 2**30 else (1, 3, 8)
    x = laid_out("transposed" if strides[1] == 1 else "samples", shape, torch.float16)
    with far_apart(shape, strides) as g, interpreting(report=Report(sample=1 << 20)):
        got = kernels.product_over_time(g, x)
        want = broadcast.product_over_time.reference(g, x)
    torch.testing.assert_close(got, want)


@each_shape([(), (1,), (3, 5), (0, 4), (2048,), (5, 1, 4099)])
def test_squared_norm(place, shape, dtype):
    both = torch.randn(*shape, 2).to(dtype)
    for x in (both[..., 0].contiguous(), both[..., 1]):
        want = reduce.sq_norm.reference(x.double())
        assert_within(place(reduce_kernels.sq_norm, x), want, want, ROUNDINGS)


def test_squared_norm_of_several_blocks_a_program(monkeypatch, place):
    monkeypatch.setattr(reduce_kernels, "PROGRAMS", 3)
    x = torch.randn(19, 1111)
    want = reduce.sq_norm.reference(x.double())
    assert_within(place(reduce_kernels.sq_norm, x), want, want, ROUNDINGS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sum_over_time", "sum_over_space"])
def test_sums_are_at_their_floor(name, dtype):
    g = torch.randn(2, 1100, 24).to(dtype)
    place = Interpreter()
    place(getattr(kernels, name), g)
    launch, *adding_up = place.report.per_launch
    assert launch.load_bytes == launch.unique_load_bytes == g.nbytes
    assert [each.store_bytes for each in adding_up] == (
        [4 * 2 * 24] if name == "sum_over_time" else []
    )
    # Of 1100 steps at least 128 a program, in whole tiles of 128; or of 24 steps.
    kept, splits = (24, 5) if name == "sum_over_time" else (1100, 1)
    assert launch.store_bytes == 4 * 2 * kept * splits


WIDTHS = [1, 7, 24, 64, 100, 768, 3072]


@pytest.mark.parametrize("time", [1, 5, 100, 512, 5000])
@pytest.mark.parametrize("batch", [1, 16, 300])
@pytest.mark.parametrize("itemsizes", [(2,), (4,), (2, 2), (2, 4), (4, 4)])
@pytest.mark.parametrize("time_is_contiguous", [False, True])
def test_tiles(batch, time, itemsizes, time_is_contiguous):
    """They cover everything once; loads fill lines, and time is split last."""
    for features in WIDTHS:
        cut = _time_tiles.tiles(
            *(batch, time, features),
            time_is_contiguous=time_is_contiguous,
            itemsizes=itemsizes,
        )
        assert cut.span * (cut.splits - 1) < time <= cut.span * cut.splits
        assert cut.blocks == -(-features // cut.block_features)
        assert cut.span % cut.block_time == 0
        assert cut.block_time * cut.block_features <= 8192 // min(itemsizes)
        if time_is_contiguous:
            continue
        line = cut.block_features * min(itemsizes)
        assert line >= min(64, features * min(itemsizes))
        if cut.splits > 1:
            assert batch * cut.blocks < _time_tiles.FEW
            assert cut.span >= _time_tiles.LEAST_TIME


def test_one_launch_where_samples_and_features_fill_a_gpu():
    cut = _time_tiles.tiles(16, 512, 768, time_is_contiguous=False, itemsizes=(2,))
    assert cut == _time_tiles.Tiles(128, 32, span=512, splits=1, blocks=24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_norms_are_at_their_floor(dtype):
    g, x = torch.randn(2, 2, 130, 80).to(dtype)
    place = Interpreter()
    place(kernels.product_over_time, g, x)
    (launch,) = place.report.per_launch
    assert launch.load_bytes == launch.unique_load_bytes == 2 * g.nbytes
    assert launch.store_bytes == 4 * 2 * 80
    place(reduce_kernels.sq_norm, g)
    (launch,) = place.report.per_launch
    assert launch.load_bytes == launch.unique_load_bytes == g.nbytes
    assert launch.store_bytes == 4 * launch.programs
