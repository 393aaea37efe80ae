"""Norms of compiled regions are launched by the extension, once launches are known."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastminima as fm
from fastminima.capture.graph.extension import learned
from fastminima.capture.session.marked_launches import LaunchedUse

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if learned() is None:
    pytest.skip("the extension launches nothing here", allow_module_level=True)

from fake_driver import driving
from launch_cases import Net, assert_captured, data, losses_of, warm_up

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BACKEND = "aot_eager_decomp_partition"


@pytest.fixture
def driver(on_the_cpu, compiling):
    with driving() as found:
        yield found


def ways_of(probe):
    """How the norms of each use are found, of all regions that were read."""
    recipes = (
        recipe
        for structure in probe._reader._structures.values()
        for recipe in structure._recipes.values()
    )
    regions = (region for r in recipes for region in r.regions.values())
    return [way.take for region in regions for way in region.ways.values() if way]


def stats_of(model, fast, probe, step, dtype, device="cpu"):
    model.zero_grad()
    x = data(step).to(device, dtype)
    return probe.backward(losses_of(fast, x))


def grads_of(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("mode", ["observe", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uses_are_launched_and_give_the_same_bits(driver, dtype, mode):
    torch.manual_seed(0)
    model = Net().to(dtype)
    fast = fm.compile(model, backend=BACKEND)
    probe, oracle = (
        fm.GradientProbe(model, per_parameter=True, mode=mode) for _ in range(2)
    )
    for step in range(14):
        stats_of(model, fast, probe, step, dtype)
    ways = ways_of(probe)
    assert ways and all(isinstance(way, LaunchedUse) for way in ways)
    driver.by_python.clear()
    driver.launches.clear()
    got = stats_of(model, fast, probe, 14, dtype)
    grads = grads_of(model)
    assert all(way.is_launched for way in ways) and driver.launches
    assert any(way.makes for way in ways) == (mode == "fused")
    expected = stats_of(model, fast, oracle, 14, dtype)
    for grad, want in zip(grads, grads_of(model), strict=True):
        assert torch.equal(grad, want)
    for name, norms in expected.sq_norms_by_parameter.items():
        assert torch.equal(got.sq_norms_by_parameter[name], norms), name


def test_statistics_of_one_pass_outlive_the_next(driver):
    torch.manual_seed(1)
    model = Net()
    fast = fm.compile(model, backend=BACKEND)
    probe = fm.GradientProbe(model, per_parameter=True)
    for step in range(14):
        stats_of(model, fast, probe, step, torch.float32)
    got = stats_of(model, fast, probe, 14, torch.float32)
    kept = {name: x.clone() for name, x in got.sq_norms_by_parameter.items()}
    stats_of(model, fast, probe, 15, torch.float32)
    for name, norms in kept.items():
        assert torch.equal(got.sq_norms_by_parameter[name], norms), name


def test_what_the_driver_refuses_goes_by_python(driver):
    torch.manual_seed(2)
    model = Net()
    fast = fm.compile(model, backend=BACKEND)
    probe, oracle = fm.GradientProbe(model), fm.GradientProbe(model)
    driver.code = 1
    for step in range(6):
        got = stats_of(model, fast, probe, step, torch.float32)
    assert not any(way.is_launched for way in ways_of(probe))
    expected = stats_of(model, fast, oracle, 5, torch.float32)
    assert torch.equal(got.sq_norms, expected.sq_norms)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_is_given_the_same_kernels(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(3)
    model = Net().to("cuda", dtype)
    fast = fm.compile(model, backend=BACKEND)
    probe, oracle = (fm.GradientProbe(model, per_parameter=True) for _ in range(2))
    for step in range(14):
        stats_of(model, fast, probe, step, dtype, "cuda")
    launched = [way.is_launched for way in ways_of(probe)]
    assert any(launched)
    if dtype == torch.bfloat16:  # in float32 products of sequences are PyTorch's
        assert all(launched)
    got = stats_of(model, fast, probe, 14, dtype, "cuda")
    expected = stats_of(model, fast, oracle, 14, dtype, "cuda")
    for name, norms in expected.sq_norms_by_parameter.items():
        assert torch.equal(got.sq_norms_by_parameter[name], norms), name


class Operations(TorchDispatchMode):
    """Names of the operations that are not views, within some calls."""

    def __init__(self):
        super().__init__()
        self.names, self.is_within = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.is_within and not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["observe", "fused"])
def test_what_is_launched_looks_at_nothing(driver, mode, monkeypatch):
    """So a CUDA graph can be recorded around the whole step: only memory is asked for.

    The first use of a pass allocates rows for all of them, and scratch grows to what
    the largest needs.
    """
    torch.manual_seed(4)
    model = Net()
    fast = fm.compile(model, backend=BACKEND)
    probe = fm.GradientProbe(model, mode=mode)
    for step in range(14):
        stats_of(model, fast, probe, step, torch.float32)
    seen, usual = Operations(), LaunchedUse.__call__
    uses = []

    def within(self, memory, *tensors):
        assert self.is_launched
        uses.append(self)
        with seen:
            seen.is_within = True
            try:
                return usual(self, memory, *tensors)
            finally:
                seen.is_within = False

    monkeypatch.setattr(LaunchedUse, "__call__", within)
    driver.is_idle = True  # what it computes would be seen
    stats_of(model, fast, probe, 14, torch.float32)
    assert len(uses) > 3
    assert set(seen.names) == {"aten::empty.memory_format"}
    gradients = sum(use.makes for use in uses)
    assert len(seen.names) <= 1 + gradients + len(uses)


@pytest.mark.gpu
def test_a_compiled_step_is_captured_in_a_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(5)
    model = Net().to("cuda", torch.bfloat16)
    fast = fm.compile(model, backend=BACKEND)
    probe = fm.GradientProbe(model)
    x = data(0).to("cuda", torch.bfloat16)

    def step():
        model.zero_grad()
        return probe.backward(losses_of(fast, x)).sq_norms

    warm_up(step, 14)
    assert_captured(step, x)
