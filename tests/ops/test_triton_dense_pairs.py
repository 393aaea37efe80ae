"""Products of dense gradients in Triton: between samples, and with directions."""

import pytest
import torch
from ops.triton_cases import (
    LAYOUTS,
    assert_within,
    double,
    each_shape,
    far_apart,
    laid_out,
)

from fastminima.ops import dense
from fastminima.ops.triton import dense_dots as dots
from fastminima.ops.triton import dense_pairs as pairs
from tools.kernels.interpreter import Report, interpreting
from tools.kernels.place import Interpreter

# batch, time, d_in, d_out
SHAPES = [
    *[(3, 5, 7, 4), (1, 1, 1, 1), (17, 1, 20, 17), (2, 33, 70, 16), (7, 3, 16, 96)],
    *[(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (2, 4, 3, 0)],
]
WAYS = [pairs._by_rows, pairs._by_gradients]
ROUNDINGS = 24  # a term: its products, and the sums it passes through


def inputs(shape, dtype, layout="samples"):
    batch, time, d_in, d_out = shape
    a = laid_out(layout, (batch, time, d_in), dtype)
    return a, laid_out(layout, (batch, time, d_out), dtype)


def check(place, launcher, op, *args, roundings=ROUNDINGS):
    want = op.reference(*double(*args))
    size = op.reference(*(x.abs() for x in double(*args)))
    got = place(launcher, *args)
    assert_within(got, want, size, roundings)
    return got


def by(way):
    """A launcher that goes one way, with the arguments that it expects."""
    return lambda a, g: way(pairs._aligned(a), pairs._aligned(g))


@each_shape(SHAPES, halves=True)
def test_gram(place, shape, dtype):
    check(place, pairs.sequence_gram, dense.sequence_gram, *inputs(shape, dtype))


@pytest.mark.parametrize("way", WAYS)
@each_shape([(3, 5, 7, 4), (3, 35, 20, 17), (17, 1, 33, 20)], halves=True)
def test_both_ways(place, way, shape, dtype):
    gram = check(place, by(way), dense.sequence_gram, *inputs(shape, dtype))
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_pairs(place, way, layout):
    a, g = inputs((5, 9, 32, 19), torch.bfloat16, layout)
    check(place, by(way), dense.sequence_gram, a, g)


def test_larger_tiles(monkeypatch, place):
    monkeypatch.setattr(pairs, "PROGRAMS", 3)
    for dtype in (torch.float32, torch.bfloat16):
        a, g = inputs((3, 70, 20, 33), dtype)
        check(place, by(pairs._by_rows), dense.sequence_gram, a, g)


def test_gradients_in_several_chunks(monkeypatch, place):
    monkeypatch.setattr(pairs, "SCRATCH_BYTES", 1 << 18)
    monkeypatch.setattr(pairs, "SCRATCH_ROWS", 16)
    monkeypatch.setattr(pairs, "PROGRAMS", 3)
    a, g = inputs((17, 3, 20, 200), torch.float32)
    check(place, by(pairs._by_gradients), dense.sequence_gram, a, g)
    if place.report is not None:
        assert place.report.launches == 4


def test_each_way_is_taken_where_it_is_cheaper():
    half, full = torch.bfloat16, torch.float32
    assert pairs._is_by_rows(256, 1, 4096, 4096, half)
    assert pairs._is_by_rows(16, 64, 4096, 4096, full)
    assert not pairs._is_by_rows(16, 512, 1024, 1024, half)
    assert not pairs._is_by_rows(64, 512, 256, 256, full)


def test_squared_norms_are_not_negative(place):
    a = torch.ones(2, 2, 16)
    g = torch.randn(2, 1, 16) * torch.tensor([1.0, -1.0 - 2.0**-22])[:, None]
    gram = place(by(pairs._by_rows), a, g)
    assert (gram.diagonal() >= 0).all()


@each_shape(SHAPES, halves=True)
@pytest.mark.parametrize("directions", [1, 3])
def test_dots(place, shape, dtype, directions):
    a, g = inputs(shape, dtype)
    v = torch.randn(directions, shape[3], shape[2])
    check(place, dots.sequence_multi_dots, dense.sequence_multi_dots, a, g, v)
    if directions == 1:
        check(place, dots.sequence_dots, dense.sequence_dots, a, g, v[0])


@pytest.mark.parametrize("directions", [0, 2, 8, 11])
def test_many_directions(place, directions):
    a, g = inputs((3, 19, 40, 33), torch.bfloat16)
    v = torch.randn(directions, 33, 40, dtype=torch.float64).bfloat16()
    check(place, dots.sequence_multi_dots, dense.sequence_multi_dots, a, g, v)


@pytest.mark.parametrize("time", [1, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_dots(place, layout, time):
    a, g = inputs((3, time, 32, 19), torch.bfloat16, layout)
    v = laid_out(layout, (2, 19, 32), torch.float32)
    check(place, dots.sequence_multi_dots, dense.sequence_multi_dots, a, g, v)


def test_several_samples_a_program(monkeypatch, place):
    monkeypatch.setattr(dots, "PROGRAMS", 5)
    a, g = inputs((7, 3, 20, 24), torch.float32)
    v = torch.randn(2, 24, 20)
    check(place, dots.sequence_multi_dots, dense.sequence_multi_dots, a, g, v)


def test_half_precision_does_not_overflow(place):
    """Sums of equal, positive terms: their roundings go one way and add up.

    What is multiplied is exact, 300 and the integers 16 * 300^2 and 20 * 300^2 below
    2^24. A result is then a sum of `terms` products; each is rounded once, and passes
    through at most terms - 1 additions in whatever order they are made, so that the
    relative error is at most `terms` half units (Higham 2002, section 4.2).
    """
    time, width = 20, 16
    a = torch.full((2, time, width), 300.0, dtype=torch.float16)
    want = dense.sequence_gram.reference(a.double(), a.double())
    for way in WAYS:
        terms = time**2 if way is pairs._by_rows else width**2
        assert_within(place(by(way), a, a), want, want, terms)
    v = torch.ones(1, width, width)
    want = dense.sequence_multi_dots.reference(a.double(), a.double(), v.double())
    assert_within(place(dots.sequence_multi_dots, a, a, v), want, want, width**2)


def test_different_dtypes(place):
    a, g = inputs((3, 5, 7, 4), torch.float32)
    g, v = g.bfloat16(), torch.randn(1, 4, 7).half()
    check(place, pairs.sequence_gram, dense.sequence_gram, a, g)
    check(place, dots.sequence_multi_dots, dense.sequence_multi_dots, a, g, v)


@pytest.mark.parametrize("strides", [(2**30, 16, 1), (48, 2**30, 1)])
def test_offsets_of_64_bits(strides):
    shape = (3, 3, 16) if strides[0] == 2**30 else (1, 3, 16)
    g, v = torch.randn(shape).half(), torch.randn(2, 16, 16)
    with far_apart(shape, strides) as a, interpreting(report=Report(sample=1 << 20)):
        grams = [way(a, g) for way in WAYS]
        many = dots.sequence_multi_dots(a, g, v)
        want = dense.sequence_gram.reference(a, g)
        products = dense.sequence_multi_dots.reference(a, g, v)
    for gram in grams:
        torch.testing.assert_close(gram, want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(many, products, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_at_their_floor(dtype):
    batch, time, d_in, d_out = 8, 16, 64, 96
    place = Interpreter()
    a, g = inputs((batch, time, d_in, d_out), dtype)
    place(pairs._by_rows, a, g)
    (launch,) = place.report.per_launch
    assert launch.unique_load_bytes == a.nbytes + g.nbytes
    assert launch.store_bytes == 4 * batch**2
    blocks = batch * time // (16 if dtype == torch.float32 else 32)
    whole = batch**2 * time**2 * (d_in + d_out)
    floor = whole + whole // blocks
    padded = (d_in + 128) / (d_in + d_out) if dtype == torch.bfloat16 else 1
    assert launch.dot_flops == floor * padded
    assert launch.load_bytes == (blocks + 1) * launch.unique_load_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_at_their_floor(dtype):
    batch, time, d_in, d_out = 16, 64, 32, 64
    place = Interpreter()
    a, g = inputs((batch, time, d_in, d_out), dtype)
    place(pairs._by_gradients, a, g)
    made, paired = place.report.per_launch
    size = d_in * d_out
    assert made.load_bytes == made.unique_load_bytes == a.nbytes + g.nbytes
    assert made.store_bytes == 4 * batch * size
    assert made.dot_flops == 2 * batch * time * size
    splits = paired.programs
    below = 4 * splits * batch * (batch + 1) // 2
    assert paired.unique_load_bytes == 4 * batch * size + below
    assert paired.load_bytes == paired.unique_load_bytes
    assert paired.store_bytes == below
    assert paired.dot_flops == 2 * batch**2 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("directions", [1, 4])
def test_dots_are_at_their_floor(monkeypatch, directions, dtype):
    monkeypatch.setattr(dots, "PROGRAMS", 1)
    batch, time, d_in, d_out = 3, 64, 64, 32
    place = Interpreter()
    a, g = inputs((batch, time, d_in, d_out), dtype)
    v = torch.randn(directions, d_out, d_in)
    place(dots.sequence_multi_dots, a, g, v)
    (launch,) = place.report.per_launch
    assert launch.unique_load_bytes == a.nbytes + g.nbytes + v.nbytes
    assert launch.load_bytes == launch.unique_load_bytes
    assert launch.store_bytes == 4 * batch * directions
    assert launch.dot_flops == 2 * batch * time * d_in * d_out
