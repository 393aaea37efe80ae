"""Dense weights: every implementation against the float64 reference and a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastminima.ops import dense
from fastminima.ops.cost import dense as dense_cost

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# batch, time, d_in, d_out
SHAPES = [
    *[
        (3, 5, 7, 4),
        (1, 1, 1, 1),
        (5, 1, 33, 17),
        (2, 64, 48, 8),
        (2, 2, 9, 40),
        (2, 7, 70, 3),
        (2, 8, 33, 50),
        (3, 9, 16, 70),
        (2, 12, 40, 60),
        (2, 16, 33, 50),
        (4, 37, 50, 19),
    ],
    *[(0, 3, 4, 5), (3, 0, 4, 5), (2, 130, 17, 65), (1, 200, 9, 130)],
]
SQ_NORMS = [dense.gram_sq_norms, dense.direct_sq_norms]


def layouts(batch, time, width, dtype=torch.float32):
    """The layouts that tensors come in: by sample, by time, slices, transposed."""
    yield torch.randn(batch, time, width, dtype=torch.float32).to(dtype)
    yield torch.randn(time, batch, width, dtype=torch.float32).to(dtype).transpose(0, 1)
    yield torch.randn(batch, time, 2 * width + 3).to(dtype)[:, :, 2 : 2 + width]
    yield torch.randn(batch, width, time).to(dtype).transpose(1, 2)


def pairs(shape, dtype=torch.float32):
    batch, time, d_in, d_out = shape
    yield from zip(
        layouts(batch, time, d_in, dtype),
        layouts(batch, time, d_out, dtype),
        strict=True,
    )


def bound(a, g):
    """Room for rounding, relative to |gradient| where nothing cancels: a few sums."""
    return {"rtol": 1e-12 if g.dtype == torch.float64 else 3e-5, "atol": 1e-5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_squared_norms_of_sequences(check, shape, dtype):
    for a, g in pairs(shape, dtype):
        for op in SQ_NORMS:
            check(op, a, g, **bound(a, g), nonnegative=True)
        for with_bias in (True, False):
            check(
                *(dense.sequence_sq_norms, a, g, with_bias),
                **bound(a, g),
                nonnegative=True,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_over_sequences(check, shape, dtype):
    for a, g in pairs(shape, dtype):
        loose = bound(a, g) | {"atol": 1e-3}
        check(dense.sequence_second_moment, a, g, **loose, nonnegative=True)
        check(dense.sequence_gram, a, g, **loose)
        check(dense.sequence_gradients, a, g, **loose)
        check(dense.sequence_dots, a, g, torch.randn(shape[3], shape[2]), **loose)
        for count in (0, 1, 3, 20):  # one at a time, and from gradients made once
            directions = list(torch.randn(count, shape[3], shape[2]))
            check(dense.sequence_multi_dots, a, g, directions, **loose)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_squared_norms_of_rows(check, shape, dtype):
    for a, g in pairs(shape, dtype):
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        check(dense.row_sq_norms, a, g, **bound(a, g), nonnegative=True)


@pytest.mark.parametrize("shape", [(3, 130, 300, 520), (2, 6, 20000, 30000)])
def test_sizes_that_occupy_several_threads(check, shape):
    batch, time, d_in, d_out = shape
    a, g = (
        torch.randn(time, batch, d_in).transpose(0, 1),
        torch.randn(batch, time, d_out),
    )
    check(dense.gram_sq_norms, a, g, **bound(a, g))
    check(dense.row_sq_norms, a[:, 0], g[:, 0], **bound(a, g))
    if d_in * d_out < 1e6:
        check(dense.direct_sq_norms, a, g, **bound(a, g))
        check(dense.sequence_second_moment, a, g, rtol=3e-5, atol=1e-2)


def test_references_against_single_samples():
    a, g = torch.randn(4, 6, 5).double(), torch.randn(4, 6, 3).double()
    v = torch.randn(3, 5).double()
    grads = torch.stack(
        [sum(torch.outer(g[n, t], a[n, t]) for t in range(6)) for n in range(4)]
    )
    flat = grads.flatten(1)
    weight, bias = dense.sequence_sq_norms.reference(a, g, True)
    want = {
        dense.gram_sq_norms: flat.square().sum(1),
        dense.direct_sq_norms: flat.square().sum(1),
        dense.sequence_second_moment: grads.square().sum(0),
        dense.sequence_gram: flat @ flat.T,
        dense.sequence_gradients: grads,
    }
    for op, value in want.items():
        torch.testing.assert_close(op.reference(a, g), value)
    torch.testing.assert_close(
        dense.sequence_dots.reference(a, g, v), flat @ v.flatten()
    )
    many = [v, 2 * v.flip(0)]
    torch.testing.assert_close(
        dense.sequence_multi_dots.reference(a, g, many),
        flat @ torch.stack(many).flatten(1).T,
    )
    torch.testing.assert_close(weight, flat.square().sum(1))
    torch.testing.assert_close(bias, g.sum(1).square().sum(1))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(
        *[st.integers(1, 3), st.integers(1, 20)], *[st.integers(1, 40)] * 2
    ),
    power=st.integers(-8, 8),
)
def test_scaling_a_gradient_scales_its_squared_norm_by_the_square(shape, power):
    batch, time, d_in, d_out = shape
    a, g = torch.randn(batch, time, d_in), torch.randn(batch, time, d_out)
    for op in [*SQ_NORMS, dense.sequence_second_moment]:
        for backend in op.backends("cpu", torch.float32):
            run = op.on(backend, "cpu", torch.float32)
            # powers of two round nothing
            torch.testing.assert_close(
                run(a, g * 2.0**power), run(a, g) * 4.0**power, rtol=0, atol=0
            )


def test_squared_norms_of_parts_add_up():
    a, g = torch.randn(3, 40, 30), torch.randn(3, 40, 20)
    for op in SQ_NORMS:
        for backend in op.backends("cpu", torch.float32):
            run = op.on(backend, "cpu", torch.float32)
            parts = run(a, g[:, :, :7]) + run(a, g[:, :, 7:])
            torch.testing.assert_close(run(a, g), parts, rtol=1e-5, atol=0)


def test_half_precision_does_not_overflow():
    a = torch.full((2, 3, 100), 30.0, dtype=torch.float16)
    norms, bias = dense.sequence_sq_norms(a, a, True)
    assert torch.isfinite(norms).all() and torch.isfinite(bias).all()
    torch.testing.assert_close(norms, torch.full((2,), (3 * 900.0 * 100) ** 2))


def cancelling(noise, batch=3, time=64, d_in=96, d_out=160):
    """Time steps in pairs whose contributions cancel up to `noise`."""
    a, g = torch.randn(batch, time, d_in), torch.randn(batch, time, d_out)
    a[:, 1::2] = a[:, ::2]
    g[:, 1::2] = noise * torch.randn(batch, time // 2, d_out) - g[:, ::2]
    return a, g


def error(got, want):
    return ((got.double() - want) / want).abs().max().item()


# The second size is cut in pieces for two threads.
@pytest.mark.parametrize("size", [(64, 96, 160), (128, 384, 640)])
def test_gram_alone_is_wrong_where_time_steps_cancel_and_the_guard_sees_it(size):
    a, g = cancelling(1e-3, 3, *size)
    assert dense_cost.choose(*size) == "gram"
    want = dense.direct_sq_norms.reference(a.double(), g.double())
    for backend in dense.gram_sq_norms.backends("cpu", torch.float32):
        gram = dense.gram_sq_norms.on(backend, "cpu", torch.float32)
        assert error(gram(a, g), want) > 1e-2, backend
    for backend in dense.sequence_sq_norms.backends("cpu", torch.float32):
        guarded = dense.sequence_sq_norms.on(backend, "cpu", torch.float32)
        assert error(guarded(a, g, False)[0], want) < 1e-4, backend


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_gram_is_accurate_where_the_guard_lets_it_pass(shift):
    share = dense_cost.guard(96, 160, torch.float32)
    passed = 0
    for noise in torch.logspace(-2, 0.5, 30):
        a, g = cancelling(noise.item())
        a = a + shift
        want = dense.direct_sq_norms.reference(a.double(), g.double())
        parts = (a.double().square().sum(2) * g.double().square().sum(2)).sum(1)
        is_passed = want >= share * parts
        for backend in dense.gram_sq_norms.backends("cpu", torch.float32):
            got = dense.gram_sq_norms.on(backend, "cpu", torch.float32)(a, g)
            if is_passed.any():
                assert error(got[is_passed], want[is_passed]) < 1e-4, backend
        passed += int(is_passed.sum())
    assert 20 < passed < 85  # of 90: the guard did divide the cases


def test_choice_follows_the_sizes():
    assert dense_cost.choose(1, 1, 1) == "rows"
    assert dense_cost.choose(32, 512, 512) == "gram"
    assert dense_cost.choose(2048, 64, 64) == "direct"
