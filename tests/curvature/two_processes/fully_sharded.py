"""Products under `fully_shard`: exact, and the model as it was."""

import cases
import torch
import torch.distributed as dist
from rank_checks import check, raised
from sharing import assert_near, counted_collectives, operators, rank, share, vectors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastminima as fm


def sharded(name, **options):
    """A model, the same under fully_shard module by module, the batch, this share."""
    model, batch = cases.make(name)
    copy, _ = cases.make(name)
    own = share(batch)
    for module in list(copy.children()):
        if any(True for _ in module.parameters()) and name != "tied":
            fully_shard(module, **options)
    fully_shard(copy, **options)
    return model, copy, batch, own


def shown(model):
    """What a model shows of itself: parameters, gradients, hooks."""
    hooks = [
        dict(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks")
    ]
    parameters = [
        (id(p), p._local_tensor.clone(), p.grad, p.requires_grad)
        for p in model.parameters()
    ]
    return hooks, parameters


def assert_as_before(model, before):
    hooks, parameters = shown(model)
    assert hooks == before[0]
    for now, then in zip(parameters, before[1], strict=True):
        assert now[0] == then[0] and now[2] is then[2] and now[3] == then[3]
        assert torch.equal(now[1], then[1])
    assert all(isinstance(p, DTensor) for p in model.parameters())


@check
def sharded_products_are_exact():
    for name in ("mlp", "layer_norm", "attention", "tied"):
        for reshard in (True, False):
            model, copy, batch, own = sharded(name, reshard_after_forward=reshard)
            before = shown(copy)
            joint = operators(copy, own)
            for kind, H in operators(model, batch).items():
                J, v = joint[kind], vectors(H)
                for _ in range(2):
                    assert_near(J @ v, H @ v)
                assert_near(J.gradient, H.gradient)
                assert J.names == H.names
            assert_as_before(copy, before)


@check
def sharded_products_follow_training():
    model, copy, batch, own = sharded("mlp")
    J = fm.Hessian(copy, cases.loss, own)
    probe, alone = (fm.SharpnessProbe(m, cases.loss) for m in (copy, model))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (copy, model)]
    for _ in range(3):
        H = fm.Hessian(model, cases.loss, batch)
        v = vectors(H)
        assert_near(J @ v, H @ v, rtol=1e-10, atol=1e-12)
        got, want = probe(own), alone(batch)
        torch.testing.assert_close(got.values, want.values, rtol=1e-6, atol=1e-9)
        for m, optimizer in zip((copy, model), optimizers, strict=True):
            optimizer.zero_grad()
            cases.loss(m, batch).backward()  # all have all: the mean is the same
        grads = [p.grad for p in copy.parameters()]
        assert_near(J @ v, H @ v, rtol=1e-10, atol=1e-12)  # gradients are not touched
        assert all(p.grad is g for p, g in zip(copy.parameters(), grads, strict=True))
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(copy.parameters(), model.parameters(), strict=True):
        assert_near(p.full_tensor(), q.detach())


@check
def between_a_forward_and_a_backward_pass():
    model, copy, batch, own = sharded("mlp", reshard_after_forward=False)
    cases.loss(model, batch).backward()
    J = fm.Hessian(copy, cases.loss, own)
    v = vectors(J)
    loss = cases.loss(copy, batch)
    want = fm.Hessian(model, cases.loss, batch) @ v
    assert_near(J @ v, want)
    loss.backward()
    for p, q in zip(copy.parameters(), model.parameters(), strict=True):
        assert_near(p.grad.full_tensor(), q.grad)


@check
def a_flag_and_a_reduction_a_product():
    _, copy, _, own = sharded("mlp")
    J = fm.Hessian(copy, cases.loss, own)
    v = vectors(J)
    J @ v
    with counted_collectives() as calls:
        J @ v
    assert calls == ["all_reduce"] * 2


@check
def shards_written_on_one_rank_are_gathered_by_all():
    model, copy, batch, own = sharded("mlp")
    J = fm.Hessian(copy, cases.loss, own)
    v = vectors(J)
    J @ v
    weight = next(copy.parameters())
    if rank() == 1:
        weight._local_tensor.data.mul_(2)
    with torch.no_grad():
        next(model.parameters()).copy_(weight.full_tensor())
    assert_near(J @ v, fm.Hessian(model, cases.loss, batch) @ v)


@check
def an_error_leaves_shards_as_they_were():
    _, copy, _, own = sharded("mlp")
    before = shown(copy)

    def loss(model, batch):
        found = cases.loss(model, batch)
        if rank() == 1:
            raise ValueError("no such token")
        return found

    J = fm.Hessian(copy, loss, own)
    raised(lambda: J @ vectors(J), ValueError, "no such token")
    assert_as_before(copy, before)


@check
def frozen_parameters_and_critical_sharpness():
    model, copy, batch, own = sharded("mlp")
    for m in (model, copy):
        next(m.parameters()).requires_grad_(False)
    H, J = (
        fm.Hessian(m, cases.loss, data) for m, data in ((model, batch), (copy, own))
    )
    assert J.shape == H.shape
    assert_near(J @ vectors(H), H @ vectors(H))
    for m in (model, copy):
        cases.loss(m, batch).backward()
    want = fm.critical_sharpness(model, cases.loss, batch)
    direction = [p.grad for p in copy.parameters() if p.requires_grad]
    got = fm.critical_sharpness(copy, cases.loss, own, direction)
    assert abs(got.value / want.value - 1) < 0.06  # the brackets' width


@check
def preconditioned_by_a_sharded_optimizer():
    model, copy, batch, own = sharded("mlp")
    tops = []
    for m, data in ((model, batch), (copy, own)):
        optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
        cases.loss(m, batch).backward()
        optimizer.step()
        P = fm.Hessian(m, cases.loss, data).preconditioned(
            fm.preconditioner(m, optimizer)
        )
        tops.append(fm.top_eigenpairs(P).values)
    torch.testing.assert_close(*tops, rtol=1e-6, atol=1e-9)


@check
def engines_and_groups_under_fully_shard():
    for engine in ("recompute", "forward_over_reverse"):
        model, copy, batch, own = sharded("mlp")
        H = fm.Hessian(model, cases.loss, batch)
        J = fm.Hessian(copy, cases.loss, own, engine=engine)
        for _ in range(2):
            assert_near(J @ vectors(H), H @ vectors(H))
    losses = cases.losses(copy, own)
    mine = (dist.new_group([0]), dist.new_group([1]))[rank()]
    raised(
        lambda: fm.Hessian(copy, cases.loss, own, process_group=mine),
        ValueError,
        "over 2 ranks",
    )
    raised(lambda: fm.SharpnessProbe(copy)(loss=losses), ValueError, "Pass the batch")


@check
def a_mesh_of_two_dimensions():
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
        model, copy, batch, own = sharded("mlp", mesh=mesh)
        H, J = fm.Hessian(model, cases.loss, batch), fm.Hessian(copy, cases.loss, own)
        assert_near(J @ vectors(H), H @ vectors(H))


@check
def other_shardings_are_refused():
    model, batch = cases.make("mlp")
    mesh = init_device_mesh("cpu", (2,))
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    layer.weight = nn.Parameter(
        distribute_tensor(layer.weight.detach(), mesh, [Shard(0)])
    )
    raised(
        lambda: fm.Hessian(model, cases.loss, batch),
        ValueError,
        "fully_shard",
        "Tensor parallelism",
    )
