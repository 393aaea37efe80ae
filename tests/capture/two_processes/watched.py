"""Whose the largest samples of a watched step are, where each rank has its own."""

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from oracles import flat, single_sample_gradients
from rank_checks import check, raised
from setting import build, data, losses_of, share
from torch.nn.parallel import DistributedDataParallel

import fastminima as fm

EVEN, UNEVEN = [[3, 3], [2, 2]], [[5, 3], [2, 6]]  # of each batch, on each rank


def names_of(sizes):
    """What each rank calls its samples: rank, batch, index."""
    batches = list(enumerate(sizes))
    return [
        (rank, batch, i) for batch, of in batches for rank, n in enumerate(of)
        for i in range(n)
    ]  # fmt: skip


def watched(sizes, ids, **options):
    """The table of the largest samples of a step, the joined batches, and the loss."""
    model = DistributedDataParallel(build())
    joined = [data(sum(of), seed) for seed, of in enumerate(sizes)]
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as folder:
        w = fm.monitor.watch(
            *(model, None, None, folder), accumulate=len(sizes), largest=100,
            process_group="world", **options,
        )  # fmt: skip
        for batch, (x, of) in enumerate(zip(joined, sizes, strict=True)):
            names = [(rank, batch, i) for i in range(of[rank])]
            w.backward(losses_of(model, share(x, of)), ids=names if ids else None)
        loss = w.row["loss"]
        files = sorted(path.name for path in Path(folder).iterdir())
        assert ("samples.jsonl" in files) == (rank == 0), files
        text = Path(folder, "samples.jsonl").read_text() if rank == 0 else None
    return text and json.loads(text)["samples"], torch.cat(joined), loss


def check_table(sizes, ids, **options):
    table, joined, loss = watched(sizes, ids, **options)
    losses = losses_of(build(), joined).detach()
    torch.testing.assert_close(loss, losses.mean().item(), rtol=1e-5, atol=0)
    if table is None:
        return  # the first rank writes
    grads = single_sample_gradients(build(), lambda m, x: losses_of(m, *x), (joined,))
    norms = flat(grads).norm(dim=1)
    places = names_of(sizes)
    order = norms.argsort(descending=True).tolist()
    assert len(table) == len(places)
    for one, number in zip(table, order, strict=True):
        rank, batch, index = places[number]
        assert (one["rank"], one["microbatch"], one["index"]) == places[number]
        assert one["id"] == ([rank, batch, index] if ids else index)
        torch.testing.assert_close(
            one["loss"], losses[number].item(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(one["norm"], norms[number].item(), rtol=1e-4, atol=0)


@check
def watched_ids_are_those_of_the_ranks():
    check_table(EVEN, ids=True, keep_mean=True)


@check
def watched_ids_with_batches_of_any_size():
    check_table(UNEVEN, ids=True, keep_mean=True)


@check
def watched_ranks_without_ids():
    check_table(UNEVEN, ids=False, keep_mean=True)
    check_table(EVEN[:1], ids=False)


@check
def watched_samples_that_are_not_all_have_no_rank():
    table, joined, loss = watched([[4, 4]], True, sample=2)
    want = losses_of(build(), joined).mean().item()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    if table is not None:
        assert [one["rank"] for one in table] == [None] * 4
        assert sorted(one["id"] for one in table) == [0, 1, 2, 3]


@check
def watched_rows_need_the_sizes_of_batches():
    stats = fm.GradientStatistics(2, 1, torch.ones(2), torch.tensor(0.5))
    monitor = fm.monitor.Monitor(largest=1)
    raised(lambda: monitor.log(0, stats, process_group="world"), ValueError, "sizes")


@check
def watched_samples_that_are_not_all_in_several_batches():
    table, _, _ = watched([[4, 4], [4, 4]], True, sample=2, keep_mean=True)
    if table is not None:
        assert [(one["rank"], one["loss"]) for one in table] == [(None, None)] * 8
        assert sorted(one["id"] for one in table) == list(range(8))


@check
def watched_ranks_that_differ_say_so_on_all():
    """Nobody waits for a message that another rank does not send."""
    stats = fm.GradientStatistics(4, 1, torch.ones(4), torch.tensor(0.5))
    monitor, rank = fm.monitor.Monitor(largest=1), dist.get_rank()

    def log(**options):
        monitor.log(0, stats, process_group="world", **options)

    sizes = [[2], [1, 1]][rank]
    raised(lambda: log(microbatches=sizes), ValueError, "numbers of batches", "[1, 2]")
    loss = [torch.ones(2), None][rank]
    raised(lambda: log(microbatches=[2], loss=loss), ValueError, "Some ranks gave")


@check
def watched_rows_of_curvature_alone_ask_nobody():
    """One rank has none where its own losses are not finite: no other waits for it."""
    model = build()  # whose gradients the loop averages
    options = {"every": 2, "sharpness": 1, "process_group": "world", "keep_mean": True}
    w = fm.monitor.watch(model, None, lambda m, b: losses_of(m, *b).mean(), **options)
    mine = share(data(6, 0), [3, 3])
    w.backward(losses_of(model, mine), batch=(mine,))
    losses = losses_of(model, mine)
    if dist.get_rank():
        losses = losses * float("inf")
    row = w.backward(losses, batch=(mine,))
    assert (row is None) == (dist.get_rank() == 1)
    if row is not None:
        assert row["loss"] == losses.mean().item()
