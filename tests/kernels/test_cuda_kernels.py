"""The CUDA kernels against the float64 references, on an emulated and a real device.

Each case runs with the threads and blocks forwards, backwards and shuffled, and must
give the same bits; on a real device twice.
"""

import math
from unittest import mock

import pytest
import torch
from cuda_tensors import ALL, FLOATS, same, shifted

from fastminima.ops import langevin, multi, vector
from fastminima.ops.cuda import embedding as embedding_cuda
from fastminima.ops.cuda import langevin as langevin_cuda
from fastminima.ops.cuda import multi as multi_cuda
from fastminima.ops.cuda import vector as vector_cuda
from fastminima.ops.random import Noise

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


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e19, 1e30])
def test_vector_steps_of_every_scale(device, scale):
    size = 4099
    w, v, u = (unit(size, torch.float32, 0) for _ in range(3))
    w, beta = w * scale, torch.tensor(0.7 * scale, dtype=torch.float64)
    wide, out = w.double().clone(), torch.empty(size, dtype=torch.float64)
    want = vector.lanczos_step.reference(wide, v.double(), u.double(), beta)
    power = vector.power_step.reference(w.double(), v.double(), 0.3 * scale, out)
    dots = vector.project_out.reference(w.double().clone(), [v.double()])
    w, v, u, beta = map(device.put, (w, v, u, beta))

    def case():
        moved, following = w.clone(), torch.empty_like(w)
        step = vector_cuda.lanczos_step(device.kernels, moved, v, u, beta)
        result = vector_cuda.power_step(device.kernels, w, v, 0.3 * scale, following)
        rest = vector_cuda.project_out(device.kernels, w.clone(), [v])
        return step, moved, result, following, rest

    step, moved, result, following, rest = device.every(case)
    close = {"rtol": 2e-5, "atol": 2e-5 * scale}
    for got, exact in ((step, want), (moved, wide), (result, power), (rest, dots)):
        same(got, exact, **close)
    same(following, out, rtol=2e-5, atol=2e-5)


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
        moved, rows = w.clone(), list(basis)
        alone = vector_cuda.dots(device.kernels, w, rows)
        return vector_cuda.project_out(device.kernels, moved, rows), moved, alone

    result, moved, alone = device.every(case)
    same(result, want, **CLOSE[dtype])
    same(alone, want, **CLOSE[dtype])
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


def tensors(dtype, shift=0):
    """Some empty, one large, more than one launch takes."""
    shapes = [(5,), (0,), (33, 7), (9001,), (), *[(3,)] * 100, (8, 16)]
    return [shifted(math.prod(s), dtype, shift).view(s) for s in shapes]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", ALL)
def test_multi_sq_norm(device, dtype, shift):
    xs = tensors(dtype, shift)
    want = multi.multi_sq_norm.reference(xs)
    xs = [device.put(x) for x in xs]
    run = multi_cuda.sq_norm(multi.multi_sq_norm.reference)
    got = device.every(lambda: [run(device.kernels, xs)])[0]
    # Eight products are added in the accumulation dtype, the rest in double.
    room = {} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-4}
    assert got.dtype == torch.float64
    same(got, want, **room)


def test_lists_of_several_dtypes(device):
    """As a model in bfloat16 has them whose normalisations are in float32."""
    several = [torch.randn(4, 3), torch.randn(5).double(), torch.randn(7).bfloat16()]
    xs = [device.put(x) for x in several * 2]
    run = multi_cuda.sq_norm(mock.Mock(side_effect=AssertionError("PyTorch's way")))
    want = multi.multi_sq_norm.reference(several * 2)
    same(run(device.kernels, xs).cpu(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("deviation", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", ALL)
def test_langevin_step(device, dtype, shift, momentum, deviation):
    lists = [tensors(dtype, shift) for _ in range(3 if momentum else 2)]
    transposed = [torch.randn(6, 5).to(dtype).t() for _ in lists]
    lists = [[*some, one] for some, one in zip(lists, transposed, strict=True)]
    indices = list(range(len(lists[0])))[::-1]
    rest = (0.1, momentum, Noise(-5, 2**40 + 7, indices, deviation))
    want = [[x.double().clone() for x in some] for some in lists]
    params, grads, *velocities = want
    arguments = (params, grads, *(velocities or [None]))
    langevin.langevin_step_.reference(*arguments, *rest)
    lists = [[device.put(x) for x in some] for some in lists]
    run = langevin_cuda.langevin_step_(langevin.langevin_step_.reference)

    def case():
        moved = [[x.clone() for x in some] for some in lists]
        params, grads, *velocities = moved
        run(device.kernels, params, grads, *(velocities or [None]), *rest)
        return [x for some in moved for x in some]

    truth = [x for some in want for x in some]
    for got, x in zip(device.every(case), truth, strict=True):
        # Numbers are at most 6.8, and a float32 angle is exact to 2e-7.
        same(got, x, **({"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}))


def test_half_precisions_of_every_value(emulated):
    """What the emulation makes of float16 is what PyTorch makes of it."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    exact = values[values.isfinite()].view(-1, 1, 1)
    ids = torch.zeros(len(exact), 1, dtype=torch.int64)
    got = embedding_cuda.embedding_dots(emulated, ids, exact, -1, torch.ones(1, 1))
    assert torch.equal(got, exact.flatten().float())
    floats = torch.randn(3000) * torch.exp2(torch.randint(-30, 18, (3000,)).float())
    want = floats.half().view(torch.int16).tolist()
    assert [emulated.half_bits(x) for x in floats.tolist()] == [w % 2**16 for w in want]
