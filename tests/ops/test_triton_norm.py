"""Normalisation layers in Triton: against float64, and against their floors."""

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

from fastminima.ops import norm
from fastminima.ops.triton import norm as kernels
from tools.kernels.interpreter import Report, interpreting
from tools.kernels.place import Interpreter

SHAPES = [
    *[(3, 5, 7), (1, 1, 1), (2, 33, 70), (4, 1, 300), (2, 17, 256)],
    *[(0, 3, 4), (3, 0, 4), (3, 2, 0), (2, 6100, 3)],
]
ROUNDINGS = 24  # a term: its product, then log2 of its tile, and the tiles of a lane


def rows(batch, time):
    """Statistics of layer norm, by time as the transposed tensors give them."""
    return torch.randn(time, batch).T, torch.rand(time, batch).T + 0.5


def channels(shared, groups):
    return torch.randn(shared, groups), torch.rand(shared, groups) + 0.5


def check(place, name, g, x, mean, rstd):
    """Compare a kernel with the reference in float64."""
    args = (g, x, mean, rstd)
    sizes = (g.abs(), -x.abs(), None if mean is None else mean.abs(), rstd)
    reference = getattr(norm, name).reference
    want = reference(*double(*args))
    size = reference(*double(*sizes))
    got = place(getattr(kernels, name), *args)
    for parts in zip(got, want, size, strict=True):
        assert_within(*parts, ROUNDINGS)


@each_shape(SHAPES)
def test_layer_norm(place, shape, dtype):
    g, x = laid_out("samples", shape, dtype), laid_out("samples", shape, dtype)
    mean, rstd = rows(*shape[:2])
    check(place, "layer_norm_gradients", g, x, mean, rstd)


@each_shape([(3, 5, 7), (2, 33, 70), (3, 0, 4)])
def test_rms_norm(place, shape, dtype):
    g, x = laid_out("times", shape, dtype), laid_out("samples", shape, dtype)
    check(place, "layer_norm_gradients", g, x, None, rows(*shape[:2])[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts(place, layout, other):
    g = laid_out(layout, (3, 21, 36), torch.bfloat16)
    x = laid_out(other, (3, 21, 36), torch.bfloat16)
    check(place, "layer_norm_gradients", g, x, *rows(3, 21))
    g, x, stats = g.transpose(1, 2), x.transpose(1, 2), channels(3, 4)
    check(place, "channel_norm_gradients", g, x, *stats)


@each_shape([(3, 6, 10), (1, 2, 1), (2, 4, 700), (2, 64, 49)])
@pytest.mark.parametrize("shared", [True, False])
def test_channel_norm(place, shape, shared, dtype):
    g, x = laid_out("samples", shape, dtype), laid_out("samples", shape, dtype)
    for groups in (1, 2, shape[1]):
        stats = channels(1 if shared else shape[0], groups)
        check(place, "channel_norm_gradients", g, x, *stats)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3), (1, 2, 9000)])
def test_empty_and_split_channels(place, shape):
    g, x = (laid_out("samples", shape, torch.float32) for _ in "gx")
    groups = min(2, shape[1])
    stats = channels(shape[0], groups) if groups else (torch.ones(1, 1),) * 2
    check(place, "channel_norm_gradients", g, x, *stats)


@pytest.mark.parametrize("strides", [(2**30, 8, 1), (24, 2**30, 1)])
def test_offsets_of_64_bits(strides):
    shape = (3, 3, 8) if strides[0] == 2**30 else (1, 3, 8)
    x, (mean, rstd) = torch.randn(shape).half(), rows(*shape[:2])
    with far_apart(shape, strides) as g:
        # All of a sample of programs: bytes are not marked, memory would not do.
        with interpreting(report=Report(sample=1 << 20)):
            got = kernels.layer_norm_gradients(g, x, mean, rstd)
        want = norm.layer_norm_gradients.reference(g, x, mean, rstd)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 130, 192), (2, 1400, 64)])
def test_gradients_are_at_their_floor(shape, dtype):
    batch, time, features = shape
    g, x = torch.randn(2, *shape).to(dtype)
    place = Interpreter()
    place(kernels.layer_norm_gradients, g, x, *rows(batch, time))
    launch, *others = place.report.per_launch
    assert [each.kernel for each in others] == ["_parts_kernel"] * (time == 1400)
    # Blocks of features are a line of 64 bytes: programs are few, and so are splits.
    blocks = features * g.itemsize // 64
    splits = launch.programs // (batch * blocks)
    assert launch.unique_load_bytes == 2 * g.nbytes + 8 * batch * time
    # Each block asks for the statistics of a step, which are then in the cache.
    assert launch.load_bytes == 2 * g.nbytes + 8 * batch * time * blocks
    assert launch.store_bytes == 8 * batch * features * splits
    assert 1 <= splits <= max(1, time // 128)
    assert (splits > 1) == (time == 1400)
