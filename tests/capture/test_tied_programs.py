"""Programs of tables with several uses, or looked up once for all samples."""

import gc
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from oracles import single_sample_gradients
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import fastminima as fm
from fastminima import _native
from fastminima.capture.session import hooks

if _native.host() is None:
    pytest.skip("no native extension", allow_module_level=True)

STEPS = 7  # from the fifth on they are repeated


def keep(t):
    return t


class Language(nn.Module):
    """Tokens and positions, and a head that is the table of tokens."""

    def __init__(self, *, padding_idx=None, tokens=40, width=24, time=16):
        super().__init__()
        self.table = nn.Embedding(tokens, width, padding_idx=padding_idx)
        self.positions = nn.Embedding(time, width, padding_idx=padding_idx)
        self.inner = nn.Linear(width, width)
        self.register_buffer("places", torch.arange(time), persistent=False)
        self.around_table = self.around_head = nullcontext
        self.alpha = 1

    def forward(self, ids):
        with self.around_table():
            x = self.table(ids)
        x = torch.add(x, self.positions(self.places), alpha=self.alpha)
        x = self.inner(x).tanh()
        with self.around_head():
            return F.linear(x, self.table.weight)


def language(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Language(**options).to(dtype)
    return model, torch.randint(40, (3, len(model.places)))


def losses_of(model, ids):
    return model(ids).square().sum((1, 2))


def exact(model, ids, losses=losses_of):
    return single_sample_gradients(model, lambda m, b: losses(m, b[0]), [ids])


def assert_norms(stats, want, rtol=1e-5):
    for name, g in want.items():
        got = stats.sq_norms_by_parameter[name].double()
        norms = g.flatten(1).square().sum(1)
        torch.testing.assert_close(got, norms, rtol=rtol, atol=0)


def some_steps(model, ids, losses=losses_of, before=lambda step: None, count=STEPS):
    """Statistics of some steps of a probe, each with the exact gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(model, per_parameter=True)
    found = []
    for step in range(count):
        before(step)
        model.zero_grad()
        want = exact(model, ids, losses)
        found.append((probe.backward(losses(model, ids)), want))
    return found


def assert_same_bits(found, monkeypatch, again):
    """As without programs, whatever `again` gives then."""
    monkeypatch.setattr(hooks, "program_of", lambda *_: None)
    for (stats, _), (other, _) in zip(found, again(), strict=True):
        assert torch.equal(stats.sq_norms, other.sq_norms)
        for name, norms in other.sq_norms_by_parameter.items():
            assert torch.equal(stats.sq_norms_by_parameter[name], norms), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_no_use_is_taken_by_python(
    by_python, monkeypatch, dtype, padding_idx, host_reads
):
    model, ids = language(dtype, padding_idx=padding_idx)
    found = some_steps(model, ids)
    for stats, want in found:
        assert_norms(stats, want)
    assert by_python == [[]] * STEPS or not host_reads
    assert_same_bits(found, monkeypatch, lambda: some_steps(model, ids))


def test_positions_that_are_met_more_than_once(by_python, host_reads):
    """Their rows add up; which they are is read in every step."""
    model, ids = language()

    def place(step):
        model.places.copy_(torch.arange(16) // (step + 1))

    for stats, want in some_steps(model, ids, before=place):
        assert_norms(stats, want)
    assert by_python == [[]] * STEPS or not host_reads


def test_sizes_that_change(by_python):
    model, ids = language()
    probe = fm.GradientProbe(model, per_parameter=True)
    for rows, time in [(3, 16)] * 5 + [(2, 16)] * 3 + [(3, 7)] * 3 + [(3, 16)] * 3:
        model.places = torch.arange(time)
        some = ids[:rows, :time].contiguous()
        model.zero_grad()
        want = exact(model, some)
        assert_norms(probe.backward(losses_of(model, some)), want)
    assert len(by_python) == 14


@pytest.mark.parametrize("number", ["alpha", "padding_idx", "of positions"])
def test_a_number_that_a_step_was_made_for_changes(by_python, number, host_reads):
    model, ids = language()

    def change(step):
        value = 3 if step in (2, 5) else None
        if number == "alpha":
            model.alpha = 2 if value else 1
        elif number == "padding_idx":
            model.table.padding_idx = value
        else:
            model.positions.padding_idx = value

    for stats, want in some_steps(model, ids, before=change, count=8):
        assert_norms(stats, want)
    taken = [step for step, asked in enumerate(by_python) if not asked]
    assert set(taken) >= {0, 1, 3, 4} or not host_reads


@pytest.mark.parametrize("part", ["around_table", "around_head"])
def test_one_of_two_uses_under_hooks_on_saved_tensors(
    by_python, monkeypatch, part, host_reads
):
    """What it has saved may be given out once: then both are taken by their rules."""
    model, ids = language()

    def wrap(step):
        around = (lambda: saved_tensors_hooks(keep, keep)) if step in (2, 5) else None
        setattr(model, part, around or nullcontext)

    found = some_steps(model, ids, before=wrap)
    for stats, want in found:
        assert_norms(stats, want)
    head, table = "MmBackward0", "EmbeddingBackward0"
    kept = [("part", head), ("generic", table)]
    both = [("generic", head), ("generic", table)]
    hooked = kept if part == "around_table" else both
    asked = [hooked if k in (2, 5) else [] for k in range(STEPS)]
    assert by_python == asked or not host_reads
    assert_same_bits(found, monkeypatch, lambda: some_steps(model, ids, before=wrap))


def test_indices_that_no_kernel_reads(by_python, monkeypatch, host_reads):
    """Found out when both are there: both are taken by what they contribute."""
    model, ids = language()
    found = some_steps(model, ids.int())
    for stats, want in found:
        assert_norms(stats, want)
    parts = [("part", "MmBackward0"), ("part", "EmbeddingBackward0")]
    assert by_python == [parts] * STEPS or not host_reads
    assert_same_bits(found, monkeypatch, lambda: some_steps(model, ids.int()))


def test_norms_that_nearly_cancel(by_python, monkeypatch):
    """The head's gradients are the table's, but for their sign and a hundredth."""
    torch.manual_seed(0)
    table = nn.Embedding(50, 48)
    model = nn.ModuleDict({"table": table})
    rows = torch.randn(3, 16, 48)
    ids = torch.stack([torch.randperm(50)[:16] for _ in range(3)])

    def losses(model, ids):
        logits = F.linear(rows[: len(ids)], model["table"].weight)
        head = logits.gather(2, ids.unsqueeze(2)).sum((1, 2))
        return head - 0.99 * (model["table"](ids) * rows[: len(ids)]).sum((1, 2))

    def exactly(sample):
        """A sample's gradient: its rows, less 0.99 of them."""
        return (1 - 0.99) ** 2 * rows[sample].double().square().sum()

    def steps():
        probe = fm.GradientProbe(model, per_parameter=True)
        found = []
        for _ in range(STEPS):
            model.zero_grad()
            found.append((probe.backward(losses(model, ids)), None))
        return found

    found = steps()
    want = torch.stack([exactly(n) for n in range(3)])
    for stats, _ in found:
        got = stats.sq_norms.double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    assert all(len(asked) == 2 for asked in by_python)
    assert_same_bits(found, monkeypatch, steps)


class Ended(torch.autograd.Function):
    """The identity, whose gradient may be none at all."""

    is_ended = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None if Ended.is_ended else g


@pytest.mark.parametrize("end", ["head", "table"])
def test_a_use_that_no_gradient_reaches(by_python, monkeypatch, end, host_reads):
    """What the other one brings is all there is, and is taken when the pass is over."""
    model, ids = language()

    def losses(model, ids):
        x, weight = model.table(ids), model.table.weight
        logits = F.linear(torch.full_like(x, 0.5, requires_grad=False), weight)
        if end == "head":
            logits = Ended.apply(logits)
        else:
            x = Ended.apply(x)
        return logits.square().sum((1, 2)) + x.square().sum((1, 2))

    def stop(step):
        monkeypatch.setattr(Ended, "is_ended", step in (3, 6))

    tracked = nn.ModuleDict({"table": model.table})
    for stats, want in some_steps(tracked, ids, losses, before=stop):
        assert_norms(stats, want)
    other = "EmbeddingBackward0" if end == "head" else "MmBackward0"
    alone = [("part", other)]
    asked = [alone if k in (3, 6) else [] for k in range(STEPS)]
    assert by_python == asked or not host_reads


def test_a_graph_is_let_go():
    """Nothing that is kept for a second use outlives its pass, or a detached one."""
    model, ids = language()
    probe = fm.GradientProbe(model)
    gc.disable()
    try:
        for step in range(STEPS):
            losses = losses_of(model, ids)
            held = weakref.ref(losses)
            model.zero_grad()
            if step % 3:
                probe.backward(losses)
            else:
                probe.attach(losses)
                probe.detach()
            del losses
            assert held() is None
    finally:
        gc.enable()
