"""Fused uses have steps too: same bits as the generic way, gradients that are .grad."""

import gc
import sys

import pytest
import torch
from cases import CASES
from fused_models import (
    STEPS,
    assert_same,
    compare,
    data,
    layers,
    losses_of,
    some_steps,
    step,
)
from torch import nn
from torch.nn import functional as F

import fastminima as fm
from fastminima import _native
from fastminima.capture.graph.extension import learned
from fastminima.capture.session import called

if learned() is None:
    pytest.skip("no native extension that reads tensors", allow_module_level=True)

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_program_and_the_generic_way_give_the_same_bits(name, dtype, monkeypatch):
    case = BY_NAME[name]
    model, batch = case.make()
    model = model.to(dtype)
    batch = [t.to(dtype) if t.is_floating_point() else t for t in batch]
    compare(monkeypatch, model, lambda _: case.losses(model, batch))


def test_dense_uses_are_the_extension_s(by_python, monkeypatch, repeated, host_reads):
    model = layers()
    compare(monkeypatch, model, lambda k: losses_of(model, data(k)))
    assert len(by_python) == STEPS
    assert by_python == [[]] * STEPS or not host_reads
    assert sum(repeated) >= 2


@pytest.mark.parametrize("time", [2, 5, 12, 40])
def test_time_says_which_kernel_it_is(time, monkeypatch):
    """And where products are PyTorch's, Python takes it."""
    model = layers(width=64)
    compare(monkeypatch, model, lambda k: losses_of(model, data(k, time=time)))


def test_large_weights_are_made_in_parts(by_python, monkeypatch, host_reads):
    torch.manual_seed(0)
    sizes = 2, 1100
    model = nn.Sequential(nn.Linear(6, 1100), nn.Linear(1100, 2, bias=False))
    weight = nn.Parameter(torch.randn(sizes) / 30)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.weight = model, weight

        def forward(self, x):
            return self.layers(x) @ self.weight @ self.weight.new_ones(1100, 1)

    wide = Wide()
    monkeypatch.setattr("fastminima.ops.native.dense._BLOCK", 1)
    compare(monkeypatch, wide, lambda k: losses_of(wide, data(k, time=40)))
    assert by_python == [[]] * STEPS or not host_reads


class Words(nn.Module):
    """A table that is the head's weight too."""

    def __init__(self, words, width, **options):
        super().__init__()
        self.table = nn.Embedding(words, width, **options)
        self.mix = nn.Linear(width, width)

    def forward(self, ids):
        return F.linear(self.mix(self.table(ids)).tanh(), self.table.weight)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=str)
@pytest.mark.parametrize("words", [60, 1100])
def test_a_tied_table_is_the_extension_s(
    words, options, by_python, monkeypatch, host_reads
):
    torch.manual_seed(0)
    model = Words(words, 32, **options)
    monkeypatch.setattr("fastminima.ops.native.dense._BLOCK", 1)  # of 1100 in parts

    def losses(k):
        ids = torch.randint(words, (5, 17), generator=torch.Generator().manual_seed(k))
        ids[:, :4] = 3  # several times, and what may be padding
        return F.cross_entropy(model(ids).mT, ids, reduction="none").mean(1)

    compare(monkeypatch, model, losses)
    assert by_python == [[]] * STEPS or not host_reads


@pytest.mark.parametrize("sign", [-1, 1])
def test_uses_of_a_table_that_cancel_are_made_from_gradients(
    sign, by_python, monkeypatch, host_reads
):
    """The head's part is minus the table's, nearly."""
    torch.manual_seed(0)
    model = nn.Embedding(9, 32)
    ids, factors = torch.randint(9, (5, 17)), sign * torch.full((5, 17, 32), 1.001)

    def losses(_):
        x, weight = model(ids), model.weight
        logits = F.linear(torch.ones_like(x).flatten(0, 1), weight)
        chosen = logits.unflatten(0, x.shape[:2]).gather(2, ids.unsqueeze(2))
        return chosen.sum((1, 2)) + (x * factors).sum((1, 2))

    compare(monkeypatch, model, losses)
    apart = [("part", "EmbeddingBackward0"), ("part", "MmBackward0")]
    for seen in by_python:
        assert sorted(seen) == (apart if sign < 0 else []) or not host_reads


def test_convolutions_are_called_with_what_they_read(
    by_python, monkeypatch, host_reads
):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
        nn.Flatten(),
    )
    x = torch.randn(5, 2, 6, 4)
    compare(monkeypatch, model, lambda _: model(x).square().sum(1))
    called = [[("call", "ConvolutionBackward0")] * 2] * STEPS
    assert by_python == called or not host_reads  # else launched in the end


def test_a_use_calls_no_python(on_the_cpu):
    """What is called in a step does not grow with its layers, PyTorch's own aside."""
    counts = {}
    for depth in (4, 12):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(depth)))
        probe = fm.GradientProbe(model, mode="fused")
        for k in range(STEPS):
            step(probe, model, losses_of(model, data(k, width=32)))
        model.zero_grad()
        losses, files = losses_of(model, data(9, width=32)), []

        def note(frame, event, _, files=files):
            if event == "call":
                files.append(frame.f_code.co_filename)

        gc.collect()
        gc.disable()  # else what watches the garbage of other tests may be called
        sys.setprofile(note)
        probe.backward(losses)
        sys.setprofile(None)
        gc.enable()
        counts[depth] = len(files), sum("fastminima" in file for file in files)
    (few, few_ours), (many, many_ours) = counts[4], counts[12]
    assert many_ours == few_ours
    # Registering a hook (2), an edge, and the edges that the engine is asked for (3).
    assert (many - few) / 8 <= 6


def test_threads_do_not_matter(monkeypatch):
    model = layers(width=128)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(_native, "threads", lambda t=threads: t)
        found.append(
            some_steps(model, lambda k: losses_of(model, data(k, n=32, time=64)))
        )
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_what_is_called_makes_gradients_too():
    """A function is given norms and gradients, in this order."""
    made = called.Called(
        *(lambda g, a: (a.sum(0), g.sum(0), a @ g), ["w", None], {"w": (2, 2)}),
        *({"w": 0}, 3, None, called.Launched()),
    )
    g, a = torch.ones(2, 2), torch.eye(2)
    norms, grads = made.found(g, a)
    assert norms.keys() == grads.keys() == {"w"}
    assert torch.equal(norms["w"], a.sum(0)) and torch.equal(grads["w"], g)


def test_a_bias_beside_a_weight_is_left_to_the_pass(fusions, monkeypatch):
    """A hook on the bias alone: its gradient is the pass', its norms are the step's."""
    model = layers()
    model.shift.register_hook(lambda g: None)
    compare(monkeypatch, model, lambda k: losses_of(model, data(k)))
    assert all("mixed" in names and "shift" not in names for names in fusions)


def test_functional_linear_with_a_weight_seen_from_the_other_side(monkeypatch):
    torch.manual_seed(0)
    model = nn.ParameterDict({"w": torch.randn(6, 40), "v": torch.randn(40, 40)})

    def losses(k):
        y = F.linear(F.linear(data(k), model["w"].t().t().t()), model["v"].mT)
        return y.square().sum((1, 2))

    compare(monkeypatch, model, losses)
