"""The CUDA kernels against the float64 references, on an emulated and a real device.

Each case runs with the threads and blocks forwards, backwards and shuffled, and must
give the same bits; on a real device twice.
"""

import math

import pytest
import torch
from cuda_tensors import ALL, FLOATS, same, shifted

from fastminima.ops import multi, random, vector
from fastminima.ops.cuda import multi as multi_cuda
from fastminima.ops.cuda import random as random_cuda
from fastminima.ops.cuda import vector as vector_cuda

SIZES = [0, 1, 33, 4099, 20_011]
# Sums of n products of unit scale: errors grow as sqrt(n), and n is at most 2e4.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.float64: {}}


def unit(size, dtype, shift):
    v = shifted(size, dtype, shift)
    return v / v.norm() if size and not shift else v.mul_(1 / math.sqrt(size + 1))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("has_previous", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_lanczos_step(device, size, dtype, has_previous, shift):
    w, v, u = (unit(size, dtype, shift) for _ in range(3))
    beta = torch.tensor(0.7, dtype=torch.float64)
    want_w = w.double().clone()
    previous = u.double() if has_previous else None
    want = vector.lanczos_step.reference(want_w, v.double(), previous, beta)
    w, v, u, beta = map(device.put, (w, v, u if has_previous else None, beta))

    def case():
        moved = torch.cat([w[:shift], w])[shift:] if size else w.clone()
        result = vector_cuda.lanczos_step(device.kernels, moved, v, u, beta)
        return result, moved

    result, moved = device.every(case)
    same(result, want, **CLOSE[dtype])
    same(moved, want_w, **CLOSE[dtype])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_power_step(device, size, dtype, shift):
    w, v = shifted(size, dtype, shift), unit(size, dtype, shift)
    want_out = torch.empty(size, dtype=torch.float64)
    want = vector.power_step.reference(w.double(), v.double(), -1.5, want_out)
    w, v = device.put(w), device.put(v)

    def case():
        out = torch.empty_like(w)
        return vector_cuda.power_step(device.kernels, w, v, -1.5, out), out

    result, out = device.every(case)
    same(result, want, **CLOSE[dtype])
    same(out, want_out, **CLOSE[dtype])


def test_power_step_of_zero_is_zero(device):
    w, v = device.put(torch.zeros(50)), device.put(unit(50, torch.float32, 0))
    out = torch.full_like(w, 3)
    assert not vector_cuda.power_step(device.kernels, w, v, 0.0, out).any()
    assert not out.any()


@pytest.mark.parametrize(
    ("count", "size"), [(0, 33), (1, 4099), (9, 20_011), (300, 37)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_project_out(device, size, dtype, count):
    w, basis = torch.randn(size, dtype=dtype), torch.randn(count, size, dtype=dtype)
    basis /= math.sqrt(size * max(count, 1))
    want_w = w.double().clone()
    want = vector.project_out.reference(want_w, list(basis.double()))
    w, basis = device.put(w), device.put(basis)

    def case():
        moved = w.clone()
        return vector_cuda.project_out(device.kernels, moved, list(basis)), moved

    result, moved = device.every(case)
    same(result, want, **CLOSE[dtype])
    same(moved, want_w, **CLOSE[dtype])


@pytest.mark.parametrize("outputs", [0, 1, 11])
@pytest.mark.parametrize(("count", "size"), [(1, 0), (3, 4099), (260, 65)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_combinations(device, size, dtype, count, outputs):
    basis = torch.randn(count, size, dtype=dtype)
    weights = torch.randn(count, outputs, dtype=torch.float64) / math.sqrt(count)
    want = weights.T @ basis.double()
    basis, weights = device.put(basis), device.put(weights)

    def case():
        run = vector_cuda.linear_combinations
        return [run(device.kernels, basis[0], list(basis[1:]), weights)]

    same(device.every(case)[0], want, **CLOSE[dtype])


def lists(dtype, shift=0):
    """Two lists of tensors, some empty, one large, more than one launch takes."""
    shapes = [(5,), (0,), (33, 7), (9001,), (), *[(3,)] * 100, (8, 16)]
    make = lambda: [  # noqa: E731
        shifted(math.prod(s), dtype, shift).view(s) for s in shapes
    ]
    return make(), make()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", ALL)
def test_multi_dot_and_sq_norm(device, dtype, shift):
    xs, ys = lists(dtype, shift)
    dot, norm = multi.multi_dot.reference(xs, ys), multi.multi_sq_norm.reference(xs)
    xs, ys = [device.put(x) for x in xs], [device.put(y) for y in ys]
    run = multi_cuda.dot(multi.multi_dot.reference)
    square = multi_cuda.sq_norm(multi.multi_dot.reference)
    got = device.every(
        lambda: [run(device.kernels, xs, ys), square(device.kernels, xs)]
    )
    # Eight products are added in the accumulation dtype, the rest in double.
    room = {} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-4}
    assert got[0].dtype == got[1].dtype == torch.float64
    same(got[0], dot, **room)
    same(got[1], norm, **room)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", ALL)
def test_multi_axpy(device, dtype, shift, on_device):
    ys, xs = lists(dtype, shift)
    want = [y.clone() for y in ys]
    multi.multi_axpy.reference(want, xs, -0.3)
    ys, xs = [device.put(y) for y in ys], [device.put(x) for x in xs]
    factor = device.put(torch.tensor(-0.3, dtype=torch.float64)) if on_device else -0.3
    run = multi_cuda.axpy(multi.multi_axpy.reference)

    def case():
        moved = [y.clone() for y in ys]
        run(device.kernels, moved, xs, factor)
        return moved

    for got, truth in zip(device.every(case), want, strict=True):
        same(got, truth)


def test_lists_that_do_not_fit_go_to_the_reference(device):
    ys = [device.put(torch.randn(4, 3)).t(), device.put(torch.randn(5).double())]
    xs = [torch.ones_like(y) for y in ys]
    want = [y + 2 for y in ys]
    multi_cuda.axpy(multi.multi_axpy.reference)(device.kernels, ys, xs, 2.0)
    for got, truth in zip(ys, want, strict=True):
        same(got.cpu(), truth.cpu())


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("size", [0, 1, 6, 9001])
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-1, 3), (2**63 + 5, 2**40 + 7)])
def test_fills(device, dtype, size, seed, offset):
    want = [torch.empty(size, dtype=torch.float64) for _ in range(2)]
    random.gaussian_fill_.reference(want[0], seed, offset)
    random.rademacher_fill_.reference(want[1], seed, offset)

    def case():
        out = [torch.empty(size, dtype=dtype, device=device.name) for _ in range(2)]
        random_cuda.gaussian_fill_(device.kernels, out[0], seed, offset)
        random_cuda.rademacher_fill_(device.kernels, out[1], seed, offset)
        return out

    normal, sign = device.every(case)
    wide = dtype in FLOATS
    same(normal, want[0], **({"rtol": 1e-6, "atol": 1e-6} if wide else {}))
    assert torch.equal(sign, want[1].to(dtype))


def test_fills_of_strided_and_shifted_tensors(device):
    want = random.gaussian_fill_.reference(torch.empty(5, 7), 1, 2)
    for out in (torch.empty(7, 5).t(), torch.empty(36)[1:].view(5, 7)):
        out = device.put(out)
        got = random_cuda.gaussian_fill_(device.kernels, out, 1, 2)
        assert got is out
        same(out.cpu(), want, rtol=1e-6, atol=1e-6)


def test_an_offset_on_the_device_is_the_same_offset(device):
    offset = device.put(torch.tensor(2**33 + 1))
    numbers = torch.empty(9, device=device.name)
    there = random_cuda.gaussian_fill_(device.kernels, numbers, 4, offset).clone()
    here = random_cuda.gaussian_fill_(device.kernels, numbers, 4, 2**33 + 1)
    assert torch.equal(there, here)
    same(random.gaussian_fill_.reference(torch.empty(9), 4, offset.cpu()), here.cpu())


@pytest.mark.parametrize("deviation", [0.0, 0.3])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", ALL)
def test_langevin_step(device, dtype, shift, deviation):
    params, grads = lists(dtype, shift)
    numbers = (0.1, deviation, 11, 5)
    want = [p.double().clone() for p in params]
    random.langevin_step_.reference(want, [g.double() for g in grads], *numbers)
    params, grads = [device.put(p) for p in params], [device.put(g) for g in grads]
    run = random_cuda.langevin_step_(random.langevin_step_.reference)

    def case():
        moved = [p.clone() for p in params]
        run(device.kernels, moved, grads, *numbers)
        return moved

    for got, truth in zip(device.every(case), want, strict=True):
        same(got, truth)


def test_half_precisions_of_every_value(emulated):
    """What the emulation makes of float16 is what PyTorch makes of it."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    exact = values[values.isfinite()]
    run = multi_cuda.axpy(multi.multi_axpy.reference)
    got = torch.zeros_like(exact)
    run(emulated, [got], [exact], 1.0)
    assert torch.equal(got, exact)
    floats = torch.randn(3000) * torch.exp2(torch.randint(-30, 18, (3000,)).float())
    want = floats.half().view(torch.int16).tolist()
    assert [emulated.half_bits(x) for x in floats.tolist()] == [w % 2**16 for w in want]
