"""A small classifier, its data, and what its rows should say."""

from itertools import pairwise
from pathlib import Path

import torch
from oracles import flat, single_sample_gradients
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fastminima.monitor import Logger

BATCH, BATCHES = 6, 4
UNEVEN = 22  # samples whose last batch is smaller
TRAINED = 4 * 5 + 5 + 5 * 3 + 3  # parameters of the classifier


def classifier():
    """In float64, so that rounding hides nothing."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def dataset(samples=BATCH * BATCHES):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=generator))


def losses(model, batch):
    x, y = batch
    return cross_entropy(model(x), y, reduction="none")


def joined(seen, accumulate):
    """What each step of so many batches saw: its batches, one after the other."""
    found = []
    for first in range(0, len(seen), accumulate):
        step = seen[first : first + accumulate]
        parts = zip(*(batch for _, batch in step), strict=True)
        found.append((step[0][0], tuple(torch.cat(part) for part in parts)))
    return found


def check_steps_taken(rows, models, tolerance=1e-6):
    """Rows of plain SGD against how far parameters went from each model to the next.

    A step goes as far as the row's mean gradient times the rate behind its ratio.
    """
    vectors = [nn.utils.parameters_to_vector(model.parameters()) for model in models]
    for row, (before, after) in zip(rows.rows, pairwise(vectors), strict=True):
        rate = row["factors/ratio"] * row["factors/batch_size"]
        taken = rate * row["gradient/mean_grad_sq_norm"] ** 0.5
        moved = (after - before).norm().item()
        assert abs(taken - moved) < tolerance * moved


class Rows(Logger):
    """Keeps rows, each with the statistics behind it."""

    def __init__(self):
        self.rows, self.stats, self.watch, self.is_closed = [], [], None, False

    def write(self, row):
        self.rows.append(row)
        if self.watch is not None:
            self.stats.append(self.watch.stats)

    def close(self):
        self.is_closed = True


def check(rows, seen, per_sample=losses, **tolerance):
    """Rows against single-sample gradients of the models and batches they saw."""
    assert len(rows.rows) == len(seen)
    for row, stats, (model, batch) in zip(rows.rows, rows.stats, seen, strict=True):
        g = flat(single_sample_gradients(model, per_sample, batch))
        norms = stats.sq_norms.double()
        torch.testing.assert_close(norms, g.square().sum(1), **tolerance)
        want = {
            "covariance_trace": g.var(0).sum(),
            "mean_grad_sq_norm": g.mean(0).square().sum(),
            "norm_max": g.norm(dim=1).max(),
        }
        for name, value in want.items():
            got = torch.tensor(row[f"gradient/{name}"], dtype=torch.float64)
            torch.testing.assert_close(got, value, **tolerance)
        loss = per_sample(model.double(), [_double(t) for t in batch]).mean()
        got = torch.tensor(row["loss"], dtype=torch.float64)
        torch.testing.assert_close(got, loss.detach(), **tolerance)
        assert row["gradient/count"] == len(g)


def _double(t):
    return t.double() if t.is_floating_point() else t


def fail_in_backward(parameter, error):
    """Raise when this gradient arrives: in training, not in passes that measure."""

    def hook(_):
        raise error

    return parameter.register_post_accumulate_grad_hook(hook)


def accumulators(model):
    """Kept alive, as DistributedDataParallel does: a hook left there would be seen."""
    return [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]


def open_files(folder):
    """Names of the files in a folder that this process has open; on Linux."""
    links = Path("/proc/self/fd").iterdir()
    paths = [link.readlink() for link in links if link.is_symlink()]
    return [path.name for path in paths if path.is_relative_to(folder)]
