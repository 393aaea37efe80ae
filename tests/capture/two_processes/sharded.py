"""Statistics under `fully_shard`."""

import copy
import functools

import cases
import torch
import torch.distributed as dist
from rank_checks import check, raised
from scenarios import (
    build_normalised,
    check_batch_norm,
    check_cases,
    check_training,
    full,
)
from setting import (
    OPTIONS,
    Block,
    assert_close,
    assert_oracle,
    assert_same,
    build,
    build_block,
    counted_collectives,
    data,
    losses_of,
    share,
    words,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

import fastminima as fm

# fully_shard takes no scalar parameters.
SCALARS = [
    c.name for c in cases.CASES if any(not p.dim() for p in c.build().parameters())
]


@check
def fsdp_cases():
    check_cases(fully_shard, "", skip=SCALARS)


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
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
        assert list(stats.mean_grad) == [n for n, _ in build().named_parameters()]
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
def fsdp_of_frozen_layers_only():
    """Trained ones are whole; passes gather and free parameters all the same."""
    single = build()
    single[2].requires_grad_(False)
    model = copy.deepcopy(single)
    fully_shard(model[2], reshard_after_forward=True)
    probe = fm.GradientProbe(model, process_group="world", keep_mean=True)
    for counts in ([3, 3], [2, 20], [3, 3]):
        whole_x = data(sum(counts))
        stats = probe.backward(losses_of(model, share(whole_x, counts)))
        assert_oracle(stats, single, whole_x)
        assert isinstance(model[2].weight, DTensor)  # in pieces again


@check
def fsdp_probe_made_between_the_passes():
    model = shard(build())
    losses = losses_of(model, share(data()))
    probe = fm.GradientProbe(model, process_group="world")
    assert_oracle(probe.backward(losses), build(), data())


def mean_over_ranks(model, x):
    """The loss on all ranks together."""
    mean = losses_of(model, x).mean().detach()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


@check
def fsdp_critical_sharpness():
    """As of one process, from pieces that stay pieces."""
    want = fm.critical_sharpness(build(), lambda m, x: losses_of(m, x).mean(), data())
    for reshard in (True, False):
        model, x = shard(build(), reshard), share(data())
        before = [full(p) for p in model.parameters()]
        without = functools.partial(fm.critical_sharpness, model, mean_over_ranks, x)
        raised(without, ValueError, "p.grad")
        losses_of(model, x).mean().backward()
        direction = [p.grad for p in model.parameters()]
        mean_over_ranks(model, x)  # gathered, and left so in the second case
        got = fm.critical_sharpness(model, mean_over_ranks, x, direction)
        assert got.converged and got.evaluations <= 8
        assert got.lower <= want.upper and want.lower <= got.upper, (got, want)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        for p, kept in zip(model.parameters(), before, strict=True):
            assert torch.equal(full(p), kept)
