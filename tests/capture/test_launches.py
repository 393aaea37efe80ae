"""Kernels that a use launches are launched again by the extension, without Python."""

import contextlib
import gc
import importlib.util
import sys
from unittest import mock

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.capture.graph.extension import learned
from fastminima.ops.table import Op

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if learned() is None:
    pytest.skip("the extension walks no graphs here", allow_module_level=True)

from fake_driver import driving
from launch_cases import (
    N,
    Net,
    T,
    assert_captured,
    data,
    launched_nodes,
    losses_of,
    warm_up,
)


@contextlib.contextmanager
def called_files():
    """The file of each function of Python that is called."""
    files = []

    def note(frame, event, arg):
        if event == "call":
            files.append(frame.f_code.co_filename)

    gc.collect()
    gc.disable()  # else what watches the garbage of other tests may be called
    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)
        gc.enable()


def test_all_uses_are_launched_and_give_the_same_bits(driver):
    torch.manual_seed(0)
    model = Net()
    probe, again = fm.GradientProbe(model), fm.GradientProbe(model)
    for step in range(8):
        model.zero_grad()
        stats = probe.backward(losses_of(model, data(step)))
    assert driver.launches
    driver.by_python.clear()
    model.zero_grad()
    stats = probe.backward(losses_of(model, data(8)))
    assert not driver.by_python
    model.zero_grad()
    expected = again.backward(losses_of(model, data(8)))
    assert torch.equal(stats.sq_norms, expected.sq_norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_halves_and_attached_passes_too(driver, dtype):
    torch.manual_seed(1)
    model = Net().to(dtype)
    probe, again = (fm.GradientProbe(model, per_parameter=True) for _ in range(2))

    def attached(probe, x):
        model.zero_grad()
        losses = losses_of(model, x.to(dtype))
        probe.attach(losses)
        losses.mean().backward()
        return probe.collect()

    for step in range(6):
        attached(probe, data(step))
    driver.by_python.clear()
    got = attached(probe, data(6))
    assert not driver.by_python
    expected = attached(again, data(6))
    assert len(expected.sq_norms_by_parameter) == len(list(model.parameters()))
    for name, norms in expected.sq_norms_by_parameter.items():
        assert torch.equal(got.sq_norms_by_parameter[name], norms), name


def test_another_batch_goes_by_python_and_is_launched_later(driver):
    torch.manual_seed(2)
    model = Net()
    probe = fm.GradientProbe(model)
    oracle = fm.GradientProbe(model)

    def both(x):
        found = []
        for each in (probe, oracle):
            driver.by_python.clear()
            model.zero_grad()
            found.append((each.backward(losses_of(model, x)), list(driver.by_python)))
            oracle._reader._structures.clear()
        (stats, by_python), (expected, _) = found
        assert torch.equal(stats.sq_norms, expected.sq_norms)
        return by_python

    for step in range(6):
        both(data(step))
    assert not both(data(6))
    assert both(data(7, n=4))
    for step in range(8, 14):
        both(data(step, n=4))
    assert not both(data(15, n=4))
    assert not both(data(16))


def test_a_step_of_a_use_calls_little_python(driver):
    """One launch a kernel, and nothing of Python that grows with the uses."""
    counts = {}
    for layers in (4, 12):
        torch.manual_seed(7)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        probe = fm.GradientProbe(model)
        for step in range(6):
            model.zero_grad()
            probe.backward(model(data(step)).square().sum((1, 2)))
        driver.is_idle = True
        driver.launches.clear()
        model.zero_grad()
        losses = model(data(6)).square().sum((1, 2))
        with called_files() as files:
            probe.backward(losses)
        driver.is_idle = False
        # The driver is a function of Python here.
        ours = [file for file in files if "fake_driver" not in file]
        counts[layers] = len(ours), len(driver.launches)
    (few, few_launches), (many, many_launches) = counts[4], counts[12]
    assert few_launches == 4 * 3 and many_launches == 12 * 3
    # Registering and removing a hook, which are PyTorch's own functions.
    assert (many - few) / 8 <= 6


def test_launchers_of_the_extension_are_called_again(emulated, on_the_cpu):
    """A table's norms, by kernels in CUDA C++, with their scratch."""
    torch.manual_seed(8)
    with driving(emulated):
        model = nn.Sequential(nn.Embedding(11, 8, padding_idx=3), nn.Linear(8, 4))
        probe, oracle = fm.GradientProbe(model), fm.GradientProbe(model)
        random = torch.Generator().manual_seed(9)

        def stats(probe, ids):
            model.zero_grad()
            return probe.backward(model(ids).square().sum((1, 2)))

        counted = mock.Mock(side_effect=emulated.embedding_sq_norms_f32)
        with mock.patch.object(emulated, "embedding_sq_norms_f32", counted):
            for _ in range(6):
                stats(probe, torch.randint(11, (N, T), generator=random))
            counted.reset_mock()
            ids = torch.randint(11, (N, T), generator=random)
            got = stats(probe, ids)
            assert not counted.called
            expected = stats(oracle, ids)
            assert counted.called
        assert torch.equal(got.sq_norms, expected.sq_norms)


@pytest.mark.parametrize("groups", [1, 32])
def test_convolutions_with_channels_copied_last(driver, groups):
    torch.manual_seed(10)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=groups), nn.Flatten())
    probe, oracle = fm.GradientProbe(model), fm.GradientProbe(model)

    def stats(probe, step):
        model.zero_grad()
        random = torch.Generator().manual_seed(step)
        x = torch.randn(2, 32, 4, 4, generator=random)
        return probe.backward(model(x).square().sum(1))

    for step in range(5):
        stats(probe, step)
    driver.by_python.clear()
    got = stats(probe, 6)
    assert not driver.by_python
    assert torch.equal(got.sq_norms, stats(oracle, 6).sq_norms)


class RootMeanSquare(nn.Module):
    """As language models write it: a product with the scale is the use."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.scale * (x * x.square().mean(-1, keepdim=True).rsqrt())


@pytest.mark.parametrize(
    "make",
    [lambda: RootMeanSquare(8), lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(1, 8)],
    ids=["root mean square", "groups", "one group"],
)
def test_normalisations_are_launched(driver, make):
    torch.manual_seed(11)
    layer = make()
    probe, oracle = fm.GradientProbe(layer), fm.GradientProbe(layer)

    def stats(probe, step):
        layer.zero_grad()
        random = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, N, 8, 8, generator=random)
        return probe.backward((layer(x) * y).sum((1, 2)))

    for step in range(5):
        stats(probe, step)
    driver.by_python.clear()
    driver.launches.clear()
    got = stats(probe, 6)
    assert driver.launches and not driver.by_python
    expected = stats(oracle, 6)
    assert torch.equal(got.sq_norms, expected.sq_norms)
    with mock.patch.object(Op, "__call__", lambda op, *a, **k: op.reference(*a, **k)):
        reference = stats(fm.GradientProbe(layer), 6)
    torch.testing.assert_close(got.sq_norms, reference.sq_norms)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_is_given_the_same_kernels(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(12)
    model = Net().to("cuda", dtype)
    probe = fm.GradientProbe(model)

    def stats(step):
        model.zero_grad()
        return probe.backward(losses_of(model, data(step).to("cuda", dtype)))

    by_python = [stats(step).sq_norms for step in range(2)]
    for step in range(8):
        stats(step)
    launched, uses = launched_nodes(probe)
    if dtype == torch.bfloat16:  # in float32 products of sequences are PyTorch's
        assert launched == uses
    for step, expected in enumerate(by_python):
        assert torch.equal(stats(step).sq_norms, expected)


@pytest.mark.gpu
def test_launches_can_be_captured_in_a_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(13)
    model = Net().to("cuda", torch.bfloat16)
    probe = fm.GradientProbe(model)
    x = data(0).to("cuda", torch.bfloat16)

    def step():
        model.zero_grad()
        return probe.backward(losses_of(model, x)).sq_norms

    warm_up(step, 6)
    assert launched_nodes(probe)[0]
    assert_captured(step, x)
