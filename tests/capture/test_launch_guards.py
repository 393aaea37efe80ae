"""What is launched without Python is right, or is left to Python."""

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
from fastminima.capture.reading.plan import Plan, Use
from fastminima.capture.reading.recipe import Recipe
from fastminima.capture.session import called, program

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if learned() is None:
    pytest.skip("the extension walks no graphs here", allow_module_level=True)

from launch_cases import N, Net, T, data, launched_nodes, losses_of


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
    negated = torch._neg_view(data(7))
    assert negated.is_neg() and negated.is_contiguous()
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
    monkeypatch.setattr(program, "_make", lambda *_: object())
    recipe = Recipe(Plan((Use(0, "AddmmBackward0", ()),), frozenset()), {})

    def program_on(index):
        output = SimpleNamespace(
            device=torch.device("cuda", index), dtype=torch.float32
        )
        tape = SimpleNamespace(nodes=[SimpleNamespace(_input_metadata=[output])])
        reading = SimpleNamespace(recipe=recipe, tape=tape)
        return program.program_of(reading, {})

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
