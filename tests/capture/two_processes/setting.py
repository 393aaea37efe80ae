"""Models, shares of a batch and comparisons that the checks have in common."""

from contextlib import contextmanager

import oracles
import torch
import torch.distributed as dist
from torch import nn


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )


class Block(nn.Module):
    """A small transformer with a tied head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build_block(seed=0):
    torch.manual_seed(seed)
    return Block().double()


def data(samples=6, seed=1):
    return torch.randn(samples, 5, generator=torch.Generator().manual_seed(seed))


def words(samples=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(11, (samples, 4), generator=generator)


def losses_of(model, x):
    out = model(x).flatten(1)
    weight = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)
    return (out * weight).sin().sum(1)


def share(x, counts=None):
    """This rank's part of a batch."""
    if counts is None:
        return x.chunk(dist.get_world_size())[dist.get_rank()]
    return x.split(counts)[dist.get_rank()]


def assert_close(got, want, **tolerance):
    torch.testing.assert_close(got, want, check_dtype=False, **tolerance)


def assert_same(got, want, prefix="", **tolerance):
    """Statistics of all ranks, and of one process on the joined batch."""
    assert (got.count, got.parameter_count) == (want.count, want.parameter_count)
    for name in ("sq_norms", "mean_grad_sq_norm", "covariance_trace", "noise_scale"):
        assert_close(getattr(got, name), getattr(want, name), **tolerance)
    assert_close(got.dots, want.dots, **tolerance)
    for name in (
        *("sq_norms_by_parameter", "mean_grad_sq_norms_by_parameter"),
        *("second_moments", "mean_grad"),
    ):
        ours, theirs = getattr(got, name), getattr(want, name)
        if theirs is None:
            assert ours is None, name
            continue
        named = {prefix + key: value for key, value in theirs.items()}
        assert ours.keys() == named.keys(), name
        assert_close(ours, named, **tolerance)
    if want.mean_grad is not None and want.second_moments is not None:
        named = {prefix + key: value for key, value in want.variance.items()}
        assert_close(got.variance, named, **tolerance)
    assert got.gram is None


def assert_oracle(stats, model, x):
    """Norms, mean and variance in float64, one sample at a time."""
    grads = oracles.single_sample_gradients(
        model, lambda m, batch: losses_of(m, *batch), (x,)
    )
    g = oracles.flat(grads)
    assert_close(stats.sq_norms.double(), g.square().sum(1), rtol=1e-4, atol=1e-6)
    mean = g.mean(0)
    assert_close(
        stats.mean_grad_sq_norm.double(), mean.square().sum(), rtol=1e-4, atol=1e-6
    )
    assert_close(stats.covariance_trace.double(), g.var(0).sum(), rtol=1e-4, atol=1e-6)


@contextmanager
def counted_collectives():
    """Names and bytes of the collectives that Python calls in the context."""
    calls, originals = [], {}
    for name in ("all_gather", "all_reduce", "all_gather_object", "broadcast"):
        originals[name] = original = getattr(dist, name)

        def wrapper(*args, _name=name, _original=original, **kwargs):
            sent = [a for a in args if isinstance(a, torch.Tensor)]
            calls.append((_name, sum(t.nbytes for t in sent)))
            return _original(*args, **kwargs)

        setattr(dist, name, wrapper)
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


OPTIONS = {"measure": ("norms", "second_moments"), "per_parameter": True}
