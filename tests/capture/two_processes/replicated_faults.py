"""What goes wrong under DistributedDataParallel, on one rank or on all."""

import warnings

import torch
import torch.distributed as dist
from rank_checks import check, raised
from setting import assert_close, assert_oracle, build, data, losses_of, share
from torch.nn.parallel import DistributedDataParallel

import fastminima as fm


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
    session = fm.capture.session.hooks.Session
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
