"""NoiseScaleBatchSize: when the size changes, by how much, and the rate with it."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import fastminima as fm


def stats_of(noise, signal, **more):
    return SimpleNamespace(
        covariance_trace=torch.tensor(noise), signal=torch.tensor(signal), **more
    )


def following_of(n=1000, size=10, sampler=None, **options):
    sampler = fm.optim.BatchSizeSampler(n, size, **(sampler or {}))
    return sampler, fm.optim.NoiseScaleBatchSize(sampler, **options)


def sizes_of(sampler, following, stats, epochs=1):
    sizes = []
    for _ in range(epochs):
        for batch in sampler.consumed(sampler):
            sizes.append(len(batch))
            following.update(stats)
    return sizes


def count_batch(sampler):
    """As if a loop had received one more."""
    next(iter(sampler))
    sampler.step()


def sgd(rate=0.1):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], rate)


def test_it_changes_at_the_ends_of_epochs():
    sampler, following = following_of(100, 10)
    sizes = sizes_of(sampler, following, stats_of(350.0, 10.0), 4)
    assert sizes == [10] * 10 + [20] * 5 + [35, 35, 30] * 2


def test_it_changes_every_so_many_samples():
    sampler, following = following_of(100, 10, every=25)
    sizes = sizes_of(sampler, following, stats_of(350.0, 10.0))
    assert sizes == [10] * 3 + [20, 35, 15]


def test_the_size_falls_too():
    sampler, following = following_of(200, 40, every=40, min_size=8)
    sizes = sizes_of(sampler, following, stats_of(5.0, 1.0))
    assert sizes[:8] == [40, 20, 20, 10, 10, 10, 10, 8]


@pytest.mark.parametrize("signal", [0.0, -1.0, math.nan])
def test_an_unknown_noise_scale_keeps_the_size(signal):
    sampler, following = following_of(every=10)
    assert set(sizes_of(sampler, following, stats_of(50.0, signal))) == {10}
    assert math.isnan(following.noise_scale)


def test_hysteresis():
    sampler, following = following_of(every=10, hysteresis=0.25)
    assert set(sizes_of(sampler, following, stats_of(12.0, 1.0))) == {10}
    sampler, following = following_of(every=10, hysteresis=0.1)
    assert set(sizes_of(sampler, following, stats_of(12.0, 1.0))) == {10, 12, 6}


def test_limits():
    sampler, following = following_of(every=10, max_size=33)
    assert max(sizes_of(sampler, following, stats_of(1e9, 1.0))) == 33
    sampler, following = following_of(every=10, min_size=4)
    assert min(sizes_of(sampler, following, stats_of(0.0, 1.0))) == 4


def test_averages_are_separate_and_unbiased():
    sampler, following = following_of(smoothing=0.5)

    def update(*stats):
        count_batch(sampler)
        following.update(*stats)

    update(stats_of(8.0, 2.0))
    assert (following.covariance_trace, following.signal) == (8.0, 2.0)
    update(stats_of(8.0, -0.25))
    assert following.covariance_trace == 8.0
    assert following.signal == pytest.approx((2 * -0.25 + 2.0) / 3)
    update(stats_of(math.inf, 1.0))
    update(stats_of(3.0, 1.0, count=1))
    update()
    assert following.noise_scale == pytest.approx(8.0 / 0.5)


@pytest.mark.parametrize(("scale_lr", "power"), [("linear", 1), ("sqrt", 0.5)])
@pytest.mark.usefixtures("on_the_cpu")  # workers are forked
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [None, 60])
def test_the_rate_changes_with_the_first_batch_of_the_new_size(
    scale_lr, power, workers, every
):
    optimizer = sgd()
    sampler, following = following_of(
        400, 10, every=every, optimizer=optimizer, scale_lr=scale_lr
    )
    loader = DataLoader(range(400), batch_sampler=sampler, num_workers=workers)
    seen = set()
    for _ in range(3):
        for batch in sampler.consumed(loader):
            rate = optimizer.param_groups[0]["lr"]
            is_last = sampler.samples_seen % 400 == 0
            if not is_last:  # those may be short
                assert rate / 0.1 == pytest.approx((len(batch) / 10) ** power)
                seen.add(len(batch))
            following.update(stats_of(35.0, 1.0))
    assert seen == {10, 20, 35}


def test_rates_that_are_tensors_and_none():
    rate = torch.tensor(0.1)
    optimizer = sgd(rate)
    sampler, following = following_of(every=10, optimizer=optimizer, scale_lr="linear")
    sizes_of(sampler, following, stats_of(20.0, 1.0))
    torch.testing.assert_close(optimizer.param_groups[0]["lr"], torch.tensor(0.2))
    plain = sgd()
    sampler, following = following_of(every=10, optimizer=plain)
    sizes_of(sampler, following, stats_of(20.0, 1.0))
    assert plain.param_groups[0]["lr"] == 0.1
    row = following.to_dict()
    assert (row["batch_size"], row["ratio"]) == (20, 0.1 / 20)
    assert row["noise_scale"] == pytest.approx(20)


def test_sizes_are_over_all_ranks():
    sampler, following = following_of(
        1000, 10, sampler={"num_replicas": 4, "rank": 1}, every=40
    )
    sizes_of(sampler, following, stats_of(60.0, 1.0))
    assert sampler.batch_size == 15
    sampler, following = following_of(
        30, 2, sampler={"num_replicas": 4, "rank": 1, "last": "drop"}, every=8
    )
    sizes_of(sampler, following, stats_of(1e9, 1.0), 5)
    assert sampler.batch_size == 7


class Training:
    """Linear regression whose batch size follows its probe."""

    def __init__(self, workers):
        torch.manual_seed(0)
        x = torch.randn(300, 5)
        y = x.sum(1, keepdim=True) + torch.randn(300, 1)
        self.model = torch.nn.Linear(5, 1)
        self.probe = fm.GradientProbe(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02)
        self.sampler = fm.optim.BatchSizeSampler(300, 4, seed=3)
        self.loader = DataLoader(
            torch.utils.data.TensorDataset(x, y),
            batch_sampler=self.sampler,
            num_workers=workers,
        )
        self.following = fm.optim.NoiseScaleBatchSize(
            self.sampler, every=50, scale_lr="sqrt", optimizer=self.optimizer
        )

    def parts(self):
        return (self.model, self.optimizer, self.sampler, self.following)

    def run(self, steps):
        rows = []
        while True:
            for x, y in self.sampler.consumed(self.loader):
                losses = (self.model(x) - y).square().mean(1)
                self.optimizer.zero_grad()
                stats = self.probe.backward(losses)
                self.optimizer.step()
                self.following.update(stats)
                rows.append((len(x), losses.mean().item(), self.following.to_dict()))
                if len(rows) == steps:
                    return rows


@pytest.mark.usefixtures("on_the_cpu")  # workers are forked
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [13, 14, 15, 25])
def test_resuming_gives_the_same_bits(workers, stop):
    want = Training(workers).run(40)
    assert len({size for size, *_ in want}) > 2
    first = Training(workers)
    got = first.run(stop)
    states = copy.deepcopy([part.state_dict() for part in first.parts()])
    second = Training(workers)
    for part, state in zip(second.parts(), states, strict=True):
        part.load_state_dict(state)
    assert repr(got + second.run(40 - stop)) == repr(want)


def test_minibatch_variance_serves():
    model = torch.nn.Linear(3, 1)
    variance = fm.MinibatchVariance(model)
    for _ in range(4):
        model.zero_grad()
        model(torch.randn(8, 3)).mean().backward()
        variance.update(batch_size=8)
    sampler, following = following_of()
    count_batch(sampler)
    following.update(variance)
    assert following.covariance_trace == pytest.approx(float(variance.covariance_trace))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1"),
        ({"factor": 1.0}, "factor must be above 1"),
        ({"hysteresis": -0.1}, "hysteresis must be at least 0"),
        ({"min_size": 5, "max_size": 4}, "got min_size=5 and max_size=4"),
        ({"max_size": 1001}, "max_size <= 1000"),
        ({"min_size": 1}, "need 2 <= min_size"),
        (
            {
                "min_size": 5,
                "max_size": 7,
                "sampler": {"num_replicas": 4, "rank": 0},
            },
            "multiple of num_replicas=4, and none lies between min_size=5",
        ),
        ({"scale_lr": "log"}, "scale_lr must be one of"),
        ({"scale_lr": "sqrt"}, "needs the optimizer"),
        ({"sampler": {"schedule": lambda seen: 3}}, "has a schedule"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        following_of(**options)


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("factor", [1.1, 1.25, 2.0, 3.7, math.inf])
@pytest.mark.parametrize("noise", [0.0, 1e9])
def test_a_change_is_no_larger_than_the_factor_or_one_sample(factor, noise, ranks):
    """And none leaves the limits, which are reached whatever the factor."""
    for start in (1, 2, 3, 5, 7, 13, 33):
        sampler, following = following_of(
            20_000,
            start,
            sampler={"num_replicas": ranks, "rank": 0},
            every=1,
            hysteresis=0.0,
            factor=factor,
            min_size=10,
            max_size=90,
        )
        sizes = [start]
        for _ in sampler.consumed(sampler):
            following.update(stats_of(noise, 1.0))
            sizes.append(sampler.batch_size)
        for old, new in itertools.pairwise(sizes):
            one = abs(new - old) <= 1
            assert one or 1 / factor <= new / old <= factor
            if 10 <= old * ranks <= 90:
                assert 10 <= new * ranks <= 90
        want = 90 // ranks if noise else -(-10 // ranks)
        assert sizes[-1] == want


def test_a_size_outside_the_limits_moves_there_though_the_scale_is_unknown():
    """From a single sample there are no statistics at all."""
    sampler, following = following_of(100, 1, every=1)
    sizes = sizes_of(sampler, following, stats_of(50.0, 1.0, count=1))
    assert sizes[:3] == [1, 2, 2]
    sampler, following = following_of(1000, 100, every=1, max_size=95)
    assert sizes_of(sampler, following, None)[:3] == [100, 95, 95]


def test_a_batch_that_was_not_counted():
    sampler, following = following_of(100, 10)
    for _ in sampler:
        with pytest.raises(RuntimeError, match=r"has counted 0 samples.*consumed"):
            following.update(stats_of(50.0, 1.0))
        break
    assert math.isnan(following.signal)
    count_batch(sampler)
    following.update(stats_of(50.0, 1.0))
    with pytest.raises(RuntimeError, match="has counted 20 samples"):
        following.update(stats_of(50.0, 1.0))
