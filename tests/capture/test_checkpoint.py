"""Activation checkpointing, both kinds, and other hooks on saved tensors."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from cases import CASES, Columns
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

import fastminima as fm
from fastminima.capture.graph.saved import frames_of
from fastminima.capture.graph.tape import Tape
from fastminima.capture.rows.samples import Batch

KINDS = pytest.mark.parametrize("use_reentrant", [False, True])
BY_NAME = {case.name: case for case in CASES}


def quiet(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def grads_of(model):
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def same(a, b):
    return all(
        (x is None and y is None) or torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


@KINDS
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_case_inside_a_region(name, use_reentrant):
    """The whole computation of the losses, to the last bit what it is without."""
    case = BY_NAME[name]
    model, batch = case.make()
    options = {"measure": ("norms", "gram"), "keep_mean": True}
    probe = fm.GradientProbe(model, **options)
    want = quiet(probe.backward, case.losses(model, batch))
    grads = grads_of(model)
    probe = fm.GradientProbe(model, **options)
    key = torch.zeros((), requires_grad=True)  # reentrant regions need such an input
    for step in range(3):
        losses = checkpoint(
            lambda _, *b: case.losses(model, b),
            key,
            *batch,
            use_reentrant=use_reentrant,
        )
        if step < 2:
            got = quiet(probe.backward, losses)
        else:  # the second way to read the gradient
            quiet(probe.attach, losses)
            losses.mean().backward()
            got = probe.collect()
        assert torch.equal(got.sq_norms, want.sq_norms)
        assert torch.equal(got.gram, want.gram)
        torch.testing.assert_close(got.mean_grad_sq_norm, want.mean_grad_sq_norm)
        assert same(grads_of(model), grads)


class Blocks(nn.Module):
    """Residual blocks under checkpointing; one matrix may serve everywhere."""

    def __init__(
        self, use_reentrant=None, dropout=0.0, width=6, depth=3, is_shared=True
    ):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(4, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.Tanh(),
                nn.Dropout(dropout),
            )
            for _ in range(depth)
        )
        self.shared = nn.Linear(width, width, bias=False)
        self.is_shared = is_shared

    def step(self, block, x):
        y = block(x)
        return x + (self.shared(y).tanh() if self.is_shared else y)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            if self.use_reentrant is None:
                x = self.step(block, x)
            else:
                x = checkpoint(self.step, block, x, use_reentrant=self.use_reentrant)
        return self.shared(x).square().mean((1, 2))


@KINDS
@pytest.mark.parametrize("way", ["backward", "accumulate", "attach", "scalar"])
def test_a_parameter_in_many_regions(use_reentrant, way):
    model = Blocks()
    x = torch.randn(5, 3, 4)
    want = fm.GradientProbe(model, per_parameter=True).backward(model(x))
    grads = grads_of(model)
    model.use_reentrant = use_reentrant
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(2):
        losses = model(x)
        if way == "accumulate":  # gradients are there before, and are not the pass' own
            model(x).mean().backward()
        if way == "attach":
            probe.attach(losses)
            losses.mean().backward()
            got = probe.collect()
        elif way == "scalar":
            got = probe.backward(losses.mean(), batch_size=5)
        else:
            got = probe.backward(losses)
        torch.testing.assert_close(got.sq_norms, want.sq_norms)
        torch.testing.assert_close(got.mean_grad_sq_norm, want.mean_grad_sq_norm)
        for name, norms in want.sq_norms_by_parameter.items():
            torch.testing.assert_close(got.sq_norms_by_parameter[name], norms)
        found = grads_of(model)
        if way == "accumulate":
            found = [g / 2 for g in found]
        for g, h in zip(found, grads, strict=True):
            torch.testing.assert_close(g, h)


@KINDS
def test_batches_of_one_and_of_other_sizes(use_reentrant):
    model = Blocks()
    checkpointed = copy.deepcopy(model)
    checkpointed.use_reentrant = use_reentrant
    plain, probe = fm.GradientProbe(model), fm.GradientProbe(checkpointed)
    for n, t in [(1, 3), (4, 3), (1, 3), (4, 5), (2, 1), (4, 3)]:
        x = torch.randn(n, t, 4)
        want = plain.backward(model(x)).sq_norms
        torch.testing.assert_close(probe.backward(checkpointed(x)).sq_norms, want)


@KINDS
def test_dropout_is_drawn_again_alike(use_reentrant):
    torch.manual_seed(3)
    plain = Blocks(use_reentrant, dropout=0.5)
    probed = copy.deepcopy(plain)
    probe = fm.GradientProbe(probed)
    x = torch.randn(5, 3, 4)
    for seed in range(3):
        torch.manual_seed(seed)
        plain(x).mean().backward()
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        losses = probed(x)
        stats = probe.backward(losses)
        assert torch.equal(torch.get_rng_state(), after)
        assert same(grads_of(plain), grads_of(probed))
        if not use_reentrant:
            torch.manual_seed(seed)
            assert fm.GradientProbe(probed).audit(probed(x)).ok
    assert stats.covariance_trace > 0


@KINDS
def test_mixed_samples_are_seen(use_reentrant):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(6, 4)
    key = torch.zeros((), requires_grad=True)

    def run(part):
        return checkpoint(lambda _: part(x), key, use_reentrant=use_reentrant).flatten()

    losses = run(model)
    with pytest.raises(fm.CaptureError, match="normalisation"):
        fm.GradientProbe(model).backward(losses)

    def centred(x):
        y = model[0](x)
        return model[2]((y - y.mean(0)).tanh())

    losses = run(centred)
    with pytest.raises(fm.CaptureError, match="samples"):
        fm.GradientProbe(model).backward(losses)


def test_what_reentrant_checkpoints_cannot_do():
    model = Blocks(use_reentrant=True)
    probe = fm.GradientProbe(model)
    losses = model(torch.randn(5, 3, 4))
    with pytest.raises(fm.CaptureError, match="use_reentrant=False"):
        probe.audit(losses)

    def outer(x):
        return checkpoint(model, x, use_reentrant=True)

    x = torch.randn(5, 3, 4, requires_grad=True)
    with pytest.raises(fm.CaptureError, match="contains another"):
        probe.backward(checkpoint(outer, x, use_reentrant=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_region_that_computes_something_else():
    """A program that branches differently when it runs again is not misread."""
    layer = nn.Linear(4, 4)
    runs = []

    def region(x):
        runs.append(None)
        y = layer(x)
        return y.tanh() if len(runs) < 5 else y.sin().tanh()

    x = torch.randn(3, 4, requires_grad=True)
    probe = fm.GradientProbe(layer)
    probe.backward(checkpoint(region, x, use_reentrant=True).sum(1))
    with pytest.raises(fm.CaptureError, match="something else"):
        probe.backward(checkpoint(region, x, use_reentrant=True).sum(1))


@KINDS
@pytest.mark.parametrize("fails_at", range(1, 5))
def test_an_exception_inside_leaves_nothing(use_reentrant, fails_at):
    model = Blocks(use_reentrant)
    x = torch.randn(5, 3, 4)
    want = fm.GradientProbe(model).backward(model(x)).sq_norms
    grads = grads_of(model)
    runs = []

    def fail(module, inputs):
        runs.append(None)
        if len(runs) == 3 + fails_at:  # three in the forward pass
            raise KeyboardInterrupt

    handles = [block.register_forward_pre_hook(fail) for block in model.blocks]
    losses = model(x)
    probe = fm.GradientProbe(model)
    with pytest.raises(KeyboardInterrupt):
        probe.backward(losses)
        raise KeyboardInterrupt  # fewer runs than that: nothing to interrupt
    for handle in handles:
        handle.remove()
    nodes = Tape([losses.grad_fn], {}).nodes
    stand_ins = [n.run_function for n in nodes if hasattr(n, "run_function")]
    assert all(not hasattr(f, "watchers") for f in stand_ins)
    model.zero_grad(set_to_none=True)
    assert torch.equal(probe.backward(model(x)).sq_norms, want)
    assert same(grads_of(model), grads)


def test_two_probes_on_one_region():
    model = Blocks(use_reentrant=True)
    x = torch.randn(5, 3, 4)
    first = fm.GradientProbe(model)
    second = fm.GradientProbe(dict(model.shared.named_parameters()))
    losses = model(x)
    first.attach(losses)
    second.attach(losses)
    losses.mean().backward()
    a, b = first.collect(), second.collect()
    assert (b.sq_norms < a.sq_norms).all()
    assert torch.equal(fm.GradientProbe(model).backward(model(x)).sq_norms, a.sq_norms)


def peak_bytes(step, device):
    """Most bytes of tensors alive at once during a step, beyond those before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    sizes = [
        e.nbytes()
        for e in profile.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    return max(torch.tensor(sizes, dtype=torch.long).cumsum(0).max().item(), 0)


@KINDS
def test_the_memory_saving_survives(use_reentrant, device):
    """Deep and wide enough that activations are most of the memory."""
    if device.type == "apart":
        pytest.skip("the profiler does not see the memory of `apart`")
    x = torch.randn(64, 16, 4)
    peaks = {}
    for kind in (None, use_reentrant):
        torch.manual_seed(0)
        model = Blocks(kind, width=64, depth=12, is_shared=False)
        probe = fm.GradientProbe(model)

        def plain(model=model):
            model(x).mean().backward()
            model.zero_grad()

        def probed(model=model, probe=probe):
            probe.backward(model(x))
            model.zero_grad()

        plain()
        peaks[kind, "plain"] = peak_bytes(plain, device)
        peaks[kind, "first"] = peak_bytes(probed, device)
        peaks[kind, "probed"] = peak_bytes(probed, device)
    saved = peaks[use_reentrant, "plain"] / peaks[None, "plain"]
    assert saved < 0.5, peaks  # there is something to lose
    for step, most in (("probed", 1.15), ("first", 1.6)):
        growth = peaks[use_reentrant, step] / peaks[use_reentrant, "plain"]
        assert growth < most, (step, peaks)


def test_passes_that_are_over_keep_nothing():
    """What a measuring pass recomputes is gone before the training pass begins."""
    model = Blocks(use_reentrant=False)
    losses = model(torch.randn(5, 3, 4))
    fm.GradientProbe(model)._reader.read(losses, Batch(5))
    frames = frames_of(Tape([losses.grad_fn], {}).nodes)
    assert len(frames) == 3
    for frame in frames:
        assert not any(len(kept) for kept in frame.recomputed.values())
        holders = [ref() for ref in frame.weak_holders]
        assert not any(h.handles for h in holders if h is not None)


def test_the_explaining_mode_of_checkpoint():
    model = Blocks()
    x = torch.randn(5, 3, 4)
    want = fm.GradientProbe(model).backward(model(x)).sq_norms
    model.use_reentrant = False
    probe = fm.GradientProbe(model)
    probe.backward(model(x))
    with checkpointing.set_checkpoint_debug_enabled(True):
        losses = model(x)
    torch.testing.assert_close(probe.backward(losses).sq_norms, want)


@pytest.mark.parametrize("name", ["mixed", "conv2d", "tied head", "lstm", "experts"])
def test_saved_tensors_that_are_moved_away(name):
    case = BY_NAME[name]
    model, batch = case.make()
    want = quiet(fm.GradientProbe(model).backward, case.losses(model, batch)).sq_norms
    grads = grads_of(model)
    probe = fm.GradientProbe(model)
    for _ in range(2):
        with save_on_cpu():
            losses = case.losses(model, batch)
        assert torch.equal(quiet(probe.backward, losses).sq_norms, want)
        assert same(grads_of(model), grads)


def test_packed_tensors_are_unpacked_by_the_users_hooks():
    """Hooks that keep bfloat16 copies: the statistics are those of that backward."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(6, 4)
    alive = []

    def pack(t):
        alive.append(weakref.ref(t))
        return t.bfloat16()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.float()):
        losses = model(x).square().sum(1)
    probe = fm.GradientProbe(model, per_parameter=True)
    singles = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for loss in losses
    ]
    want = torch.stack([sum(g.square().sum() for g in gs) for gs in singles])
    torch.testing.assert_close(probe.backward(losses).sq_norms, want)


class Given(nn.Module):
    """A region that is given a parameter as an argument."""

    def __init__(self, is_prepared):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 2)
        self.is_prepared = is_prepared
        self.runs_again = False

    def forward(self, x):
        def region(x, weight):
            return self.head((x @ weight).tanh()) * self.weight.sum()

        weight = self.weight.t() if self.is_prepared else self.weight
        if not self.runs_again:
            return region(x, weight)
        return checkpoint(region, x, weight, use_reentrant=True)


@pytest.mark.parametrize("way", ["backward", "attach"])
def test_a_parameter_given_to_a_region(way):
    model = Given(is_prepared=False)
    x = torch.randn(5, 4)
    want = fm.GradientProbe(model, keep_mean=True).backward(model(x).square().sum(1))
    grads = grads_of(model)
    model.runs_again = True
    probe = fm.GradientProbe(model, keep_mean=True)
    for _ in range(2):
        losses = model(x).square().sum(1)
        if way == "backward":
            got = probe.backward(losses)
        else:
            probe.attach(losses)
            losses.mean().backward()
            got = probe.collect()
        torch.testing.assert_close(got.sq_norms, want.sq_norms)
        for name, mean in want.mean_grad.items():
            torch.testing.assert_close(got.mean_grad[name], mean)
        for g, h in zip(grads_of(model), grads, strict=True):
            torch.testing.assert_close(g, h)


def test_a_parameter_changed_on_its_way_into_a_region():
    model = Given(is_prepared=True)
    model.runs_again = True
    losses = model(torch.randn(5, 4)).square().sum(1)
    with pytest.raises(fm.CaptureError, match="'weight' is changed"):
        fm.GradientProbe(model).backward(losses)
    assert all(p.grad is None for p in model.parameters())


def test_sizes_inside_a_region():
    """As many pixels, another aspect ratio: measured again, or refused if unseen."""
    torch.manual_seed(0)
    model = Columns()

    def losses_of(run, *args):
        pixels = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
        return run(pixels.requires_grad_(), *args).sin().flatten(1).sum(1)

    probe, unseen = fm.GradientProbe(model), fm.GradientProbe(model)
    for height, width in ((4, 6), (6, 4), (3, 8), (4, 6)):
        sizes = height, width
        want = fm.GradientProbe(model).backward(losses_of(model, *sizes)).sq_norms

        def told(*args):
            return checkpoint(model, *args, use_reentrant=True)

        def closed(pixels, sizes=sizes):
            run = lambda x: model(x, *sizes)  # noqa: E731
            return checkpoint(run, pixels, use_reentrant=True)

        got = probe.backward(losses_of(told, *sizes)).sq_norms
        torch.testing.assert_close(got, want)
        if sizes == (4, 6):
            got = unseen.backward(losses_of(closed)).sq_norms
            torch.testing.assert_close(got, want)
        else:
            with pytest.raises(fm.CaptureError, match="something else now"):
                unseen.backward(losses_of(closed))


def test_experts_of_one_sample_inside_a_region():
    """Other numbers of rows for each expert in every step."""
    case = BY_NAME["experts"]
    model, _ = case.make()
    probe = fm.GradientProbe(model)
    key = torch.zeros((), requires_grad=True)
    for seed in range(4):
        x = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(seed))
        run = lambda _, x: case.losses(model, [x])  # noqa: E731
        got = probe.backward(checkpoint(run, key, x, use_reentrant=True))
        want = fm.GradientProbe(model).backward(case.losses(model, [x]))
        torch.testing.assert_close(got.sq_norms, want.sq_norms)


@KINDS
def test_one_parameter_given_twice_to_a_region(use_reentrant):
    torch.manual_seed(0)
    w, x = torch.nn.Parameter(torch.randn(6, 6)), torch.randn(4, 5, 6)
    linear = torch.nn.functional.linear

    def region(x, a, b):
        return linear(linear(x, a).tanh(), b)

    def probed(y):
        w.grad = None
        stats = fm.GradientProbe({"w": w}).backward(y.square().flatten(1).sum(1))
        return stats.sq_norms

    want = probed(region(x, w, w))
    x.requires_grad_()
    y = checkpoint(region, x, w, w, use_reentrant=use_reentrant)
    torch.testing.assert_close(probed(y), want)


def test_an_audit_of_reentrant_regions_alone_says_why_not():
    layer, x = torch.nn.Linear(6, 3), torch.randn(4, 6, requires_grad=True)
    losses = checkpoint(layer, x, use_reentrant=True).square().sum(1)
    with pytest.raises(fm.CaptureError, match="use_reentrant=False"):
        fm.GradientProbe(layer).audit(losses)
