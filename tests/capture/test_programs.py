"""Programs: uses whose steps are decided once give what the generic way gives."""

import warnings

import pytest
import torch
from cases import CASES
from oracles import flat, single_sample_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastminima as fm
from fastminima.capture.rows.samples import Batch
from fastminima.capture.session import hooks, program

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def found(monkeypatch):
    """The parameters that have a step, of each program that is made."""
    seen = []

    def spying(reading):
        made = honest(reading)
        steps = made.steps.values()
        seen.append({n for step in steps for n in (step.weight, step.bias) if n})
        return made

    honest = program._make
    monkeypatch.setattr(program, "_make", spying)
    return seen


def without_programs(monkeypatch):
    monkeypatch.setattr(hooks, "program_of", lambda *_, **__: program.Program())


def assert_norms(stats, gradients, rtol=1e-5):
    want = {name: g.flatten(1).square().sum(1) for name, g in gradients.items()}
    scale = max(w.max() for w in want.values())
    for name, w in want.items():
        got = stats.sq_norms_by_parameter[name].double()
        torch.testing.assert_close(got / scale, w / scale, rtol=rtol, atol=1e-9)


def probed(model, losses, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(model, per_parameter=True, **options)
        return probe.backward(losses)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_norms_alone_in_every_case(name):
    case = BY_NAME[name]
    model, batch = case.make()
    want = single_sample_gradients(model, case.losses, batch)
    stats = probed(model, case.losses(model, batch))
    exact = flat(want).square().sum(1)
    scale = exact.max()
    torch.testing.assert_close(
        stats.sq_norms.double() / scale, exact / scale, rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_program_and_the_generic_way_give_the_same_bits(name, monkeypatch):
    case = BY_NAME[name]
    model, batch = case.make()
    with_program = probed(model, case.losses(model, batch))
    model.zero_grad()
    without_programs(monkeypatch)
    generic = probed(model, case.losses(model, batch))
    assert torch.equal(with_program.sq_norms, generic.sq_norms)
    for parameter, norms in generic.sq_norms_by_parameter.items():
        assert torch.equal(with_program.sq_norms_by_parameter[parameter], norms)
    assert torch.equal(with_program.mean_grad_sq_norm, generic.mean_grad_sq_norm)


def test_programs_are_compared_with_something():
    steps = 0
    for case in CASES:
        model, batch = case.make()
        probe = fm.GradientProbe(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = case.losses(model, batch)
            reading = probe._reader.read(losses, Batch(len(losses)))
        made = program.program_of(reading, wants_norms_only=True)
        steps += len(made.steps)
    assert steps >= 15


def test_a_step_that_does_not_fit_any_more(found):
    """A number that is not part of the graph's structure says another thing later."""
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))
    x = torch.randn(4, 3)
    probe = fm.GradientProbe({"w": w, "b": b}, per_parameter=True)
    for alpha in (1.0, 2.0, 1.0):
        y = torch.addmm(b, x, w, alpha=alpha)
        g = 2 * y.detach().double()
        want = {"w": alpha * torch.einsum("ni,no->nio", x.double(), g), "b": g}
        assert_norms(probe.backward(y.square().sum(1)), want)
    assert found == [{"w", "b"}]  # one program, that the second step does not follow


class Net(nn.Module):
    """Plain, without bias, transposed, used twice, over a sequence."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(6, 5)
        self.bare = nn.Linear(5, 4, bias=False)
        self.columns = nn.Parameter(torch.randn(4, 4))
        self.twice = nn.Linear(4, 4)
        self.sequence = nn.Linear(2, 3)

    def forward(self, x):
        x = self.bare(self.plain(x).tanh()) @ self.columns
        x = self.twice(self.twice(x).tanh())
        return self.sequence(x.reshape(-1, 2, 2))


def net():
    torch.manual_seed(0)
    return Net(), torch.randn(7, 6)


def losses_of(model, x):
    return model(x).flatten(1).square().sum(1)


def test_which_uses_go_the_short_way(found):
    model, x = net()
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x])
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(2):
        assert_norms(probe.backward(losses_of(model, x)), want)
    once = {"plain.weight", "plain.bias", "bare.weight", "columns"}
    assert found == [once | {"sequence.weight", "sequence.bias"}]


@pytest.mark.parametrize(
    "options", [{"measure": "second_moments"}, {"measure": "gram"}, {"sample": 3}]
)
def test_everything_else_goes_the_general_way(options, found):
    model, x = net()
    probe = fm.GradientProbe(model, **options)
    probe.backward(losses_of(model, x))
    assert not any(found)


def test_scaled_products_go_the_general_way(found):
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))
    x = torch.randn(4, 3)
    y = torch.addmm(b, x, w, beta=0.5, alpha=2.0)
    stats = probed({"w": w, "b": b}, y.square().sum(1))
    g = 2 * y.detach()
    want = {"w": 2 * torch.einsum("ni,no->nio", x, g), "b": 0.5 * g}
    assert_norms(stats, {name: v.double() for name, v in want.items()})


def test_a_bias_that_is_broadcast():
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(1))
    x = torch.randn(4, 3)
    y = torch.addmm(b, x, w)
    stats = probed({"w": w, "b": b}, y.square().sum(1))
    g = (2 * y).detach().double()
    want = {"w": torch.einsum("ni,no->nio", x.double(), g), "b": g.sum(1, keepdim=True)}
    assert_norms(stats, want)


def test_a_checkpointed_region():
    model, x = net()
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x])
    x.requires_grad_()
    losses = checkpoint(lambda x: losses_of(model, x), x, use_reentrant=False)
    assert_norms(probed(model, losses), want)


def test_a_second_pass_is_refused():
    model, x = net()
    probe = fm.GradientProbe(model)
    losses = losses_of(model, x)
    probe.attach(losses)
    losses.mean().backward(retain_graph=True)
    with pytest.raises(fm.CaptureError, match="second backward"):
        losses.mean().backward()


def test_the_last_batch_of_an_epoch():
    model, x = net()
    probe = fm.GradientProbe(model, per_parameter=True)
    for n in (7, 7, 3, 1, 7):
        want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x[:n]])
        assert_norms(probe.backward(losses_of(model, x[:n])), want)


def test_half_precision():
    model, x = net()
    model, x = model.bfloat16(), x.bfloat16()
    stats = probed(model, losses_of(model, x).float())
    assert stats.sq_norms.dtype == torch.float32
