"""Engines, precisions and the graph of a training step over two processes."""

import cases
import torch
import torch.distributed as dist
from rank_checks import check, raised
from sharing import assert_near, counted_collectives, rank, replicated, share, vectors

import fastminima as fm


@check
def engines_of_all_ranks():
    model, wrapped, batch, own = replicated("mlp")
    H = fm.Hessian(model, cases.loss, batch)
    v = vectors(H)
    for engines in (
        ("recompute", "recompute"),
        ("cached", "recompute"),  # memory may be short on one
        ("forward_over_reverse", "forward_over_reverse"),
    ):
        J = fm.Hessian(wrapped, cases.loss, own, engine=engines[rank()])
        for _ in range(2):
            with counted_collectives() as calls:
                assert_near(J @ v, H @ v)
        assert calls == ["all_reduce"]


@check
def found_in_bfloat16_and_certified():
    model, wrapped, batch, own = replicated("mlp", torch.float32)
    got = fm.top_eigenpairs(fm.Hessian(wrapped, cases.loss, own), precision="certified")
    want = fm.top_eigenpairs(fm.Hessian(model, cases.loss, batch))
    assert got.converged
    torch.testing.assert_close(got.values, want.values, rtol=1e-2, atol=0)
    values = [torch.empty_like(got.values) for _ in range(2)]
    dist.all_gather(values, got.values)
    assert torch.equal(*values)


@check
def the_graph_of_a_step():
    """Each rank counts alike, as in the gradient of the step."""
    model, wrapped, batch, _ = replicated("mlp")
    own = share(batch, [5, 5])
    alone, joint = fm.SharpnessProbe(model), fm.SharpnessProbe(wrapped)
    for _ in range(3):
        found = []
        for m, probe, data in ((model, alone, batch), (wrapped, joint, own)):
            m.zero_grad()
            found.append(probe.backward(cases.losses(m, data)))
        want, got = found
        torch.testing.assert_close(got.values, want.values, rtol=1e-6, atol=1e-9)
        for p, q in zip(wrapped.parameters(), model.parameters(), strict=True):
            assert_near(p.grad, q.grad)
            with torch.no_grad():
                p -= 0.1 * q.grad
                q -= 0.1 * q.grad


@check
def errors_at_the_graph_of_a_step():
    _, wrapped, _, _ = replicated("mlp")
    _, batch = cases.make("mlp")
    H = fm.SharpnessProbe(wrapped)._of(cases.losses(wrapped, share(batch)), 1.0)
    v = vectors(H)
    words = ("Pass",) if rank() == 1 else ("Rank 1", "Pass")
    raised(lambda: H @ (v[1:] if rank() == 1 else v), ValueError, *words)
    H @ v
    raised(lambda: H @ (v + rank()), ValueError, "not the same")
