"""Fused uses have steps too: same bits as the generic way, gradients that are .grad."""

import copy
import sys
import warnings

import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn import functional as F

import fastminima as fm
from fastminima import _native
from fastminima.capture.graph.extension import learned
from fastminima.capture.session import attach, called, hooks, repeat, taking

if learned() is None:
    pytest.skip("no native extension that reads tensors", allow_module_level=True)

BY_NAME = {case.name: case for case in CASES}
STEPS = 7  # from the fifth on they are repeated


@pytest.fixture
def by_python(monkeypatch):
    """What Python was asked to take of each pass: nodes, by rule or by a function."""
    passes = []

    def starting(honest):
        def start(session, *args):
            passes.append([])
            return honest(session, *args)

        return start

    for owner, name in ((hooks.Session, "_hook_program"), (repeat.Repeated, "hook")):
        monkeypatch.setattr(owner, name, starting(getattr(owner, name)))
    for name in ("generic", "call", "part"):
        honest = getattr(taking.Taking, name)

        def spy(session, node, *args, _honest=honest, _name=name):
            passes[-1].append((_name, session._program.use_at[node].name))
            return _honest(session, node, *args)

        monkeypatch.setattr(taking.Taking, name, spy)
    return passes


@pytest.fixture
def repeated(monkeypatch):
    """Whether each step that could be like the one before was taken so."""
    found = []
    honest = repeat.Repeat.attach

    def attach(self, *args):
        made = honest(self, *args)
        found.append(made is not None)
        return made

    monkeypatch.setattr(repeat.Repeat, "attach", attach)
    return found


def without_programs(monkeypatch):
    monkeypatch.setattr(hooks, "program_of", lambda *_: None)
    monkeypatch.setattr(attach, "program_of", lambda *_: None)


def fused(model, **options):
    return fm.GradientProbe(model, mode="fused", per_parameter=True, **options)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(probe, model, losses):
    """Statistics of one step, and the gradients that it left."""
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = probe.backward(losses)
    return stats, gradients(model)


def assert_same(one, other):
    """The same bits, and gradients that lie in the same order."""
    (stats, grads), (expected, want) = one, other
    assert torch.equal(stats.sq_norms, expected.sq_norms)
    assert torch.equal(stats.mean_grad_sq_norm, expected.mean_grad_sq_norm)
    found = stats.sq_norms_by_parameter
    for name, norms in expected.sq_norms_by_parameter.items():
        assert torch.equal(found[name], norms), name
    assert grads.keys() == want.keys()
    for name, grad in want.items():
        assert torch.equal(grads[name], grad), name
        assert grads[name].stride() == grad.stride(), name
        assert not grads[name].is_inference() and not grads[name].requires_grad


def some_steps(model, losses, count=STEPS, **options):
    torch.manual_seed(1)
    probe = fused(model, **options)
    return [step(probe, model, losses(k)) for k in range(count)]


def compare(monkeypatch, model, losses, count=STEPS, **options):
    """Steps with programs and without them: the same bits."""
    state = copy.deepcopy(model.state_dict())
    found = some_steps(model, losses, count, **options)
    model.load_state_dict(state)
    with monkeypatch.context() as patch:
        without_programs(patch)
        for one, other in zip(
            found, some_steps(model, losses, count, **options), strict=True
        ):
            assert_same(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_program_and_the_generic_way_give_the_same_bits(name, dtype, monkeypatch):
    case = BY_NAME[name]
    model, batch = case.make()
    model = model.to(dtype)
    batch = [t.to(dtype) if t.is_floating_point() else t for t in batch]
    compare(monkeypatch, model, lambda _: case.losses(model, batch))


class Layers(nn.Module):
    """Weights [d_out, d_in] and [d_in, d_out], with bias and without."""

    def __init__(self, d_in=6, width=40, d_out=5):
        super().__init__()
        self.first = nn.Linear(d_in, width)
        self.norm = nn.LayerNorm(width)
        self.bare = nn.Linear(width, width, bias=False)
        self.columns = nn.Parameter(torch.randn(width, width) / 6)
        self.mixed = nn.Parameter(torch.randn(width, d_out) / 6)
        self.shift = nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        x = self.bare(self.norm(self.first(x)).tanh()) @ self.columns
        rows = x.flatten(0, 1)
        return torch.addmm(self.shift, rows, self.mixed).unflatten(0, x.shape[:2])


def layers(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return Layers(**sizes).to(dtype)


def data(seed, n=5, time=17, width=6):
    return torch.randn(n, time, width, generator=torch.Generator().manual_seed(seed))


def losses_of(model, x):
    return model(x).square().sum((1, 2))


def test_dense_uses_are_the_extension_s(by_python, monkeypatch, repeated):
    model = layers()
    compare(monkeypatch, model, lambda k: losses_of(model, data(k)))
    assert by_python == [[]] * STEPS
    assert sum(repeated) >= 2


@pytest.mark.parametrize("time", [2, 5, 12, 40])
def test_time_says_which_kernel_it_is(time, monkeypatch):
    """And where products are PyTorch's, Python takes it."""
    model = layers(width=64)
    compare(monkeypatch, model, lambda k: losses_of(model, data(k, time=time)))


def test_large_weights_are_made_in_parts(by_python, monkeypatch):
    torch.manual_seed(0)
    sizes = 2, 1100
    model = nn.Sequential(nn.Linear(6, 1100), nn.Linear(1100, 2, bias=False))
    weight = nn.Parameter(torch.randn(sizes) / 30)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.weight = model, weight

        def forward(self, x):
            return self.layers(x) @ self.weight @ self.weight.new_ones(1100, 1)

    wide = Wide()
    monkeypatch.setattr("fastminima.ops.native.dense._BLOCK", 1)
    compare(monkeypatch, wide, lambda k: losses_of(wide, data(k, time=40)))
    assert by_python == [[]] * STEPS


class Words(nn.Module):
    """A table that is the head's weight too."""

    def __init__(self, words, width, **options):
        super().__init__()
        self.table = nn.Embedding(words, width, **options)
        self.mix = nn.Linear(width, width)

    def forward(self, ids):
        return F.linear(self.mix(self.table(ids)).tanh(), self.table.weight)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=str)
@pytest.mark.parametrize("words", [60, 1100])
def test_a_tied_table_is_the_extension_s(words, options, by_python, monkeypatch):
    torch.manual_seed(0)
    model = Words(words, 32, **options)
    monkeypatch.setattr("fastminima.ops.native.dense._BLOCK", 1)  # of 1100 in parts

    def losses(k):
        ids = torch.randint(words, (5, 17), generator=torch.Generator().manual_seed(k))
        ids[:, :4] = 3  # several times, and what may be padding
        return F.cross_entropy(model(ids).mT, ids, reduction="none").mean(1)

    compare(monkeypatch, model, losses)
    assert by_python == [[]] * STEPS


@pytest.mark.parametrize("sign", [-1, 1])
def test_uses_of_a_table_that_cancel_are_made_from_gradients(
    sign, by_python, monkeypatch
):
    """The head's part is minus the table's, nearly."""
    torch.manual_seed(0)
    model = nn.Embedding(9, 32)
    ids, factors = torch.randint(9, (5, 17)), sign * torch.full((5, 17, 32), 1.001)

    def losses(_):
        x, weight = model(ids), model.weight
        logits = F.linear(torch.ones_like(x).flatten(0, 1), weight)
        chosen = logits.unflatten(0, x.shape[:2]).gather(2, ids.unsqueeze(2))
        return chosen.sum((1, 2)) + (x * factors).sum((1, 2))

    compare(monkeypatch, model, losses)
    apart = [("part", "EmbeddingBackward0"), ("part", "MmBackward0")]
    for seen in by_python:
        assert sorted(seen) == (apart if sign < 0 else [])


def test_convolutions_are_called_with_what_they_read(by_python, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
        nn.Flatten(),
    )
    x = torch.randn(5, 2, 6, 4)
    compare(monkeypatch, model, lambda _: model(x).square().sum(1))
    assert by_python == [[("call", "ConvolutionBackward0")] * 2] * STEPS


def test_a_use_calls_no_python():
    """What is called in a step does not grow with its layers, PyTorch's own aside."""
    counts = {}
    for depth in (4, 12):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(depth)))
        probe = fm.GradientProbe(model, mode="fused")
        for k in range(STEPS):
            step(probe, model, losses_of(model, data(k, width=32)))
        model.zero_grad()
        losses, files = losses_of(model, data(9, width=32)), []

        def note(frame, event, _, files=files):
            if event == "call":
                files.append(frame.f_code.co_filename)

        sys.setprofile(note)
        probe.backward(losses)
        sys.setprofile(None)
        counts[depth] = len(files), sum("fastminima" in file for file in files)
    (few, few_ours), (many, many_ours) = counts[4], counts[12]
    assert many_ours == few_ours
    # Registering a hook (2), an edge, and the edges that the engine is asked for (3).
    assert (many - few) / 8 <= 6


def test_sizes_that_change_and_come_back(monkeypatch, by_python):
    sizes = [(5, 17), (5, 17), (5, 17), (3, 17), (5, 9), (1, 17), (5, 17), (5, 17)]
    model = layers()
    losses = lambda k: losses_of(model, data(k, *sizes[k]))  # noqa: E731
    compare(monkeypatch, model, losses, len(sizes))
    assert by_python[-1] == []


def test_numbers_that_change(monkeypatch):
    """A factor that is not part of the structure."""
    torch.manual_seed(0)
    model = nn.ParameterDict(
        {"w": torch.randn(6, 40), "b": torch.randn(40), "v": torch.randn(40, 40)}
    ).double()
    alphas = [1.0] * 6 + [2.0, 1.0, 1.0]

    def losses(k):
        x = data(k).double().flatten(0, 1)
        y = torch.addmm(model["b"], x, model["w"], alpha=alphas[k]).tanh()
        return (y @ model["v"]).unflatten(0, (5, 17)).square().sum((1, 2))

    found = some_steps(model, losses, len(alphas))
    for k, (stats, grads) in enumerate(found):
        model.zero_grad()
        expected, want = step(fm.GradientProbe(model), model, losses(k))
        torch.testing.assert_close(stats.sq_norms, expected.sq_norms)
        torch.testing.assert_close(grads, want)


def test_gradients_that_lie_apart_go_the_generic_way(monkeypatch, by_python):
    """The gradient of a sum is one number, seen everywhere."""
    torch.manual_seed(0)
    model = nn.Linear(6, 40)

    def losses(k):
        return model(data(k).flatten(0, 1)).sum(1).unflatten(0, (5, 17)).sum(1)

    compare(monkeypatch, model, losses)
    assert by_python == [[("generic", "AddmmBackward0")]] * STEPS


class Negative(torch.autograd.Function):
    """The identity, whose gradient is a view that is negated when it is read."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return torch.complex(torch.zeros_like(g), -g).conj().imag


def test_a_gradient_with_another_sign(monkeypatch, by_python):
    """Norms are the same, gradients are not: what is read has to be what it says."""
    torch.manual_seed(0)
    model = nn.Linear(6, 40)

    def losses(k):
        rows = data(k).flatten(0, 1)
        y = Negative.apply(torch.addmm(model.bias, rows, model.weight.t()))
        return y.unflatten(0, (5, 17)).square().sum((1, 2))

    compare(monkeypatch, model, losses)
    want = torch.autograd.grad(losses(0).mean(), model.weight)[0]
    _, grads = some_steps(model, losses, 6)[-1]
    del grads
    step(fused(model), model, losses(0))
    torch.testing.assert_close(model.weight.grad, want)
    assert all(seen == [("generic", "AddmmBackward0")] for seen in by_python)


def test_inputs_with_another_sign(monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(6, 40)

    def losses(k):
        x = torch.complex(torch.zeros(5, 17, 6), data(k)).conj().imag
        return losses_of(model, x if k in (2, 5) else x.resolve_neg())

    compare(monkeypatch, model, losses)


def test_a_model_that_changes_its_dtype(monkeypatch):
    model = layers()
    probe, found = fused(model), []
    for k in range(12):
        if k in (5, 9):
            model.double() if k == 5 else model.float()
        x = data(k).to(model.columns.dtype)
        got = step(probe, model, losses_of(model, x))
        expected = step(fm.GradientProbe(model), model, losses_of(model, x))
        torch.testing.assert_close(got[0].sq_norms, expected[0].sq_norms)
        torch.testing.assert_close(got[1], expected[1])
        found.append(got)
    assert {stats.sq_norms.dtype for stats, _ in found} == {
        *(torch.float32, torch.float64)
    }


def test_autocast_and_half_precision_go_by_python(autocast, by_python, monkeypatch):
    model = layers()

    def losses(k):
        with autocast(dtype=torch.bfloat16):
            return model(data(k)).float().square().sum((1, 2))

    compare(monkeypatch, model, losses)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = layers(torch.bfloat16)
    compare(monkeypatch, half, lambda k: losses_of(half, data(k).bfloat16()).float())
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())


@pytest.mark.parametrize("name", ["first.weight", "first.bias", "columns"])
def test_a_parameter_that_is_frozen_for_a_while(name, repeated):
    """Before the forward pass, and since it."""
    model = layers()
    probe = fused(model)
    parameter = model.get_parameter(name)
    for k in range(18):
        is_frozen, since = k in (6, 12), k == 12
        if is_frozen and not since:
            parameter.requires_grad_(False)
        losses = losses_of(model, data(k))
        (want,) = [torch.autograd.grad(losses.mean(), model.mixed, retain_graph=True)]
        parameter.requires_grad_(not is_frozen)
        _, grads = step(probe, model, losses)
        assert (name in grads) != is_frozen
        torch.testing.assert_close(grads["mixed"], want[0])
        parameter.requires_grad_()
    assert repeated.count(True) >= 3


def test_a_hook_that_is_added_between_steps(repeated, fusions):
    model = layers()
    probe, seen = fused(model), []
    for k in range(12):
        if k == 7:
            handle = model.columns.register_hook(lambda g: seen.append(g.clone()))
        step(probe, model, losses_of(model, data(k)))
        if 7 <= k < 9:
            assert len(seen) == k - 6  # once a step
            assert torch.equal(seen[-1], model.columns.grad)
        if k == 9:
            handle.remove()
    assert any("columns" not in names for names in fusions)
    assert repeated[0] and not all(repeated)


def test_hooks_of_accumulators_fire_once_in_repeated_steps(repeated):
    model = layers()
    probe, seen, nodes = fused(model), [], []
    for name, p in model.named_parameters():
        (node,) = [p.expand_as(p).grad_fn.next_functions[0][0]]
        nodes.append(node)
        node.register_prehook(lambda g, n=name: seen.append((n, g[0].clone())))
    for k in range(STEPS):
        seen.clear()
        _, grads = step(probe, model, losses_of(model, data(k)))
        assert sorted(name for name, _ in seen) == sorted(grads)
        for name, grad in seen:
            assert torch.equal(grad, grads[name]), name
    assert any(repeated)


def test_an_optimizer_in_the_backward_pass_is_served_at_once():
    """Parameters are gone on with as soon as their last use has run."""
    model, other = layers(torch.float64), layers(torch.float64)
    order = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, n=name: order.append(n))
    probe = fused(model)
    for k in range(STEPS):
        order.clear()
        x = data(k).double()
        _, grads = step(probe, model, losses_of(model, x))
        assert sorted(order) == sorted(grads)
        assert order.index("mixed") < order.index("first.weight")
        other.zero_grad()
        losses_of(other, x).mean().backward()
        torch.testing.assert_close(grads, gradients(other))


def test_gradients_that_are_there_are_added_to(repeated):
    model = layers()
    probe = fused(model)
    for k in range(STEPS):
        _, grads = step(probe, model, losses_of(model, data(k)))
        before = {name: g.clone() for name, g in grads.items()}
        probe.backward(losses_of(model, data(k)))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, 2 * before[name])


def test_a_gradient_belongs_to_its_parameter_alone():
    """It is not written into by the next step."""
    model = layers()
    found = some_steps(model, lambda k: losses_of(model, data(k)))
    kept = [{n: g.clone() for n, g in grads.items()} for _, grads in found]
    step(fused(model), model, losses_of(model, data(99)))
    for (_, grads), was in zip(found, kept, strict=True):
        for name, grad in grads.items():
            assert torch.equal(grad, was[name])
    pointers = {g.data_ptr() for _, grads in found for g in grads.values()}
    assert len(pointers) == len(found) * len(found[0][1])


def test_an_error_in_the_pass_leaves_nothing_behind(monkeypatch):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("not today")

    model = layers()
    probe = fused(model)
    for _ in range(5):
        step(probe, model, losses_of(model, data(0)))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not today"):
            step(probe, model, losses_of(model, Bad.apply(data(1).requires_grad_())))
    model.zero_grad()
    compare(monkeypatch, model, lambda k: losses_of(model, data(k)))


@pytest.mark.parametrize("options", [{"keep_mean": True}, {"every": 2}], ids=str)
def test_other_options(options):
    model = layers()
    probe = fused(model, **options)
    for k in range(12):
        stats, grads = step(probe, model, losses_of(model, data(k)))
        model.zero_grad()
        losses_of(model, data(k)).mean().backward()
        torch.testing.assert_close(grads, gradients(model))
        if stats is not None and "keep_mean" in options:
            torch.testing.assert_close(stats.mean_grad, grads)


def test_inference_mode_makes_ordinary_gradients():
    model = layers()
    probe = fused(model)
    for k in range(STEPS):
        losses = losses_of(model, data(k))
        model.zero_grad()
        with torch.inference_mode(k % 2 == 1):
            probe.backward(losses)
        made = (p.grad for name, p in model.named_parameters() if "norm" not in name)
        assert not any(grad.is_inference() for grad in made)


def test_second_moments_are_made_with_the_gradients():
    model = layers()
    probe = fused(model, measure=("norms", "second_moments"))
    expected = fm.GradientProbe(model, measure="second_moments")
    for k in range(STEPS):
        stats, grads = step(probe, model, losses_of(model, data(k)))
        other, want = step(expected, model, losses_of(model, data(k)))
        torch.testing.assert_close(grads, want)
        torch.testing.assert_close(stats.second_moments, other.second_moments)


def test_threads_do_not_matter(monkeypatch):
    model = layers(width=128)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(_native, "threads", lambda t=threads: t)
        found.append(
            some_steps(model, lambda k: losses_of(model, data(k, n=32, time=64)))
        )
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_what_is_called_makes_gradients_too():
    """A function is given norms and gradients, in this order."""
    made = called.Called(
        *(lambda g, a: (a.sum(0), g.sum(0), a @ g), ["w", None], ["w"]),
        *({"w": 0}, 3, None, called.Launched()),
    )
    g, a = torch.ones(2, 2), torch.eye(2)
    norms, grads = made.found(g, a)
    assert norms.keys() == grads.keys() == {"w"}
    assert torch.equal(norms["w"], a.sum(0)) and torch.equal(grads["w"], g)


def test_a_bias_beside_a_weight_is_left_to_the_pass(fusions, monkeypatch):
    """A hook on the bias alone: its gradient is the pass', its norms are the step's."""
    model = layers()
    model.shift.register_hook(lambda g: None)
    compare(monkeypatch, model, lambda k: losses_of(model, data(k)))
    assert all("mixed" in names and "shift" not in names for names in fusions)


def test_functional_linear_with_a_weight_seen_from_the_other_side(monkeypatch):
    torch.manual_seed(0)
    model = nn.ParameterDict({"w": torch.randn(6, 40), "v": torch.randn(40, 40)})

    def losses(k):
        y = F.linear(F.linear(data(k), model["w"].t().t().t()), model["v"].mT)
        return y.square().sum((1, 2))

    compare(monkeypatch, model, losses)
