"""mode="fused" under wrappers that wait for gradients inside the pass."""

import copy

import torch
import torch.distributed as dist
from rank_checks import check
from replicated import DDP_OPTIONS
from scenarios import full, load, sgd
from setting import (
    assert_close,
    assert_oracle,
    build_block,
    data,
    losses_of,
    share,
    words,
)
from sharded import MIXED, shard
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastminima as fm
from fastminima.capture.session import attach
from fastminima.capture.session.fused import find_fusion


class Fused:
    """What was fused in each pass."""

    def __enter__(self):
        self.names = []

        def spying(*args, **options):
            fusion = find_fusion(*args, **options)
            self.names.append(set() if fusion is None else set(fusion.names))
            return fusion

        attach.find_fusion = spying
        return self

    def __exit__(self, *_):
        attach.find_fusion = find_fusion


# Used several times, or in parts.
TIED = ("tokens.weight", "in_proj_weight")


def check_fused(make, whole_x):
    """Gradients after every step as those of the plain training, statistics exact."""
    x = share(whole_x)
    plain, probed = make(), make()
    single = build_block()
    optimizers = [sgd(plain), sgd(probed)]
    probe = fm.GradientProbe(probed, mode="fused")
    with Fused() as fused:
        for _ in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses_of(plain, x).mean().backward()
            load(single, probed)
            assert_oracle(probe.backward(losses_of(probed, x)), single, x)
            assert_same_gradients(plain, probed)
            for optimizer in optimizers:
                optimizer.step()
    for names in fused.names:
        assert len([name for name in names if name.endswith(TIED)]) == 3, names


def assert_same_gradients(plain, probed):
    for p, q in zip(plain.parameters(), probed.parameters(), strict=True):
        assert_close(full(q.grad), full(p.grad), rtol=1e-9, atol=1e-12)


def ddp_fused_check(name):
    def run():
        options = DDP_OPTIONS[name]
        check_fused(lambda: DistributedDataParallel(build_block(), **options), words())

    run.__name__ = f"ddp_fused_{name}"
    return check(run)


for name in DDP_OPTIONS:
    ddp_fused_check(name)


def fsdp_fused_check(name, reshard):
    def run():
        check_fused(lambda: shard(build_block(), reshard), words())

    run.__name__ = f"fsdp_fused_{name}"
    return check(run)


fsdp_fused_check("block", True)
fsdp_fused_check("unresharded", False)


@check
def fsdp_fused_mixed_precision():
    plain, probed = (shard(build_block().float(), mp_policy=MIXED) for _ in range(2))
    probe = fm.GradientProbe(probed, mode="fused")
    x = share(words())
    for _ in range(2):
        plain.zero_grad()
        probed.zero_grad()
        losses_of(plain, x).float().mean().backward()
        probe.backward(losses_of(probed, x).float())
        for p, q in zip(plain.parameters(), probed.parameters(), strict=True):
            # Both are rounded to bfloat16, the plain one use by use.
            error = (full(p.grad) - full(q.grad)).norm()
            assert error <= 2**-7 * full(p.grad).norm(), error


@check
def ddp_fused_gradient_accumulation():
    plain, probed = (DistributedDataParallel(build_block()) for _ in range(2))
    probe = fm.GradientProbe(probed, mode="fused")
    for seed in range(4):
        x = share(words(seed=seed))
        waits = seed % 2 == 0
        for model in (plain, probed):
            model.require_backward_grad_sync = not waits
        losses_of(plain, x).mean().backward()
        probe.backward(losses_of(probed, x))
        assert_same_gradients(plain, probed)


@check
def fsdp_fused_gradient_accumulation():
    plain, probed = shard(build_block()), shard(build_block())
    probe = fm.GradientProbe(probed, mode="fused")
    for seed in range(4):
        x = share(words(seed=seed))
        for model in (plain, probed):
            model.set_requires_gradient_sync(seed % 2 == 1)
        losses_of(plain, x).mean().backward()
        probe.backward(losses_of(probed, x))
        if seed % 2 == 1:
            assert_same_gradients(plain, probed)


class Tower(nn.Module):
    """Layers over sequences, whose outputs say when a pass comes by."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.log = []

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x).tanh()
            x.register_hook(lambda g, i=i: self.log.append(f"layer {i}"))
        return x


@check
def ddp_fused_reductions_start_inside_the_pass():
    logs = []
    for mode in (None, "observe", "fused"):
        tower = Tower()
        model = DistributedDataParallel(tower, bucket_cap_mb=0.0001)

        def reduction(_, bucket, log=tower.log):
            log.append(f"bucket {bucket.index()} of {bucket.buffer().numel()}")
            work = dist.all_reduce(
                bucket.buffer().div_(dist.get_world_size()), async_op=True
            )
            return work.get_future().then(lambda f: f.value()[0])

        model.register_comm_hook(None, reduction)
        probe = None if mode is None else fm.GradientProbe(model, mode=mode)
        steps = []
        for _ in range(3):  # buckets are rebuilt after the first
            model.zero_grad()
            x = share(torch.stack([data(), data(seed=2), data(seed=3)], 1))
            losses = losses_of(model, x)
            tower.log.clear()
            if probe is None:
                losses.mean().backward()
            else:
                probe.backward(losses)
            own = tower.log[-(4 + sum("bucket" in line for line in tower.log)) :]
            steps.append(list(own))
        logs.append(steps)
    assert logs[0] == logs[1]
    buckets = [line for line in logs[0][2] if line.startswith("bucket")]
    assert len(buckets) > 2
    assert [line for line in logs[2][2] if line.startswith("bucket")] == buckets
    # Not all of them at the end.
    assert logs[2][2].index(buckets[0]) < logs[2][2].index("layer 1"), logs[2][2]


@check
def ddp_fused_statistics_of_all_ranks():
    model = DistributedDataParallel(build_block())
    probe = fm.GradientProbe(model, mode="fused", keep_mean=True)
    stats = probe.backward(losses_of(model, share(words()))).all_reduce()
    assert_oracle(stats, copy.deepcopy(model.module), words())
