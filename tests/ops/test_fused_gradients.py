"""The weight gradient with what is per sample in it: every way against float64."""

from functools import partial

import pytest
import torch
from test_conv import CASES, autograd_gradients, draw, geometry
from test_dense import DTYPES, SHAPES, pairs

from fastminima import _native
from fastminima.ops.conv import conv_fused, conv_sq_norms
from fastminima.ops.cost.dense import is_fused_faster
from fastminima.ops.dense import sequence_fused
from fastminima.ops.native import conv as conv_native
from fastminima.ops.native import dense as dense_native

FLAGS = [(False, False), (True, False), (False, True), (True, True)]
ALL_CONVOLUTIONS = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def ways(op, dtype, tiles):
    """Every implementation, and the native tiles where the op would choose."""
    for backend in op.backends("cpu", dtype):
        yield backend, op.on(backend, "cpu", dtype)
    for isa in _native.available_isas():
        yield f"tiles {isa}", partial(tiles, _native.kernels_for(isa))


def dense_ways(dtype):
    return ways(sequence_fused, dtype, dense_native.sequence_fused)


def conv_ways(dtype):
    def tiles(kernels, x, g, geometry, with_bias, with_second_moment):
        return conv_native.tile_gradient(
            kernels, x, g, geometry, with_bias, True, with_second_moment
        )

    return ways(conv_fused, dtype, tiles)


def assert_agree(got, want, dtype, name):
    """Each part to 2e-6 of its largest element (float64: 1e-13), norms each for itself.

    A sum of n <= 1024 products errs by about sqrt(n) eps / 4 = 1e-6 of their root mean
    square, which nothing in random data makes larger than the largest sum.
    """
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    assert len(got) == len(want) == 4
    for part, (mine, truth) in enumerate(zip(got, want, strict=True)):
        where = f"{name}, part {part}"
        if truth is None:
            assert mine is None, where
            continue
        assert mine.dtype == dtype, where
        assert mine.shape == truth.shape, where
        if truth.numel() == 0:
            continue
        error, scale = (mine.double() - truth).abs(), truth.abs()
        size = scale if part == 1 else scale.max()
        # Norms and second moments are squares: twice the relative error.
        assert (error <= bound * (1 + part % 2) * size + 1e-30).all(), where


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_in_every_way(shape, dtype, flags):
    for a, g in pairs(shape, dtype):
        want = sequence_fused.reference(a.double(), g.double(), *flags)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name, way in dense_ways(dtype):
            assert_agree(way(a, g, *flags), want, wide, name)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16, 0), (8, 32, 1 << 9)])
def test_gradients_in_blocks_of_rows(size, dtype, flags, monkeypatch):
    least, most, block = size
    calls = []

    def counted(kernels, a, g, *rest):
        calls.append(g.shape[2])
        return made(kernels, a, g, *rest)

    made = dense_native._fused
    monkeypatch.setattr(dense_native, "_fused", counted)
    monkeypatch.setattr(dense_native, "_ROWS", least)
    monkeypatch.setattr(dense_native, "_BLOCK", block)
    for a, g in pairs((3, 7, 9, 70), dtype):
        want = sequence_fused.reference(a.double(), g.double(), *flags)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for isa in _native.available_isas():
            calls.clear()
            kernels = _native.kernels_for(isa)
            got = dense_native.sequence_fused(kernels, a, g, *flags)
            assert_agree(got, want, wide, isa)
            assert sum(calls) == 70 and len(calls) > 2 and max(calls) <= most


# Wide layers over few and many steps, by product and norms and by tiles, and one whose
# inputs are on the left of the tiles.
@pytest.mark.parametrize(
    "shape", [(6, 3, 300, 257), (6, 16, 300, 257), (5, 70, 129, 200), (3, 90, 80, 17)]
)
def test_sequences_for_several_threads(shape):
    a, g = next(pairs(shape))
    want = sequence_fused.reference(a.double(), g.double(), True, True)
    for name, way in dense_ways(torch.float32):
        assert_agree(way(a, g, True, True), want, torch.float32, name)
        assert_agree(way(a, g, True, False), (*want[:3], None), torch.float32, name)


def test_sequences_are_taken_both_ways():
    assert not is_fused_faster(1, 50, 60)
    assert not is_fused_faster(3, 300, 257)
    assert not is_fused_faster(16, 300, 257)
    assert is_fused_faster(12, 300, 257)
    assert is_fused_faster(128, 300, 257)
    assert is_fused_faster(2, 20, 20)


@pytest.mark.parametrize("flags", FLAGS)
@ALL_CONVOLUTIONS
def test_convolutions_in_every_way(case, flags):
    x, g = draw(case)
    want = conv_fused.reference(x, g, case[0], *flags)
    for dtype in (torch.float64, torch.float32):
        for name, way in conv_ways(dtype):
            got = way(x.to(dtype), g.to(dtype), case[0], *flags)
            assert_agree(got, want, dtype, name)


@ALL_CONVOLUTIONS
def test_convolutions_against_autograd(case):
    x, g = draw(case)
    grads = autograd_gradients(case, x, g)
    grad, norms, bias, moment = conv_fused.reference(x, g, case[0], True, True)
    torch.testing.assert_close(grad, grads.sum(0))
    torch.testing.assert_close(norms, grads.flatten(1).square().sum(1))
    torch.testing.assert_close(bias, g.flatten(2).sum(2))
    torch.testing.assert_close(moment, grads.square().sum(0))


@ALL_CONVOLUTIONS
@pytest.mark.parametrize("batch", [0, 1, 21])
def test_convolutions_of_any_batch(case, batch):
    """More samples than slabs and chunks, and fewer."""
    x, g = draw(case, batch=batch)
    want = conv_fused.reference(x, g, case[0], True, True)
    for name, way in conv_ways(torch.float32):
        got = way(x.float(), g.float(), case[0], True, True)
        assert_agree(got, want, torch.float32, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolutions_of_halves(dtype):
    case = CASES["groups"]
    x, g = (t * 100 for t in draw(case, dtype))  # squared norms far beyond 65504
    want = conv_fused.reference(x.double(), g.double(), case[0], True, True)
    for backend in conv_fused.backends("cpu", dtype):
        got = conv_fused.on(backend, "cpu", dtype)(x, g, case[0], True, True)
        assert_agree(got, want, torch.float32, backend)


@pytest.mark.parametrize("name", ["2x2 image", "stride 2", "groups", "transposed 2"])
def test_convolutions_of_any_strides(name):
    case = CASES[name]
    x, g = draw(case, torch.float32)
    layouts = (
        [t.to(memory_format=torch.channels_last) for t in (x, g)],
        (x, g.to(memory_format=torch.channels_last)),
        (x.to(memory_format=torch.channels_last), g),
        (x.flip(3).flip(3).mT.contiguous().mT, torch.stack([g, g], -1)[..., 0]),
        (x.expand_as(x), g[:, :1, :1, :1].expand_as(g)),
    )
    for x_, g_ in layouts:
        want = conv_fused.reference(x_.double(), g_.double(), case[0], True, True)
        for name_, way in conv_ways(torch.float32):
            got = way(x_, g_, case[0], True, True)
            assert_agree(got, want, torch.float32, name_)


# Rows of several ranges, images packed ahead of them, and layers of one range.
WIDE = (*CASES["large"][:2], 48, 300, (4, 4))


def test_convolutions_too_large_to_pack_at_once():
    """20 samples of 1 MiB between far apart taps, of which one meets the image."""
    case = (geometry((3, 3), padding=30, dilation=30), 20, 64, 1100, (4, 4))
    x, g = draw(case, torch.float32)
    want = conv_fused.reference(x.double(), g.double(), case[0], True, True)
    for name, way in conv_ways(torch.float32):
        got = way(x, g, case[0], True, True)
        assert_agree(got, want, torch.float32, name)


@pytest.mark.parametrize("case", [CASES["same 3x3"], CASES["groups"], WIDE])
def test_convolutions_whatever_the_threads(case):
    x, g = draw(case, torch.float32, batch=37)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                [w(x, g, case[0], True, True) for _, w in conv_ways(x.dtype)]
            )
    finally:
        torch.set_num_threads(before)
    want = conv_fused.reference(x.double(), g.double(), case[0], True, True)
    for (name, _), *runs in zip(conv_ways(x.dtype), *results, strict=True):
        for got in runs:
            assert_agree(got, want, torch.float32, name)
        if name.startswith("tiles"):
            assert all(map(torch.equal, runs[0], runs[1])), name
            assert all(map(torch.equal, runs[0], runs[2])), name


def test_sequences_whatever_the_threads():
    a, g = torch.randn(40, 30, 100), torch.randn(40, 30, 130)
    before = torch.get_num_threads()
    try:
        for name, way in dense_ways(torch.float32):
            if not name.startswith("tiles"):
                continue
            runs = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                runs.append(way(a, g, True, True))
            assert all(map(torch.equal, runs[0], runs[1])), name
            assert all(map(torch.equal, runs[0], runs[2])), name
    finally:
        torch.set_num_threads(before)


def test_values_that_are_not_finite_stay_in_their_sample():
    case = CASES["same 3x3"]
    x, g = draw(case, torch.float32)
    x[0, 0, 4, 4] = float("nan")  # scratch of the first sample is used again
    g[1] = 0
    for name, way in conv_ways(torch.float32):
        _, norms, bias, _ = way(x, g, case[0], True, False)
        assert norms[0].isnan(), name
        assert norms[1] == 0 == bias[1].abs().max(), name
        assert norms[2].isfinite(), name


def test_norms_of_layers_with_few_positions_are_the_accurate_ones():
    """Where contributions cancel, the Gram way must fall back as it does by itself."""
    case = CASES["2x2 image"]
    x, g = draw(case)
    x = torch.ones_like(x) + 1e-4 * x
    x, g = x.float(), (g - g.mean(dim=(2, 3), keepdim=True)).float()
    want = conv_sq_norms.reference(x.double(), g.double(), case[0], False)[0]
    for name, way in conv_ways(torch.float32):
        got = way(x, g, case[0], False, False)[1]
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0, msg=name)
