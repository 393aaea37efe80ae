"""Products within layers, and the spectra of layers, against dense blocks."""

import pytest
import torch
from curvature import cases
from curvature.faults import FAULTS, sample

import fastminima as fm

KINDS = {
    "tangents": lambda m, b: fm.Hessian(m, cases.loss, b),
    "cached": lambda m, b: fm.Hessian(m, cases.loss, b, engine="cached"),
    "recompute": lambda m, b: fm.Hessian(m, cases.loss, b, engine="recompute"),
    "evaluated": lambda m, b: fm.Hessian(
        m, cases.loss, b, engine="forward_over_reverse"
    ),
    "gauss_newton": lambda m, b: fm.GaussNewton(m, cases.outputs, cases.output_loss, b),
    "covariance": lambda m, b: fm.GradientCovariance(m, cases.losses, b),
    "sum": lambda m, b: (
        KINDS["tangents"](m, b)
        - 0.5
        * KINDS["cached"](m, b).preconditioned(
            torch.linspace(1, 2, sum(p.numel() for p in m.parameters())).double()
        )
    ),
}
MODELS = ("mlp", "conv", "attention", "tied", "layer_norm", "unreached")


def dense(operator):
    return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


def index_of(H, block):
    ends = torch.tensor(H.sizes).cumsum(0).tolist()
    places = dict(zip(H.names, zip(ends, H.sizes, strict=True), strict=True))
    return torch.cat(
        [torch.arange(places[n][0] - places[n][1], places[n][0]) for n in block.names]
    )


def check_blocks(H, whole, by):
    """Each block's matrix is the rows and columns of the whole one."""
    generator = torch.Generator().manual_seed(2)
    for block in H.blocks(by).values():
        index = index_of(H, block)
        v = torch.randn(len(index), 2, generator=generator, dtype=torch.float64)
        want = whole[index][:, index] @ v
        scale = max(float(want.abs().max()), float(whole.abs().max()))
        torch.testing.assert_close(block @ v, want, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_products_within_layers(name):
    model, batch = cases.make(name)
    by_kind = {"tangents": "parameter", "cached": "layer", "gauss_newton": "layer"}
    for kind, by in by_kind.items():
        H = KINDS[kind](model, batch)
        check_blocks(H, dense(H), by)


@pytest.mark.parametrize("kind", ["recompute", "evaluated", "covariance", "sum"])
@pytest.mark.parametrize("is_single", [True, False])
def test_of_all_operators(kind, is_single):
    model, batch = cases.make("mlp")
    H = KINDS[kind](model, batch if is_single else cases.unequal(batch))
    check_blocks(H, dense(H), {"ends": ["0", "2.bias"], "last": ["2"]})


def test_of_the_graph_of_a_step():
    model, batch = cases.make("conv")
    H = fm.LossHessian(model, cases.losses(model, batch))
    check_blocks(H, dense(H), "layer")


@pytest.mark.parametrize("name", ["conv", "attention", "tied"])
@pytest.mark.parametrize("kind", ["tangents", "cached", "gauss_newton"])
def test_largest_of_each_layer(name, kind):
    model, batch = cases.make(name)
    H = KINDS[kind](model, batch)
    whole = dense(KINDS[kind](model, batch))
    found = fm.block_eigenpairs(H, k=2, rtol=1e-6)
    blocks = H.blocks()
    assert list(found) == list(blocks)
    for layer, pairs in found.items():
        index = index_of(H, blocks[layer])
        block = whole[index][:, index]
        truth = torch.linalg.eigvalsh(block).flip(0)
        assert pairs.converged
        assert pairs.vectors.shape == (min(2, len(index)), len(index))
        images = pairs.vectors @ block
        apart = (images - pairs.values[:, None] * pairs.vectors).norm(dim=1)
        size = float(truth.abs().max())
        torch.testing.assert_close(apart, pairs.residuals, rtol=1, atol=1e-8 * size)
        torch.testing.assert_close(
            pairs.values, truth[: len(pairs.values)], rtol=1e-5, atol=1e-5 * size
        )
        assert pairs.upper >= float(truth[0]) * (1 - 1e-9) - 1e-12


def test_groups_and_the_other_end():
    model, batch = cases.make("mlp")
    H = fm.Hessian(model, cases.loss, batch)
    groups = {"first": ["0"], "biases": ["0.bias", "2.bias"]}
    found = fm.block_eigenpairs(H, by=groups, which="smallest")
    whole = dense(H)
    for name, block in H.blocks(groups).items():
        index = index_of(H, block)
        truth = torch.linalg.eigvalsh(whole[index][:, index])
        value = float(found[name].values[0])
        assert value == pytest.approx(
            float(truth[0]), abs=1e-2 * float(truth.abs()[-1])
        )


def test_several_batches_and_covariance():
    model, batch = cases.make("mlp")
    for kind in ("tangents", "covariance"):
        H = KINDS[kind](model, cases.unequal(batch))
        whole = dense(H)
        for name, pairs in fm.block_eigenpairs(H).items():
            index = index_of(H, H.blocks()[name])
            truth = torch.linalg.eigvalsh(whole[index][:, index])[-1]
            assert float(pairs.values[0]) == pytest.approx(float(truth), rel=1e-2)


def test_a_fresh_operator_is_compared_as_a_whole(monkeypatch):
    """Once, with a vector of all parameters; and where it is wrong, it is said."""
    model, batch = cases.make("mlp")
    H = fm.Hessian(model, cases.loss, batch)
    H.block("2") @ torch.ones(18).double()
    assert H.extra_products == 2
    H.block("0") @ torch.ones(20).double()
    assert H.extra_products == 2

    fault = FAULTS["detached backward"]
    H = fm.Hessian(fault.make(), fault.loss, sample(torch.device("cpu")))
    with pytest.raises(ValueError, match=fault.says):
        fm.block_eigenpairs(H)


def test_parameters_that_moved_are_followed():
    """Between sweeps, and between products within a block."""
    model, batch = cases.make("mlp")
    H = fm.Hessian(model, cases.loss, batch)
    v = torch.ones(18).double()
    fm.block_eigenpairs(H)
    for factor in (1.5, 0.5):
        model[0].weight.data.mul_(factor)
        fresh = fm.Hessian(model, cases.loss, batch)
        if factor == 0.5:
            torch.testing.assert_close(H.block("2") @ v, fresh.block("2") @ v)
        got, want = fm.block_eigenpairs(H), fm.block_eigenpairs(fresh)
        torch.testing.assert_close(got["2"].values, want["2"].values)


def test_an_autocast_around_does_not_reach_inside():
    model, batch = cases.make("mlp", torch.float32)
    want = fm.block_eigenpairs(fm.Hessian(model, cases.loss, batch))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        got = fm.block_eigenpairs(fm.Hessian(model, cases.loss, batch))
    for name, pairs in got.items():
        torch.testing.assert_close(pairs.values, want[name].values)


@pytest.mark.parametrize("by", ["row", {"a": ["nine"]}])
def test_errors(by):
    model, batch = cases.make("mlp")
    with pytest.raises(ValueError, match=r"by must be|No trainable parameter"):
        fm.block_eigenpairs(fm.Hessian(model, cases.loss, batch), by=by)
