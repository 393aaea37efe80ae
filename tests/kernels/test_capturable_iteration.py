"""Lanczos and power iterations as a CUDA graph would capture them.

Product and vector step together, on tensors without data, with the implementations that
a GPU would use: no look at the device. What is decided by numbers (convergence) comes
after as many steps as one likes.
"""

import importlib.util

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.curvature._graph import GradientGraph
from fastminima.ops.table import Op
from fastminima.ops.vector import power_step
from fastminima.spectrum._lanczos_run import LanczosRun
from fastminima.spectrum._start import Start

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tools.kernels.capturable import (
    CudaStandIn,
    NotCapturableError,
    capturing,
    cuda_ops,
)

STEPS = 4


def make(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)).to(device)
    return model, torch.randn(10, 6).to(device)


def losses_of(model, x):
    return model(x).square().sum(1)


class Unlooked(fm.LossHessian):
    """Made without looks at the loss and at its nodes, which come before a capture."""

    def _record(self, losses, functions_known):
        self._roots, self._others, self._moved = (losses.mean(),), [], []
        self._graph = GradientGraph(self._roots, self._layout.parameters)
        self._versions = [p._version for p in self._layout.parameters]

    def _bare(self):
        return fm.twice_differentiable()  # autocast knows no tensors without data


@pytest.fixture
def gpu(monkeypatch):
    """Ops called on tensors without data run as on a GPU; how each one did."""
    with_cuda, used = cuda_ops(CudaStandIn()), []

    def called(op, first, *args, **kwargs):
        op = with_cuda.get(op.name, op)
        backend = op.backends("cuda", first.dtype)[0]
        used.append((op.name, backend))
        return op.on(backend, "cuda", first.dtype)(first, *args, **kwargs)

    monkeypatch.setattr(Op, "__call__", called)
    return used


def lanczos(H, start):
    run = LanczosRun(H.__matmul__, Start(start, 1.0))
    for _ in range(STEPS):
        run.step()
    return run


def power(H, start):
    v, found = start / start.norm(), None
    for _ in range(STEPS):
        following = torch.empty_like(v)
        found = power_step(H @ v, v, 0.0, following)
        v = following
    return found


@pytest.mark.parametrize("iterate", [lanczos, power])
def test_an_iteration_is_capturable(iterate, gpu):
    model, x = make("meta")
    H = Unlooked(model, losses_of(model, x))
    start = torch.empty(H.shape[0], device="meta")
    with capturing():
        iterate(H, start)
    assert gpu.count((f"{iterate.__name__}_step", "cuda")) == STEPS


def test_what_is_found_is_not(gpu):
    model, x = make("meta")
    H = Unlooked(model, losses_of(model, x))
    with pytest.raises(NotCapturableError), capturing():
        lanczos(H, torch.empty(H.shape[0], device="meta")).ritz()


def test_the_same_without_a_graph():
    """The iterations as they are captured find what the solver finds."""
    model, x = make("cpu")
    H = fm.LossHessian(model, losses_of(model, x))
    start = torch.randn(H.shape[0])
    true = fm.top_eigenpairs(H, rtol=1e-4).values.item()
    run = LanczosRun(H.__matmul__, Start(start.clone(), 1.0))
    for _ in range(12):
        run.step()
    assert run.ritz().values[-1] == pytest.approx(true, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("iterate", [lanczos, power])
def test_a_captured_iteration_gives_the_same(iterate):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, x = make("cuda")
    H = fm.LossHessian(model, losses_of(model, x))
    start = torch.randn(H.shape[0], device="cuda")

    def found():
        result = iterate(H, start.clone())
        return result.basis[STEPS] if iterate is lanczos else result

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = found()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = found()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=1e-4, atol=1e-6)
