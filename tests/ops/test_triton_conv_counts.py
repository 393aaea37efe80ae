"""Bytes and operations of the convolution kernels against the floors they state."""

import pytest
import torch

from fastminima.ops.conv_geometry import ConvGeometry
from fastminima.ops.triton import conv, conv_cost
from fastminima.ops.triton.conv_sizes import operands
from tools.kernels.interpreter import Report, interpreting
from tools.kernels.tally import tally

BATCH, CHANNELS, HEIGHT, SIDE, TAPS = 2, 32, 16, 8, 9
LENGTH = SIDE * SIDE
LAYER = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
DEPTHWISE = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups=CHANNELS)
# Pairs of a position and a tap that meet a pixel of the image.
MEETINGS = (3 * SIDE - 2) ** 2


def tensors(dtype=torch.float32, height=HEIGHT):
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE).to(dtype)
    return x, torch.randn(BATCH, height, SIDE, SIDE).to(dtype)


def launches(launcher):
    """The launches of a call, by the names of their kernels."""
    with interpreting(report=Report()) as report:
        launcher()
    return {launch.kernel: launch for launch in report.per_launch}


def close(count, floor):
    assert floor <= count <= 1.05 * floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_direct_and_fused(dtype):
    x, g = tensors(dtype)
    weight = HEIGHT * CHANNELS * TAPS
    both = (x.numel() + g.numel()) * x.element_size()
    tiles = TAPS  # one block of channels a tap
    for chunks, run in (
        (0, lambda: conv.direct_norms(operands(x, g, LAYER))),
        (BATCH, lambda: conv.conv_fused(x, g, LAYER, False, False)),
        (2 * BATCH, lambda: conv.conv_fused(x, g, LAYER, False, True)),
    ):
        launch = launches(run)["_products_kernel"]
        close(launch.dot_flops, 2 * BATCH * LENGTH * weight)
        close(launch.unique_load_bytes, both)
        close(launch.unique_store_bytes, 4 * (tiles * BATCH + chunks * weight))
        assert launch.store_bytes == launch.unique_store_bytes
        requests = g.numel() * tiles + BATCH * CHANNELS * MEETINGS
        close(launch.load_bytes, requests * x.element_size())


@pytest.mark.parametrize("by_channel", [False, True])
def test_depthwise(by_channel):
    x, g = tensors(torch.bfloat16, height=CHANNELS)
    if by_channel:
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    run = lambda: conv.conv_fused(x, g, DEPTHWISE, False, True)  # noqa: E731
    launch = launches(run)["_depthwise_kernel"]
    weight = CHANNELS * TAPS
    sizes = operands(x, g, DEPTHWISE).sizes
    tile = conv_cost.depthwise_tile(sizes)
    assert tile.count(sizes) == 1
    assert launch.programs == BATCH * TAPS  # too few to leave all taps to each
    close(launch.unique_load_bytes, 2 * (x.numel() + g.numel()))
    close(launch.unique_store_bytes, 4 * (TAPS * BATCH + 2 * BATCH * weight))
    close(launch.load_bytes, 2 * (TAPS * g.numel() + BATCH * CHANNELS * MEETINGS))


def test_taps_are_shared_where_programs_are_few():
    """Of few channels and samples; with enough of them each goes over all taps."""
    x = torch.empty(2, 8, 9, 9, device="meta")
    layer = ConvGeometry((7, 7), (1, 1), (3, 3), (1, 1), groups=8)
    sizes = operands(x, x, layer).sizes
    tile = conv_cost.depthwise_tile(sizes)
    parts, each = tile.taps(sizes, chunks=2)
    assert parts * each >= 49 and parts > 20
    assert tile.taps(sizes, chunks=1000) == (1, 49)


@pytest.mark.parametrize("shifts", [False, True])
def test_gram(shifts):
    x, g = tensors()
    of = operands(x, g, LAYER)
    tile = conv_cost.gram_tile(of.sizes, x.dtype, shifts)._replace(positions=32)
    blocks, pairs, square = 2, 3, 32 * 32
    counts = launches(lambda: conv.gram_norms(of, tile))
    launch = counts["_pairs_kernel"]
    close(launch.unique_store_bytes, 4 * 2 * BATCH * pairs)
    of_rows = 4 * g.numel() * (blocks + 1)
    flops = 2 * BATCH * pairs * square
    if not shifts:
        close(launch.unique_load_bytes, 4 * (x.numel() + g.numel()))
        close(launch.dot_flops, flops * (HEIGHT + CHANNELS * TAPS))
        close(launch.load_bytes, of_rows + 4 * BATCH * CHANNELS * MEETINGS * 3)
        return
    close(launch.dot_flops, flops * HEIGHT)
    close(launch.load_bytes, of_rows + 4 * BATCH * pairs * square * TAPS)
    image = counts["_image_gram_kernel"]
    border = 2 * LENGTH + 1
    close(image.unique_store_bytes, 4 * BATCH * (pairs * square + border))
    assert image.store_bytes == image.unique_store_bytes
    close(image.unique_load_bytes, 4 * x.numel())
    close(image.load_bytes, 4 * x.numel() * (blocks + 1))
    close(image.dot_flops, flops * CHANNELS)


def test_samples_that_hold_are_not_read_again():
    x, g = tensors()
    of = operands(x, g, LAYER)
    tile = conv_cost.gram_tile(of.sizes, x.dtype, False)._replace(positions=32)
    settle = launches(lambda: conv.gram_norms(of, tile))["_settle_kernel"]
    assert settle.dot_flops == 0
    assert settle.load_bytes == 4 * 2 * tile.pairs(LENGTH) * settle.programs
    assert settle.programs <= BATCH * TAPS  # a block of channels a tap
    x[:], inner = 1, g[:, :, 1:-1, 1:-1].clone()
    g[:] = 0  # at the rim, where the padding's zeros would not cancel
    g[:, :, 1:-1, 1:-1] = inner - inner.mean(dim=(2, 3), keepdim=True)
    of = operands(x, g, LAYER)
    settle = launches(lambda: conv.gram_norms(of, tile))["_settle_kernel"]
    close(settle.dot_flops, 2 * BATCH * LENGTH * HEIGHT * CHANNELS * TAPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_packs_each_operand_once(dtype):
    """What the Gram kernels have copied, the one behind them takes as it lies."""
    x = torch.empty(64, 256, 8, 8, dtype=dtype, device="meta")
    g = torch.empty(64, 512, 8, 8, dtype=dtype, device="meta")
    found = tally(lambda: conv.conv_sq_norms(x, g, LAYER, False), ())
    assert not any(step.bytes for step in found.steps)
    copies = [work.bytes for name, work in found.beside if name == "_turn_kernel"]
    assert len(copies) == (dtype == torch.bfloat16)
    assert all(moved == 2 * x.nbytes for moved in copies)
    assert found.launches[-2:] == ["_settle_kernel", "_parts_kernel"]
