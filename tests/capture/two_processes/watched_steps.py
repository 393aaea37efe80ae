"""`fm.monitor.watch` under DistributedDataParallel: what a step is made of."""

import torch
import torch.distributed as dist
from rank_checks import check, raised
from setting import build, data, losses_of, share
from torch.nn.parallel import DistributedDataParallel

import fastminima as fm


def rows_of(poisoned=None, **options):
    """Rows of two steps, the second with an input that is not finite on a rank."""
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    w = fm.monitor.watch(
        *(model, optimizer, lambda model, x: losses_of(model, x).mean()),
        sharpness=1,
        **options,
    )
    x, rows = share(data()), []
    for step in range(2):
        if step and dist.get_rank() == poisoned:
            x = x * torch.nan
        model.zero_grad()
        rows.append(w.backward(losses_of(model, x), batch=x))
    return rows, len(x)


@check
def watched_batch_size_is_that_of_all_ranks():
    for options in ({}, {"process_group": "world"}):
        (row, _), count = rows_of(**options)
        assert row["gradient/count"] == count * (2 if options else 1)
        assert row["factors/batch_size"] == 2 * count
        assert abs(row["factors/ratio"] - 0.1 / (2 * count)) < 1e-12


@check
def watched_layers_are_those_of_the_model():
    (row, _), _ = rows_of()
    assert not [name for name in row if name.startswith("layers/module")]
    assert [name for name in row if name.startswith("layers/")]


@check
def watched_clipping_needs_the_gradient_of_all_ranks():
    raised(lambda: rows_of(max_norm=1.0), ValueError, "process_group='world'")
    (row, _), _ = rows_of(max_norm=1e-6, process_group="world")
    assert row["factors/clip"] < 1


@check
def watched_step_that_is_not_finite_on_one_rank():
    (before, after), _ = rows_of(poisoned=1, process_group="world")
    assert "sharpness/eigenvalue_1" in before
    assert "sharpness/eigenvalue_1" not in after
    assert not after["is_finite"]
