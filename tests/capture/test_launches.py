"""Kernels that a use launches are launched again by the extension, without Python."""

import contextlib
import ctypes
import importlib.util
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.capture.graph.extension import learned
from fastminima.capture.session import called, program
from fastminima.ops.table import Op

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if learned() is None:
    pytest.skip("the extension walks no graphs here", allow_module_level=True)

from fake_driver import driving

from tools.kernels import emulator

N, T = 6, 5


class Net(nn.Module):
    """Layers of sequences, and one with a row a sample."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.bare = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.first(x).tanh())
        return self.head(self.bare(x).mean(1))


def losses_of(model, x):
    return model(x).square().sum(1)


def data(step, n=N):
    return torch.randn(n, T, 8, generator=torch.Generator().manual_seed(step))


@contextlib.contextmanager
def called_files():
    """The file of each function of Python that is called."""
    files = []

    def note(frame, event, arg):
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


@pytest.fixture
def driver():
    with driving() as found:
        yield found


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


def test_a_view_with_another_sign_is_not_launched(driver):
    """A layer norm takes the mean from its input, whose memory holds -x."""
    torch.manual_seed(3)
    model = nn.LayerNorm(8)
    probe, oracle = fm.GradientProbe(model), fm.GradientProbe(model)

    def stats(probe, x):
        model.zero_grad()
        return probe.backward(model(x).square().sum((1, 2)))

    for step in range(6):
        stats(probe, data(step))
    driver.by_python.clear()
    stats(probe, data(6))
    assert not driver.by_python
    negated = torch.complex(torch.zeros(N, T, 8), data(7)).conj().imag
    assert negated.is_neg()
    got = stats(probe, negated)
    assert driver.by_python
    assert torch.equal(got.sq_norms, stats(oracle, -data(7)).sq_norms)


def test_launches_that_give_something_else_are_not_used(driver):
    torch.manual_seed(4)
    model = Net()
    probe, oracle = fm.GradientProbe(model), fm.GradientProbe(model)
    driver.wrong = 1.0
    for step in range(6):
        driver.launches.clear()
        driver.by_python.clear()
        model.zero_grad()
        stats = probe.backward(losses_of(model, data(step)))
        assert driver.by_python
        assert bool(driver.launches) == (step == 1)
    model.zero_grad()
    expected = oracle.backward(losses_of(model, data(5)))
    assert torch.equal(stats.sq_norms, expected.sq_norms)


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_outputs_that_say_nothing_show_nothing(driver, factor):
    """Zeros come of wrong inputs too, and what is no number of no launch at all."""
    torch.manual_seed(14)
    model = Net()
    probe, oracle = fm.GradientProbe(model), fm.GradientProbe(model)

    def stats(probe, step, factor=1.0):
        model.zero_grad()
        return probe.backward(losses_of(model, data(step)) * factor)

    stats(probe, 0)
    driver.wrong = 1.0
    for step in range(1, 4):
        stats(probe, step, factor)
        assert not driver.launches
    got = stats(probe, 4)
    assert driver.launches
    assert torch.equal(got.sq_norms, stats(oracle, 4).sq_norms)
    driver.launches.clear()
    got = stats(probe, 5)
    assert not driver.launches
    assert torch.equal(got.sq_norms, stats(oracle, 5).sq_norms)


def test_checks_of_what_says_nothing_come_to_an_end(driver, monkeypatch):
    monkeypatch.setattr(called, "MOST_CHECKS", 3)
    looked = mock.Mock(side_effect=called.says_something)
    monkeypatch.setattr(called, "says_something", looked)
    model = nn.Linear(8, 3)
    probe = fm.GradientProbe(model)
    for step in range(8):
        model.zero_grad()
        probe.backward(model(data(step)).square().sum((1, 2)) * 0)
    assert looked.call_count == 3


class Tagged(torch.Tensor):
    """What some data sets give out."""


@pytest.mark.parametrize("first", [0, 1, 4])
def test_tensors_of_another_type_are_left_to_python(driver, first):
    torch.manual_seed(15)
    model = nn.Linear(8, 3)
    probe, oracle = fm.GradientProbe(model), fm.GradientProbe(model)

    def stats(probe, x):
        model.zero_grad()
        losses = nn.functional.linear(x, model.weight, model.bias).square()
        return probe.backward(losses.sum(1).as_subclass(torch.Tensor))

    for step in range(6):
        x = data(step)[:, 0]  # as it is saved, and no view of it
        got = stats(probe, x.as_subclass(Tagged) if step >= first else x)
        assert torch.equal(got.sq_norms, stats(oracle, x).sq_norms)


def test_what_the_driver_refuses_at_first_is_left_to_python(driver):
    torch.manual_seed(16)
    model = Net()
    probe, oracle = fm.GradientProbe(model), fm.GradientProbe(model)
    driver.code = 1
    for step in range(4):
        model.zero_grad()
        got = probe.backward(losses_of(model, data(step)))
        model.zero_grad()
        expected = oracle.backward(losses_of(model, data(step)))
        assert torch.equal(got.sq_norms, expected.sq_norms)
    assert not launched_nodes(probe)[0]


def test_memory_of_a_capture_is_used_in_it_alone(driver):
    """A graph that is replayed writes into memory that somebody else has by then."""
    torch.manual_seed(17)
    model = Net()
    probe = fm.GradientProbe(model)

    def by_python(step, at_attach, in_pass):
        model.zero_grad()
        driver.by_python.clear()
        losses = losses_of(model, data(step))
        driver.is_capturing = at_attach
        probe.attach(losses)
        driver.is_capturing = in_pass
        losses.mean().backward()
        probe.collect()
        return driver.by_python

    for step in range(6):
        by_python(step, False, False)
    assert not by_python(6, False, False)
    assert by_python(7, False, True)
    assert not by_python(8, True, True)
    assert by_python(9, True, False)


def test_other_threads_go_on_during_a_launch(driver):
    """The driver waits where its queue is full, perhaps for what they launch."""
    model = nn.Linear(8, 3)
    probe = fm.GradientProbe(model)
    for step in range(6):
        model.zero_grad()
        probe.backward(model(data(step)).square().sum((1, 2)))
    has_gil = ctypes.cast(ctypes.pythonapi.PyGILState_Check, ctypes.c_void_p).value
    learned().use_driver(has_gil)  # its answer is an error where it is 1
    model.zero_grad()
    driver.by_python.clear()
    probe.backward(model(data(6)).square().sum((1, 2)))
    assert not driver.by_python


@pytest.mark.parametrize(("of_output", "of_scratch"), [(0, 0), (1, 0), (0, 1), (4, 16)])
def test_memory_is_aligned_as_kernels_were_compiled_for(of_output, of_scratch, driver):
    x, table = torch.ones(4), torch.empty(64)
    scratch = torch.empty(64, dtype=torch.uint8)
    launches = learned().Launches([x], [], [0], 8, None)
    is_aligned = of_output % 4 == 0 and of_scratch % 16 == 0
    given = [x], [table[of_output:]], scratch[of_scratch:]
    assert launches.run(*given) == is_aligned
    assert not launches.run([x], [table], scratch[:7])


def test_each_device_has_a_program_and_memory_of_its_own(monkeypatch):
    """A model that moves to another one is launched there too."""
    monkeypatch.setattr(program, "_make", lambda reading, order: object())
    plan = SimpleNamespace(uses=(SimpleNamespace(node=0),))
    recipe = SimpleNamespace(
        routes=None, regions={}, lasts=True, plan=plan, programs={}
    )

    def program_on(index):
        output = SimpleNamespace(
            device=torch.device("cuda", index), dtype=torch.float32
        )
        tape = SimpleNamespace(nodes=[SimpleNamespace(_input_metadata=[output])])
        reading = SimpleNamespace(recipe=recipe, tape=tape)
        return program.program_of(reading, [])

    first, second = program_on(0), program_on(1)
    assert first is program_on(0)
    assert second is program_on(1)
    assert first is not second


def test_launches_that_are_refused_hold_nothing():
    kept = object()
    count = sys.getrefcount(kept)
    for _ in range(3):
        with pytest.raises(ValueError, match="1 to 64 arguments"):
            learned().Launches([], [(1, (1, 1, 1), 32, 0, [], [])], [], 0, kept)
    assert sys.getrefcount(kept) == count


def test_a_refused_launch_is_an_error_and_leaves_no_hooks(driver):
    torch.manual_seed(5)
    model = Net()
    probe = fm.GradientProbe(model)
    for step in range(6):
        model.zero_grad()
        probe.backward(losses_of(model, data(step)))
    driver.code = 700
    with pytest.raises(RuntimeError, match="CUresult 700"):
        probe.backward(losses_of(model, data(6)))
    model.zero_grad()
    losses_of(model, data(6)).mean().backward()  # no hook launches anything
    driver.code = 0
    model.zero_grad()
    stats = probe.backward(losses_of(model, data(7)))
    assert stats.sq_norms.isfinite().all()


def test_an_address_with_another_alignment_is_not_launched(driver):
    torch.manual_seed(6)
    model = nn.Linear(8, 3)
    probe = fm.GradientProbe(model)
    memory = torch.randn(N * T * 8 + 16)

    def by_python(offset):
        driver.by_python.clear()
        x = memory[offset : offset + N * T * 8].view(N, T, 8)
        model.zero_grad()
        probe.backward(model(x).square().sum((1, 2)))
        return driver.by_python

    start = -memory.data_ptr() // 4 % 4
    for _ in range(6):
        by_python(start)
    assert not by_python(start)
    assert not by_python(start + 4)
    assert by_python(start + 1)


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


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    if reason := emulator.missing([], folder):
        pytest.skip(reason)
    sources = [*emulator.KERNELS, emulator.HERE / "emulated.cpp"]
    flags = ["-shared", "-fPIC"]
    return emulator.Emulated(emulator.build(folder / "emulated.so", sources, flags))


def test_launchers_of_the_extension_are_called_again(emulated):
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
    "layer", [RootMeanSquare(8), nn.GroupNorm(2, 8), nn.GroupNorm(1, 8)], ids=str
)
def test_normalisations_are_launched(driver, layer):
    torch.manual_seed(11)
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


def launched_nodes(probe):
    """Nodes of a probe's only program that the extension launches, and all of them."""
    (structure,) = probe._reader._structures.values()
    (recipe,) = structure._recipes.values()
    (program,) = recipe.programs.values()
    return program.launched.nodes, set(program.use_at)


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

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(6):
            step()
    torch.cuda.current_stream().wait_stream(side)
    assert launched_nodes(probe)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        x.copy_(data(seed))
        graph.replay()
        replayed = captured.clone()
        assert torch.equal(replayed, step())
