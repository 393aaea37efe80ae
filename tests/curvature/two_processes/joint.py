"""Products, spectra and quantities of all ranks' data under data parallelism."""

import cases
import torch
import torch.distributed as dist
from rank_checks import check
from sharing import (
    assert_near,
    counted_collectives,
    operators,
    rank,
    replicated,
    share,
    vectors,
)
from torch import nn

import fastminima as fm


@check
def products_are_those_of_one_process():
    for name in ("mlp", "layer_norm", "attention", "tied"):
        model, wrapped, batch, own = replicated(name)
        joint = operators(wrapped, own)
        for kind, H in operators(model, batch).items():
            J = joint[kind]
            v, V = vectors(H), vectors(H, 3)
            for _ in range(2):  # recorded, and from the kept graph
                assert_near(J @ v, H @ v)
            assert_near(J @ V, H @ V)
            assert_near(J.gradient, H.gradient)
            assert J.extra_products == H.extra_products == 1, kind


@check
def float32_is_exact_to_rounding():
    model, wrapped, batch, own = replicated("mlp", torch.float32)
    joint = operators(wrapped, own)
    for kind, H in operators(model, batch).items():
        v = vectors(H)
        assert_near(joint[kind] @ v, H @ v, rtol=1e-5, atol=1e-6)


@check
def a_mean_far_larger_than_the_spread():
    """Factors <g_n, v> that differ in their last digits only."""
    x = (1e3 + torch.arange(10.0) / 10)[:, None]
    model = nn.Linear(1, 1, bias=False)
    C = fm.GradientCovariance(
        model, lambda m, x: m(x)[:, 0], share((x,))[0], process_group="world"
    )
    got = (C @ torch.ones(1)).double()[0]
    # Ten products of 1e3 and differences of .3 are rounded by 2e-5 each; they sum to
    # .8. Those of 1e3 with itself would be, by .06 each.
    torch.testing.assert_close(got, x.double().var(), rtol=1e-3, atol=0)


@check
def several_batches_and_uneven_shares():
    model, wrapped, batch, _ = replicated("mlp")
    whole = list(zip(*(t.split([4, 3, 1, 2]) for t in batch), strict=True))
    own = whole[:3] if rank() == 0 else whole[3:]
    joint = operators(wrapped, own)
    for kind, H in operators(model, whole).items():
        v = vectors(H)
        for _ in range(2):
            assert_near(joint[kind] @ v, H @ v)
        assert_near(joint[kind].gradient, H.gradient)


@check
def weights_are_counted_as_said():
    model, wrapped, batch, own = replicated("mlp")
    mean_of_sums = fm.Hessian(
        wrapped, lambda m, b: 10 * cases.loss(m, b), own, lambda b: 2 * len(b[1])
    )
    H = 10 * fm.Hessian(model, cases.loss, batch)
    assert_near(mean_of_sums @ vectors(H), H @ vectors(H))


@check
def batch_norm_is_that_of_each_rank():
    model, wrapped, batch, own = replicated("batch_norm")
    whole = list(zip(*(t.split([7, 3]) for t in batch), strict=True))
    count = lambda batch: len(batch[1])  # noqa: E731
    H, J = (
        fm.Hessian(m, cases.loss, data, count)
        for m, data in ((model, whole), (wrapped, own))
    )
    before = [b.clone() for b in wrapped.buffers()]
    with counted_collectives() as calls:
        assert_near(J @ vectors(H), H @ vectors(H))
    assert calls == ["all_reduce"] * 2  # and no buffers are broadcast
    for b, c in zip(wrapped.buffers(), before, strict=True):
        assert torch.equal(b, c)


@check
def one_reduction_a_product():
    _, wrapped, _, own = replicated("mlp")
    for kind, J in operators(wrapped, own).items():
        v, V = vectors(J), vectors(J, 3)
        first = 3 if kind == "covariance" else 2  # its mean gradient; made twice
        for call, expected in (
            (lambda J=J, v=v: J @ v, first),
            (lambda J=J, v=v: J @ v, 1),
            (lambda J=J, V=V: J @ V, 1),
            (lambda J=J: J.gradient, 1),
        ):
            with counted_collectives() as calls:
                call()
            assert calls == ["all_reduce"] * expected, (kind, calls)


@check
def spectra_are_those_of_one_process():
    model, wrapped, batch, own = replicated("mlp")
    H, J = operators(model, batch)["hessian"], operators(wrapped, own)["hessian"]
    for options in ({}, {"k": 3}, {"which": "smallest"}, {"method": "power"}):
        with counted_collectives() as calls:
            got = fm.top_eigenpairs(J, rtol=1e-3, **options)
        want = fm.top_eigenpairs(H, rtol=1e-3, **options)
        torch.testing.assert_close(got.values, want.values, rtol=1e-6, atol=1e-9)
        assert (got.products, got.converged) == (want.products, True), options
        assert calls.count("all_reduce") <= got.products + 1  # and the gradient
    for measure in (fm.trace, fm.frobenius_norm):
        got, want = measure(J, 40), measure(H, 40)
        assert abs(got.value - want.value) < 1e-9
        assert abs(got.standard_error - want.standard_error) < 1e-9
    got, want = (fm.spectral_density(x, steps=6, probes=2) for x in (J, H))
    assert_near(got.density, want.density, rtol=1e-8, atol=1e-8)
    C = H + 0.5 * operators(model, batch)["covariance"]
    D = J + 0.5 * operators(wrapped, own)["covariance"]
    got, want = fm.top_eigenpairs(D), fm.top_eigenpairs(C)
    torch.testing.assert_close(got.values, want.values, rtol=1e-6, atol=1e-9)


@check
def noise_scales_and_sums():
    model, wrapped, batch, own = replicated("mlp")
    one, all_ranks = operators(model, batch), operators(wrapped, own)
    assert all_ranks["covariance"].samples == one["covariance"].samples == 10
    for measure in (
        lambda x: fm.hessian_noise_scale(x["hessian"], x["covariance"], products=30),
        lambda x: fm.product_trace(x["hessian"], x["covariance"], products=30),
        lambda x: fm.effective_dimension(x["gauss_newton"], 0.1, products=30),
        lambda x: fm.trace(x["hessian"], 30, rtol=0.2),
    ):
        got, want = measure(all_ranks), measure(one)
        assert abs(got.value - want.value) <= 1e-8 * abs(want.value)
        assert got.products == want.products


@check
def quantities_along_steps():
    model, wrapped, batch, own = replicated("mlp")
    got = fm.critical_sharpness(wrapped, cases.loss, own)
    want = fm.critical_sharpness(model, cases.loss, batch)
    assert got.evaluations == want.evaluations
    assert abs(got.value - want.value) < 1e-9 * want.value
    halves = list(zip(*(t.split(5) for t in batch), strict=True))
    parts = [share(half, [3, 2]) for half in halves]
    got = fm.batch_sharpness(wrapped, cases.loss, parts)
    want = fm.batch_sharpness(model, cases.loss, halves)
    assert abs(got.value - want.value) < 1e-9 * want.value
    assert "forward" not in wrapped.__dict__


@check
def sharpness_beside_training():
    """The probe follows; training is what it is without it, to the last bit."""
    model, wrapped, batch, own = replicated("mlp")
    _, plain, _, _ = replicated("mlp")
    alone, joint = (fm.SharpnessProbe(m, cases.loss) for m in (model, wrapped))
    for _ in range(3):
        got, want = joint(own), alone(batch)
        torch.testing.assert_close(got.values, want.values, rtol=1e-6, atol=1e-9)
        assert got.products == want.products
        for m in (wrapped, plain):
            m.zero_grad()
            cases.loss(m, own).backward()
            with torch.no_grad():
                for p in m.parameters():
                    p -= 0.1 * p.grad
        with torch.no_grad():
            for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
                p.copy_(q)
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p, q)


@check
def the_graph_is_kept_beside_training_passes():
    _, wrapped, _, own = replicated("mlp")
    J = fm.Hessian(wrapped, cases.loss, own)
    v = vectors(J)
    before, graph = J @ v, J._kept.graph
    cases.loss(wrapped, own).backward()
    assert torch.equal(J @ v, before)
    assert J._kept.graph is graph


@check
def whose_data_are_meant():
    """A plain model's are the rank's own, unless a group is named."""
    model, wrapped, batch, own = replicated("mlp")
    H, v = fm.Hessian(model, cases.loss, batch), None
    v = vectors(H)
    for group in ("world", dist.group.WORLD):
        J = fm.Hessian(model, cases.loss, own, process_group=group)
        assert_near(J @ v, H @ v)
    for local in (model, wrapped.module):
        with counted_collectives() as calls:
            alone = fm.Hessian(local, cases.loss, own) @ v
        assert not calls
        assert_near(alone, fm.Hessian(model, cases.loss, own) @ v)
    mine = dist.new_group([0]), dist.new_group([1])
    J = fm.Hessian(wrapped, cases.loss, own, process_group=mine[rank()])
    assert_near(J @ v, alone)
