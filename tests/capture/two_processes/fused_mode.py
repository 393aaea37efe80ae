"""mode="fused" under wrappers that wait for gradients inside the pass."""

import copy

import torch
import torch.distributed as dist
from replicated import DDP_OPTIONS
from scenarios import full
from setting import (
    assert_close,
    assert_oracle,
    build_block,
    check,
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

        def spying(reading, parameters):
            fusion = find_fusion(reading, parameters)
            self.names.append(set() if fusion is None else set(fusion.names))
            return fusion

        attach.find_fusion = spying
        return self

    def __exit__(self, *_):
        attach.find_fusion = find_fusion


def tied(names):
    return {name for name in names if name.endswith(("tokens.weight", "in_proj_weight"))}


def check_fused(make, whole_x, steps=4, is_rounded=False):
    """Gradients after every step as those of the plain training, statistics exact."""
    x = share(whole_x)
    plain, probed = make(), make()
    single = build_block()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, probed)]
    probe = fm.GradientProbe(probed, mode="fused")
    room = {"rtol": 1e-2, "atol": 1e-3} if is_rounded else {"rtol": 1e-9, "atol": 1e-12}
    with Fused() as fused:
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses_of(plain, x).mean().backward()
            load(single, probed)
            stats = probe.backward(losses_of(probed, x))
            if not is_rounded:
                assert_oracle(stats, single, x)
            for p, q in zip(plain.parameters(), probed.parameters(), strict=True):
                assert_close(full(q.grad), full(p.grad), **room)
            for optimizer in optimizers:
                optimizer.step()
    assert all(len(tied(names)) == 3 and len(names) > 8 for names in fused.names)


@torch.no_grad()
def load(single, parallel):
    for p, q in zip(single.parameters(), parallel.parameters(), strict=True):
        p.copy_(full(q))


def ddp_fused_check(name):
    def run():
        options = DDP_OPTIONS[name]
        check_fused(lambda: DistributedDataParallel(build_block(), **options), words())

    run.__name__ = f"ddp_fused_{name}"
    return check(run)


for name in DDP_OPTIONS:
    ddp_fused_check(name)


def fsdp_fused_check(name, *, reshard=True, **options):
    def run():
        check_fused(lambda: shard(build_block(), reshard, **options), words())

    run.__name__ = f"fsdp_fused_{name}"
    return check(run)


fsdp_fused_check("block")
fsdp_fused_check("unresharded", reshard=False)


@check
def fsdp_fused_mixed_precision():
    check_fused(
        lambda: shard(build_block().float(), mp_policy=MIXED),
        words(),
        is_rounded=True,
    )


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
        for p, q in zip(plain.parameters(), probed.parameters(), strict=True):
            assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)


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
            for p, q in zip(plain.parameters(), probed.parameters(), strict=True):
                assert_close(full(q.grad), full(p.grad), rtol=1e-9, atol=1e-12)


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
