"""What goes wrong on one rank is raised on all, and what follows is right."""

from pathlib import Path
from tempfile import mkdtemp

import cases
import torch
from rank_checks import check, raised
from sharing import assert_near, operators, rank, replicated, vectors

import fastminima as fm


@check
def other_vectors_are_refused():
    _, wrapped, _, own = replicated("mlp")
    for J in operators(wrapped, own).values():
        v = vectors(J)
        raised(lambda J=J, v=v: J @ (v + rank()), ValueError, "not the same")
        J @ v
    raised(
        lambda: fm.top_eigenpairs(fm.Hessian(wrapped, cases.loss, own), seed=rank()),
        ValueError,
        "same seed",
    )


@check
def a_wrong_vector_on_one_rank():
    _, wrapped, _, own = replicated("mlp")
    for J in operators(wrapped, own).values():
        v = vectors(J)
        words = ("Pass",) if rank() == 1 else ("Rank 1", "Pass")
        for wrong in (v[1:], v.float(), "a vector"):
            other = wrong if rank() == 1 else v
            raised(lambda J=J, other=other: J @ other, ValueError, *words)
        J @ v
        other = torch.stack([v, v], 1)
        other = other[1:] if rank() == 1 else other
        raised(lambda J=J, other=other: J @ other, ValueError, *words)
        J @ v


@check
def other_parameters_are_refused():
    _, wrapped, _, own = replicated("mlp")
    J = fm.Hessian(wrapped, cases.loss, own)
    v = vectors(J)
    before = J @ v
    first = next(wrapped.parameters())
    with torch.no_grad():
        first[0, 0] += rank()
    raised(lambda: J @ v, ValueError, "parameters of the 2 ranks")
    raised(
        lambda: fm.critical_sharpness(wrapped, cases.loss, own, direction=v),
        ValueError,
        "parameters of the 2 ranks",
    )
    with torch.no_grad():
        first[0, 0] -= rank()
    assert_near(J @ v, before)


@check
def an_error_on_one_rank_is_raised_on_all():
    _, wrapped, _, own = replicated("mlp")
    fails = {"now": None}

    def loss(model, batch):
        if fails["now"] is not None and rank() == 1:
            raise fails["now"]
        return cases.loss(model, batch)

    def losses(model, batch):
        loss(model, batch)
        return cases.losses(model, batch)

    J = fm.Hessian(wrapped, loss, own)
    C = fm.GradientCovariance(wrapped, losses, own)
    v = vectors(J)
    for call in (
        lambda: J @ v,
        lambda: J.gradient,
        lambda: C @ v,
        lambda: fm.top_eigenpairs(J),
        lambda: fm.trace(fm.Hessian(wrapped, loss, own), 10),
        lambda: fm.SharpnessProbe(wrapped, loss)(own),
        lambda: fm.critical_sharpness(wrapped, loss, own),
    ):
        before = call()
        for error in (ValueError("no such token"), KeyError("no such key")):
            fails["now"] = error
            other = ValueError if isinstance(error, ValueError) else RuntimeError
            if rank() == 1:
                raised(call, type(error), "no such")
            else:
                raised(call, other, "Rank 1", "no such")
        fails["now"] = None
        after = call()
        if isinstance(before, torch.Tensor):
            assert_near(after, before)


@check
def a_rank_without_samples_is_an_error():
    _, wrapped, _, own = replicated("mlp")
    own = own if rank() == 0 else tuple(t[:0] for t in own)
    J = fm.Hessian(wrapped, cases.loss, own)
    raised(lambda: J @ vectors(J), ValueError, "no samples")


@check
def what_changes_on_one_rank_is_followed():
    model, wrapped, batch, own = replicated("mlp")
    J = fm.Hessian(wrapped, cases.loss, own)
    v = vectors(J)
    J @ v
    if rank() == 1:
        own[0].data.mul_(2)  # which moves no version
    whole = batch[0].clone()
    whole[7:] *= 2
    H = fm.Hessian(model, cases.loss, (whole, batch[1]))
    assert_near(J @ v, H @ v)
    got, want = fm.top_eigenpairs(J), fm.top_eigenpairs(H)
    torch.testing.assert_close(got.values, want.values, rtol=1e-6, atol=1e-9)
    if rank() == 1:
        wrapped.module.marker = 3  # the operator is compared anew, on all
    before = J.extra_products
    assert_near(J @ v, H @ v)
    assert J.extra_products == before + 1


@check
def a_loss_that_changes_unseen_on_one_rank():
    _, wrapped, _, own = replicated("mlp")
    file = Path(mkdtemp()) / "factor"
    file.write_text("1.0")

    def loss(model, batch):  # no comparison reads files
        return cases.loss(model, batch) * float(file.read_text())

    J = fm.Hessian(wrapped, loss, own)
    v = vectors(J)
    J @ v
    if rank() == 1:
        file.write_text("3.0")
    text = raised(lambda: [J @ v for _ in range(40)], ValueError, "nothing showed it")
    assert "products differ by" in str(text)
    want = fm.Hessian(wrapped, loss, own) @ v
    assert_near(J @ v, want)
    if rank() == 1:
        file.write_text("1.0")
    fm.top_eigenpairs(J)  # a solver asks before it starts
    want = fm.Hessian(wrapped, cases.loss, own) @ v
    assert_near(J @ v, want)


@check
def randomness_of_one_rank_is_refused_on_all():
    _, wrapped, _, own = replicated("mlp")
    generator = torch.Generator().manual_seed(rank())

    def loss(model, batch):
        noise = 0.0
        if rank() == 1:
            noise = torch.rand((), generator=generator, dtype=torch.float64)
        return cases.loss(model, batch) * (1 + noise)

    J = fm.Hessian(wrapped, loss, own)
    raised(lambda: J @ vectors(J), ValueError, "not the same matrix twice")


class Asymmetric(torch.autograd.Function):
    """The identity, with a backward that is no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 + x.roll(1, -1))


@check
def what_one_rank_makes_asymmetric_is_refused_on_all():
    _, wrapped, _, own = replicated("mlp")

    def loss(model, batch):
        out = model(batch[0])
        out = Asymmetric.apply(out) if rank() == 1 else out
        return torch.nn.functional.cross_entropy(out, batch[1])

    J = fm.Hessian(wrapped, loss, own)
    V = vectors(J, 6)
    raised(lambda: [J @ column for column in V.T], ValueError, "not symmetric")


@check
def no_group_and_other_groups():
    model, _, _, own = replicated("mlp")
    for group in ("everyone", 3):
        raised(
            lambda group=group: fm.Hessian(model, cases.loss, own, process_group=group),
            ValueError,
            '"world"',
            str(group),
        )
