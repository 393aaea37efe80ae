"""Compiled modules: what `compile` keeps is enough to read them, exactly."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Columns
from torch import nn

import fastminima as fm

BY_NAME = {case.name: case for case in CASES}
# One of each kind: what a compiler makes of it is not the point, the graph is.
NAMES = (
    "linear 3d",
    "conv2d",
    "mha batch first",
    "tied head",
    "group norm",
    "rms norm",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _placed(compiling):
    """Models and batches are moved one by one."""


class Blocks(nn.Module):
    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.first = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)
        )
        self.second = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.first(x)
        x = x + self.second(x)
        return x @ self.table.weight.t()


@pytest.fixture
def blocks(device):
    """`Blocks` on the device."""
    return lambda **options: Blocks(**options).to(device)


@pytest.fixture
def batch(device):
    """Ids on the device."""

    def make(n=5, t=4, seed=0):
        ids = torch.randint(11, (n, t), generator=torch.Generator().manual_seed(seed))
        return ids.to(device)

    return make


def losses_of(run, ids):
    return F.cross_entropy(run(ids).mT, ids, reduction="none").mean(1)


def take_grads(model):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_reads_as_the_plain_one(name, device):
    case = BY_NAME[name]
    model, inputs = case.make(device=device)
    options = {"measure": ("norms", "gram"), "per_parameter": True}
    want = fm.GradientProbe(model, **options).backward(case.losses(model, inputs))
    take_grads(model)
    fast = fm.compile(model, backend="aot_eager", fullgraph=True)
    case.losses(fast, inputs).mean().backward()
    grads = take_grads(model)
    probe = fm.GradientProbe(model, **options)
    for way in ("backward", "backward", "attach"):
        losses = case.losses(fast, inputs)
        if way == "backward":
            got = probe.backward(losses)
        else:
            probe.attach(losses)
            losses.mean().backward()
            got = probe.collect()
        torch.testing.assert_close(got.sq_norms, want.sq_norms)
        torch.testing.assert_close(got.gram, want.gram)
        torch.testing.assert_close(got.mean_grad_sq_norm, want.mean_grad_sq_norm)
        for parameter, norms in want.sq_norms_by_parameter.items():
            torch.testing.assert_close(got.sq_norms_by_parameter[parameter], norms)
        for g, h in zip(take_grads(model), grads, strict=True):
            assert torch.equal(g, h)  # the compiled code's own, to the last bit
    losses = case.losses(fast, inputs)
    assert probe.audit(losses).ok
    losses.mean().backward()


@pytest.mark.slow
def test_inductor_trains_the_same_and_is_read(blocks, batch):
    """The real compiler: a run with and without the probe, bit by bit the same."""
    torch.manual_seed(0)
    plain = blocks()
    probed = copy.deepcopy(plain)
    want = fm.GradientProbe(plain).backward(losses_of(plain, batch()))
    plain.zero_grad()
    runs = {}
    for model in (plain, probed):
        fast = fm.compile(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = fm.GradientProbe(model, every=2)
        for step in range(5):
            losses = losses_of(fast, batch())
            optimizer.zero_grad()
            if model is probed:
                stats = probe.backward(losses)
                assert (stats is None) == (step % 2 == 1)
                if step == 0:
                    torch.testing.assert_close(stats.sq_norms, want.sq_norms)
            else:
                losses.mean().backward()
            optimizer.step()
        runs[model] = [p.detach().clone() for p in model.parameters()]
    for a, b in zip(*runs.values(), strict=True):
        assert torch.equal(a, b)


def test_other_sizes_and_graph_breaks(blocks, batch):
    """Dynamic shapes, batches of one, several regions and plain layers between them."""
    model = blocks()
    parts = copy.copy(model)
    parts.first, parts.second = (
        fm.compile(part, backend="aot_eager") for part in (model.first, model.second)
    )
    whole = fm.compile(model, backend="aot_eager", dynamic=True)
    plain, first, second = (fm.GradientProbe(model) for _ in range(3))
    for n, t in [(5, 4), (3, 4), (5, 6), (1, 4), (5, 4), (2, 2)]:
        ids = batch(n, t)
        want = plain.backward(losses_of(model, ids)).sq_norms
        for run, probe in ((whole, first), (parts, second)):
            got = probe.backward(losses_of(run, ids)).sq_norms
            torch.testing.assert_close(got, want)


def test_losses_inside_the_region(blocks, batch):
    model = blocks()
    ids = batch()
    want = fm.GradientProbe(model).backward(losses_of(model, ids))
    fast = fm.compile(lambda ids: losses_of(model, ids), backend="aot_eager")
    got = fm.GradientProbe(model).backward(fast(ids))
    torch.testing.assert_close(got.sq_norms, want.sq_norms)


def test_autocast_around_a_region(blocks, batch, autocast):
    model = blocks()
    fast = fm.compile(model, backend="aot_eager")
    ids = batch()

    def losses(run):
        with autocast(dtype=torch.bfloat16):
            logits = run(ids)
        return F.cross_entropy(logits.float().mT, ids, reduction="none").mean(1)

    want = fm.GradientProbe(model).backward(losses(model)).sq_norms
    got = fm.GradientProbe(model).backward(losses(fast)).sq_norms
    # Compilers may leave out the rounding between operations: one unit each way.
    torch.testing.assert_close(got, want, rtol=2**-6, atol=0)


def test_mixed_samples_inside_a_region(device):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            y = self.first(x)
            return self.second((y - y.mean(0)).tanh()).flatten()

    model = Centred().to(device)
    fast = fm.compile(model, backend="aot_eager")
    with pytest.raises(fm.CaptureError, match="samples"):
        fm.GradientProbe(model).backward(fast(torch.randn(6, 4).to(device)))


class Mixed(nn.Module):
    """A layer whose gradient no mark knows, after what is not the same twice."""

    def __init__(self, before):
        super().__init__()
        self.before, self.layer = before, nn.Bilinear(4, 4, 3)

    def forward(self, x):
        x = self.before(x)
        return self.layer(x, x.tanh())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x * self.seen


def test_what_cannot_run_again_is_refused(device):
    """And is not marked either: then neither its numbers nor its state are touched."""
    rng = torch.cuda if device.type == "cuda" else torch
    model = Mixed(nn.Dropout()).to(device)
    fast = fm.compile(model, backend="aot_eager")
    x = torch.randn(5, 4).to(device)
    state = rng.get_rng_state()
    losses = fast(x).sum(1)
    after = rng.get_rng_state()
    with pytest.raises(fm.CaptureError, match=r"random.*trilinear"):
        fm.GradientProbe(model).backward(losses)
    assert torch.equal(rng.get_rng_state(), after)
    assert not torch.equal(state, after)
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    with pytest.warns(UserWarning, match="once more, uncompiled.*trilinear"):
        stats = fm.GradientProbe(model).backward(fast(x).sum(1))
    assert stats.is_finite
    counting = Mixed(Counting()).to(device)
    losses = fm.compile(counting, backend="aot_eager")(x).sum(1)
    with pytest.raises(fm.CaptureError, match=r"changed in place"):
        fm.GradientProbe(counting).backward(losses)
    assert counting.before.seen == 1


def test_a_model_compiled_by_others(blocks, batch):
    model = blocks()
    fast = torch.compile(model, backend="aot_eager")
    with pytest.raises(fm.CaptureError, match=r"fastminima\.compile"):
        fm.GradientProbe(model).backward(losses_of(fast, batch()))


def test_every_kth_step_on_the_uncompiled_module(blocks, batch):
    """The other way, without `fastminima.compile`: two lines."""
    torch.manual_seed(0)
    model = blocks()
    fast = torch.compile(model, backend="aot_eager")
    probe = fm.GradientProbe(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(5):
        optimizer.zero_grad()
        run = model if step % 2 == 0 else fast
        losses = losses_of(run, batch())
        if run is model:
            found.append(probe.backward(losses))
        else:
            losses.mean().backward()
        optimizer.step()
    assert len(found) == 3
    assert all(stats.is_finite for stats in found)


def test_inference_and_unprobed_steps_are_plain(blocks, batch):
    model = blocks()
    fast = fm.compile(model, backend="aot_eager")
    ids = batch()
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), model(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses_of(fast, ids).mean().backward()
    grads = take_grads(model)
    losses_of(model, ids).mean().backward()
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_sizes_that_a_region_is_given_as_numbers(device):
    """As many pixels, another aspect ratio, one compiled graph for all of them."""
    torch.manual_seed(0)
    model, pixels = Columns().to(device), torch.randn(3, 24, 8).to(device)
    fast = fm.compile(model, backend="aot_eager", dynamic=True)
    probe = fm.GradientProbe(model)
    for sizes in ((4, 6), (6, 4), (3, 8), (4, 6)):
        want, got = (
            (fm.GradientProbe(model) if run is model else probe).backward(
                run(pixels, *sizes).sin().flatten(1).sum(1)
            )
            for run in (model, fast)
        )
        torch.testing.assert_close(got.sq_norms, want.sq_norms)


@pytest.mark.parametrize("name", ["loop over images", "mha cross", "own function"])
def test_what_rules_take_from_the_nodes_of_a_region(name, device):
    """No rule of their own, or places in a packed parameter; in changing sizes too."""
    case = BY_NAME[name]
    model, inputs = case.make(device=device)
    options = {"per_parameter": True, "measure": ("norms", "second_moments")}
    count = sum(p.numel() for p in model.parameters())
    options["directions"] = {"v": torch.linspace(-1, 1, count).to(device)}
    fast, probe = (
        fm.compile(model, backend="aot_eager"),
        fm.GradientProbe(model, **options),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in (3, 2, 3):
            batch = [x[:size] for x in inputs]
            out = case.call(fast, *batch).flatten(1)
            weight = torch.linspace(0.5, 1.5, out.shape[1]).to(device)
            got = probe.backward((out * weight).sin().sum(1))
            plain = fm.GradientProbe(model, **options)
            want = plain.backward(case.losses(model, batch))
            for p, norms in want.sq_norms_by_parameter.items():
                scale = float(want.sq_norms.max())
                close = {"rtol": 1e-4, "atol": 1e-6 * scale}
                torch.testing.assert_close(got.sq_norms_by_parameter[p], norms, **close)
                moments = got.second_moments[p], want.second_moments[p]
                torch.testing.assert_close(*moments, **close)
            torch.testing.assert_close(got.dots["v"], want.dots["v"], **close)


def test_frozen_factors_inside_a_region(device):
    case = BY_NAME["low rank"]
    model, (x,) = case.make(device=device)
    model.a.requires_grad_(False)
    fast = fm.compile(model, backend="aot_eager")
    got, want = (
        fm.GradientProbe(model).backward(run(x).sin().sum(1)) for run in (fast, model)
    )
    torch.testing.assert_close(got.sq_norms, want.sq_norms)
