"""Statistics under DistributedDataParallel."""

import copy

import torch
import torch.distributed as dist
from rank_checks import check, raised
from scenarios import build_normalised, check_batch_norm, check_cases, check_training
from setting import (
    OPTIONS,
    assert_close,
    assert_oracle,
    assert_same,
    build,
    counted_collectives,
    data,
    losses_of,
    share,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastminima as fm

DDP_OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static_unused": {"static_graph": True, "find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "buckets": {"bucket_cap_mb": 0.0001},
}


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
def ddp_some_samples_of_each_rank():
    """Norms of the samples looked at; the mean gradient of all, and weighed by all."""
    for keep_mean in (False, True):
        single = build()
        whole = fm.GradientProbe(single, keep_mean=True).backward(
            losses_of(single, data())
        )
        model = DistributedDataParallel(build())
        probe = fm.GradientProbe(
            model, process_group="world", sample=2, keep_mean=keep_mean
        )
        stats = probe.backward(losses_of(model, share(data())))
        assert (stats.count, stats.mean_count) == (4, 6)
        assert_close(stats.mean_grad_sq_norm, whole.mean_grad_sq_norm)
        # Two of each rank's three samples, the same two since the draws are.
        kept = [
            i
            for i in range(3)
            if any(
                torch.isclose(whole.sq_norms[i], n, rtol=1e-4) for n in stats.sq_norms
            )
        ]
        assert len(kept) == 2
        kept += [i + 3 for i in kept]
        assert_close(stats.sq_norms, whole.sq_norms[kept])
        if keep_mean:
            for name, mean in whole.mean_grad.items():
                assert_close(stats.mean_grad[f"module.{name}"], mean)


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
    numbers = 6 + len(list(model.parameters())) + 3  # head, was reached?, norms
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


@check
def ddp_cases():
    check_cases(
        lambda m: DistributedDataParallel(m, find_unused_parameters=True), "module."
    )
