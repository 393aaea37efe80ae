"""Fused uses are launched without Python; each step's gradients are new tensors."""

import gc
import importlib.util
import sys

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.capture.graph.extension import learned
from fastminima.capture.session import fused as fusing
from fastminima.ops import recording

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if learned() is None:
    pytest.skip("the extension walks no graphs here", allow_module_level=True)

from launch_cases import N, T, data, launched_nodes

STEPS = 6  # until everything is launched


class Fused(nn.Module):
    """Weights seen from both sides, with bias and without, and a normalisation."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.bare = nn.Linear(16, 8, bias=False)
        self.columns = nn.Parameter(torch.randn(8, 4) / 3)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = self.bare(self.norm(self.first(x)).tanh())
        return torch.addmm(self.shift, x.flatten(0, 1), self.columns)


def losses_of(model, x):
    return model(x).square().unflatten(0, x.shape[:2]).sum((1, 2))


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return Fused().to(dtype)


def fused(model):
    return fm.GradientProbe(model, mode="fused", per_parameter=True)


def step(probe, model, losses):
    model.zero_grad(set_to_none=True)
    stats = probe.backward(losses)
    return stats, {name: p.grad for name, p in model.named_parameters()}


def assert_same(one, other):
    (stats, grads), (expected, want) = one, other
    for name, norms in expected.sq_norms_by_parameter.items():
        assert torch.equal(stats.sq_norms_by_parameter[name], norms), name
    for name, grad in want.items():
        assert torch.equal(grads[name], grad), name
        assert grads[name].dtype == grad.dtype


def both(driver, model, losses, steps=STEPS):
    """A step that is launched, and the same by Python."""
    probe = fused(model)
    for k in range(steps):
        step(probe, model, losses(k))
    driver.by_python.clear()
    driver.launches.clear()
    got = step(probe, model, losses(steps))
    by_python = list(driver.by_python)
    return got, step(fused(model), model, losses(steps)), by_python, probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_and_norms_are_those_of_python(driver, dtype):
    model = model_of(dtype)
    got, expected, by_python, probe = both(
        driver, model, lambda k: losses_of(model, data(k).to(dtype))
    )
    assert not by_python
    assert_same(got, expected)
    launched, uses = launched_nodes(probe)
    assert launched == uses
    assert all(grad.dtype == dtype for grad in got[1].values())
    plain = model_of(dtype)
    losses_of(plain, data(STEPS).to(dtype)).mean().backward()
    tolerance = {} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-7}
    for name, p in plain.named_parameters():
        torch.testing.assert_close(got[1][name], p.grad, **tolerance)


def test_gradients_that_wait_are_no_wider_than_their_parameters(driver, monkeypatch):
    waiting = []
    deliver = fusing.Fusion.deliver

    def noting(fusion):
        waiting.append({g.dtype for g in fusion.made.values()})
        deliver(fusion)

    monkeypatch.setattr(fusing.Fusion, "deliver", noting)
    model = model_of(torch.bfloat16)
    both(driver, model, lambda k: losses_of(model, data(k).bfloat16()))
    assert waiting == [{torch.bfloat16}] * (STEPS + 2)


def test_autocast_rounds_weights_and_no_gradients(driver, autocast):
    model = model_of()

    def losses(k):
        with autocast(dtype=torch.bfloat16):
            x = model.bare(torch.randn(N, T, 16, generator=seeded(k)).tanh())
            y = torch.addmm(model.shift, x.flatten(0, 1), model.columns)
            return y.float().square().unflatten(0, (N, T)).sum((1, 2))

    got, expected, by_python, _ = both(driver, model, losses)
    assert not by_python
    there = {name: g for name, g in got[1].items() if g is not None}
    assert there.keys() == {"bare.weight", "columns", "shift"}
    assert_same((got[0], there), (expected[0], {n: expected[1][n] for n in there}))
    rounded = there["bare.weight"].bfloat16().float()
    assert not torch.equal(there["bare.weight"], rounded)


def seeded(k):
    return torch.Generator().manual_seed(k)


def test_convolutions(driver):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten())

    def losses(k):
        return model(torch.randn(2, 3, 6, 6, generator=seeded(k))).square().sum(1)

    got, expected, by_python, _ = both(driver, model, losses)
    assert not by_python
    assert_same(got, expected)


def test_gradients_are_not_written_into_by_the_next_step(driver):
    model = model_of()
    probe, found = fused(model), []
    for k in range(STEPS + 3):
        _, grads = step(probe, model, losses_of(model, data(k)))
        found.append([(grad, grad.clone()) for grad in grads.values()])
    for grads in found:
        for grad, was in grads:
            assert torch.equal(grad, was)


def test_what_is_not_like_the_recording_goes_by_python(driver):
    """Another batch, a gradient of another sign: right, and launched later or never."""
    model = model_of()
    probe = fused(model)

    class Negative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return torch._neg_view(-g)

    def negated(x):
        return Negative.apply(model(x)).square().unflatten(0, x.shape[:2]).sum((1, 2))

    kinds = [*[lambda k: losses_of(model, data(k))] * STEPS]
    kinds += [lambda k: losses_of(model, data(k, n=4)), lambda k: negated(data(k))]
    kinds += [lambda k: losses_of(model, data(k))] * 2
    seen = []
    for k, losses in enumerate(kinds):
        driver.by_python.clear()
        got = step(probe, model, losses(k))
        seen.append(list(driver.by_python))
        expected = step(fused(model), model, losses(k))
        assert_same(got, expected)
    assert seen[STEPS] and seen[STEPS + 1]
    assert not seen[STEPS - 1] and not seen[-1]


def test_launches_that_give_something_else_are_not_used(driver):
    model = model_of()
    probe = fused(model)
    driver.wrong = 1.0
    for k in range(STEPS):
        driver.launches.clear()
        got = step(probe, model, losses_of(model, data(k)))
    driver.wrong = 0.0
    assert not driver.launches  # all were refused
    assert_same(got, step(fused(model), model, losses_of(model, data(STEPS - 1))))


def test_gradients_are_no_scratch(driver, monkeypatch):
    """What scratch is limited to does not count them: weights may be large."""
    torch.manual_seed(5)
    model = nn.Linear(64, 64, bias=False)

    def losses(k):
        x = torch.randn(N, T, 64, generator=seeded(k))
        return model(x).square().sum((1, 2))

    *_, by_python, probe = both(driver, model, losses)
    assert not by_python
    (structure,) = probe._reader._structures.values()
    (recipe,) = structure._recipes.values()
    (program,) = recipe.programs.values()
    scratch = program.launched.bytes + 1024  # and norms
    monkeypatch.setattr(recording, "LIMIT", scratch)
    got, expected, by_python, _ = both(driver, model, losses)
    assert not by_python
    assert_same(got, expected)
    monkeypatch.setattr(recording, "LIMIT", scratch - 2048)
    *_, by_python, _ = both(driver, model, losses)
    assert by_python


def test_a_use_calls_no_python(driver):
    counts = {}
    for depth in (4, 12):
        torch.manual_seed(7)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))
        probe = fm.GradientProbe(model, mode="fused")
        for k in range(8):
            step(probe, model, model(data(k)).square().sum((1, 2)))
        driver.is_idle = True
        driver.launches.clear()
        model.zero_grad()
        losses, files = model(data(9)).square().sum((1, 2)), []

        def note(frame, event, _, files=files):
            if event == "call":
                files.append(frame.f_code.co_filename)

        gc.collect()
        gc.disable()  # else what watches the garbage of other tests may be called
        sys.setprofile(note)
        probe.backward(losses)
        sys.setprofile(None)
        gc.enable()
        driver.is_idle = False
        # The driver is a function of Python here.
        ours = [file for file in files if "fake_driver" not in file]
        counts[depth] = len(ours), len(driver.launches)
    (few, few_launches), (many, many_launches) = counts[4], counts[12]
    assert few_launches % 4 == 0 and many_launches == 3 * few_launches
    assert (many - few) / 8 <= 6  # hooks and edges, as on the host
