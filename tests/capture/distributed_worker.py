"""What two processes check together; `test_distributed.py` launches this with torchrun.

Each rank takes its share of one batch, and what comes out is compared with the probe of
one process on the whole batch and with the float64 oracle. A check that fails says so
in the file `<folder>/<rank>.json`, and the next one runs.
"""

import copy
import dataclasses
import datetime
import json
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastminima as fm

sys.path.insert(0, str(Path(__file__).parents[1]))
import cases
import oracles

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


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


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def assert_close(got, want, **tolerance):
    torch.testing.assert_close(got, want, check_dtype=False, **tolerance)


def assert_same(got, want, prefix="", **tolerance):
    """Statistics of all ranks, and of one process on the joined batch."""
    assert (got.count, got.parameter_count) == (want.count, want.parameter_count)
    for name in ("sq_norms", "mean_grad_sq_norm", "covariance_trace", "noise_scale"):
        assert_close(getattr(got, name), getattr(want, name), **tolerance)
    assert_close(got.dots, want.dots, **tolerance)
    for name in ("sq_norms_by_parameter", "second_moments", "mean_grad"):
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


def raised(call, kind, match):
    """That `call` raises on this rank."""
    try:
        call()
    except kind as error:
        assert match in str(error), str(error)
        return error
    raise AssertionError(f"no {kind.__name__}")


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


# DistributedDataParallel


DDP_OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static_unused": {"static_graph": True, "find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "buckets": {"bucket_cap_mb": 0.0001},
}
OPTIONS = {"measure": ("norms", "second_moments"), "per_parameter": True}


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


def ddp_check(name, keep_mean):
    def run():
        def make():
            return DistributedDataParallel(build(), **DDP_OPTIONS[name])

        check_training(make, data(), "module.", keep_mean)

    run.__name__ = f"ddp_{name}" + ("_keep_mean" if keep_mean else "")
    return check(run)


for name in DDP_OPTIONS:
    ddp_check(name, keep_mean=False)
for name in ("plain", "static"):
    ddp_check(name, keep_mean=True)


@check
def ddp_names_of_the_inner_module():
    model = DistributedDataParallel(build())
    probe = fm.GradientProbe(model.module, process_group="world", per_parameter=True)
    stats = probe.backward(losses_of(model, share(data())))
    assert next(iter(stats.sq_norms_by_parameter)) == "0.weight"
    assert_oracle(stats, build(), data())


@check
def ddp_attach_and_collect():
    model = DistributedDataParallel(build())
    probe = fm.GradientProbe(model, process_group="world")
    loss = losses_of(model, share(data())).mean() * 128
    probe.attach(loss, batch_size=3, scale=128)
    loss.backward()
    assert_oracle(probe.collect(), build(), data())


@check
def ddp_local_statistics_are_of_this_rank():
    model = DistributedDataParallel(build())
    x = share(data())
    stats = fm.GradientProbe(model).backward(losses_of(model, x))
    assert_oracle(stats, build(), x)


@check
def ddp_sums_may_have_unequal_counts():
    model = DistributedDataParallel(build())
    probe = fm.GradientProbe(model, process_group="world")
    x = share(data(), [2, 4])
    loss = losses_of(model, x).sum()
    stats = probe.backward(loss, batch_size=len(x), reduction="sum")
    assert_oracle(stats, build(), data())


@check
def ddp_unequal_counts():
    model = DistributedDataParallel(build())
    x = share(data(), [2, 4])
    probe = fm.GradientProbe(model, process_group="world")
    error = raised(
        lambda: probe.backward(losses_of(model, x)), ValueError, "drop_last=True"
    )
    assert "[2, 4]" in str(error)
    probe = fm.GradientProbe(model, process_group="world", keep_mean=True, **OPTIONS)
    for counts in ([2, 4], [1, 20], [7, 3], [3, 3]):
        whole_x = data(sum(counts))
        stats = probe.backward(losses_of(model, share(whole_x, counts)))
        single = build()
        alone = fm.GradientProbe(single, keep_mean=True, **OPTIONS)
        assert_same(stats, alone.backward(losses_of(single, whole_x)), "module.")
        assert_oracle(stats, single, whole_x)


@check
def ddp_accumulation():
    model = DistributedDataParallel(build())
    x = share(data())
    probe = fm.GradientProbe(model, process_group="world")
    with model.no_sync():
        losses = losses_of(model, x)
        raised(lambda: probe.backward(losses), ValueError, "no_sync()")
    local = [p.grad.clone() for p in model.parameters()]
    losses = losses_of(model, x)
    error = raised(lambda: probe.backward(losses), ValueError, "earlier backward")
    assert "'module.0.weight'" in str(error)
    # The pass has run all the same: the ranks' sums are now averaged.
    for p, before in zip(model.parameters(), local, strict=True):
        assert not torch.equal(p.grad, before)
    sums = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with model.no_sync():
        losses_of(model, x).mean().backward()
    losses_of(model, x).mean().backward()
    for p, got in zip(model.parameters(), sums, strict=True):
        assert torch.equal(p.grad, got)
    # Nor does it pass when one rank's gradient is not finite.
    model.zero_grad()
    with model.no_sync():
        losses = losses_of(model, x / (1 - dist.get_rank()))
        raised(lambda: probe.backward(losses), ValueError, "no_sync()")
    model.zero_grad()
    # With the mean kept, single passes are right whatever is in .grad.
    probe = fm.GradientProbe(model, process_group="world", keep_mean=True)
    with model.no_sync():
        assert_oracle(probe.backward(losses_of(model, x)), build(), data())
    stats = probe.backward(losses_of(model, x))
    assert_oracle(stats, build(), data())
    assert_close((stats + stats).mean_grad_sq_norm, stats.mean_grad_sq_norm)
    # Gradients of zero are none.
    model.zero_grad(set_to_none=False)
    probe = fm.GradientProbe(model, process_group="world")
    assert_oracle(probe.backward(losses_of(model, x)), build(), data())


@check
def ddp_gradients_gone_before_collect():
    model = DistributedDataParallel(build())
    probe = fm.GradientProbe(model, process_group="world")
    loss = losses_of(model, share(data())).mean()
    probe.attach(loss, batch_size=3)
    loss.backward()
    model.zero_grad()
    raised(probe.collect, ValueError, "no gradient in .grad of 'module.0.weight'")


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x, which):
        return self.branches[which](x)


@check
def ddp_ranks_reach_different_parameters():
    rank = dist.get_rank()
    torch.manual_seed(0)
    single = Branches()
    x = data()
    parts = [
        fm.GradientProbe(single, keep_mean=True, **OPTIONS).backward(
            losses_of(lambda x, i=i: single(x, i), x.chunk(2)[i])
        )
        for i in range(2)
    ]
    want = parts[0] + parts[1]
    model = DistributedDataParallel(copy.deepcopy(single), find_unused_parameters=True)
    for keep_mean in (False, True):
        model.zero_grad()
        probe = fm.GradientProbe(
            model.module, process_group="world", keep_mean=keep_mean, **OPTIONS
        )
        stats = probe.backward(losses_of(lambda x: model(x, rank), share(x)))
        assert list(stats.second_moments) == [
            f"branches.{i}.{n}" for i in range(2) for n in ("weight", "bias")
        ]
        if keep_mean:
            assert_same(stats, want)
        else:
            assert_close(stats.mean_grad_sq_norm, want.mean_grad_sq_norm)
            assert_close(stats.sq_norms_by_parameter, want.sq_norms_by_parameter)
            assert_close(stats.second_moments, want.second_moments)
    # The call on finished statistics of each rank.
    model.zero_grad()
    probe = fm.GradientProbe(model.module, keep_mean=True, **OPTIONS)
    stats = probe.backward(losses_of(lambda x: model(x, rank), share(x)))
    assert_same(stats.all_reduce(), want)


@check
def ddp_every():
    model = DistributedDataParallel(build())
    probe = fm.GradientProbe(model, process_group="world", every=2)
    for step in range(4):
        model.zero_grad()
        with counted_collectives() as calls:
            stats = probe.backward(losses_of(model, share(data())))
        assert (stats is None) == (step % 2 == 1)
        assert bool(calls) == (step % 2 == 0)
        if stats is not None:
            assert_oracle(stats, build(), data())


@check
def ddp_nan_on_one_rank():
    model = DistributedDataParallel(build())
    probe = fm.GradientProbe(model, process_group="world")
    x = data()
    x[4] = torch.nan  # of rank 1
    for _ in range(2):
        model.zero_grad()
        stats = probe.backward(losses_of(model, share(x)))
        assert not stats.is_finite
        assert stats.sq_norms.isfinite().tolist() == [True] * 4 + [False, True]
        assert stats.mean_grad_sq_norm.isnan()
    model.zero_grad()
    assert_oracle(probe.backward(losses_of(model, share(data()))), build(), data())


@check
def ddp_an_error_of_one_rank_is_raised_on_all():
    model = DistributedDataParallel(build())
    plain = DistributedDataParallel(build())
    x = share(data())

    def losses(m):
        found = losses_of(m, x)
        return found * found.mean() if dist.get_rank() == 1 else found

    losses(plain).mean().backward()
    probe = fm.GradientProbe(model, process_group="world")
    error = raised(
        lambda: probe.backward(losses(model)), fm.CaptureError, "do not each belong"
    )
    assert str(error).startswith("Rank 1") == (dist.get_rank() == 0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    model.zero_grad()
    loss = losses(model)
    probe.attach(loss)
    loss.mean().backward()
    raised(probe.collect, fm.CaptureError, "do not each belong")
    model.zero_grad()
    found = losses_of(model, x).mean()
    size = 3 if dist.get_rank() == 0 else 0
    raised(
        lambda: probe.backward(found, batch_size=size), ValueError, "positive integer"
    )
    model.zero_grad()
    assert_oracle(probe.backward(losses_of(model, x)), build(), data())
    assert not any(p._backward_hooks for p in model.parameters())


@check
def ddp_an_error_in_the_middle_of_a_pass():
    model = DistributedDataParallel(build())
    x = share(data())
    probe = fm.GradientProbe(model, process_group="world")
    session = fm.capture.session.Session
    visit = session._visit

    def fails(self, use, *rest):
        if "module.2.weight" in use.parameters:
            raise fm.CaptureError("met something")
        return visit(self, use, *rest)

    if dist.get_rank() == 1:
        session._visit = fails
    try:
        raised(
            lambda: probe.backward(losses_of(model, x)),
            fm.CaptureError,
            "met something",
        )
    finally:
        session._visit = visit
    plain = DistributedDataParallel(build())
    losses_of(plain, x).mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    model.zero_grad()
    assert_oracle(probe.backward(losses_of(model, x)), build(), data())


@check
def ddp_reductions_start_where_they_did():
    """Order and place in the backward pass of each bucket's reduction."""
    logs = []
    for options in (None, {}, {"keep_mean": True}, {"process_group": None}):
        model = DistributedDataParallel(build(), bucket_cap_mb=0.0001)
        log = []

        def reduction(_, bucket, log=log):
            log.append(f"bucket {bucket.index()} of {bucket.buffer().numel()}")
            work = dist.all_reduce(
                bucket.buffer().div_(dist.get_world_size()), async_op=True
            )
            return work.get_future().then(lambda f: f.value()[0])

        model.register_comm_hook(None, reduction)
        for name, p in model.named_parameters():
            p.register_hook(lambda g, name=name, log=log: log.append(name))
        settings = {"process_group": "world", **OPTIONS, **(options or {})}
        probe = fm.GradientProbe(model, **settings)
        steps = []
        for _ in range(3):  # buckets are rebuilt after the first
            model.zero_grad()
            losses = losses_of(model, share(data()))
            if options is not None:
                probe.attach(losses)
            log.clear()
            losses.mean().backward()
            steps.append(list(log))
            if options is not None:
                is_joint = probe.collect().count == 6
                assert is_joint == (settings["process_group"] is not None)
        logs.append(steps)
    for other in logs[1:]:
        assert logs[0] == other
    assert sum(line.startswith("bucket") for line in logs[1][2]) > 2
    first = next(i for i, line in enumerate(logs[1][2]) if line.startswith("bucket"))
    assert any(not line.startswith("bucket") for line in logs[1][2][first:])


@check
def ddp_one_small_collective_a_step():
    model = DistributedDataParallel(build())
    per_step = []
    probe = fm.GradientProbe(model, process_group="world")
    for _ in range(3):
        model.zero_grad()
        with counted_collectives() as calls:
            probe.backward(losses_of(model, share(data())))
        per_step.append(calls)
    numbers = 5 + len(list(model.parameters())) + 3  # head, was reached?, norms
    assert per_step[1:] == [[("all_gather", 8 * numbers)]] * 2
    assert [name for name, _ in per_step[0]] == ["all_gather"] * 2  # the count is new
    probe = fm.GradientProbe(
        model, ("norms", "second_moments"), keep_mean=True, process_group="world"
    )
    for _ in range(2):
        with counted_collectives() as calls:
            probe.backward(losses_of(model, share(data())))
    vector = 4 * sum(p.numel() for p in model.parameters())
    assert calls[1:] == [("all_reduce", vector)] * 2


@check
def ddp_without_a_wrapper():
    model = build()  # nobody reduces its gradients
    x = share(data())
    probe = fm.GradientProbe(model, process_group="world")
    losses = losses_of(model, x)
    raised(lambda: probe.backward(losses), ValueError, "different gradients")
    probe = fm.GradientProbe(model, process_group="world", keep_mean=True)
    assert_oracle(probe.backward(losses_of(model, x)), build(), data())


@check
def ddp_different_probes():
    model = build()
    per_parameter = dist.get_rank() == 1
    raised(
        lambda: fm.GradientProbe(
            model, process_group="world", per_parameter=per_parameter
        ),
        ValueError,
        "ranks 0 and 1 differ",
    )


@check
def ddp_group_of_other_ranks():
    groups = [dist.new_group([i]) for i in range(2)]
    model = DistributedDataParallel(build())
    own = groups[dist.get_rank()]
    raised(
        lambda: fm.GradientProbe(model, process_group=own),
        ValueError,
        "averaged over [2] ranks",
    )
    probe = fm.GradientProbe(model, process_group=own, keep_mean=True)
    assert_oracle(
        probe.backward(losses_of(model, share(data()))), build(), share(data())
    )


@check
def ddp_a_group_of_one():
    groups = [dist.new_group([i]) for i in range(2)]
    rank = dist.get_rank()
    model = build()
    probe = fm.GradientProbe(model, process_group=groups[rank])
    assert_oracle(
        probe.backward(losses_of(model, share(data()))), build(), share(data())
    )
    raised(
        lambda: fm.GradientProbe(model, process_group=groups[1 - rank]),
        ValueError,
        "process_group must be",
    )


@check
def a_collective_in_the_graph_is_refused():
    model = build()
    probe = fm.GradientProbe(model)
    losses = losses_of(model, share(data()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed import _functional_collectives as functional
        from torch.distributed.nn.functional import all_reduce

        joint = [
            all_reduce(losses.clone()),
            functional.all_reduce(losses, "sum", dist.group.WORLD),
        ]
        for loss in joint:
            raised(lambda loss=loss: probe.backward(loss), fm.CaptureError, "ranks'")


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


@check
def ddp_batch_norm():
    for mode in ("rows", "frozen"):
        for options in ({}, {"static_graph": True}):
            check_batch_norm(
                lambda o=options: DistributedDataParallel(build_normalised(), **o),
                mode,
                "module.",
            )


@check
def ddp_audit_before_the_first_step():
    for options in DDP_OPTIONS.values():
        plain, model = (DistributedDataParallel(build(), **options) for _ in range(2))
        for step in range(2):
            losses_of(plain, share(data())).mean().backward()
            losses = losses_of(model, share(data()))
            if step == 0:
                assert fm.GradientProbe(model).audit(losses).ok
            losses.mean().backward()
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)


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


@check
def ddp_cases():
    check_cases(
        lambda m: DistributedDataParallel(m, find_unused_parameters=True), "module."
    )


# fully_shard


# fully_shard takes no scalar parameters.
SCALARS = [
    c.name for c in cases.CASES if any(not p.dim() for p in c.build().parameters())
]


@check
def fsdp_cases():
    check_cases(fully_shard, "", skip=SCALARS)


SHARDED = {
    "mlp": (build, data, True),
    "mlp_unresharded": (build, data, False),
    "block": (build_block, words, True),
}


def shard(model, reshard=True, **options):
    """Each layer by itself and the rest with the root, as users do it."""
    for layer in model.layers if isinstance(model, Block) else model:
        if list(layer.parameters()):
            fully_shard(layer, reshard_after_forward=reshard, **options)
    return fully_shard(model, reshard_after_forward=reshard, **options)


def fsdp_check(name, keep_mean):
    build_model, inputs, reshard = SHARDED[name]

    def run():
        check_training(
            lambda: shard(build_model(), reshard),
            inputs(),
            "",
            keep_mean,
            build=build_model,
        )

    run.__name__ = f"fsdp_{name}" + ("_keep_mean" if keep_mean else "")
    return check(run)


for name in SHARDED:
    fsdp_check(name, keep_mean=False)
for name in ("mlp", "block"):
    fsdp_check(name, keep_mean=True)


@check
def fsdp_local_statistics_are_of_this_rank():
    model = shard(build())
    x = share(data())
    for _ in range(2):
        stats = fm.GradientProbe(model, keep_mean=True).backward(losses_of(model, x))
        assert_oracle(stats, build(), x)
        assert list(stats.mean_grad) == [n for n, _ in build().named_parameters()][::-1]
    assert all(isinstance(p, DTensor) for p in model.parameters())


@check
def fsdp_unequal_counts_and_one_rank_that_measures():
    model = shard(build())
    probe = fm.GradientProbe(model, process_group="world", keep_mean=True, **OPTIONS)
    for counts in ([2, 20], [2, 300], [1, 4], [3, 1], [1, 1], [3, 4], [2, 20], [4, 3]):
        model.zero_grad()
        whole_x = data(sum(counts))
        if counts == [4, 3]:
            whole_x[:4] = torch.nan  # rank 0 cannot keep what it measures
        stats = probe.backward(losses_of(model, share(whole_x, counts)))
        single = build()
        alone = fm.GradientProbe(single, keep_mean=True, **OPTIONS)
        want = alone.backward(losses_of(single, whole_x))
        if stats.is_finite:
            assert_same(stats, want)
        else:
            assert_close(stats.sq_norms, want.sq_norms, equal_nan=True)
    probe = fm.GradientProbe(model, process_group="world")
    model.zero_grad()
    x = share(data(), [2, 4])
    raised(lambda: probe.backward(losses_of(model, x)), ValueError, "drop_last=True")


@check
def fsdp_an_error_of_one_rank_is_raised_on_all():
    model = shard(build())
    x = share(data())
    probe = fm.GradientProbe(model, process_group="world")
    losses = losses_of(model, x)
    if dist.get_rank() == 1:
        losses = losses * losses.mean()
    raised(lambda: probe.backward(losses), fm.CaptureError, "do not each belong")
    for _ in range(2):  # not measured yet, and remembered
        model.zero_grad()
        loss = losses_of(model, x).mean()
        size = 3 if dist.get_rank() == 0 else 0
        raised(
            lambda a=(loss, size): probe.backward(*a), ValueError, "positive integer"
        )
        model.zero_grad()
        assert_oracle(probe.backward(losses_of(model, x)), build(), data())


@check
def fsdp_accumulation():
    model = shard(build())
    x = share(data())
    probe = fm.GradientProbe(model, process_group="world")
    model.set_requires_gradient_sync(False)
    losses = losses_of(model, x)
    raised(lambda: probe.backward(losses), ValueError, "no gradient in .grad")
    losses = losses_of(model, x)
    raised(lambda: probe.backward(losses), ValueError, "sharded parameters")
    model.set_requires_gradient_sync(True)
    losses = losses_of(model, x)
    raised(lambda: probe.backward(losses), ValueError, "sharded parameters")
    losses = losses_of(model, x)
    raised(lambda: probe.backward(losses), ValueError, "earlier backward")
    model.zero_grad()
    assert_oracle(probe.backward(losses_of(model, x)), build(), data())


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@check
def fsdp_measuring_does_not_reduce_what_waits():
    for policy in (MixedPrecisionPolicy(), MIXED):
        check_waiting_gradients(policy)


def check_waiting_gradients(policy):
    x = share(data())
    found = []
    for is_probed in (False, True):
        model = shard(build(), mp_policy=policy)
        model.set_requires_gradient_sync(False)
        losses_of(model, x).mean().backward()
        model.set_requires_gradient_sync(True)
        losses = losses_of(model, x[:2].square())
        if is_probed:
            fm.GradientProbe(model).backward(losses)
        else:
            losses.mean().backward()
        found.append([full(p.grad) for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@check
def fsdp_mixed_precision():
    plain, model = (shard(build(), mp_policy=MIXED) for _ in range(2))
    x, whole_x = share(data()), data()
    for keep_mean in (False, True):
        plain.zero_grad()
        model.zero_grad()
        probe = fm.GradientProbe(model, process_group="world", keep_mean=keep_mean)
        stats = probe.backward(losses_of(model, x).float())
        losses_of(plain, x).float().mean().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.equal(full(p.grad), full(q.grad))
        single = build().bfloat16()
        want = fm.GradientProbe(single).backward(
            losses_of(single, whole_x.bfloat16()).float()
        )
        # Gradients of the model in bfloat16, eight bits.
        assert_close(stats.sq_norms, want.sq_norms, rtol=2e-2, atol=0)
        if not keep_mean:
            grads = [full(p.grad).double().square().sum() for p in model.parameters()]
            assert_close(stats.mean_grad_sq_norm, torch.stack(grads).sum().float())
        assert_close(stats.mean_grad_sq_norm, want.mean_grad_sq_norm, rtol=5e-2, atol=0)
    probe = fm.GradientProbe(model, process_group="world")
    model.zero_grad()
    model.set_requires_gradient_sync(False)
    losses_of(model, x).float().mean().backward()
    model.set_requires_gradient_sync(True)
    losses = losses_of(model, x).float()
    raised(lambda: probe.backward(losses), ValueError, "sharded parameters")


@check
def fsdp_replicated_pieces():
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "pieces"))
        model = shard(build(), mesh=mesh)
        probe = fm.GradientProbe(model, process_group="world")
        for _ in range(2):
            model.zero_grad()
            assert_oracle(
                probe.backward(losses_of(model, share(data()))), build(), data()
            )


@check
def fsdp_batch_norm():
    for mode in ("rows", "frozen"):
        for reshard in (True, False):
            check_batch_norm(lambda r=reshard: shard(build_normalised(), r), mode, "")


@check
def fsdp_minibatch_variance():
    single, model = build(), shard(build())
    alone, joint = fm.MinibatchVariance(single), fm.MinibatchVariance(model)
    for seed in range(4):
        single.zero_grad()
        model.zero_grad()
        x = data(seed=seed)
        losses_of(single, x).mean().backward()
        losses_of(model, share(x)).mean().backward()
        alone.update(batch_size=6)
        joint.update(batch_size=6)
    for name in ("covariance_trace", "signal", "noise_scale"):
        assert_close(getattr(joint, name), getattr(alone, name), rtol=1e-5, atol=1e-6)


@check
def fsdp_group_of_other_ranks():
    groups = [dist.new_group([i]) for i in range(2)]
    model = shard(build())
    raised(
        lambda: fm.GradientProbe(model, process_group=groups[dist.get_rank()]),
        ValueError,
        "averaged over [2] ranks",
    )


@check
def fsdp_audit():
    model = shard(build())
    probe = fm.GradientProbe(model)
    losses = losses_of(model, share(data()))
    audit = probe.audit(losses)
    assert audit.ok, str(audit)
    assert all(p.grad is None for p in model.parameters())
    losses.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@check
def fsdp_collectives():
    model = shard(build())
    probe = fm.GradientProbe(model, process_group="world")
    for _ in range(3):
        model.zero_grad()
        losses = losses_of(model, share(data()))
        with counted_collectives() as calls:
            probe.backward(losses)
    names = [name for name, _ in calls]
    assert names.count("all_gather") == 1
    assert sum(size for _, size in calls) < 200, calls


@check
def fsdp_probe_made_between_the_passes():
    model = shard(build())
    losses = losses_of(model, share(data()))
    probe = fm.GradientProbe(model, process_group="world")
    assert_oracle(probe.backward(losses), build(), data())


@check
def fsdp_parts_of_a_model():
    model = shard(build())
    x = share(data())
    probe = fm.GradientProbe(model[0], process_group="world")
    single = build()
    want = fm.GradientProbe(single[0]).backward(losses_of(single, data()))
    stats = probe.backward(losses_of(model, x))
    assert_close(stats.sq_norms, want.sq_norms)
    assert_close(stats.mean_grad_sq_norm, want.mean_grad_sq_norm)
    error = raised(
        lambda: fm.GradientProbe(dict(model.named_parameters())),
        ValueError,
        "fully_shard",
    )
    assert "'0.weight'" in str(error)
    assert "Shard(dim=0)" in str(error)
    whole = fully_shard(build())
    raised(lambda: fm.GradientProbe(whole[0]), ValueError, "fully_shard was called on")


@check
def other_sharded_parameters_are_refused():
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(0), Replicate()):
        model = build()
        model[2].weight = nn.Parameter(
            distribute_tensor(model[2].weight.detach(), mesh, [placement])
        )
        error = raised(lambda m=model: fm.GradientProbe(m), ValueError, "'2.weight'")
        assert repr(placement) in str(error), str(error)
    model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"))
    raised(lambda: fm.GradientProbe(model), ValueError, "FullyShardedDataParallel")
    raised(
        lambda: fm.GradientProbe(dict(model.named_parameters())),
        ValueError,
        "FullyShardedDataParallel",
    )


def main(folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    results = {}
    path = Path(folder) / f"{dist.get_rank()}.json"
    for name in names or CHECKS:
        try:
            CHECKS[name]()
            results[name] = "ok"
        except Exception:  # every kind of failure is to be shown, with its check
            results[name] = traceback.format_exc()
        path.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
