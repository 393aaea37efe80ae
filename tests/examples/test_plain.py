"""The loop of one network: schedules, divergence, and the same bits after a kill."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from examples.common import augment, data, networks, plain


class Killed(Exception):
    pass


class Keeper:
    """A watch that keeps each state as a file would, and kills after some steps."""

    def __init__(self, dies_after=None):
        self.dies_after, self.saved, self.kept, self.fractions = dies_after, 0, None, []

    def progress(self, fraction):
        self.fractions.append(fraction)

    def load(self):
        if self.kept is None:
            return None
        return torch.load(io.BytesIO(self.kept), weights_only=False)

    def save(self, state):
        self.saved += 1
        file = io.BytesIO()
        torch.save(state(), file)
        self.kept = file.getvalue()
        if self.saved == self.dies_after:
            raise Killed


def blobs(count=90, size=8, classes=3, seed=0):
    """Images of which each class has its own mean, and as many to validate."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 1, size, size, generator=generator)
    y = torch.arange(count) % classes
    x = means[y] + 0.5 * torch.randn(count, 1, size, size, generator=generator)
    half = count // 3 * 2
    return data.Split((x[:half], y[:half]), (x[half:], y[half:]))


def small(dropout=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(144, 3),
    )
    for p in net.parameters():
        with torch.no_grad():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))
    return net


CYCLE = plain.Cycle(0.002, 0.01, epochs=2)
BY_SIZE = plain.Cycle(0.002, 0.01, epochs=2, vary="batch_size")


@pytest.mark.parametrize("schedule", [None, CYCLE, BY_SIZE])
@pytest.mark.parametrize("dies_after", [1, 5, 6, 13])
def test_a_killed_run_ends_with_the_same_bits(schedule, dies_after):
    def run(watch):
        return plain.train(
            small(dropout=0.3),
            blobs(),
            rate=0.05,
            batch_size=7,
            epochs=3,
            seed=3,
            schedule=schedule,
            momentum=0.5,
            weight_decay=1e-3,
            augment=augment.shift_and_flip,
            watch=watch,
            measure_every=0.5,
            device="cpu",
        )

    whole, history = run(None)
    watch = Keeper(dies_after)
    with pytest.raises(Killed):
        run(watch)
    torch.rand(7)  # what others draw in between does not matter
    watch.dies_after = None
    resumed, again = run(watch)
    assert again == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert watch.fractions[-1] == pytest.approx(1, abs=0.2)


def test_measures_at_places_and_ends_after_the_epochs():
    _, history = plain.train(
        small(), blobs(), rate=0.01, batch_size=7, epochs=4, seed=0, device="cpu"
    )
    # 60 samples: each epoch ends within the last batch before 60, 120, 180, 240.
    assert [p["samples"] for p in history.points] == [0, 56, 119, 175, 238]
    assert (history.steps, history.samples) == (34, 238)
    assert history.status == "finished"
    assert set(history.points[0]) == {
        *("epoch", "samples", "steps", "rate", "batch_size", "train_loss"),
        *("train_accuracy", "validation_loss", "validation_accuracy"),
    }
    assert history.points[-1]["train_accuracy"] > 0.8


def test_is_plain_sgd():
    """Against three steps by hand, with weight decay and momentum."""
    split, rate = blobs(count=30), 0.05
    model, history = plain.train(
        small(),
        split,
        rate=rate,
        batch_size=20,
        epochs=3,
        seed=0,
        momentum=0.9,
        weight_decay=0.01,
        device="cpu",
    )
    assert history.steps == 3
    by_hand = small()
    v = [torch.zeros_like(p) for p in by_hand.parameters()]
    for _ in range(3):
        loss = nn.functional.cross_entropy(by_hand(split.train[0]), split.train[1])
        grads = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for p, g, w in zip(by_hand.parameters(), grads, v, strict=True):
                w.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(rate * w)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("vary", ["lr", "batch_size"])
def test_cycles_have_the_same_ratio_at_the_same_place(vary):
    cycle = plain.Cycle(0.002, 0.01, epochs=2, vary=vary)
    _, history = plain.train(
        small(),
        blobs(),
        rate=0.04,
        batch_size=4,
        epochs=4,
        seed=0,
        schedule=cycle,
        device="cpu",
    )
    sizes = {"lr": [4, 4, 4, 4, 4], "batch_size": [20, 20, 4, 20, 4]}[vary]
    rates = {"lr": [0.008, 0.008, 0.04, 0.008, 0.04], "batch_size": [0.04] * 5}[vary]
    assert [p["batch_size"] for p in history.points] == sizes
    assert [p["rate"] for p in history.points] == pytest.approx(rates)
    assert [p["epoch"] for p in history.points] == [0, 1, 2, 3, 4]


def test_depends_on_the_seed_only_and_leaves_the_generators():
    fresh = small(dropout=0.5)

    def run(seed):
        model, _ = plain.train(
            copy.deepcopy(fresh),
            blobs(),
            rate=0.02,
            batch_size=10,
            epochs=1,
            seed=seed,
            device="cpu",
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.manual_seed(0)
    first = run(1)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.rand(3), drawn)
    torch.manual_seed(5)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)


def test_measuring_does_not_change_the_run():
    def measure(model):
        assert not model.training
        return {"drawn": float(torch.rand(()))}

    kwargs = {"rate": 0.02, "batch_size": 10, "epochs": 2, "seed": 1, "device": "cpu"}
    one, history = plain.train(small(0.5), blobs(), measure=measure, **kwargs)
    two, _ = plain.train(small(0.5), blobs(), measure_every=2, **kwargs)
    assert "drawn" in history.points[1]
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rate", [1e30, math.inf])
def test_an_exploded_run_is_diverged(rate):
    _, history = plain.train(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        blobs(),
        rate=rate,
        batch_size=2,
        epochs=50,
        seed=0,
        device="cpu",
    )
    assert history.status == "diverged"
    assert history.steps < 1500


def test_a_network_that_learned_nothing_is_untrained():
    split = blobs()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(model[1].weight)
    _, history = plain.train(
        model, split, rate=1e-12, batch_size=10, epochs=1, seed=0, device="cpu"
    )
    assert history.status == "untrained"


def test_stops_where_it_is_told():
    kwargs = {"rate": 0.05, "batch_size": 10, "epochs": 30, "seed": 0, "device": "cpu"}
    watch = Keeper()
    _, history = plain.train(
        small(),
        blobs(),
        until=lambda p: p["train_loss"] < 0.1,
        measure_every=0.5,
        measured_samples=60,
        watch=watch,
        **kwargs,
    )
    assert history.points[-1]["train_loss"] < 0.1 <= history.points[-2]["train_loss"]
    assert history.samples < 30 * 60
    # Killed after the last step, it does not go on beyond it.
    _, again = plain.train(
        small(), blobs(), watch=watch, until=lambda p: False, **kwargs
    )
    assert again == history


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="fp8"):
        plain.train(
            small(),
            blobs(),
            rate=1.0,
            batch_size=1,
            epochs=1,
            seed=0,
            precision="fp8",
            device="cpu",
        )


@pytest.mark.parametrize("name", ["vgg11", "resnet56"])
def test_the_networks_of_the_paper_start(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 32, 32, generator=generator)
    y = torch.arange(8)
    model = networks.make(name, 0, x)
    split = data.Split((x, y), (x[:2], y[:2]))
    before = [p.detach().clone() for p in model.parameters()]
    model, history = plain.train(
        model,
        split,
        rate=0.01,
        batch_size=8,
        epochs=1,
        seed=0,
        augment=augment.shift_and_flip,
        device="cpu",
    )
    assert history.steps == 1
    assert math.isfinite(history.points[-1]["train_loss"])
    moved = [
        not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)
    ]
    assert sum(moved) > 0.6 * len(moved)
