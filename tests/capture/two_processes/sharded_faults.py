"""What goes wrong with sharded parameters."""

import torch
import torch.distributed as dist
from rank_checks import check, raised
from scenarios import full
from setting import assert_close, assert_oracle, build, data, losses_of, share
from sharded import MIXED, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastminima as fm


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
def fsdp_group_of_other_ranks():
    groups = [dist.new_group([i]) for i in range(2)]
    model = shard(build())
    raised(
        lambda: fm.GradientProbe(model, process_group=groups[dist.get_rank()]),
        ValueError,
        "averaged over [2] ranks",
    )


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
