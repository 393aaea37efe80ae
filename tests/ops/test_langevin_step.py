"""The step of Langevin dynamics, by every implementation."""

import math

import pytest
import torch
from normality import check_moments, check_normal, check_uncorrelated

from fastminima import _native
from fastminima.ops.langevin import langevin_step_
from fastminima.ops.native import langevin as native
from fastminima.ops.random import Noise, normals

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(), (0,), (5,), (3, 7), (1024,), (2, 1025), (10_007,)]
# Numbers are at most 6.8 in size and the angles of float32 are exact to 2e-7.
CLOSE = {torch.float32: {"rtol": 1e-6, "atol": 2e-6}, torch.float64: {}}


def lists(dtype, has_velocities):
    """Parameters, gradients and velocities, some strided; the last may be None."""
    made = []
    for _ in range(3):
        some = [torch.randn(s, dtype=dtype) for s in SHAPES]
        some.append(torch.randn(33, 40, dtype=dtype).t())
        some.append(torch.randn(2, 8, 3, 5, dtype=dtype))
        made.append(some)
    made[0][-1] = made[0][-1].contiguous(memory_format=torch.channels_last)
    return made if has_velocities else [*made[:2], None]


def copies(made, convert=torch.clone):
    return [some and [convert(x) for x in some] for some in made]


def close(got, want, dtype):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(dtype), **CLOSE.get(dtype, {}))


@pytest.mark.parametrize("deviation", [0.0, 0.7])
@pytest.mark.parametrize("has_velocities", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_implementation_is_the_reference(dtype, has_velocities, deviation):
    made = lists(dtype, has_velocities)
    indices = [7 * i % 9 for i in range(len(made[0]))]
    rest = (0.3, 0.9, Noise(-3, 2**40 + 5, indices, deviation))
    want = copies(made, lambda x: x.double().clone())
    langevin_step_.reference(*want, *rest)
    for backend in langevin_step_.backends("cpu", dtype):
        params, grads, velocities = copies(made)
        run = langevin_step_.on(backend, "cpu", dtype)
        assert run(params, grads, velocities, *rest) is None
        close(params, want[0], dtype)
        close(grads, made[1], dtype)
        if velocities is not None:
            close(velocities, want[2], dtype)


def test_the_formula():
    noise = Noise(1, 2, [5], 0.4)
    z = normals(noise, 0, slice(0, 6), torch.device("cpu"))
    p, g, v = torch.randn(3, 6, dtype=torch.float64).unbind()
    velocity = 0.9 * v + math.sqrt(0.2) * g - 0.4 * z
    still, moving = [p.clone()], [p.clone()]
    langevin_step_(still, [g], None, 0.2, 0.9, noise)
    torch.testing.assert_close(still[0], p - 0.2 * g + math.sqrt(0.2) * 0.4 * z)
    langevin_step_(moving, [g], [v], 0.2, 0.9, noise)
    torch.testing.assert_close(v, velocity)
    torch.testing.assert_close(moving[0], p - math.sqrt(0.2) * velocity)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_threads_or_on_the_list(dtype):
    """Of the list a tensor's index is all that counts."""
    params = [torch.zeros(size, dtype=dtype) for size in (300_001, 5, 0, 200_000)]
    grads = [torch.ones_like(p) for p in params]
    before = torch.get_num_threads()
    for backend in langevin_step_.backends("cpu", dtype):
        run = langevin_step_.on(backend, "cpu", dtype)
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                moved = [p.clone() for p in params]
                run(moved, grads, None, 0.1, 0.0, Noise(3, 4, range(4), 1.0))
                found.append(torch.cat(moved))
        finally:
            torch.set_num_threads(before)
        for i in (3, 1, 0):
            run([params[i]], [grads[i]], None, 0.1, 0.0, Noise(3, 4, [i], 1.0))
        found.append(torch.cat(params))
        for p in params:
            p.zero_()
        assert all(torch.equal(found[0], other) for other in found[1:]), backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counters_carry_into_their_upper_word(dtype):
    first = 4 * (2**32 - 200)
    noise = Noise(1, 2, [3], 1.0)
    want = normals(noise, 0, slice(first, first + 1600), torch.device("cpu"))
    for isa in _native.available_isas():
        p = torch.zeros(1600, dtype=dtype)
        place = noise.places[0] + first // 4
        native._launch(
            *(_native.kernels_for(isa), [p], [torch.zeros_like(p)], None, [place]),
            *(1.0, 0.0, noise),
        )
        torch.testing.assert_close(p, want.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_kernel_draws_is_normal(dtype):
    """And independent from step to step and from tensor to tensor."""
    for backend in langevin_step_.backends("cpu", dtype):
        run, drawn = langevin_step_.on(backend, "cpu", dtype), []
        for step in range(2):
            params = [torch.zeros(200_000, dtype=dtype) for _ in range(2)]
            grads = [torch.zeros_like(p) for p in params]
            run(params, grads, None, 1.0, 0.0, Noise(5, step, (0, 1), 1.0))
            drawn += [p.double() for p in params]
        for x in drawn:
            check_moments(x)
        check_normal(torch.cat(drawn))
        check_uncorrelated(torch.stack(drawn))


def test_lists_that_do_not_fit_go_to_the_reference():
    params = [torch.zeros(3), torch.zeros(4, dtype=torch.float64)]
    grads = [torch.ones(3), torch.ones(4, dtype=torch.float64)]
    langevin_step_(params, grads, None, 0.5, 0.0, Noise(1, 2, [0, 1], 0.0))
    assert params[0].eq(-0.5).all() and params[1].eq(-0.5).all()


@pytest.mark.parametrize("has_velocities", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_sees_what_was_written(dtype, has_velocities):
    """Kernels write through addresses, of which versions know nothing."""
    made = lists(dtype, has_velocities)
    rest = (0.3, 0.9, Noise(1, 2, list(range(len(made[0]))), 0.7))
    for backend in langevin_step_.backends("cpu", dtype):
        params, grads, velocities = copies(made)
        written = [x for x in (*params, *(velocities or ())) if x.numel()]
        before = [x._version for x in written]
        read = [g._version for g in grads]
        langevin_step_.on(backend, "cpu", dtype)(params, grads, velocities, *rest)
        raised = [x._version > n for x, n in zip(written, before, strict=True)]
        assert all(raised), backend
        assert [g._version for g in grads] == read, backend
