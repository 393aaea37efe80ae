"""mode="fused": the same statistics, gradients equal to rounding, no traces left."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, FORMULAS
from oracles import flat, single_sample_gradients
from torch import nn

import fastminima as fm
from fastminima.capture.session import fused
from fastminima.capture.session.states import Nothing
from fastminima.ops import dense

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(params=sorted(BY_NAME))
def case(request):
    return BY_NAME[request.param]


def fused_probe(model, **options):
    return fm.GradientProbe(model, mode="fused", **options)


def plain_gradients(model, losses):
    plain = copy.deepcopy(model)
    losses(plain).mean().backward()
    return {name: p.grad for name, p in plain.named_parameters()}


def assert_same_gradients(model, plain, rtol=1e-6):
    """To `rtol` of each parameter's gradient, or of a hundredth of the whole one.

    A gradient that is less than the rounding of one number of the whole one, such as
    that of a bias before a normalisation, is a sum of terms that cancel. Another order
    of the sum gives another rest, which is as small.
    """
    whole = sum(g.square().sum() for g in plain.values() if g is not None).sqrt()
    for name, p in model.named_parameters():
        want = plain[name]
        assert (p.grad is None) == (want is None), name
        if want is not None:
            error = (p.grad - want).norm() / want.norm().clamp_min(whole / 100)
            nothing = torch.finfo(want.dtype).eps * whole
            is_rest = max(want.norm(), p.grad.norm()) <= nothing
            assert error <= rtol or is_rest, f"{name}: {error:.1e}"
            assert p.grad.stride() == want.stride(), name


class Mixed(nn.Module):
    """Sequences and images, with and without bias, a tied and a reused weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(4, 6, 1, bias=False)
        self.dense = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.twice = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.pointwise(self.conv(x).tanh()).flatten(2).mT.contiguous()
        x = self.norm(self.dense(x))
        x = self.twice(self.twice(x).tanh())
        return self.head(x.mean(1))


FUSED = {
    *("conv.weight", "conv.bias", "pointwise.weight"),
    *("dense.weight", "dense.bias", "twice.weight", "twice.bias"),
}


def mixed(dtype=torch.float32, n=5):
    torch.manual_seed(0)
    return Mixed().to(dtype), torch.randn(n, 2, 5, 4, dtype=dtype)


def losses_of(model, x):
    return model(x).square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_case(case, dtype):
    model, batch = case.make()
    want = single_sample_gradients(model, case.losses, batch)
    model = model.to(dtype)
    batch = [t.to(dtype) if t.is_floating_point() else t for t in batch]
    plain = plain_gradients(model, lambda m: case.losses(m, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = fused_probe(
            model,
            measure=("norms", "second_moments"),
            per_parameter=True,
            keep_mean=True,
        ).backward(case.losses(model, batch))
    rtol = 2e-4 if dtype == torch.float32 else 1e-9
    gradients = flat(want)
    exact = gradients.square().sum(1)
    scale = exact.max()
    torch.testing.assert_close(
        stats.sq_norms.double() / scale, exact / scale, rtol=rtol, atol=rtol / 10
    )
    moments = gradients.square().mean(0)
    got = torch.cat([stats.second_moments[name].flatten().double() for name in want])
    torch.testing.assert_close(
        got / moments.max(), moments / moments.max(), rtol=rtol, atol=rtol / 10
    )
    mean = gradients.mean(0)
    torch.testing.assert_close(
        stats.mean_grad_sq_norm.double() / scale,
        mean.square().sum() / scale,
        rtol=rtol,
        atol=rtol / 10,
    )
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(
                stats.mean_grad[name], p.grad, rtol=1e-6, atol=1e-12
            )
            square = stats.mean_grad_sq_norms_by_parameter[name]
            torch.testing.assert_close(square, p.grad.square().sum().to(square.dtype))
    assert_same_gradients(model, plain, 1e-6 if dtype == torch.float32 else 1e-14)


def test_what_is_fused(fusions):
    model, x = mixed()
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    fused_probe(model).backward(losses_of(model, x))
    assert fusions == [FUSED]
    assert_same_gradients(model, plain)


WHOLE = {
    "tied head": {"tokens.weight"},
    "tied head padding": {"tokens.weight"},
    "tied often": {"table.weight", "layer.weight", "layer.bias"},
    "reused": {"layer.weight"},
    "unrolled": {f"cell.{n}_{m}" for n in ("weight", "bias") for m in ("ih", "hh")},
    "mha cross packed": {"in_proj_weight", "out_proj.weight", "out_proj.bias"},
    "rows apart": {"weight"},
    "rows in common": {"weight"},
    **{f"weight {name}": {"weight"} for name in FORMULAS},
    # One row a sample, a table alone, uneven rows, and what is no such product.
    "linear 2d": set(),
    "embedding": {"head.weight"},
    "experts": {"inner.weight", "inner.bias"},
    "scale last": set(),
    "low rank": set(),
}


# On GPUs the weights' products alone: a cell's kernel adds the biases.
ON_GPUS = {"unrolled": {"cell.weight_ih", "cell.weight_hh"}}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_fused_of_every_case(name, fusions, device):
    model, batch = BY_NAME[name].make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused_probe(model).backward(BY_NAME[name].losses(model, batch))
    expected = WHOLE | ON_GPUS if device.type == "cuda" else WHOLE
    assert fusions == [expected[name]]


class Words(nn.Module):
    """A language model with a tied head over many words."""

    def __init__(self, words, width):
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.tokens(ids).tanh())


@pytest.mark.parametrize("measure", [("norms",), ("norms", "second_moments")])
def test_a_tied_head_makes_one_product(measure):
    torch.manual_seed(0)
    model, ids = Words(1000, 16), torch.randint(1000, (4, 12))

    def losses(model):
        return model(ids).square().sum((1, 2))

    plain = plain_gradients(model, losses)
    probe = fused_probe(model, measure=measure)

    for _ in range(2):  # the first step measures the rows
        model.zero_grad()
        with torch.profiler.profile() as profile:
            probe.backward(losses(model))
    names = [event.name for event in profile.events()]
    assert names.count("EmbeddingBackward0") == 1
    assert "aten::embedding_dense_backward" not in names
    (head,) = (e for e in profile.events() if e.name == "MmBackward0")
    assert [c.name for c in head.cpu_children].count("aten::mm") == 1  # of the input
    assert_same_gradients(model, plain)


def test_a_tied_head_holds_no_gradient_of_each_sample(monkeypatch):
    torch.manual_seed(0)
    model, ids = Words(1000, 16), torch.randint(1000, (4, 12))
    model(ids).square().sum().backward()
    made = []

    def spying(a, g, *rest):
        made.append((len(g), g.shape[2]))
        return gradients(a, g, *rest)

    gradients = dense.sequence_gradients
    monkeypatch.setattr(dense, "sequence_gradients", spying)
    stats = fused_probe(model, measure=("norms", "second_moments")).backward(
        model(ids).square().sum((1, 2))
    )
    # Second moments make those of the rows that are looked up.
    assert made and max(rows for _, rows in made) <= ids.numel()
    want = single_sample_gradients(
        model, lambda m, b: m(b[0]).square().sum((1, 2)), [ids]
    )
    exact = flat(want).square()
    torch.testing.assert_close(stats.sq_norms.double(), exact.sum(1), rtol=1e-5, atol=0)
    got = stats.second_moments["tokens.weight"].double().flatten()
    torch.testing.assert_close(got, exact.mean(0), rtol=1e-4, atol=1e-6)


def test_the_pass_makes_none_of_these_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 7, 3)
    probe = fused_probe(model)
    for _ in range(2):  # the first step measures the rows
        losses = model(x).square().sum((1, 2))
        with torch.profiler.profile() as profile:
            probe.backward(losses)
    nodes = [e for e in profile.events() if e.name == "AddmmBackward0"]
    products = [
        child for node in nodes for child in node.cpu_children if "mm" in child.name
    ]
    assert len(nodes) == 2
    assert len(products) == 1  # the gradient of the second layer's input


def test_accumulates_into_gradients_that_are_there():
    model, x = mixed()
    probe = fused_probe(model)
    probe.backward(losses_of(model, x))
    plain = {name: 2 * p.grad for name, p in model.named_parameters()}
    stats = probe.backward(losses_of(model, x))
    assert_same_gradients(model, plain)
    observed = fm.GradientProbe(model).backward(losses_of(model, x))
    torch.testing.assert_close(stats.mean_grad_sq_norm, observed.mean_grad_sq_norm)


def test_becomes_the_gradient_without_a_copy(monkeypatch):
    model, x = mixed()
    made = {}
    deliver = fused.Fusion.deliver

    def noting(fusion):
        made.update({name: g.data_ptr() for name, g in fusion.made.items()})
        deliver(fusion)

    monkeypatch.setattr(fused.Fusion, "deliver", noting)
    fused_probe(model).backward(losses_of(model, x))
    assert set(made) == FUSED
    for name, p in model.named_parameters():
        if name in made:
            assert p.grad.data_ptr() == made[name], name


def test_hooks_of_parameters_fire_once_with_the_gradient():
    model, x = mixed()
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    before, after = {}, {}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, n=name: before.setdefault(n, []).append(g.clone()))
        p.register_post_accumulate_grad_hook(
            lambda q, n=name: after.setdefault(n, []).append(q.grad.clone())
        )
    stats = fused_probe(model).backward(losses_of(model, x))
    assert stats.mean_grad_sq_norm > 0
    for name, want in plain.items():
        for seen in (before, after):
            (got,) = seen[name]
            torch.testing.assert_close(got, want, msg=name)
    assert all(len(p._backward_hooks) == 1 for p in model.parameters())


@pytest.mark.parametrize("mode", ["all", "any"])
def test_hooks_on_several_parameters_fire_once(mode, fusions):
    model, x = mixed()
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    names = ["dense.weight", "conv.bias", "norm.weight", "twice.weight"]
    seen = []
    torch.autograd.graph.register_multi_grad_hook(
        [model.get_parameter(name) for name in names], seen.append, mode=mode
    )
    stats = fused_probe(model).backward(losses_of(model, x))
    # The pass makes the gradients of these parameters itself.
    assert fusions == [FUSED - {*names, "dense.bias", "twice.bias"}]
    (got,) = seen
    if mode == "all":
        for name, grad in zip(names, got, strict=True):
            torch.testing.assert_close(grad, plain[name])
    assert_same_gradients(model, plain)
    observed = fm.GradientProbe(model).backward(losses_of(model, x))
    torch.testing.assert_close(stats.sq_norms, observed.sq_norms)


def test_hooks_of_accumulators_fire_once():
    model, x = mixed()
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    before, after = [], []
    nodes = []  # which nothing else keeps
    for name, p in model.named_parameters():
        (node,) = [p.expand_as(p).grad_fn.next_functions[0][0]]
        nodes.append(node)
        node.register_prehook(lambda g, n=name: before.append((n, g[0].clone())))
        node.register_hook(lambda *_, n=name: after.append(n))
    fused_probe(model).backward(losses_of(model, x))
    assert sorted(after) == sorted(plain)
    assert sorted(name for name, _ in before) == sorted(plain)
    for name, grad in before:
        torch.testing.assert_close(grad, plain[name], msg=name)


def test_an_optimizer_in_the_backward_pass(fusions):
    """It steps in place as soon as a gradient is there, and lets go of it."""
    model, x = mixed(torch.float64)
    other, order = copy.deepcopy(model), {}

    def stepping(model, kind):
        def step(p, name):
            order[kind].append(name)
            with torch.no_grad():
                p -= 0.05 * p.grad
            p.grad = None

        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, n=name: step(p, n))

    stepping(model, "fused")
    stepping(other, "plain")
    probe = fused_probe(model)
    for _ in range(5):
        order["fused"], order["plain"] = [], []
        probe.backward(losses_of(model, x))
        losses_of(other, x).mean().backward()
        assert sorted(order["fused"]) == sorted(order["plain"])
    assert set(fusions[-1]) == FUSED
    # Inside the pass: the last layer's weight long before the first one's inputs.
    assert order["fused"].index("twice.weight") < order["fused"].index("norm.weight")
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert p.grad is None


def test_a_hook_that_changes_the_gradient():
    model, x = mixed()
    weight = model.dense.weight
    handle = weight.register_hook(lambda g: 3 * g)
    fused_probe(model).backward(losses_of(model, x))
    handle.remove()
    want = plain_gradients(model, lambda m: losses_of(m, x))["dense.weight"]
    torch.testing.assert_close(weight.grad, 3 * want)


@pytest.mark.parametrize("is_fresh", [True, False])
def test_the_mean_is_what_hooks_make_of_the_gradient(is_fresh):
    model, x = mixed()
    model.dense.weight.register_hook(lambda g: 3 * g)
    other = copy.deepcopy(model)
    other.dense.weight.register_hook(lambda g: 3 * g)
    if not is_fresh:
        for p in (*model.parameters(), *other.parameters()):
            p.grad = torch.zeros_like(p)
    stats = fused_probe(model, keep_mean=True).backward(losses_of(model, x))
    probe = fm.GradientProbe(other, keep_mean=True)
    observed = probe.backward(losses_of(other, x))
    torch.testing.assert_close(stats.mean_grad, observed.mean_grad)
    torch.testing.assert_close(stats.mean_grad_sq_norm, observed.mean_grad_sq_norm)
    torch.testing.assert_close(stats.mean_grad["dense.weight"], model.dense.weight.grad)


def test_a_second_probe_observes_the_same_pass():
    model, x = mixed()
    losses = losses_of(model, x)
    other = fm.GradientProbe(model, keep_mean=True)
    other.attach(losses)
    stats = fused_probe(model).backward(losses)
    seen = other.collect()
    torch.testing.assert_close(seen.sq_norms, stats.sq_norms)
    torch.testing.assert_close(seen.mean_grad_sq_norm, stats.mean_grad_sq_norm)
    for name, p in model.named_parameters():
        torch.testing.assert_close(seen.mean_grad[name], p.grad)


def test_other_leaves_of_the_graph_get_their_gradients():
    model, x = mixed()
    x.requires_grad_()
    scale = torch.ones((), requires_grad=True)
    losses = losses_of(model, x) * scale
    fused_probe(model).backward(losses)
    torch.testing.assert_close(scale.grad, losses.detach().mean())
    (want,) = torch.autograd.grad(losses_of(model, x).mean(), x)
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("name", ["dense.weight", "pointwise.weight", "norm.bias"])
def test_a_parameter_frozen_since_the_forward_pass(name):
    model, x = mixed()
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    losses = losses_of(model, x)
    model.get_parameter(name).requires_grad_(False)
    fused_probe(model).backward(losses)
    assert_same_gradients(model, plain | {name: None})


def test_a_model_that_is_watched_in_part(fusions):
    model, x = mixed()
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    watched = {"weight": model.dense.weight}
    stats = fused_probe(watched).backward(losses_of(model, x))
    assert fusions == [{"weight"}]
    assert_same_gradients(model, plain)
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x])
    exact = want["dense.weight"].flatten(1).square().sum(1)
    torch.testing.assert_close(stats.sq_norms, exact.float())


def test_autocast(fusions, autocast):
    model, x = mixed()
    x = x.abs()

    def losses(model):
        with autocast(dtype=torch.bfloat16):
            return model(x).float().square().sum(1)

    plain = plain_gradients(model, losses)
    stats = fused_probe(model).backward(losses(model))
    observed = fm.GradientProbe(model).backward(losses(model))
    assert fusions[0] >= {"conv.weight", "dense.weight", "dense.bias"}
    torch.testing.assert_close(stats.sq_norms, observed.sq_norms, rtol=1e-3, atol=0)
    # Autocast rounds the gradients it delivers to bfloat16, ours are not rounded.
    model.zero_grad()
    fused_probe(model).backward(losses(model))
    assert_same_gradients(model, plain, rtol=2**-7)
    assert model.dense.weight.grad.dtype == torch.float32


def test_half_precision_parameters(monkeypatch):
    model, x = mixed()
    model, x = model.bfloat16(), x.bfloat16()
    waiting = []
    deliver = fused.Fusion.deliver

    def noting(fusion):
        waiting.extend(g.dtype for g in fusion.made.values())
        deliver(fusion)

    monkeypatch.setattr(fused.Fusion, "deliver", noting)
    stats = fused_probe(model).backward(losses_of(model, x).float())
    assert waiting == [torch.bfloat16] * len(FUSED)
    assert stats.sq_norms.dtype == torch.float32
    assert model.dense.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("retain", [False, True])
def test_retain_graph(retain):
    model, x = mixed()
    losses = losses_of(model, x)
    probe = fused_probe(model)
    probe.backward(losses, retain_graph=retain)
    if retain:
        first = {name: p.grad.clone() for name, p in model.named_parameters()}
        losses.mean().backward()
        assert_same_gradients(model, {name: 2 * g for name, g in first.items()})
    else:
        with pytest.raises(RuntimeError, match="second time"):
            losses.mean().backward()


def test_the_graph_dies_with_the_step():
    model, x = mixed()
    outputs = []
    model.conv.register_forward_hook(lambda *seen: outputs.append(weakref.ref(seen[2])))
    probe = fused_probe(model)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            probe.backward(losses_of(model, x))
        assert len(outputs) == 3 and all(output() is None for output in outputs)
    finally:
        gc.enable()
    assert isinstance(probe._pass, Nothing)
    assert all(not p._backward_hooks for p in model.parameters())


def test_an_error_in_the_pass_leaves_nothing_behind(monkeypatch):
    model, x = mixed()
    probe = fused_probe(model)
    probe.backward(losses_of(model, x))

    def failing(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastminima.ops.dense.sequence_fused", failing)
        with pytest.raises(KeyboardInterrupt):
            probe.backward(losses_of(model, x))
    assert all(not p._backward_hooks for p in model.parameters())
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    model.zero_grad()
    probe.backward(losses_of(model, x))
    assert_same_gradients(model, plain)


def test_batch_norm_by_rows(fusions):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    x = torch.randn(6, 2, 4, 4).double()
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    probe = fused_probe(model, batchnorm="rows")
    probe.backward(losses_of(model, x))
    assert fusions == [{"0.weight", "0.bias"}]
    assert_same_gradients(model, plain)
    model.zero_grad()
    fused_probe(model, batchnorm="frozen").backward(losses_of(model, x))
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, fusions):
    from torch.utils.checkpoint import checkpoint

    model, x = mixed()
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    x.requires_grad_()

    def losses():
        def images(x):
            return model.pointwise(model.conv(x).tanh()).flatten(2).mT.contiguous()

        y = model.norm(model.dense(checkpoint(images, x, use_reentrant=use_reentrant)))
        y = model.twice(model.twice(y).tanh())
        return model.head(y.mean(1)).square().sum(1)

    stats = fused_probe(model).backward(losses())
    assert fusions == [set() if use_reentrant else FUSED]
    assert_same_gradients(model, plain)
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x.detach()])
    exact = flat(want).square().sum(1).float()
    torch.testing.assert_close(stats.sq_norms, exact, rtol=1e-5, atol=0)


def test_every_leaves_steps_alone(fusions):
    model, x = mixed()
    probe = fused_probe(model, every=2)
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    for _ in range(2):
        model.zero_grad()
        stats = probe.backward(losses_of(model, x))
    assert stats is None and len(fusions) == 1
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, plain[name]), name


def test_training_goes_where_it_went():
    model, x = mixed(torch.float64)
    other = copy.deepcopy(model)
    probe = fused_probe(model)
    one = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    two = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9)
    for _ in range(20):
        one.zero_grad()
        two.zero_grad()
        probe.backward(losses_of(model, x))
        losses_of(other, x).mean().backward()
        one.step()
        two.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_scalar_losses_and_scale():
    model, x = mixed()
    stats = fused_probe(model).backward(
        losses_of(model, x).sum() * 8, batch_size=len(x), reduction="sum", scale=8.0
    )
    model.zero_grad()
    vector = fused_probe(model).backward(losses_of(model, x))
    torch.testing.assert_close(stats.sq_norms, vector.sq_norms)


def test_packed_documents():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(2, 6, 3)
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, -1, -1]])

    def losses(model):
        tokens = model(x).square().sum(-1)
        return torch.zeros(5).index_add(0, ids.flatten() + 1, tokens.flatten())[1:]

    plain = plain_gradients(model, losses)
    stats = fused_probe(model).backward(losses(model), segment_ids=ids)
    observed = fm.GradientProbe(model).backward(losses(model), segment_ids=ids)
    torch.testing.assert_close(stats.sq_norms, observed.sq_norms)
    model.zero_grad()
    fused_probe(model).backward(losses(model), segment_ids=ids)
    assert_same_gradients(model, plain)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"measure": ("norms", "gram")}, "gram"),
        ({"sample": 2}, "sample"),
        ({"process_group": "world"}, "all_reduce"),
    ],
)
def test_what_fused_mode_has_no_kernels_for(options, word):
    with pytest.raises(ValueError, match=word):
        fused_probe(nn.Linear(2, 2), **options)


def test_attach_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"probe\.backward"):
        fused_probe(model).attach(model(torch.randn(3, 2)).sum(1))


def test_a_use_that_no_gradient_reaches():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    x = torch.randn(4, 5, 3)

    class Ignored(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, g):
            return g, None

    losses = Ignored.apply(model["a"](x), model["b"](x)).square().sum((1, 2))
    fused_probe(model).backward(losses)
    assert model["a"].weight.grad is not None
    assert model["b"].weight.grad is None


def test_losses_of_functional_layers(fusions):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3))
    x = torch.randn(5, 6, 3)
    losses = F.linear(x, w).square().sum((1, 2))
    stats = fused_probe({"w": w}).backward(losses)
    grads = torch.einsum("ntp,ntd->npd", 2 * (x @ w.T), x).detach()
    assert fusions == [{"w"}]
    torch.testing.assert_close(stats.sq_norms, grads.square().sum((1, 2)))
    torch.testing.assert_close(w.grad, grads.mean(0))


def scaled(w, b, x):
    return torch.addmm(b, x.flatten(0, 1), w.mT, beta=0.5, alpha=2.0)


ODD_USES = {
    "scaled": (scaled, (3, 4), (3,), (6, 4), set()),
    "one bias for all": (
        lambda w, b, x: torch.addmm(b, x.flatten(0, 1), w.mT),
        *((3, 4), (1,), (6, 4), {"w"}),
    ),
    "transposed bias": (
        lambda w, b, x: F.linear(x, w, b.t()),
        *((3, 4), (3,), (6, 4), {"w", "b"}),
    ),
    "transposed twice": (
        lambda w, b, x: F.linear(x, w.t().t(), b),
        *((3, 4), (3,), (6, 4), {"w", "b"}),
    ),
    "transposed kernel": (
        lambda w, b, x: F.conv2d(x, w.transpose(0, 1), b),
        *((2, 3, 3, 2), (3,), (2, 5, 4), {"w", "b"}),
    ),
}


@pytest.mark.parametrize("name", ODD_USES)
def test_odd_uses(name, fusions):
    torch.manual_seed(0)
    use, w, b, sample, names = ODD_USES[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(w))
            self.b = nn.Parameter(torch.randn(b))

        def forward(self, x):
            return use(self.w, self.b, x).reshape(len(x), -1)

    model, x = Model(), torch.randn(5, *sample)
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x])
    plain = plain_gradients(model, lambda m: losses_of(m, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = fused_probe(model).backward(losses_of(model, x))
    assert fusions == [names]
    assert_same_gradients(model, plain)
    exact = flat(want).square().sum(1).float()
    torch.testing.assert_close(stats.sq_norms, exact, rtol=1e-5, atol=0)
