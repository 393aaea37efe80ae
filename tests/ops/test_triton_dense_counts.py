"""Triton kernels of dense weights: what they read, multiply, and are chosen for."""

import pytest
import torch
from triton_cases import DTYPES, cancelling, far_apart, sequences

from fastminima.ops import _pieces, dense
from fastminima.ops.cost import dense as dense_cost
from fastminima.ops.triton import _launch, _settle, dense_fused, dense_gram
from fastminima.ops.triton import dense as launchers
from tools.kernels.capturable import capturing
from tools.kernels.cases import Tensors
from tools.kernels.interpreter import Report, interpreting


def counts(launcher, *args, **options):
    """Counts of the launches of each kernel, by its name."""
    with interpreting(report=Report(**options)) as report:
        launcher(*args)
    return {launch.kernel: launch for launch in report.per_launch}


@pytest.mark.parametrize(
    ("launcher", "first"),
    [
        (launchers.sequence_sq_norms, "_gram_kernel"),
        (launchers.sequence_sq_norms_by_torch, "_fold_kernel"),
    ],
)
def test_samples_that_are_not_lost_are_not_read_again(launcher, first):
    a, g = sequences((3, 6, 200, 150))
    found = counts(launcher, a, g, True)
    assert [*found] == [first, "_settle_kernel", "_parts_kernel"]
    assert found["_parts_kernel"].store_bytes == 4 * 2 * len(a)
    settle = found["_settle_kernel"]
    assert settle.load_bytes == 4 * 4 * settle.programs  # sums and diagonals
    a, g = cancelling(torch.float32)
    settle = counts(launcher, a, g, True)["_settle_kernel"]
    assert settle.unique_load_bytes == 4 * (3 * 4 + 6 * 200 + 6 * 150)
    settle = counts(launcher, a, g, False)["_settle_kernel"]
    assert settle.unique_load_bytes == 4 * (3 * 2 + 6 * 200 + 6 * 150)


def test_programs_that_decide_are_about_as_many_as_made_the_sums():
    """Or a GPU's worth of them: where nothing is lost, each costs its start."""
    for batch, pairs in [(1, 1), (16, 10), (64, 1), (4096, 1), (4096, 10)]:
        programs = _settle.sharers(batch, pairs, tiles=144)
        assert 1 <= programs <= max(pairs, _launch.PROGRAMS // batch, 1)


@pytest.mark.parametrize("time", [16, 40, 70])
def test_floor_of_sums_of_products_that_are_there(time):
    a, g = sequences((2, time, 128, 128))
    found = counts(launchers.sequence_sq_norms_by_torch, a, g, True)["_fold_kernel"]
    block = min(64, max(16, 1 << (time - 1).bit_length()))
    assert found.unique_load_bytes <= 4 * 2 * time * (time + block)
    assert found.dot_flops == 0


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
    parts, _ = dense_fused._parts(a, g, 1 if a.itemsize == 2 else 4, 2)
    tiles = fused.programs // parts
    assert tiles in (1, 2, 4)
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
    assert dense_cost.choose_on_gpu(*shape, torch.half) == (
        "gram" if gram < direct else "direct"
    )


def test_no_gram_sums_where_the_guard_would_reject_most():
    """A vocabulary's width in halves: the sums of tensor cores leave too little."""
    shape = (512, 768, 50257)
    assert dense_cost.guard_on_gpu(*shape[1:], torch.bfloat16) > 1
    assert dense_cost.choose_on_gpu(*shape, torch.bfloat16) == "direct"
    assert dense_cost.guard_on_gpu(*shape[1:], torch.float32) < 0.5
    assert dense_cost.choose_on_gpu(*shape, torch.float32) == "gram"
    new = Tensors("meta", torch.half)
    a, g = new.normal(1, 16, 64), new.normal(1, 16, 40000)
    with capturing() as launches:
        launchers.sequence_sq_norms(a, g, False)
    assert [x.kernel for x in launches] == ["_direct_kernel", "_parts_kernel"]


def test_parts_fill_the_rounds_of_a_gpu():
    """The widest layers of GPT-2 have 144 tiles: two rounds of 132, 55 % of them full.

    Parts take whole samples, none twice, and within what may be held.
    """
    for batch, time, kept in [(16, 512, 1), (8, 1024, 1), (16, 512, 2)]:
        a = torch.empty(batch, time, 768, dtype=torch.bfloat16, device="meta")
        g = torch.empty(batch, time, 3072, dtype=torch.bfloat16, device="meta")
        parts, each = dense_fused._parts(a, g, 144, kept)
        rounds = -(-144 * parts // 132)
        assert each * rounds < 0.85 * 2 * batch
        assert 4 * parts * kept * 768 * 3072 <= _pieces.LIMIT
    for samples in (1, 7, 16, 300):
        for tiles in (1, 36, 144, 2358):
            for work in (0.01, 1.0, 30.0):
                parts, each = _launch.balanced(samples, tiles, work, 7)
                assert each * (parts - 1) < samples <= each * parts and parts <= 7
    assert _launch.balanced(8, 2358, 3.0, 1 << 30)[0] == 1  # a head of 50257


def test_one_step_is_a_row():
    assert dense_cost.choose_on_gpu(1, 5, 7, torch.half) == "rows"
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


def test_float32_norms_of_sequences_have_products_by_torch():
    op = dense.sequence_sq_norms
    assert op.backends("cuda", torch.float32)[0] == "torch"
    assert op.backends("cuda", torch.float32).count("torch") == 1
    run = op.on("torch", "cuda", torch.float32)
    with interpreting() as report:
        run(*sequences((2, 20, 70, 40)), True)
    assert report.per_launch[0].kernel == "_fold_kernel"
    assert op.on("torch", "cuda", torch.float64) is op.on("torch", "cpu", torch.float64)


@pytest.mark.parametrize(
    "name", [name for name in launchers.__all__ if not name.endswith("_by_torch")]
)
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
