"""Kernels move and multiply what the floor model says, and not twice."""

from typing import NamedTuple

import pytest
import torch

from tools.kernels.cases import Tensors, all_ops
from tools.kernels.work import Work, work_of

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastminima.ops.conv_geometry import ConvGeometry
from tools.kernels.interpreter import interpreting

SLACK = 1.05
NEW = Tensors("cpu", torch.float32)


class Counted(NamedTuple):
    """Bytes that loads and stores ask for, and operations of products."""

    loads: int
    stores: int
    products: int


def counted(run, arguments):
    with interpreting() as report:
        run(*arguments)
    return Counted(report.load_bytes, report.store_bytes, report.dot_flops)


def excess(found: Counted, least: Work) -> float:
    """Bytes over the least ones, where the least is to read and to write once."""
    return (found.loads + found.stores) / least.bytes


@triton.jit
def _mean_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """The squared norm of a row less its mean; TWICE: reads the row again for it."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * size + i, mask=i < size, other=0.0)
    mean = tl.sum(x) / size
    if TWICE:
        x = tl.load(x_ptr + row * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + row, tl.sum(tl.where(i < size, x - mean, 0) * x))


@pytest.mark.parametrize("twice", [False, True])
def test_a_kernel_that_reads_twice_is_found(twice):
    x = NEW.normal(4, 200)

    def run(x):
        out = x.new_empty(len(x))
        _mean_kernel[(len(x),)](x, out, x.shape[1], BLOCK=256, TWICE=twice)

    least = Work(x.numel() * 4 + len(x) * 4)
    assert (excess(counted(run, (x,)), least) > SLACK) == twice


# Of ops that are bound by memory: one size each, small enough to interpret.
STREAMING = {
    "sum_over_time": (NEW.normal(2, 256, 130),),
    "sum_over_space": (NEW.normal(2, 33, 520),),
    "product_over_time": (NEW.normal(2, 256, 130), NEW.normal(2, 256, 130)),
    # Samples for two programs a multiprocessor: features stay in one block, so that
    # statistics of time steps are asked for once (`test_triton_norm` counts the rest).
    "layer_norm_gradients": (
        NEW.normal(264, 6, 128),
        NEW.normal(264, 6, 128),
        NEW.wide(264, 6),
        NEW.wide(264, 6),
    ),
    "channel_norm_gradients": (
        NEW.normal(2, 8, 700),
        NEW.normal(2, 8, 700),
        NEW.wide(2, 4),
        NEW.wide(2, 4),
    ),
    "row_sq_norms": (NEW.normal(5, 300), NEW.normal(5, 700)),
    "sq_norm": (NEW.normal(50, 1000),),
}


def _launcher(name):
    op = all_ops().get(name)
    if op is None or "triton" not in op.backends("cuda", torch.float32):
        pytest.skip(f"{name} has no Triton kernel")
    return op.on("triton", "cuda", torch.float32)


@pytest.mark.parametrize("name", STREAMING)
def test_what_memory_bounds_is_moved_once(name):
    found = counted(_launcher(name), STREAMING[name])
    assert found.loads > 0
    assert excess(found, work_of(name, STREAMING[name])) < SLACK


# Whole tiles, so that padding does not count.
_PAIR = NEW.normal(2, 64, 256), NEW.normal(2, 64, 256)
_IMAGES = NEW.normal(2, 64, 8, 8), NEW.normal(2, 64, 8, 8)
_POINTWISE = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
MULTIPLYING = {
    "direct_sq_norms": _PAIR,
    "sequence_fused": (*_PAIR, True, False),
    "sequence_second_moment": _PAIR,
    "conv_fused": (*_IMAGES, _POINTWISE, True, False),
    "conv_second_moment": (*_IMAGES, _POINTWISE),
}


@pytest.mark.parametrize("name", MULTIPLYING)
def test_products_are_made_once(name):
    found = counted(_launcher(name), MULTIPLYING[name])
    least = work_of(name, MULTIPLYING[name])
    assert least.products <= found.products <= SLACK * least.products


def test_gram_products_are_made_for_half_of_the_pairs():
    """Of blocks of time those on and below the diagonal: at most T (T + block)."""
    batch, time, width = 1, 256, 64
    a, g = NEW.normal(batch, time, width), NEW.normal(batch, time, width)
    found = counted(_launcher("gram_sq_norms"), (a, g))
    block = 128
    most = batch * time * (time + block) * 2 * width
    assert work_of("gram_sq_norms", (a, g)).products <= found.products <= most
