"""BatchSizeSampler: no sample lost or repeated, and resuming as if never stopped."""

import io
import random
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import fastminima as fm

# Indices, and workers that are forked.
pytestmark = pytest.mark.usefixtures("on_the_cpu")

LAST = ("keep", "drop", "carry")


def sampler_of(n=50, batch_size=4, **options):
    return fm.optim.BatchSizeSampler(n, batch_size, **options)


def loader_of(sampler, workers=0, **options):
    """Batches are lists of indices."""
    return DataLoader(
        range(sampler.n),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=list,
        **options,
    )


def flat(batches):
    return list(chain.from_iterable(batches))


def size_after(count):
    """A size that changes often, and only by what the loop has received."""
    return random.Random(count // 3).randint(1, 9)


def run(sampler, loader, stop, start=0):
    """Batches `start` to `stop` of a loop that sets a size after each."""
    batches = []
    while start + len(batches) < stop:
        for batch in sampler.consumed(loader):
            batches.append(batch)
            sampler.batch_size = size_after(start + len(batches))
            if start + len(batches) == stop:
                break
    return batches


@given(
    n=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    replicas=st.integers(1, 3),
)
def test_an_epoch_is_a_permutation(n, sizes, replicas):
    n = max(n, replicas)
    ranks = [
        sampler_of(n, sizes[0], num_replicas=replicas, rank=rank)
        for rank in range(replicas)
    ]
    for epoch in range(3):
        seen = []
        for sampler in ranks:
            assert sampler.epoch == epoch
            batches = []
            for count, batch in enumerate(sampler.consumed(sampler)):
                batches.append(batch)
                sampler.batch_size = sizes[count % len(sizes)]
            seen.append(batches)
        assert len({len(batches) for batches in seen}) == 1
        for same in zip(*seen, strict=True):
            assert len({len(batch) for batch in same}) == 1
        indices = flat(flat(seen))
        assert set(indices) == set(range(n))
        assert len(indices) - n < replicas


@given(st.integers(5, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_carried_samples_come_first(n, first, second, seed):
    """The batches of all epochs are one stream of permutations."""
    sampler = sampler_of(n, first, last="carry", seed=seed)
    stream = []
    for _ in range(4):
        for batch in sampler.consumed(sampler):
            assert len(batch) == sampler.batch_size
            stream += batch
        sampler.batch_size = second
    epochs = [stream[at : at + n] for at in range(0, len(stream), n)]
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(n))
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert sampler.samples_seen == len(stream)


@pytest.mark.parametrize(("last", "sizes"), [("keep", [4, 4, 2]), ("drop", [4, 4])])
def test_the_last_batch(last, sizes):
    sampler = sampler_of(10, 4, last=last)
    for _ in range(2):
        assert [len(batch) for batch in sampler] == sizes
        assert len(sampler) == len(sizes)


def test_permutations_come_from_seed_and_epoch():
    def epochs(seed):
        sampler = sampler_of(seed=seed)
        return [flat(sampler) for _ in range(3)]

    assert epochs(1) == epochs(1)
    assert len({tuple(e) for seed in (0, 1, 2) for e in epochs(seed)}) == 9
    assert flat(sampler_of(shuffle=False)) == list(range(50))


@pytest.mark.parametrize("last", LAST)
@settings(max_examples=40, deadline=None)
@given(stop=st.integers(0, 60), seed=st.integers(0, 3))
def test_resuming_equals_not_stopping(last, stop, seed):
    whole = sampler_of(seed=seed, last=last)
    want = run(whole, whole, 80)
    first = sampler_of(seed=seed, last=last)
    got = run(first, first, stop)
    state = io.BytesIO()
    torch.save(first.state_dict(), state)
    state.seek(0)
    second = sampler_of(seed=99, last=last)
    second.load_state_dict(torch.load(state))
    assert second.next_batch_size == len(want[stop])
    got += run(second, second, 80, start=stop)
    assert got == want
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stop", [1, 7, 12, 13])
def test_resuming_with_workers(last, persistent, stop):
    options = {"workers": 2, "prefetch_factor": 2, "persistent_workers": persistent}
    whole = sampler_of(last=last)
    want = run(whole, loader_of(whole, **options), 30)
    first = sampler_of(last=last)
    loader = loader_of(first, **options)
    got = run(first, loader, stop)
    state = first.state_dict()
    second = sampler_of(last=last)
    second.load_state_dict(state)
    assert run(second, loader_of(second, **options), 30, start=stop) == want[stop:]
    # Breaking off and iterating again is the same as resuming.
    assert got + run(first, loader, 30, start=stop) == want


@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_are_permutations_with_workers(persistent):
    sampler = sampler_of()
    loader = loader_of(sampler, 2, persistent_workers=persistent)
    for epoch in range(4):
        assert sampler.epoch == epoch
        seen = []
        for batch in sampler.consumed(loader):
            seen += batch
            sampler.batch_size = size_after(len(seen))
        assert sorted(seen) == list(range(50))


@pytest.mark.parametrize(("workers", "ahead", "late"), [(0, None, 0), (2, 3, 6)])
def test_when_a_size_acts(workers, ahead, late):
    sampler = sampler_of(200)
    sizes, announced = [], 4
    for batch in sampler.consumed(loader_of(sampler, workers, prefetch_factor=ahead)):
        assert len(batch) == announced
        sizes.append(len(batch))
        if len(sizes) == 5:
            sampler.batch_size = 7
        announced = sampler.next_batch_size
    assert sizes[: 5 + late] == [4] * (5 + late)
    assert set(sizes[5 + late : -1]) == {7}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_schedule_acts_at_its_place(workers):
    sampler = sampler_of(100, 1, schedule=lambda seen: 5 if seen < 130 else 10)
    loader = loader_of(sampler, workers)
    sizes = [[len(batch) for batch in sampler.consumed(loader)] for _ in range(2)]
    assert sizes == [[5] * 20, [5] * 6 + [10] * 7]
    with pytest.raises(ValueError, match="has a schedule"):
        sampler.batch_size = 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("last", LAST)
def test_a_state_after_the_last_batch_is_the_next_epoch(workers, last):
    sampler = sampler_of(22, 4, last=last)
    batches = list(sampler.consumed(loader_of(sampler, workers)))
    assert len(batches) == len(sampler_of(22, 4, last=last))
    assert sampler.state_dict()["epoch"] == 1
    assert sampler.epoch == 1
    for save_in_body in (False, True):
        sampler = sampler_of(22, 4, last=last)
        loader = loader_of(sampler, workers)
        states = [sampler.state_dict() for _ in sampler.consumed(loader)]
        second = sampler_of(22, 4, last=last)
        second.load_state_dict(states[-1] if save_in_body else sampler.state_dict())
        assert second.epoch == 1
        want = list(sampler.consumed(sampler))
        assert list(second.consumed(loader_of(second, workers))) == want
        assert want


def test_without_counting_each_pass_is_an_epoch():
    sampler, counted = sampler_of(), sampler_of()
    want = [list(counted.consumed(counted)) for _ in range(3)]
    assert list(sampler) == want[0]
    with pytest.raises(RuntimeError, match="none was counted"):
        sampler.state_dict()
    next(iter(sampler))
    assert list(sampler) == want[2]
    carrying = sampler_of(10, 4, last="carry")
    assert [len(list(carrying)) for _ in range(4)] == [2, 3, 2, 3]


def test_set_epoch():
    sampler, other = sampler_of(), sampler_of()
    epochs = [list(other.consumed(other)) for _ in range(3)]
    for epoch in (0, 2, 1):
        sampler.set_epoch(epoch)
        assert list(sampler.consumed(sampler)) == epochs[epoch]
    sampler.set_epoch(0)
    got = run_plain(sampler, 5)
    resumed = sampler_of()
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(0)  # as a loop does that starts with the epoch it is in
    assert got + list(resumed) == epochs[0]


def run_plain(sampler, stop):
    batches = []
    for batch in sampler.consumed(sampler):
        batches.append(batch)
        if len(batches) == stop:
            return batches
    raise AssertionError


def test_counting_errors():
    sampler = sampler_of()
    with pytest.raises(RuntimeError, match="all that were made are counted"):
        sampler.step()
    batches = iter(sampler)
    next(batches)
    sampler.step()
    iter(sampler)
    with pytest.raises(RuntimeError, match="stale"):
        next(batches)


@pytest.mark.parametrize(
    ("n", "size", "options", "message"),
    [
        (10, 0, {}, "batch_size must be at least 1, got 0"),
        (10, 2.5, {}, "batch_size must be an integer, got 2.5"),
        (0, 1, {}, "n must be at least 1"),
        (10, 2, {"last": "pad"}, "last must be one of"),
        (10, 2, {"seed": -1}, "seed must be at least 0"),
        (10, 11, {"last": "drop"}, "never full"),
        (10, 6, {"last": "carry", "num_replicas": 2}, "at most 5"),
        (10, 2, {"num_replicas": 2, "rank": 2}, "rank must be below"),
        (2, 1, {"num_replicas": 3}, "cannot be split"),
    ],
)
def test_arguments_are_checked(n, size, options, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(n, size, **options)


def test_a_state_of_another_sampler_is_refused():
    with pytest.raises(ValueError, match="n=50, and this one has n=51"):
        sampler_of(51).load_state_dict(sampler_of(50).state_dict())
    state = sampler_of(num_replicas=2, rank=0).state_dict()
    sampler_of(num_replicas=2, rank=1).load_state_dict(state)


def test_ranks_are_those_of_torch_distributed(monkeypatch):
    for name, value in (
        ("is_initialized", True),
        ("get_world_size", 3),
        ("get_rank", 2),
    ):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    sampler = sampler_of(shuffle=False)
    assert (sampler.num_replicas, sampler.rank) == (3, 2)
    assert next(iter(sampler)) == [2, 5, 8, 11]
    assert next(iter(sampler_of(num_replicas=1, rank=0, shuffle=False))) == [0, 1, 2, 3]


def test_a_loader_that_changes_the_order_is_refused():
    sampler = sampler_of()
    with pytest.raises(ValueError, match="in_order=True"):
        sampler.consumed(loader_of(sampler, 2, in_order=False))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_counted", [False, True])
def test_set_epoch_in_the_loop_changes_nothing(is_counted, workers):
    """Schedules go on and samples are carried, counted or not."""

    def epochs(sets_epoch):
        sampler = sampler_of(
            22, 1, last="carry", schedule=lambda seen: 4 if seen < 40 else 6
        )
        loader = loader_of(sampler, workers)
        for epoch in range(4):
            if sets_epoch:
                sampler.set_epoch(epoch)
            yield list(sampler.consumed(loader) if is_counted else loader)

    want = list(epochs(False))
    assert list(epochs(True)) == want
    assert [len(batches) for batches in want] == [5, 5, 4, 4]


def test_set_epoch_after_a_pass_that_was_broken_off():
    sampler = sampler_of()
    want = list(sampler)
    sampler = sampler_of()
    next(iter(sampler))  # to see what a batch looks like
    sampler.set_epoch(0)
    assert sampler.samples_made == 0
    assert list(sampler) == want
    sampler.set_epoch(0)
    assert list(sampler) == want
    assert sampler.samples_made == 100
    next(iter(sampler))
    sampler.set_epoch(7)
    assert (sampler.epoch, sampler.samples_made) == (7, 104)


@pytest.mark.parametrize("is_counted", [False, True])
def test_the_length_of_an_epoch_with_carried_samples(is_counted):
    sampler = sampler_of(10, 4, last="carry")
    loader = loader_of(sampler)
    lengths, received = [], []
    for _ in range(4):
        lengths.append(len(loader))
        received.append(len(list(sampler.consumed(loader) if is_counted else loader)))
    assert lengths == received == [2, 3, 2, 3]
