"""Second moments of dense weights with one row a sample: our own product of squares."""

import pytest
import torch

from fastminima import _native
from fastminima.ops import dense
from fastminima.ops.cost.dense import is_moment_faster
from fastminima.ops.native import dense as native

ISAS = _native.available_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="no native kernels")
DTYPES = [torch.float32, torch.float64]
# batch, d_in, d_out: whole blocks of 64 samples, tiles and vectors, and odd sizes
SHAPES = [
    *[(1, 1, 1), (0, 3, 4), (2, 0, 3), (2, 3, 0), (1, 700, 3), (64, 48, 16)],
    *[(65, 47, 33), (63, 113, 9), (130, 10, 200), (200, 3, 131), (129, 200, 10)],
    *[(70, 130, 1100), (70, 1100, 130), (128, 256, 64)],
]
ZEROS = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.6), (0.5, 0.9), (1.0, 0.2), (0.0, 1.0)]


def rows(batch, width, zeros, dtype=torch.float64):
    x = torch.randn(batch, width, dtype=torch.float64)
    return (x * (torch.rand(batch, width) >= zeros)).to(dtype)


def strided(x):
    """The same rows in several layouts."""
    yield x
    wide = x.new_full((len(x), 2 * x.shape[1] + 3), float("nan"))
    wide[:, 2 : 2 + x.shape[1]] = x
    yield wide[:, 2 : 2 + x.shape[1]]
    yield x.T.contiguous().T
    yield x.repeat_interleave(2, 0)[::2]


def moment(isa, a, g):
    kernels = _native.kernels_for(isa)
    return native.sequence_second_moment(kernels, a.unsqueeze(1), g.unsqueeze(1))


def wanted(a, g):
    return g.double().square().T @ a.double().square()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_products_of_squares(shape, dtype, isa):
    """Terms of one sign: the roundings of the sum of a block, and of blocks."""
    batch, d_in, d_out = shape
    rtol = (66 + batch / 64) * torch.finfo(dtype).eps
    for a_zeros, g_zeros in ZEROS:
        a, g = rows(batch, d_in, a_zeros, dtype), rows(batch, d_out, g_zeros, dtype)
        for x, y in zip(strided(a), strided(g), strict=True):
            got = moment(isa, x, y)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), wanted(a, g), rtol=rtol, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_is_as_accurate_as_the_product_of_squares(isa):
    for a_zeros, g_zeros in ZEROS[:4]:
        a = rows(512, 300, a_zeros, torch.float32)
        g = rows(512, 200, g_zeros, torch.float32)
        want = wanted(a, g)
        plain = g.square().T @ a.square()
        own = (moment(isa, a, g) - want).norm()
        assert own <= 1.5 * (plain - want).norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_zeros_do_not_hide_what_is_not_finite(side, value, isa):
    """Zero times infinity is NaN, also where zeros are skipped; 1e30 overflows."""
    for zeros in ((0.0, 0.7), (0.7, 0.0), (0.0, 0.0)):
        pair = rows(100, 130, zeros[0]).float(), rows(100, 60, zeros[1]).float()
        pair[side][33, 7] = value
        a, g = pair
        want = g.square().T @ a.square()
        got = moment(isa, a, g)
        torch.testing.assert_close(got, want, equal_nan=True)
        assert not want.isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("zeros", ZEROS[:3])
def test_the_number_of_threads_changes_nothing(isa, zeros):
    a, g = rows(300, 500, zeros[0]).float(), rows(300, 700, zeros[1]).float()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(moment(isa, a, g))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16])
def test_the_op_on_many_rows(check, dtype):
    """Enough samples for our product, and through the op that also makes gradients."""
    a, g = (rows(100, width, 0.5, dtype).unsqueeze(1) for width in (90, 70))
    assert is_moment_faster(100, 90, 70, "avx512")
    loose = {"rtol": 1e-12 if dtype == torch.float64 else 3e-5, "atol": 1e-6}
    check(dense.sequence_second_moment, a, g, **loose, nonnegative=True)
    check(dense.sequence_fused, a, g, True, True, **loose | {"atol": 1e-4})


def test_few_rows_and_large_or_small_results_are_left_to_pytorch():
    assert not is_moment_faster(64, 64, 10, "avx512")
    assert not is_moment_faster(47, 512, 512, "avx512")
    assert is_moment_faster(48, 512, 512, "avx2")
    assert not is_moment_faster(64, 768, 50257, "avx512")
    assert is_moment_faster(512, 768, 50257, "avx512")
    assert not is_moment_faster(512, 512, 512, "generic")
    assert not is_moment_faster(512, 512, 512, None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_beside_it(shape, dtype, isa):
    """The same rows as they are: to some roundings of the terms' magnitudes."""
    batch, d_in, d_out = shape
    kernels = _native.kernels_for(isa)
    for a_zeros, g_zeros in ZEROS:
        a, g = rows(batch, d_in, a_zeros, dtype), rows(batch, d_out, g_zeros, dtype)
        for x, y in zip(strided(a), strided(g), strict=True):
            grad, second = native.row_sums(kernels, x, y)
            assert torch.equal(second, moment(isa, x, y))
            room = g.double().abs().T @ a.double().abs() * 66 * torch.finfo(dtype).eps
            assert ((grad - g.double().T @ a.double()).abs() <= room).all()
