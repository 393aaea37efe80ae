"""Programs: uses whose steps are decided once give what the generic way gives."""

import gc
import warnings
import weakref

import pytest
import torch
from cases import CASES
from oracles import flat, single_sample_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastminima as fm
from fastminima import _native
from fastminima.capture.rows.samples import Batch
from fastminima.capture.session import gradients, hooks, program, repeat

if _native.host() is None:
    pytest.skip("no native extension", allow_module_level=True)

BY_NAME = {case.name: case for case in CASES}


def steps_of(model, losses, **options):
    """The parameters that have a step of their kind, in the program of a graph."""
    probe = fm.GradientProbe(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reading = probe._reader.read(losses, Batch(len(losses)))
    made = program.program_of(reading, probe._parameters)
    own = set() if made is None else made.kernels | made.calls.keys()
    uses = () if made is None else made.uses
    return {n for use in uses if use.node in own for n in use.parameters}


@pytest.fixture
def taken(monkeypatch):
    """Of each pass in turn: how each of its steps went, "kernel" or "generic"."""
    passes = []

    def hooked(honest):
        def hook(session, *args, **kwargs):
            found = honest(session, *args, **kwargs)
            uses = session._program.uses
            passes.append({use.node: "waits" for use in uses if found})
            return found

        return hook

    def generic(honest):
        def go(session, node, grads):
            passes[-1][node] = "generic"
            return honest(session, node, grads)

        return go

    def finishing(honest):
        def finish(session):
            if session._pass is not None:
                taken = zip(session._program.uses, session._pass.taken, strict=True)
                for use, was in taken:
                    if was and passes[-1].get(use.node) == "waits":
                        passes[-1][use.node] = "kernel"
            return honest(session)

        return finish

    for owner, start in (
        (hooks.Session, "_hook_program"),
        (repeat.Repeated, "hook"),
    ):
        for name, spy in ((start, hooked), ("generic", generic), ("finish", finishing)):
            monkeypatch.setattr(owner, name, spy(getattr(owner, name)))
    return passes


def ways(passes):
    """How the steps of each pass went, in order of their names."""
    return [sorted(each.values()) for each in passes]


def without_programs(monkeypatch):
    monkeypatch.setattr(hooks, "program_of", lambda *_: None)


def assert_norms(stats, gradients, rtol=1e-5):
    want = {name: g.flatten(1).square().sum(1) for name, g in gradients.items()}
    scale = max(w.max() for w in want.values())
    for name, w in want.items():
        got = stats.sq_norms_by_parameter[name].double()
        torch.testing.assert_close(got / scale, w / scale, rtol=rtol, atol=1e-9)


def probed(model, losses, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(model, per_parameter=True, **options)
        return probe.backward(losses)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_norms_alone_in_every_case(name):
    case = BY_NAME[name]
    model, batch = case.make()
    want = single_sample_gradients(model, case.losses, batch)
    stats = probed(model, case.losses(model, batch))
    exact = flat(want).square().sum(1)
    scale = exact.max()
    torch.testing.assert_close(
        stats.sq_norms.double() / scale, exact / scale, rtol=2e-4, atol=2e-5
    )


def several(case, model, batch, steps):
    """Statistics of the same step several times: from the fifth on it is repeated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(model, per_parameter=True)
        found = []
        for _ in range(steps):
            model.zero_grad()
            found.append(probe.backward(case.losses(model, batch)))
        return found


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_program_and_the_generic_way_give_the_same_bits(name, monkeypatch):
    case = BY_NAME[name]
    model, batch = case.make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    with_program = several(case, model, batch, 7)
    model.load_state_dict(state)
    without_programs(monkeypatch)
    torch.manual_seed(1)
    for found, generic in zip(
        with_program, several(case, model, batch, 7), strict=True
    ):
        assert torch.equal(found.sq_norms, generic.sq_norms)
        for parameter, norms in generic.sq_norms_by_parameter.items():
            assert torch.equal(found.sq_norms_by_parameter[parameter], norms)
        assert torch.equal(found.mean_grad_sq_norm, generic.mean_grad_sq_norm)


def test_programs_are_compared_with_something():
    found = []
    for case in CASES:
        model, batch = case.make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found += steps_of(model, case.losses(model, batch))
    assert len(found) >= 30


def test_a_step_that_does_not_fit_any_more(taken):
    """A number that is not part of the graph's structure says another thing later."""
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))
    x = torch.randn(4, 3)
    probe = fm.GradientProbe({"w": w, "b": b}, per_parameter=True)
    for alpha in (1.0, 1.0, 2.0, 1.0):
        y = torch.addmm(b, x, w, alpha=alpha)
        g = 2 * y.detach().double()
        want = {"w": alpha * torch.einsum("ni,no->nio", x.double(), g), "b": g}
        w.grad = b.grad = None
        assert_norms(probe.backward(y.square().sum(1)), want)
    assert ways(taken) == [["kernel"], ["kernel"], [], ["kernel"]]


class Net(nn.Module):
    """Plain, without bias, transposed, used twice, over a sequence."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(6, 5)
        self.bare = nn.Linear(5, 4, bias=False)
        self.columns = nn.Parameter(torch.randn(4, 4))
        self.twice = nn.Linear(4, 4)
        self.sequence = nn.Linear(2, 3)

    def forward(self, x):
        x = self.bare(self.plain(x).tanh()) @ self.columns
        x = self.twice(self.twice(x).tanh())
        return self.sequence(x.reshape(-1, 2, 2))


def net():
    torch.manual_seed(0)
    return Net(), torch.randn(7, 6)


def losses_of(model, x):
    return model(x).flatten(1).square().sum(1)


def test_which_uses_have_a_step():
    """Those of parameters that are used once."""
    model, x = net()
    once = {"plain.weight", "plain.bias", "bare.weight", "columns"}
    once |= {"sequence.weight", "sequence.bias"}
    assert steps_of(model, losses_of(model, x)) == once


class Block(nn.Module):
    """A table, a layer norm, a root mean square norm written out, a sequence."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 48, padding_idx=2)
        self.norm = nn.LayerNorm(48)
        self.scale = nn.Parameter(torch.rand(48))
        self.mix = nn.Linear(48, 48)
        self.head = nn.Linear(48, 40)

    def forward(self, ids):
        x = self.norm(self.table(ids))
        x = self.scale * (x * x.square().mean(-1, keepdim=True).add(0.1).rsqrt())
        return self.head(self.mix(x).relu())


def block(dtype=torch.float32):
    torch.manual_seed(0)
    return Block().to(dtype), torch.randint(11, (5, 20))


def block_losses(model, ids):
    return model(ids).square().sum((1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_block_of_a_transformer(taken, dtype):
    model, ids = block(dtype)
    want = single_sample_gradients(model, lambda m, b: block_losses(m, b[0]), [ids])
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(7):
        model.zero_grad()
        assert_norms(probe.backward(block_losses(model, ids)), want)
    assert ways(taken) == [["kernel"] * 5] * 7


def test_sizes_that_change_and_come_back(taken):
    model, ids = block()
    probe = fm.GradientProbe(model, per_parameter=True)
    for rows, time in ((5, 20), (5, 20), (5, 20), (3, 20), (5, 17), (5, 17), (5, 20)):
        some = ids[:rows, :time].contiguous()
        want = single_sample_gradients(
            model, lambda m, b: block_losses(m, b[0]), [some]
        )
        model.zero_grad()
        assert_norms(probe.backward(block_losses(model, some)), want)
    assert all(set(each) == {"kernel"} for each in ways(taken))


@pytest.mark.parametrize(
    "turn", [lambda t: t.int(), lambda t: t.t().contiguous().t()], ids=["int32", "t"]
)
def test_indices_that_no_kernel_reads_go_the_generic_way(taken, turn, host_reads):
    model, ids = block()
    want = single_sample_gradients(model, lambda m, b: block_losses(m, b[0]), [ids])
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(3):
        model.zero_grad()
        assert_norms(probe.backward(block_losses(model, turn(ids))), want)
    assert ways(taken) == [["generic"] + ["kernel"] * 4] * 3 or not host_reads


def test_gradients_that_lie_apart_go_the_generic_way(taken, host_reads):
    """The gradient of a mean is one number, seen everywhere."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5), torch.randn(7, 6)
    want = single_sample_gradients(model, lambda m, b: m(b[0]).sum(1), [x])
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(7):
        model.zero_grad()
        assert_norms(probe.backward(model(x).sum(1)), want)
    assert ways(taken) == [["generic"]] * 7 or not host_reads


@pytest.mark.parametrize(
    "options",
    [
        {"measure": "second_moments"},
        {"measure": "gram"},
        {"sample": 3},
        {"directions": 100},
    ],
    ids=lambda options: next(iter(options)),
)
def test_everything_else_goes_the_general_way(options, taken):
    model, x = net()
    if "directions" in options:  # on the device, once there is one
        options = {"directions": {"v": torch.ones(options["directions"])}}
    probe = fm.GradientProbe(model, **options)
    probe.backward(losses_of(model, x))
    assert not any(taken)


def test_a_hook_of_a_user_changes_what_is_read(taken):
    model, x = net()
    probe = fm.GradientProbe(model, per_parameter=True)
    plain = probe.backward(losses_of(model, x))

    def doubled(m, x):
        inner = m.bare(m.plain(x).tanh())
        inner.register_hook(lambda g: 2 * g)
        return m.sequence(m.twice(m.twice(inner @ m.columns).tanh()).reshape(-1, 2, 2))

    model.zero_grad()
    stats = probe.backward(doubled(model, x).flatten(1).square().sum(1))
    for name in ("plain.weight", "plain.bias", "bare.weight"):
        torch.testing.assert_close(
            stats.sq_norms_by_parameter[name], 4 * plain.sq_norms_by_parameter[name]
        )
    assert taken


def test_other_passes_come_by_and_are_not_seen():
    model, x = net()
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x])
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(3):
        model.zero_grad()
        losses = losses_of(model, x)
        probe.attach(losses)
        torch.autograd.grad(model(x).sum(), model.plain.weight)
        losses.mean().backward()
        assert_norms(probe.collect(), want)


def test_two_probes_on_one_graph():
    model, x = net()
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x])
    probes = [fm.GradientProbe(model, per_parameter=True) for _ in range(2)]
    for _ in range(3):
        model.zero_grad()
        losses = losses_of(model, x)
        for probe in probes:
            probe.attach(losses)
        losses.mean().backward()
        for probe in probes:
            assert_norms(probe.collect(), want)


def test_a_probe_that_is_gone_when_the_pass_comes():
    """Its hooks are on the graph still; nothing is written for nobody."""
    model, x = net()
    for _ in range(3):
        probe = fm.GradientProbe(model)
        losses = losses_of(model, x)
        probe.attach(losses)
        del probe
        gc.collect()
        losses.mean().backward()


def test_a_detached_probe_leaves_no_hook(taken):
    model, x = net()
    probe = fm.GradientProbe(model)
    probe.backward(losses_of(model, x))
    losses = losses_of(model, x)
    probe.attach(losses)
    probe.detach()
    losses.mean().backward()
    assert set(taken[-1].values()) == {"waits"}


def test_an_error_in_the_pass_leaves_no_hook():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("not today")

    model, x = net()
    probe = fm.GradientProbe(model, per_parameter=True)
    probe.backward(losses_of(model, x))
    x = x.requires_grad_()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not today"):
            probe.backward(losses_of(model, Bad.apply(x)))
    model.zero_grad()
    x = x.detach()
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x])
    assert_norms(probe.backward(losses_of(model, x)), want)


def test_a_graph_is_let_go():
    """Neither a program nor a known structure keeps what a graph saved."""
    model, x = net()
    probe = fm.GradientProbe(model)
    gc.disable()
    try:
        for _ in range(4):
            losses = losses_of(model, x)
            held = weakref.ref(losses)
            probe.attach(losses)
            losses.mean().backward()
            probe.collect()
            del losses
            assert held() is None
    finally:
        gc.enable()


def whole(m, x):
    """Every use has a step."""
    return m(x).square().sum(1)


def whole_net():
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)
    return nn.Sequential(*layers), torch.randn(7, 6)


def test_steps_are_repeated_as_long_as_nothing_is_new(repeated):
    model, x = whole_net()
    probe = fm.GradientProbe(model, per_parameter=True)

    def step(x, losses=whole):
        want = single_sample_gradients(model, lambda m, b: losses(m, b[0]), [x])
        model.zero_grad()
        assert_norms(probe.backward(losses(model, x)), want)

    for _ in range(8):
        step(x)
    assert repeated == [True] * 4
    repeated.clear()
    step(x[:3])  # another batch size
    step(x, lambda m, x: m(x).abs().sum(1))  # another graph
    assert repeated == [False]
    for _ in range(8):
        step(x)
    assert repeated[-1]


def test_a_repeated_step_follows_scale_and_weights(repeated):
    model, x = whole_net()
    probe = fm.GradientProbe(model, per_parameter=True)
    for k in range(9):

        def losses(m, b, k=k):
            return whole(m, b[0] * (1 + k))

        want = single_sample_gradients(model, losses, [x])
        model.zero_grad()
        assert_norms(probe.backward(3 * losses(model, [x]), scale=3.0), want)
    assert all(repeated) and repeated


def test_a_parameter_that_is_frozen_or_replaced_ends_repeating(repeated):
    model, x = whole_net()
    probe = fm.GradientProbe(model, per_parameter=True)

    def step():
        want = single_sample_gradients(model, lambda m, b: whole(m, b[0]), [x])
        model.zero_grad()
        stats = probe.backward(whole(model, x))
        assert stats.sq_norms_by_parameter.keys() == want.keys()
        assert_norms(stats, want)

    for change in (
        lambda: model[0].bias.requires_grad_(False),
        lambda: model[0].bias.requires_grad_(True),
        lambda: setattr(model[2], "weight", nn.Parameter(torch.randn(4, 5))),
    ):
        for _ in range(8):
            step()
        assert repeated[-1]
        change()
    step()


def test_gradients_that_are_there_already_are_not_this_pass(repeated):
    """Under accumulation a step is an ordinary one."""
    model, x = whole_net()
    want = single_sample_gradients(model, lambda m, b: whole(m, b[0]), [x])
    mean = sum(g.mean(0).square().sum() for g in want.values())
    probe = fm.GradientProbe(model, per_parameter=True)
    for step in range(12):
        if step % 3 != 1:
            model.zero_grad()
        stats = probe.backward(whole(model, x))
        assert_norms(stats, want)
        torch.testing.assert_close(
            stats.mean_grad_sq_norm.double(), mean, rtol=1e-5, atol=0
        )
    assert any(repeated)


def test_a_repeated_step_is_checked_in_its_time(repeated, monkeypatch):
    from fastminima.capture.reading.reader import Reader

    measured = []
    honest = Reader._measure

    def measure(self, graph):
        measured.append(1)
        return honest(self, graph)

    monkeypatch.setattr(Reader, "_measure", measure)
    model, x = whole_net()
    probe = fm.GradientProbe(model, check_every=20)
    for _ in range(60):
        model.zero_grad()
        probe.backward(whole(model, x))
    # Once at first, after ten steps, and every twenty: at 20 and at 40.
    assert len(measured) == 4
    assert sum(repeated) > 40


def test_a_jump_makes_an_ordinary_step(repeated, host_reads):
    """On a device it is seen a step later, when its numbers have come."""
    model, x = whole_net()
    probe = fm.GradientProbe(model)
    for k in range(9 if host_reads else 10):
        model.zero_grad()
        probe.backward(whole(model, x) * (100.0 if k == 8 else 1.0))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    assert repeated == [True] * (4 if host_reads else 5)


def test_a_repeated_pass_that_runs_twice_is_refused(repeated):
    model, x = whole_net()
    probe = fm.GradientProbe(model)

    class Again(torch.autograd.Function):
        """Runs a backward pass through the loss it is part of, inside the pass."""

        run = False
        losses = None

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if Again.run:
                Again.run = False
                with torch.enable_grad():
                    again = Again.losses.sum()
                parameters = list(model.parameters())
                torch.autograd.grad(again, parameters, retain_graph=True)
            return g

    for step in range(9):
        model.zero_grad()
        Again.losses = losses = whole(model, Again.apply(x.clone().requires_grad_()))
        Again.run = step == 8
        if step < 8:
            probe.backward(losses)
            continue
        with pytest.raises(fm.CaptureError, match="more uses than the graph had"):
            probe.backward(losses, retain_graph=True)
    assert repeated


def test_scaled_products_go_the_general_way():
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))
    x = torch.randn(4, 3)
    y = torch.addmm(b, x, w, beta=0.5, alpha=2.0)
    stats = probed({"w": w, "b": b}, y.square().sum(1))
    g = 2 * y.detach()
    want = {"w": 2 * torch.einsum("ni,no->nio", x, g), "b": 0.5 * g}
    assert_norms(stats, {name: v.double() for name, v in want.items()})


def test_a_bias_that_is_broadcast():
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(1))
    x = torch.randn(4, 3)
    y = torch.addmm(b, x, w)
    stats = probed({"w": w, "b": b}, y.square().sum(1))
    g = (2 * y).detach().double()
    want = {"w": torch.einsum("ni,no->nio", x.double(), g), "b": g.sum(1, keepdim=True)}
    assert_norms(stats, want)


def test_a_checkpointed_region():
    model, x = net()
    want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x])
    x.requires_grad_()
    losses = checkpoint(lambda x: losses_of(model, x), x, use_reentrant=False)
    assert_norms(probed(model, losses), want)


def test_a_second_pass_is_refused():
    model, x = net()
    probe = fm.GradientProbe(model)
    losses = losses_of(model, x)
    probe.attach(losses)
    losses.mean().backward(retain_graph=True)
    with pytest.raises(fm.CaptureError, match="second backward"):
        losses.mean().backward()


def test_the_last_batch_of_an_epoch():
    model, x = net()
    probe = fm.GradientProbe(model, per_parameter=True)
    for n in (7, 7, 3, 1, 7):
        want = single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [x[:n]])
        assert_norms(probe.backward(losses_of(model, x[:n])), want)


def test_half_precision():
    model, x = net()
    model, x = model.bfloat16(), x.bfloat16()
    stats = probed(model, losses_of(model, x).float())
    assert stats.sq_norms.dtype == torch.float32


def attached(case, model, batch, steps):
    """Mean gradients of some steps under accumulation, whose hooks read them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(model)
        model.zero_grad()
        found = []
        for _ in range(steps):
            losses = case.losses(model, batch)
            probe.attach(losses)
            losses.mean().backward()
            found.append(probe.collect().mean_grad_sq_norm)
        return found


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_gradients_are_read_by_the_extension_as_by_python(name, monkeypatch):
    case = BY_NAME[name]
    model, batch = case.make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    known = attached(case, model, batch, 2)
    model.load_state_dict(state)
    monkeypatch.setattr(gradients, "learned", lambda: None)
    torch.manual_seed(1)
    for found, want in zip(known, attached(case, model, batch, 2), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def leaves_read(monkeypatch):
    """How many gradients the extension has read, and Python, in each pass."""
    counts = []
    honest = gradients.Gradients.finish

    def finish(self):
        read = 0 if self._leaves is None else len(self._leaves.order)
        counts.append((read, len(self._taken)))
        return honest(self)

    monkeypatch.setattr(gradients.Gradients, "finish", finish)
    return counts


def test_which_gradients_the_extension_reads(monkeypatch, host_reads):
    counts = leaves_read(monkeypatch)
    model, x = net()
    probe = fm.GradientProbe(model)
    for _ in range(2):
        losses = losses_of(model, x)
        probe.attach(losses)
        losses.mean().backward()
        probe.collect()
    assert counts == [(8, 0) if host_reads else (0, 8)] * 2
    counts.clear()
    table = nn.Embedding(5, 3, sparse=True)
    probe = fm.GradientProbe(table)
    losses = table(torch.tensor([[0, 1], [2, 2]])).square().sum((1, 2))
    probe.attach(losses)
    losses.mean().backward()
    stats = probe.collect()
    want = table.weight.grad.to_dense().square().sum()
    torch.testing.assert_close(stats.mean_grad_sq_norm, want)
    assert counts == [(0, 1)]


def test_a_penalty_on_weights_is_left_out_of_what_the_extension_reads(
    monkeypatch, host_reads
):
    counts = leaves_read(monkeypatch)
    model, x = net()
    probe = fm.GradientProbe(model)
    want = probe.backward(losses_of(model, x)).mean_grad_sq_norm
    for _ in range(3):
        model.zero_grad()
        losses = losses_of(model, x)
        probe.attach(losses)
        (losses.mean() + model.plain.weight.square().sum()).backward()
        torch.testing.assert_close(probe.collect().mean_grad_sq_norm, want)
    assert counts[-1] == ((7, 0) if host_reads else (0, 7))
