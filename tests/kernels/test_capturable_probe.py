"""A probed step as a CUDA graph would capture it: no look at the device anywhere.

The step runs on tensors without data, with the implementations that a GPU would use,
after the same model has shown a probe on the CPU what its graph looks like.
"""

import importlib.util

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.ops.table import Op

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tools.kernels.capturable import (
    CudaStandIn,
    NotCapturableError,
    capturing,
    cuda_ops,
)

N, T = 4, 7


class Net(nn.Module):
    """One of each family: table, norms, convolution, sequence, one row, scale."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.groups = nn.GroupNorm(2, 8)
        self.bare = nn.Linear(8, 6, bias=False)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.norm(self.table(ids))
        x = x + self.mix(x).softmax(-1)
        x = self.groups(self.conv(x.mT)).mT
        return self.head((self.bare(x) * self.scale).mean(1))


def losses_of(model, ids):
    return model(ids).square().sum(1)


@pytest.fixture
def gpu(monkeypatch):
    """Ops called on tensors without data run as on a GPU; what each one used."""
    with_cuda = cuda_ops(CudaStandIn())
    used = {}

    def called(op, first, *args, **kwargs):
        leader = first if isinstance(first, torch.Tensor) else first[0]
        if leader.device.type != "meta":
            return op.reference(first, *args, **kwargs)
        op = with_cuda.get(op.name, op)
        backend = op.backends("cuda", leader.dtype)[0]
        used[op.name] = backend
        return op.on(backend, "cuda", leader.dtype)(first, *args, **kwargs)

    monkeypatch.setattr(Op, "__call__", called)
    return used


def warmed_up(make=Net, **options):
    """A probe on a model without data that knows the structure of its graph."""
    torch.manual_seed(0)
    model, ids = make(), torch.randint(11, (N, T))
    known = fm.GradientProbe(model, **options)
    for _ in range(2):
        known.backward(losses_of(model, ids))
    meta = make().to("meta")
    probe = fm.GradientProbe(meta, **options)
    probe._reader._structures = known._reader._structures
    return meta, probe


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_parameter": True, "keep_mean": True},
        {"measure": "second_moments"},
        {"mode": "fused"},
        {"mode": "fused", "measure": "second_moments"},
    ],
    ids=str,
)
def test_a_probed_step_is_capturable(gpu, options):
    model, probe = warmed_up(**options)
    ids = torch.empty(N, T, dtype=torch.long, device="meta")
    with capturing() as launches:
        stats = probe.backward(losses_of(model, ids))
        derived = stats.covariance_trace, stats.noise_scale
    assert launches
    assert all(x.device.type == "meta" for x in (stats.sq_norms, *derived))
    assert "triton" in gpu.values() and gpu["embedding_sq_norms"] == "cuda"
    assert all(p.grad is not None for p in model.parameters())


def test_attach_and_collect_are_capturable(gpu):
    model, probe = warmed_up()
    ids = torch.empty(N, T, dtype=torch.long, device="meta")
    with capturing():
        losses = losses_of(model, ids)
        probe.attach(losses)
        losses.mean().backward()
        probe.collect()
    assert gpu


class Tied(nn.Module):
    """A table that is also the output head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.mix(self.table(ids)).tanh()
        return nn.functional.linear(x, self.table.weight).flatten(1)


@pytest.mark.parametrize("mode", ["observe", "fused"])
def test_a_tied_head_is_capturable(gpu, monkeypatch, mode):
    model, probe = warmed_up(Tied, mode=mode)
    ids = torch.empty(N, T, dtype=torch.long, device="meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with capturing():
        probe.backward(losses_of(model, ids))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(NotCapturableError), capturing():
        probe.backward(losses_of(model, ids))


def test_the_first_step_is_not(gpu):
    """It measures which rows belong to which sample, and looks at what it measured."""
    model, probe = warmed_up()
    probe._reader._structures = {}
    ids = torch.empty(N, T, dtype=torch.long, device="meta")
    with pytest.raises(NotCapturableError), capturing():
        probe.backward(losses_of(model, ids))
