"""Triton kernels of dense weights against the float64 reference, on any machine."""

import pytest
import torch
from triton_cases import DTYPES, cancelling, each_shape, sequences

from fastminima.ops import _pieces, dense
from fastminima.ops.cost import dense as dense_cost
from fastminima.ops.triton import _launch, _settle, dense_fused
from fastminima.ops.triton import dense as launchers
from tools.kernels.interpreter import interpreting

# batch, time, d_in, d_out: empty, least, odd, and either side of the sides of blocks.
SHAPES = [
    *[(0, 3, 4, 5), (3, 0, 4, 5), (1, 1, 1, 1), (5, 1, 70, 17), (3, 5, 7, 4)],
    *[(2, 16, 64, 16), (2, 17, 63, 33), (1, 64, 129, 3), (1, 66, 48, 130)],
]
NORMS = ["gram_sq_norms", "direct_sq_norms"]
# Room for rounding, relative to |gradient| where nothing cancels: a few sums.
ROOM = {"rtol": 3e-5, "atol": 1e-5}


def double(value):
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


GUARDED = ["sequence_sq_norms", "sequence_sq_norms_by_torch"]


def check(place, name, *args, **room):
    """A launcher where it runs against the reference of its op in float64."""
    got = place(getattr(launchers, name), *args)
    op = getattr(dense, name.removesuffix("_by_torch"))
    want = op.reference(*map(double, args))
    many = isinstance(want, tuple)
    pairs = zip(got, want, strict=True) if many else [(got, want)]
    for part, truth in pairs:
        if truth is None:
            assert part is None, name
            continue
        torch.testing.assert_close(
            part, truth.float(), **{**ROOM, **room}, msg=lambda m: f"{name}: {m}"
        )


@each_shape(SHAPES, halves=True)
def test_squared_norms(place, shape, dtype):
    a, g = sequences(shape, dtype)
    for name in NORMS:
        check(place, name, a, g)
    for name in GUARDED:
        check(place, name, a, g, True)
        check(place, name, a, g, False)


@each_shape(SHAPES, halves=True)
def test_sums_over_samples(place, shape, dtype):
    a, g = sequences(shape, dtype)
    check(place, "sequence_second_moment", a, g, atol=1e-3)
    check(place, "sequence_fused", a, g, True, True, atol=1e-3)
    check(place, "sequence_fused", a, g, False, False, atol=1e-4)


@each_shape([(0, 5, 3), (1, 1, 1), (70, 63, 10), (3, 5000, 64)], halves=True)
def test_squared_norms_of_rows(place, shape, dtype):
    batch, d_in, d_out = shape
    a, g = torch.randn(batch, d_in).to(dtype), torch.randn(batch, d_out).to(dtype)
    check(place, "row_sq_norms", a, g)


def layouts(batch, time, width, dtype):
    """By time, slices, last dimension apart, and samples that overlap."""
    yield torch.randn(time, batch, width).to(dtype).transpose(0, 1)
    yield torch.randn(batch, time, 2 * width + 3).to(dtype)[:, :, 2 : 2 + width]
    yield torch.randn(batch, width, time).to(dtype).transpose(1, 2)
    rows = torch.randn(batch + time, width).to(dtype)
    yield rows.as_strided((batch, time, width), (width, width, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("time", [1, 18])
def test_layouts(place, layout, time, dtype):
    a = list(layouts(3, time, 20, dtype))[layout]
    g = list(layouts(3, time, 9, dtype))[layout]
    for name in NORMS:
        check(place, name, a, g)
    for name in GUARDED:
        check(place, name, a, g, True)
    check(place, "sequence_fused", a, g, True, True, atol=1e-3)


@pytest.mark.parametrize(("batch", "parts"), [(7, 7), (20, 7)])
def test_a_batch_in_parts_where_the_layer_is_small(place, monkeypatch, batch, parts):
    monkeypatch.setattr(_launch, "PROGRAMS", 8)
    assert _launch.split(batch, 1)[0] == parts
    assert _launch.split(batch, 6)[0] == 1
    a, g = sequences((16 * batch, 1, 5, 3))
    check(place, "sequence_fused", a, g, True, True, atol=1e-3)
    a, g = sequences((batch, 2, 5, 3))
    for each in (1, 3, batch):
        cut = -(-batch // each), each
        monkeypatch.setattr(dense_fused, "balanced", lambda *_, cut=cut: cut)
        check(place, "sequence_fused", a, g, True, True, atol=1e-3)


@pytest.mark.parametrize("time", [1, 20])
def test_half_precision_does_not_overflow(place, time):
    a, g = sequences((2, time, 20, 30), torch.float16)
    a, g = 300 * a, 300 * g  # squares near 1e5, float16 ends at 65504
    for name in NORMS:
        check(place, name, a, g)
    check(place, "sequence_sq_norms", a, g, True)
    check(place, "sequence_fused", a, g, True, True)


def test_dtypes_that_differ_meet_in_float32(place):
    a, g = sequences((2, 5, 7, 4))
    check(place, "direct_sq_norms", a.half(), g.bfloat16())
    check(place, "sequence_sq_norms", a, g.bfloat16(), True)
    with pytest.raises(TypeError, match=r"got torch.float64 and torch.float32"):
        launchers.gram_sq_norms(a.double(), g)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(place, value):
    a, g = sequences((3, 5, 7, 4))
    a[1, 2, 3] = value
    want = torch.tensor([False, True, False])
    for name in NORMS:
        norms = place(getattr(launchers, name), a, g)
        assert torch.equal(~norms.isfinite(), want), name
    norms = place(launchers.sequence_fused, a, g, False, False)[1]
    torch.testing.assert_close(
        norms, dense.direct_sq_norms.reference(a, g), equal_nan=True
    )


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_contributions_cancel_the_gradient_is_made(place, name, dtype):
    a, g = cancelling(dtype)
    assert dense_cost.choose_on_gpu(6, 200, 150, dtype) == "gram"
    assert dense_cost.choose_by_torch_on_gpu(6, 200, 150) == "gram"
    check(place, name, a, g, True, rtol=1e-4)
    check(place, name, a, g, False, rtol=1e-4)


def cancelling_bias(time=70, d_in=200, d_out=150):
    """Three samples; the middle one's bias gradient cancels to a thousandth."""
    a, g = sequences((3, time, d_in, d_out))
    g[1, time // 2 :] = -g[1, : time // 2] + g[1, time // 2 :] / 1000
    return a, g


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 3, 256])
def test_where_a_bias_cancels_its_gradient_is_made(
    place, monkeypatch, name, dtype, programs
):
    monkeypatch.setattr(_settle, "PROGRAMS", 3 * programs)
    a, g = (x.to(dtype) for x in cancelling_bias())
    check(place, name, a, g, True, rtol=1e-4, atol=1e-9)


def test_every_program_count_gives_all_of_a_lost_sample(place, monkeypatch):
    a, g = cancelling(torch.float32)
    for most in (1, 2, 5):
        monkeypatch.setattr(_settle, "MOST", most)
        check(place, "sequence_sq_norms", a, g, True, rtol=1e-4)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", GUARDED)
def test_what_is_not_finite_stays_so_behind_the_guard(place, name, value):
    a, g = sequences((3, 5, 70, 40))
    g[1, 2, 3] = value
    want = torch.tensor([False, True, False])
    for norms in place(getattr(launchers, name), a, g, True):
        assert torch.equal(~norms.isfinite(), want), name


def test_products_by_torch_in_pieces_of_the_batch(place, monkeypatch):
    monkeypatch.setattr(_pieces, "LIMIT", 2 * 2 * 2 * 20 * 20 * 4)  # two samples
    a, g = sequences((5, 20, 70, 40))
    check(place, "sequence_sq_norms_by_torch", a, g, True)
    monkeypatch.setattr(_pieces, "LIMIT", 2 * 20 * 20 * 4)  # less than one sample
    check(place, "sequence_sq_norms_by_torch", a, g, True)


@pytest.mark.parametrize(
    ("precision", "first"), [("high", "_gram_kernel"), ("highest", "_fold_kernel")]
)
def test_products_are_not_made_by_torch_where_tf32_is_allowed(precision, first):
    a, g = sequences((2, 20, 70, 40))
    torch.set_float32_matmul_precision(precision)
    try:
        with interpreting() as report:
            launchers.sequence_sq_norms_by_torch(a, g, True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert report.per_launch[0].kernel == first


def test_a_gram_sum_alone_loses_what_cancels(place):
    a, g = cancelling(torch.float32)
    got = place(launchers.gram_sq_norms, a, g)
    want = dense.direct_sq_norms.reference(a.double(), g.double()).float()
    error = (got / want - 1).abs()
    assert error[1] > 1e-4  # or the test before this one shows nothing
    assert error[[0, 2]].max() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", GUARDED)
def test_launches_are_captured_in_a_graph(name):
    a, g = (x.cuda() for x in cancelling(torch.float32))
    launch = getattr(launchers, name)
    launch(a, g, True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch(a, g, True)
    a.mul_(2)
    graph.replay()
    want = dense.sequence_sq_norms.reference(a.double(), g.double(), True)
    for part, truth in zip(got, want, strict=True):
        torch.testing.assert_close(part, truth.float(), rtol=1e-4, atol=1e-5)


def test_references_against_single_samples():
    a, g = torch.randn(4, 6, 5).double(), torch.randn(4, 6, 3).double()
    grads = torch.stack(
        [sum(torch.outer(g[n, t], a[n, t]) for t in range(6)) for n in range(4)]
    )
    want = (grads.sum(0), grads.square().sum((1, 2)), g.sum(1), grads.square().sum(0))
    for got, truth in zip(dense.sequence_fused(a, g, True, True), want, strict=True):
        torch.testing.assert_close(got, truth)
    assert dense.sequence_fused(a, g, False, False)[2:] == (None, None)
