"""CyclicRatio: the ratio at each sample, in both modes, and exact resumption."""

import copy
import itertools
import math

import pytest
import torch
from torch.utils.data import DataLoader

import fastminima as fm

MODES = ("lr", "batch_size")
SHAPES = ("square", "triangle")


def sgd(*rates, **options):
    groups = [
        {"params": [torch.zeros(2, requires_grad=True)], "lr": rate} for rate in rates
    ]
    return torch.optim.SGD(groups, lr=1.0, **options)


def cycle_of(sampler, vary, *, rate=0.8, **options):
    optimizer = sgd(rate)
    settings = {"low": 0.02, "high": 0.1, "period": 400, **options}
    return optimizer, fm.optim.CyclicRatio(optimizer, sampler, vary=vary, **settings)


def trace(optimizer, cycle, sampler, loader, epochs):
    """(samples before, size, learning rate, wanted and realised ratio) of each step."""
    rows = []
    for _ in range(epochs):
        for batch in sampler.consumed(loader):
            row = (cycle.samples_seen, len(batch), optimizer.param_groups[0]["lr"])
            rows.append((*row, cycle.ratio, cycle.realised_ratio))
            optimizer.step()
            cycle.step()
    return rows


@pytest.mark.usefixtures("on_the_cpu")  # workers are forked
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vary", MODES)
@pytest.mark.parametrize("first", ["low", "high"])
def test_every_batch_has_the_ratio_of_its_place(vary, shape, first, workers):
    sampler = fm.optim.BatchSizeSampler(1000, 16)
    optimizer, cycle = cycle_of(sampler, vary, shape=shape, first=first)
    loader = DataLoader(range(1000), batch_sampler=sampler, num_workers=workers)
    rows = trace(optimizer, cycle, sampler, loader, 3)
    assert sum(size for _, size, *_ in rows) == 3000
    for at, size, rate, wanted, realised in rows:
        phase = at % 400 / 400
        height = phase >= 0.5 if shape == "square" else 1 - abs(2 * phase - 1)
        height = 1 - height if first == "high" else height
        assert wanted == pytest.approx(0.02 + 0.08 * height)
        assert realised == pytest.approx(rate / size)
        if vary == "lr":
            assert realised == pytest.approx(wanted)
        else:
            is_short = (at + size) % 1000 == 0
            assert rate == 0.8
            assert size == round(0.8 / wanted) or is_short


@pytest.mark.parametrize("vary", MODES)
def test_phases_of_a_square_wave(vary):
    """Each is half a period long, up to one batch, and they do not drift."""
    sampler = fm.optim.BatchSizeSampler(997, 16, last="carry")
    optimizer, cycle = cycle_of(sampler, vary, period=500)
    rows = trace(optimizer, cycle, sampler, sampler, 10)
    groups = itertools.groupby(rows, key=lambda row: row[3])
    phases = [list(group) for _, group in groups]
    assert len(phases) > 30
    for number, phase in enumerate(phases[:-1]):
        longest = max(size for _, size, *_ in phase)
        assert 0 <= phase[0][0] - 250 * number < 40
        assert abs(sum(size for _, size, *_ in phase) - 250) <= max(40, longest)


def test_ends_are_exact():
    _, cycle = cycle_of(None, "lr", batch_size=10, low=0.1, high=0.3, period=40)
    assert [cycle.ratio_at(s) for s in (0, 19, 20, 39, 40)] == [0.1, 0.1, 0.3, 0.3, 0.1]
    _, cycle = cycle_of(
        None, "lr", batch_size=10, low=0.1, high=0.3, period=40, shape="triangle"
    )
    assert [cycle.ratio_at(s) for s in (0, 20, 40)] == [0.1, 0.3, 0.1]
    assert cycle.ratio_at(5) == pytest.approx(0.15)


def test_groups_keep_their_proportions():
    optimizer = sgd(0.1, 0.02, 0.0)
    cycle = fm.optim.CyclicRatio(optimizer, None, 0.01, 0.05, 20, batch_size=10)
    rates = []
    for _ in range(3):
        rates.append(cycle.get_last_lr())
        optimizer.step()
        cycle.step()
    torch.testing.assert_close(
        torch.tensor(rates, dtype=torch.float64),
        torch.tensor([0.1, 0.5, 0.1], dtype=torch.float64)[:, None]
        * torch.tensor([1, 0.2, 0], dtype=torch.float64),
    )


def test_learning_rates_that_are_tensors():
    optimizer = sgd(torch.tensor(0.1))
    rate = optimizer.param_groups[0]["lr"]
    cycle = fm.optim.CyclicRatio(optimizer, None, 0.01, 0.05, 20, batch_size=10)
    optimizer.step()
    cycle.step()
    assert optimizer.param_groups[0]["lr"] is rate
    torch.testing.assert_close(rate, torch.tensor(0.5))
    other = sgd(torch.tensor(0.1))
    again = fm.optim.CyclicRatio(other, None, 0.01, 0.05, 20, batch_size=10)
    again.load_state_dict(cycle.state_dict())
    assert other.param_groups[0]["lr"] == rate


def test_rounding_is_seen_in_the_realised_ratio():
    sampler = fm.optim.BatchSizeSampler(100, 1)
    _, cycle = cycle_of(sampler, "batch_size", rate=0.1, low=0.03, high=0.5)
    assert (sampler.batch_size, cycle.ratio) == (3, 0.03)
    assert cycle.realised_ratio == pytest.approx(0.1 / 3)
    assert cycle._size_for(0.5) == 1


def test_the_size_is_that_of_all_ranks():
    sampler = fm.optim.BatchSizeSampler(1000, 5, num_replicas=4, rank=1)
    optimizer, _ = cycle_of(sampler, "lr")
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 20)
    _, cycle = cycle_of(sampler, "batch_size")
    assert sampler.batch_size == 10
    assert cycle.realised_ratio == pytest.approx(0.02)


class Training:
    """Linear regression with momentum under a cycle."""

    def __init__(self, vary, shape, workers, persistent):
        torch.manual_seed(0)
        x = torch.randn(203, 5)
        self.model = torch.nn.Linear(5, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.5)
        self.sampler = fm.optim.BatchSizeSampler(203, 8, seed=3)
        self.loader = DataLoader(
            torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)),
            batch_sampler=self.sampler,
            num_workers=workers,
            persistent_workers=persistent,
        )
        self.cycle = fm.optim.CyclicRatio(
            self.optimizer, self.sampler, 0.001, 0.01, 150, vary, shape
        )

    def parts(self):
        return (self.model, self.optimizer, self.sampler, self.cycle)

    def run(self, steps):
        losses = []
        while True:
            for x, y in self.sampler.consumed(self.loader):
                loss = (self.model(x) - y).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.cycle.step()
                losses.append((len(x), loss.item(), *self.cycle.get_last_lr()))
                if len(losses) == steps:
                    return losses


@pytest.mark.usefixtures("on_the_cpu")  # workers are forked
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vary", MODES)
def test_resuming_gives_the_same_bits(vary, shape, workers):
    options = (vary, shape, workers, workers > 0)
    want = Training(*options).run(60)
    first = Training(*options)
    got = first.run(37)
    states = copy.deepcopy([part.state_dict() for part in first.parts()])
    second = Training(*options)
    for part, state in zip(second.parts(), states, strict=True):
        part.load_state_dict(state)
    assert got + second.run(23) == want


def test_states_in_any_order():
    """The rates come back even if the optimizer's state is loaded first."""
    options = ("lr", "triangle", 0, False)
    first = Training(*options)
    first.run(20)
    second = Training(*options)
    for mine, other in reversed(list(zip(second.parts(), first.parts(), strict=True))):
        mine.load_state_dict(copy.deepcopy(other.state_dict()))
    assert second.cycle.get_last_lr() == first.cycle.get_last_lr()
    assert second.run(10) == first.run(10)
    assert not {"sampler", "optimizer"} & first.cycle.state_dict().keys()


def test_a_batch_that_was_not_counted():
    sampler = fm.optim.BatchSizeSampler(100, 10)
    optimizer, cycle = cycle_of(sampler, "lr")
    next(iter(sampler))
    optimizer.step()
    with pytest.raises(RuntimeError, match="has counted 0 samples"):
        cycle.step()


def test_gradient_accumulation_counts_all_batches():
    sampler = fm.optim.BatchSizeSampler(100, 10)
    optimizer, cycle = cycle_of(sampler, "lr")
    for count, _ in enumerate(sampler.consumed(sampler)):
        if count % 5 == 4:
            optimizer.step()
            cycle.step()
            assert cycle.samples_seen == 10 * (count + 1)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (None, {"batch_size": 2, "low": 0.0}, "0 < low <= high"),
        (None, {"batch_size": 2, "low": 0.2}, "low=0.2 and high=0.1"),
        (None, {"batch_size": 2, "high": math.inf}, "high < inf, got low=0.02"),
        (None, {"batch_size": 2, "low": math.nan}, "0 < low <= high"),
        (None, {"batch_size": 2, "period": 0}, "period must be above 0"),
        (None, {"batch_size": 2, "period": math.inf}, "and finite, got inf"),
        (None, {"batch_size": 2, "period": math.nan}, "and finite, got nan"),
        (None, {"batch_size": 2, "shape": "sine"}, "shape must be one of"),
        (None, {"batch_size": 2, "first": "up"}, "first must be one of"),
        (None, {"batch_size": 2, "vary": "momentum"}, "vary must be one of"),
        (None, {"batch_size": 2, "vary": "batch_size"}, "needs a sampler"),
        (None, {}, "got neither"),
        ((10, 2), {"batch_size": 2}, "got both"),
        (None, {"batch_size": 0}, "at least 1, got 0"),
        (None, {"batch_size": 2, "rate": 0.0}, "first group must be above 0"),
        ((30, 2, "drop"), {"vary": "batch_size"}, "A batch of 40 samples"),
    ],
)
def test_arguments_are_checked(sampler, options, message):
    if sampler is not None:
        *sizes, last = sampler if len(sampler) == 3 else (*sampler, "keep")
        sampler = fm.optim.BatchSizeSampler(*sizes, last=last)
    options = {"vary": "lr", **options}
    with pytest.raises(ValueError, match=message):
        cycle_of(sampler, **options)


def test_other_samplers_are_refused():
    plain = torch.utils.data.BatchSampler(range(10), 2, drop_last=False)
    with pytest.raises(ValueError, match="got a BatchSampler"):
        cycle_of(plain, "lr")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vary": "lr"}, "with vary='lr', and this one has vary='batch_size'"),
        ({"shape": "triangle"}, "shape='triangle'"),
        ({"first": "high"}, "first='high'"),
        ({"low": 0.01}, "low=0.01"),
        ({"high": 0.2}, "high=0.2"),
        ({"period": 500}, "period=500"),
    ],
)
def test_a_state_of_another_cycle_is_refused(other, message):
    def made(**options):
        sampler = fm.optim.BatchSizeSampler(100, 10)
        return cycle_of(sampler, **{"vary": "batch_size", **options})

    optimizer, cycle = made()
    before = cycle.state_dict()
    with pytest.raises(ValueError, match=message):
        cycle.load_state_dict(made(**other)[1].state_dict())
    assert cycle.state_dict() == before
    cycle.load_state_dict(made()[1].state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.8
    with pytest.raises(ValueError, match="with vary=None"):
        cycle.load_state_dict({})
