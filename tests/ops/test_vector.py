"""Every implementation of the vector steps against its reference in float64."""

import pytest
import torch

from fastminima import _native
from fastminima.ops.vector import (
    dots,
    lanczos_step,
    linear_combinations,
    power_step,
    project_out,
    same_values,
)

SIZES = [0, 1, 15, 33, 4096, 4097, 100_003]
DTYPES = [torch.float32, torch.float64]
CPU = "cpu"

# Sums of n products of unit scale: errors grow as sqrt(n), and n is at most 1e5.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 2e-4}, torch.float64: {}}


def unit(size, dtype):
    v = torch.randn(size, dtype=dtype)
    return v / v.norm() if size else v


@pytest.mark.parametrize("has_previous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_lanczos_step(size, dtype, has_previous):
    w, v, u = torch.randn(size, dtype=dtype), unit(size, dtype), unit(size, dtype)
    previous = u if has_previous else None
    beta = torch.tensor(0.7, dtype=torch.float64)
    want_w = w.double().clone()
    want = lanczos_step.reference(
        want_w, v.double(), previous if previous is None else u.double(), beta
    )
    for backend in lanczos_step.backends(CPU, dtype):
        got_w = w.clone()
        got = lanczos_step.on(backend, CPU, dtype)(got_w, v, previous, beta)
        torch.testing.assert_close(got, want, **CLOSE[dtype])
        torch.testing.assert_close(got_w, want_w.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_power_step(size, dtype, shift):
    w, v = torch.randn(size, dtype=dtype), unit(size, dtype)
    want_out = torch.empty(size, dtype=torch.float64)
    want = power_step.reference(w.double(), v.double(), shift, want_out)
    for backend in power_step.backends(CPU, dtype):
        out = torch.empty(size, dtype=dtype)
        got = power_step.on(backend, CPU, dtype)(w.clone(), v, shift, out)
        torch.testing.assert_close(got, want, **CLOSE[dtype])
        torch.testing.assert_close(out, want_out.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_step_of_zero_is_zero(dtype):
    v = unit(50, dtype)
    for backend in power_step.backends(CPU, dtype):
        out = torch.empty(50, dtype=dtype)
        got = power_step.on(backend, CPU, dtype)(torch.zeros_like(v), v, 0.0, out)
        assert not got.any()
        assert not out.any()


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [15, 4097, 100_003])
def test_project_out(size, dtype, count):
    w = torch.randn(size, dtype=dtype)
    basis = list(
        torch.linalg.qr(torch.randn(size, count, dtype=dtype))[0].T.contiguous()
    )
    want_w = w.double().clone()
    want = project_out.reference(want_w, [row.double() for row in basis])
    for backend in project_out.backends(CPU, dtype):
        got_w = w.clone()
        got = project_out.on(backend, CPU, dtype)(got_w, basis)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, **CLOSE[dtype])
        torch.testing.assert_close(got_w, want_w.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 15, 4097, 100_003])
def test_dots(size, dtype, count):
    w, rows = torch.randn(size, dtype=dtype), torch.randn(count, size, dtype=dtype)
    rows = list(rows)
    want = [torch.dot(w.double(), row.double()) for row in rows]
    for backend in dots.backends(CPU, dtype):
        got = dots.on(backend, CPU, dtype)(w, rows)
        assert got.dtype == torch.float64
        want_here = torch.stack(want) if want else got.new_zeros(0)
        # Sums are made in double: beside what float32 holds they are exact.
        torch.testing.assert_close(got, want_here, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_linear_combinations(size, dtype, outputs, count):
    basis = torch.randn(count, size, dtype=dtype)
    weights = torch.randn(count, outputs, dtype=torch.float64)
    want = (weights.T @ basis.double()).to(dtype)
    for backend in linear_combinations.backends(CPU, dtype):
        run = linear_combinations.on(backend, CPU, dtype)
        got = run(basis[0], list(basis[1:]), weights)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Squares of these are beyond float32. Elements are as much smaller than a norm as the
# root of the size, and float32 has 1e-38 at least.
SCALES = [1e-36, 1e-30, 1e-22, 1e19, 1e30, 1e36]


def relative(scale, size, dtype):
    """Closeness of what has this scale; less where elements are denormal."""
    denormal = 1.4e-45 * size**0.5 / scale if dtype == torch.float32 else 0.0
    rtol = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    return {"rtol": rtol, "atol": scale * (rtol + 2 * denormal)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [33, 5000])
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale(scale, size, dtype, device):
    """Steps on vectors of any scale, whatever device tensors are made on."""
    w = unit(size, torch.float64)
    v, u = unit(size, dtype), unit(size, dtype)
    beta = torch.tensor(0.7 * scale, dtype=torch.float64)
    scaled = (w * scale).to(dtype)
    close = relative(scale, size, dtype)
    wide = scaled.double().clone()
    want = lanczos_step.reference(wide, v.double(), u.double(), beta)
    want_out = torch.empty(size, dtype=torch.float64)
    power = power_step.reference(scaled.double(), v.double(), -1.5 * scale, want_out)
    left = scaled.double().clone()
    parts = project_out.reference(left, [v.double()])
    with torch.device(device):
        for backend in lanczos_step.backends(CPU, dtype):
            got = scaled.clone()
            result = lanczos_step.on(backend, CPU, dtype)(got, v, u, beta)
            torch.testing.assert_close(result, want, **close)
            torch.testing.assert_close(got.double(), wide, **close)
            out = scaled.clone()
            run = power_step.on(backend, CPU, dtype)
            torch.testing.assert_close(
                run(scaled, v, -1.5 * scale, out), power, **close
            )
            torch.testing.assert_close(
                out.double(), want_out, rtol=close["rtol"], atol=close["atol"] / scale
            )
            got = scaled.clone()
            result = project_out.on(backend, CPU, dtype)(got, [v])
            torch.testing.assert_close(result, parts, **close)
            result = dots.on(backend, CPU, dtype)(scaled, [v])
            torch.testing.assert_close(result, parts, **close)
            torch.testing.assert_close(got.double(), left, **close)


@pytest.mark.skipif(not _native.available_isas(), reason="no native extension")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_do_not_depend_on_the_number_of_threads(dtype):
    w, v, u = (unit(100_003, dtype) for _ in range(3))
    beta = torch.tensor(0.7, dtype=torch.float64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moved, out = w.clone(), torch.empty_like(w)
            results.append(
                [
                    lanczos_step(moved, v, u, beta),
                    power_step(w, v, 0.3, out),
                    project_out(w.clone(), [v, u]),
                    dots(w, [v, u]),
                    moved,
                    out,
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not _native.available_isas(), reason="no native extension")
def test_native_is_what_runs():
    for op in (lanczos_step, power_step, dots, project_out, linear_combinations):
        for dtype in DTYPES:
            assert op.backends(CPU, dtype)[0] == "native"
        assert op.backends(CPU, torch.bfloat16) == ("reference",)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 33, 200_001])
def test_same_values(size, dtype):
    a = torch.randn(size, dtype=dtype)
    for backend in same_values.backends(CPU, dtype):
        same = same_values.on(backend, CPU, dtype)
        assert same(a, a.clone())
        for place in {0, size // 2, size - 1} if size else ():
            b = a.clone()
            b[place] += 1
            assert not same(a, b)


def test_same_values_of_strided_tensors():
    a = torch.randn(6, 4)
    assert same_values(a.T, a.T.contiguous())
    assert not same_values(a.T, a.T.contiguous() + 1)
