"""What is checked in the same way whatever wraps the model."""

import copy
import dataclasses
import warnings

import cases
import oracles
import torch
import torch.distributed as dist
from setting import (
    OPTIONS,
    assert_close,
    assert_oracle,
    assert_same,
    build,
    data,
    losses_of,
    share,
)
from torch import nn
from torch.distributed.tensor import DTensor

import fastminima as fm


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def directions(model, prefix=""):
    generator = torch.Generator().manual_seed(3)
    return {
        "v": {
            prefix + name: torch.randn(p.shape, generator=generator)
            for name, p in model.named_parameters()
        }
    }


def train(model, optimizer, x, step):
    """Three steps; `step(losses)` runs the backward pass."""
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        found.append(step(losses_of(model, x)))
        optimizer.step()
    return found


def check_training(make, whole_x, prefix, keep_mean, options=OPTIONS, build=build):
    """Bitwise the training without a probe, and the statistics of the joined batch."""
    x = share(whole_x)
    plain, probed, single = make(), make(), build()
    train(plain, sgd(plain), x, lambda losses: losses.mean().backward())
    probe = fm.GradientProbe(
        probed,
        process_group="world",
        keep_mean=keep_mean,
        directions=directions(single, prefix),
        **options,
    )
    optimizer = sgd(probed)
    alone = fm.GradientProbe(
        single, keep_mean=keep_mean, directions=directions(single), **options
    )
    for _ in range(3):
        optimizer.zero_grad()
        stats = probe.backward(losses_of(probed, x))
        load(single, probed)
        want = alone.backward(losses_of(single, whole_x))
        assert_same(stats, want, prefix)
        assert_oracle(stats, single, whole_x)
        optimizer.step()
    for p, q in zip(plain.parameters(), probed.parameters(), strict=True):
        assert torch.equal(full(p), full(q))


def full(p):
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


@torch.no_grad()
def load(single, parallel):
    for p, q in zip(single.parameters(), parallel.parameters(), strict=True):
        p.copy_(full(q))


def check_batch_norm(make, mode, prefix):
    """Statistics over each rank's batch; the gradients of the ranks' rows join."""
    single = build_normalised()
    parts = [
        fm.GradientProbe(single, keep_mean=True, batchnorm=mode).backward(
            losses_of(single, part)
        )
        for part in data(8).double().chunk(2)
    ]
    model = make()
    probe = fm.GradientProbe(
        model, process_group="world", keep_mean=True, batchnorm=mode
    )
    for _ in range(2):
        model.zero_grad()
        stats = probe.backward(losses_of(model, share(data(8).double())))
        assert_same(stats, parts[0] + parts[1], prefix)
    if mode == "rows":
        model.zero_grad()
        probe = fm.GradientProbe(model, process_group="world", batchnorm=mode)
        stats = probe.backward(losses_of(model, share(data(8).double())))
        assert_close(stats.mean_grad_sq_norm, (parts[0] + parts[1]).mean_grad_sq_norm)


def build_normalised():
    torch.manual_seed(0)
    layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


class Called(nn.Module):
    """A model in the way a case calls it, as the forward of a module."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *inputs):
        return self.call(self.inner, *inputs)


def check_cases(wrap, prefix, skip=()):
    """Every way to use a parameter that the tests of one process know."""
    for case in cases.CASES:
        if case.name in skip:
            continue
        single, batch = case.make()
        single = Called(single, case.call).double()
        case = dataclasses.replace(case, call=lambda model, *inputs: model(*inputs))
        batch = [oracles.to_double(t) for t in batch]
        counts = [len(batch[0]) // 2, len(batch[0]) - len(batch[0]) // 2]
        parts = list(zip(*(t.split(counts) for t in batch), strict=True))
        own = parts[dist.get_rank()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = wrap(copy.deepcopy(single))
            alone = fm.GradientProbe(single, keep_mean=True, **OPTIONS)
            probe = fm.GradientProbe(
                model, keep_mean=True, process_group="world", **OPTIONS
            )
            want = [alone.backward(case.losses(single, part)) for part in parts]
            stats = probe.backward(case.losses(model, own))
        try:
            assert_same(stats, want[0] + want[1], prefix)
        except AssertionError as error:
            raise AssertionError(case.name) from error
