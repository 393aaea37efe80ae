"""Triton kernels of dense weights: what they read, multiply, and are chosen for."""

import pytest
import torch
from triton_cases import DTYPES, cancelling, far_apart, sequences

from fastminima.ops import dense
from fastminima.ops.cost import dense as dense_cost
from fastminima.ops.triton import _launch, dense_gram
from fastminima.ops.triton import dense as launchers
from tools.kernels.interpreter import Report, interpreting


def counts(launcher, *args, **options):
    """Counts of the launches of each kernel, by its name."""
    with interpreting(report=Report(**options)) as report:
        launcher(*args)
    return {launch.kernel: launch for launch in report.per_launch}


def test_samples_that_are_not_lost_are_not_read_again():
    a, g = sequences((3, 6, 200, 150))
    direct = counts(launchers.sequence_sq_norms, a, g, False)["_direct_kernel"]
    assert direct.load_bytes == 4 * direct.programs  # the flags
    assert direct.store_bytes == 0
    a, g = cancelling(torch.float32)
    direct = counts(launchers.sequence_sq_norms, a, g, False)["_direct_kernel"]
    assert direct.unique_load_bytes == 4 * (3 + 6 * 200 + 6 * 150)


def close(count, floor):
    return floor <= count <= 1.05 * floor


@pytest.mark.parametrize("dtype", DTYPES)
def test_floors(dtype):
    """Bytes and operations are what the docstrings of the kernels state."""
    batch, time, d_in, d_out = 2, 64, 128, 128
    a, g = sequences((batch, time, d_in, d_out), dtype)
    read = a.element_size() * batch * time * (d_in + d_out)
    product = 2 * batch * time * d_in * d_out

    gram = counts(launchers.gram_sq_norms, a, g)["_gram_kernel"]
    tile = dense_gram._blocks(a, g, time, batch).time
    assert close(gram.unique_load_bytes, read)
    assert close(gram.dot_flops, batch * time * (time + tile) * (d_in + d_out))

    direct = counts(launchers.direct_sq_norms, a, g)["_direct_kernel"]
    assert close(direct.unique_load_bytes, read)
    assert close(direct.dot_flops, product)

    fused = counts(launchers.sequence_fused, a, g, False, True)["_fused_kernel"]
    parts, _ = _launch.split(batch, fused.programs // batch)
    tiles = fused.programs // parts
    assert close(fused.unique_load_bytes, read)
    assert close(fused.dot_flops, product)
    written = 2 * 4 * parts * d_in * d_out + 4 * batch * tiles
    assert close(fused.unique_store_bytes, written)


@pytest.mark.parametrize("dtype", DTYPES)
def test_floors_of_rows(dtype):
    batch, d_in, d_out = 64, 128, 64
    a, g = torch.randn(batch, d_in).to(dtype), torch.randn(batch, d_out).to(dtype)
    read = a.element_size() * batch * (d_in + d_out)
    norms = counts(launchers.row_sq_norms, a, g)["_row_norms_kernel"]
    assert close(norms.load_bytes + norms.store_bytes, read + 8 * batch)
    sums = counts(launchers.sequence_fused, a[:, None], g[:, None], False, True)
    sums = sums["_row_sums_kernel"]
    parts = sums.programs // 2
    assert close(sums.unique_load_bytes, read)
    assert close(sums.unique_store_bytes, 2 * 4 * parts * d_in * d_out)
    assert close(sums.dot_flops, 2 * 2 * batch * d_in * d_out)


@pytest.mark.parametrize(
    "shape", [(64, 512, 512), (512, 64, 128), (128, 512, 64), (16, 128, 128)]
)
def test_the_way_that_is_chosen_multiplies_least(shape):
    a, g = (torch.zeros(1, shape[0], width, dtype=torch.half) for width in shape[1:])
    gram, direct = (
        sum(x.dot_flops for x in counts(launch, a, g, sample=1).values())
        for launch in (launchers.gram_sq_norms, launchers.direct_sq_norms)
    )
    assert dense_cost.choose_on_gpu(*shape) == ("gram" if gram < direct else "direct")


def test_one_step_is_a_row():
    assert dense_cost.choose_on_gpu(1, 5, 7) == "rows"
    a, g = sequences((3, 1, 5, 7))
    assert [*counts(launchers.sequence_sq_norms, a, g, True)] == ["_row_norms_kernel"]


@pytest.mark.parametrize("name", ["gram_sq_norms", "direct_sq_norms", "sequence_fused"])
@pytest.mark.parametrize("strides", [(2**30, 40, 1), (40, 2**29, 1)])
def test_offsets_past_32_bits(name, strides):
    shape, more = (3, 5, 20), (False, True) if name == "sequence_fused" else ()
    g = torch.randn(3, 5, 9).half()
    # So large a sample is every program, without a shadow of the memory.
    with far_apart(shape, strides) as a, interpreting(report=Report(sample=1 << 20)):
        got = getattr(launchers, name)(a, g, *more)
        want = getattr(dense, name).reference(a, g, *more)
    torch.testing.assert_close(got, want, rtol=3e-5, atol=1e-4)


@pytest.mark.parametrize("name", launchers.__all__)
def test_every_launcher_is_in_the_table(name):
    op = getattr(dense, name)
    for dtype in DTYPES:
        assert "triton" in op.backends("cuda", dtype)
    assert "triton" not in op.backends("cuda", torch.float64)
    assert "triton" not in op.backends("cpu", torch.float32)


def test_the_table_finds_the_launcher():
    a, g = sequences((2, 5, 7, 4))
    run = dense.direct_sq_norms.on("triton", "cuda", torch.float32)
    with interpreting() as report:
        torch.testing.assert_close(run(a, g), dense.direct_sq_norms.reference(a, g))
    assert report.launches == 1
