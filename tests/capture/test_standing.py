"""What is remembered is measured anew now and then, and when something jumps."""

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.capture.reading import attempt


class Hidden(torch.autograd.Function):
    """Mixes samples by something that no graph shows."""

    amount = 0.0

    @staticmethod
    def forward(ctx, x):
        return x + Hidden.amount * x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g + Hidden.amount * g.mean(0)


class Secretive(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self[2](Hidden.apply(self[1](self[0](x))))


@pytest.fixture
def measured(monkeypatch):
    """Counts the measurements."""
    honest, calls = attempt.measure_samples, []

    def counting(*args, **options):
        calls.append(1)
        return honest(*args, **options)

    monkeypatch.setattr(attempt, "measure_samples", counting)
    monkeypatch.setattr(Hidden, "amount", 0.0)
    return calls


def losses_of(model, scale=1.0):
    return model(torch.randn(6, 5)).square().sum(1) * scale


def test_every_so_many_steps_and_once_early_on(measured):
    torch.manual_seed(0)
    probe = fm.GradientProbe(model := Secretive(), check_every=25)
    at = []
    for step in range(60):
        before = len(measured)
        probe.backward(losses_of(model))
        if len(measured) > before:
            at.append(step)
    assert at == [0, 10, 25, 50]


def test_a_disagreement_is_an_error_that_names_the_layer(measured):
    torch.manual_seed(0)
    probe = fm.GradientProbe(model := Secretive(), check_every=8)
    with pytest.raises(fm.CaptureError, match=r"measured 8 steps ago(.|\n)*0 \(Linear"):
        for step in range(20):
            Hidden.amount = 0.5 if step > 3 else 0.0
            probe.backward(losses_of(model))
    assert step == 8
    with pytest.raises(fm.CaptureError, match="do not each belong"):
        probe.backward(losses_of(model))


class Swapping(torch.autograd.Function):
    """Turns the batch around when told to, which no graph shows."""

    turns = False

    @staticmethod
    def forward(ctx, x):
        return x.flip(0) if Swapping.turns else x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.flip(0) if Swapping.turns else g


def test_rows_that_changed_places_are_an_error(measured, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    probe = fm.GradientProbe(model, check_every=4)

    def step():
        return probe.backward(
            model[2](Swapping.apply(model[1](model[0](torch.randn(6, 5)))))
            .square()
            .sum(1)
        )

    step()
    monkeypatch.setattr(Swapping, "turns", True)
    with pytest.raises(fm.CaptureError, match="belong to other samples now"):
        for _ in range(4):
            step()


@pytest.mark.parametrize("jump", [100.0, 0.01])
def test_a_jump_is_a_reason_to_look(measured, jump):
    torch.manual_seed(0)
    probe = fm.GradientProbe(model := Secretive(), check_every=1000)
    for _ in range(15):
        probe.backward(losses_of(model))
    assert len(measured) == 2  # the first one, and the early one
    probe.backward(losses_of(model, jump))
    probe.backward(losses_of(model, jump))
    assert len(measured) == 3
    for _ in range(10):  # now that is usual
        probe.backward(losses_of(model, jump))
    assert len(measured) == 3


def test_a_steady_run_is_left_alone(measured):
    torch.manual_seed(0)
    model = Secretive()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probe = fm.GradientProbe(model)
    for _ in range(60):
        optimizer.zero_grad()
        probe.backward(losses_of(model))
        optimizer.step()
    assert len(measured) == 2


def test_an_unknown_cadence():
    with pytest.raises(ValueError, match="check_every"):
        fm.GradientProbe(nn.Linear(2, 1), check_every=0)


def test_a_batch_of_one_has_nothing_to_look_for(measured):
    torch.manual_seed(0)
    probe = fm.GradientProbe(model := Secretive(), check_every=3)
    for step in range(12):
        size = 1 if step % 2 else 6
        losses = model(torch.randn(size, 5)).square().sum(1)
        probe.backward(losses * (1000.0 if step > 8 else 1.0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=str)
def test_a_pass_that_is_called_where_no_graph_is_made(mode):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), None
    probe = fm.GradientProbe(model)
    for _ in range(5):
        x = torch.randn(6, 4)
        losses = model(x).square().sum(1)
        model.zero_grad()
        with mode():
            got = probe.backward(losses)
        model.zero_grad()
        expected = fm.GradientProbe(model).backward(model(x).square().sum(1))
        torch.testing.assert_close(got.sq_norms.clone(), expected.sq_norms)


def test_no_time_at_all():
    """Samples without a step have no gradient."""
    model = nn.Linear(4, 3)
    for _ in range(4):
        stats = fm.GradientProbe(model).backward(
            model(torch.randn(5, 0, 4)).square().sum((1, 2))
        )
        assert stats.count == 5 and not stats.sq_norms.any()


def test_parameters_are_counted_as_they_are():
    model = nn.Linear(4, 3)
    probe = fm.GradientProbe(model)

    def count():
        model.zero_grad(set_to_none=True)
        return probe.backward(model(torch.randn(5, 4)).square().sum(1)).parameter_count

    assert [count() for _ in range(5)] == [15] * 5
    model.weight.data, model.bias.data = torch.randn(7, 4), torch.randn(7)
    assert [count() for _ in range(5)] == [35] * 5
