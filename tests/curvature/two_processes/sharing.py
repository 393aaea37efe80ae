"""Models, shares of a batch and comparisons that the checks have in common."""

from contextlib import contextmanager

import cases
import torch
import torch.distributed as dist
from torch import nn

import fastminima as fm

COUNTS = [7, 3]  # of ten samples
EXACT = {"rtol": 1e-12, "atol": 1e-14}  # where parts are only added in another order


def rank():
    return dist.get_rank()


def share(batch, counts=COUNTS):
    """This rank's part of a batch."""
    return tuple(t.split(counts)[rank()].clone() for t in batch)


def replicated(name, dtype=torch.float64):
    """A model, the same under DistributedDataParallel, the batch and this share."""
    model, batch = cases.make(name, dtype)
    copy, _ = cases.make(name, dtype)
    wrapped = nn.parallel.DistributedDataParallel(copy)
    return model, wrapped, batch, share(batch)


def operators(model, batch, **options):
    """Each operator over a model and data."""
    outputs = cases.outputs, cases.output_loss
    return {
        "hessian": fm.Hessian(model, cases.loss, batch, **options),
        "gauss_newton": fm.GaussNewton(model, *outputs, batch, **options),
        "covariance": fm.GradientCovariance(model, cases.losses, batch, **options),
    }


def vectors(H, count=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (H.shape[0], count) if count > 1 else (H.shape[0],)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(H.dtype)


def assert_near(got, want, **tolerance):
    """Elementwise, beside the largest element: what is added up cancels in some."""
    largest = float(want.abs().max()) or 1.0
    torch.testing.assert_close(got / largest, want / largest, **(tolerance or EXACT))


@contextmanager
def counted_collectives():
    """Names of the collectives that are called in the context."""
    calls, originals = [], {}
    names = ("all_gather", "all_reduce", "all_gather_object", "broadcast")
    for name in names:
        originals[name] = original = getattr(dist, name)

        def wrapper(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, wrapper)
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
