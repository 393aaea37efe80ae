"""Compiled regions that show their uses themselves: nothing runs again, and exactly."""

import copy
import os
import re
import subprocess
import sys
import tomllib
import warnings
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers_models import LISTED, MORE

import fastminima as fm
from fastminima.capture.compiled import operators
from fastminima.capture.compiled.marks import Into, Mark, joined_moves, mark_of
from fastminima.capture.graph import replay
from fastminima.capture.reading.reader import Reader
from fastminima.capture.session.collector import Collector

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compiled.md"
BY_NAME = {case.name: case for case in CASES}
BACKENDS = ("aot_eager", "aot_eager_decomp_partition")
# Where a gradient is computed by what no mark knows; the reasons are in
# docs/compiled.md. Any other case that runs again is a fault.
RUN_AGAIN = {
    "bilinear",
    "experts selected",
    "loop over images",
    "loop over samples",
    "low rank",
    "spectral norm",
    "weight norm",
    "weight unbound",
}
# PyTorch has no float32 kernel for it under its compiler.
CASES = [case for case in CASES if case.name != "experts grouped"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _placed(compiling):
    """Models and batches are moved one by one."""


def take_grads(model):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return grads


def singles(losses, model):
    """Squared norms of single samples' gradients, through the very same graph."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with replay.keeping_graphs():
        rows = [
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in losses
        ]
    found = [
        sum(g.double().square().sum() for g in row if g is not None) for row in rows
    ]
    return torch.stack(found).to(losses.dtype)


def assert_trains_alike(probe, model, losses, want, grads):
    """Some steps: norms of samples and of the mean, and the gradients, to rounding."""
    for _ in range(3):
        got = probe.backward(losses())
        torch.testing.assert_close(got.sq_norms, want.sq_norms)
        torch.testing.assert_close(got.mean_grad_sq_norm, want.mean_grad_sq_norm)
        for g, h in zip(take_grads(model), grads, strict=True):
            torch.testing.assert_close(g, h)


def assert_alike(got, want):
    """Statistics by parameter, to rounding of the largest."""
    scale = float(want.sq_norms.max())
    assert got.sq_norms_by_parameter.keys() == want.sq_norms_by_parameter.keys()
    close = {"rtol": 1e-4, "atol": 1e-6 * scale}
    for name, norms in want.sq_norms_by_parameter.items():
        torch.testing.assert_close(got.sq_norms_by_parameter[name], norms, **close)
        moments = got.second_moments[name], want.second_moments[name]
        torch.testing.assert_close(*moments, **close)
    torch.testing.assert_close(got.dots["v"], want.dots["v"], **close)
    torch.testing.assert_close(
        got.mean_grad_sq_norm, want.mean_grad_sq_norm, rtol=1e-4, atol=1e-6 * scale
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case, backend, device):
    """As the uncompiled probe, and as is said of what runs again."""
    model, inputs = case.make(device=device)
    count = sum(p.numel() for p in model.parameters())
    options = {
        "measure": ("norms", "second_moments"),
        "per_parameter": True,
        "directions": {"v": torch.linspace(-1, 1, count).to(device)},
    }
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        want = fm.GradientProbe(model, **options).backward(case.losses(model, inputs))
        take_grads(model)
        fast = fm.compile(model, backend=backend)
        probe = fm.GradientProbe(model, **options)
        for _ in range(3):
            assert_alike(probe.backward(case.losses(fast, inputs)), want)
            take_grads(model)
    again = [str(w.message) for w in seen if "once more" in str(w.message)]
    assert not again or case.name in RUN_AGAIN, again


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "conv2d",
        "tied head",
        "rows in common",
        "reused",
        "group norm",
        "mha batch first",
    ],
)
def test_the_real_compiler(name, device):
    """Which writes over tensors as soon as an operator has read them."""
    case = BY_NAME[name]
    model, inputs = case.make(device=device)
    options = {"per_parameter": True, "measure": ("norms", "second_moments", "gram")}
    want = fm.GradientProbe(model, **options).backward(case.losses(model, inputs))
    take_grads(model)
    fast = fm.compile(model, fullgraph=True)
    case.losses(fast, inputs).mean().backward()
    grads = take_grads(model)
    probe = fm.GradientProbe(model, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*once more")
        for _ in range(2):
            got = probe.backward(case.losses(fast, inputs))
            torch.testing.assert_close(got.gram, want.gram, rtol=1e-4, atol=1e-5)
            for parameter, norms in want.sq_norms_by_parameter.items():
                torch.testing.assert_close(
                    got.sq_norms_by_parameter[parameter], norms, rtol=1e-4, atol=1e-5
                )
            for g, h in zip(take_grads(model), grads, strict=True):
                assert torch.equal(g, h)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "ViT", "Qwen3", "Mamba", "Swin v2"])
def test_models_of_transformers(name, device):
    """Only the last, whose positions pass a mask, has to run again."""
    zoo = next(model for model in LISTED + MORE if model.name == name)
    model, batch = zoo.make()
    model, batch = model.to(device), tuple(t.to(device) for t in batch)
    options = {"per_parameter": True}
    want = fm.GradientProbe(model, **options).backward(zoo.losses(model, batch))
    take_grads(model)
    model.forward = fm.compile(model.forward, backend="aot_eager")
    probe = fm.GradientProbe(model, **options)
    with warnings.catch_warnings():
        if name != "Swin v2":
            warnings.filterwarnings("error", message=".*once more")
        for _ in range(2):
            got = probe.backward(zoo.losses(model, batch))
            close = {"rtol": 1e-4, "atol": 1e-6 * float(want.sq_norms.max())}
            for parameter, norms in want.sq_norms_by_parameter.items():
                found = got.sq_norms_by_parameter[parameter]
                torch.testing.assert_close(found, norms, **close)


def test_the_page_names_tests_that_are_there():
    """docs/compiled.md says of each line which test shows it."""
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", PAGE.read_text()))
    files = (path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", "\n".join(files), re.MULTILINE))
    assert named
    assert named <= there


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.4), nn.LayerNorm(16)
        )
        self.head = nn.Linear(16, 11)

    def forward(self, ids):
        return self.head(self.layers(self.table(ids)))


@pytest.fixture
def dropping(device):
    """A model with dropout, and losses of single samples of any run of it."""
    torch.manual_seed(0)
    ids = torch.randint(11, (6, 5)).to(device)

    def losses(run):
        return F.cross_entropy(run(ids).mT, ids, reduction="none").mean(1)

    return Dropping().to(device), losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_with_the_masks_of_the_step(dropping, backend):
    model, losses_of = dropping
    fast = fm.compile(model, backend=backend, fullgraph=True)
    probe = fm.GradientProbe(model)
    for _ in range(3):
        losses = losses_of(fast)
        want = singles(losses, model)
        got = probe.backward(losses).sq_norms
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probed_step_is_the_step_itself(dropping, backend):
    """Bit by bit, dropout's masks and all that is random afterwards too."""
    model, losses_of = dropping
    twin = copy.deepcopy(model)
    after = {}
    for run in (model, twin):
        fast = fm.compile(run, backend=backend)
        probe = fm.GradientProbe(run, every=2)
        optimizer = torch.optim.SGD(run.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            losses = losses_of(fast)
            if run is twin:
                probe.backward(losses)
            else:
                losses.mean().backward()
            optimizer.step()
        after[run] = [*run.parameters(), torch.rand(3)]
    for a, b in zip(after[model], after[twin], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused(dropping, backend, monkeypatch):
    """Gradients with their statistics, and the product itself when nobody asks."""
    model, losses_of = dropping
    model.eval()
    fast = fm.compile(model, backend=backend)
    losses_of(fast).mean().backward()
    plain = take_grads(model)
    want = fm.GradientProbe(model).backward(losses_of(model)).sq_norms
    take_grads(model)
    probe = fm.GradientProbe(model, mode="fused", measure=("norms", "second_moments"))
    moments = fm.GradientProbe(model, measure="second_moments")
    expected = moments.backward(losses_of(model)).second_moments
    take_grads(model)
    made = []
    make = Collector.make
    monkeypatch.setattr(
        Collector, "make", lambda self, p, whole: made.append(p) or make(self, p, whole)
    )
    for _ in range(3):
        made.clear()
        got = probe.backward(losses_of(fast))
        assert made == ["head.weight", "layers.0.weight"]
        torch.testing.assert_close(got.sq_norms, want)
        for name, moment in expected.items():
            torch.testing.assert_close(got.second_moments[name], moment)
        for g, h in zip(take_grads(model), plain, strict=True):
            torch.testing.assert_close(g, h)
        losses_of(fast).mean().backward()
        for g, h in zip(take_grads(model), plain, strict=True):
            assert torch.equal(g, h)


def test_fused_and_used_elsewhere(device):
    """A weight of a region that is used outside too gets both its gradients."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 6).to(device), torch.randn(5, 4, 6).to(device)
    fast = fm.compile(model, backend="aot_eager")

    def losses(run):
        return (run(x) + model(x.flip(1)).tanh()).square().sum((1, 2))

    want = fm.GradientProbe(model).backward(losses(model))
    grads = take_grads(model)
    probe = fm.GradientProbe(model, mode="fused")
    assert_trains_alike(probe, model, lambda: losses(fast), want, grads)


def test_an_error_in_the_pass_leaves_nothing(dropping):
    model, losses_of = dropping
    model.eval()
    fast = fm.compile(model, backend="aot_eager")
    probe = fm.GradientProbe(model)
    want = probe.backward(losses_of(fast)).sq_norms
    losses = losses_of(fast)
    probe.attach(losses)

    def stop(_):
        raise RuntimeError("stop")

    handle = model.table.weight.register_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        losses.mean().backward()
    handle.remove()
    node = losses.grad_fn
    while node.name() != "CompiledFunctionBackward":
        node = next(n for n, _ in node.next_functions if n is not None)
    torch.testing.assert_close(probe.backward(losses_of(fast)).sq_norms, want)
    assert "fastminima.receiver" not in node.metadata


def test_moves_that_undo_each_other():
    turn, back = ("permute", (1, 2, 0)), ("permute", (2, 0, 1))
    assert joined_moves([turn, back]) == ()
    assert joined_moves([turn, turn]) == (back,)
    assert joined_moves([("reshape", (4, 6)), ("reshape", (24,))]) == (
        ("reshape", (24,)),
    )
    t = torch.randn(2, 3, 4)
    moves = [turn, ("reshape", (3, 8)), ("permute", (1, 0)), ("permute", (1, 0)), turn]
    assert joined_moves(moves[:4]) == (turn, ("reshape", (3, 8)))
    (both,) = joined_moves([turn, ("permute", (0, 2, 1))])
    assert torch.equal(t.permute(1, 2, 0).permute(0, 2, 1), t.permute(both[1]))


def test_a_mark_means_the_same_in_another_process():
    into = Into(2, 5, (3, 4), (("permute", (1, 0)), ("put", 0, 2, 6, 1, 6)), 7)
    mark = Mark(
        *(1, 3, "AddmmBackward0", ("mat1", "indices[]"), (into,)),
        *({"is_left": True, "stride": [2, 2]}, (2, 3, 4), 9, 2),
    )
    assert mark_of(mark.encoded()) == mark


ONE_STEP = """
import torch, fastminima as fm
from torch._dynamo.utils import counters
from fastminima.capture.compiled import inserting
sources = inserting.get_hash_for_files
inserting.get_hash_for_files = lambda files: sources(files) + {version!r}.encode()
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)
)
fast = fm.compile(model)
stats = fm.GradientProbe(model).backward(fast(torch.randn(5, 4, 6)).sum((1, 2)))
found = counters["aot_autograd"]
print(found["autograd_cache_hit"], found["autograd_cache_miss"])
print(stats.sq_norms.tolist())
"""


@pytest.mark.slow
def test_caches_of_the_compiler(tmp_path):
    """A second process compiles nothing, and reads the same; other sources do."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}

    def run(version):
        code = ONE_STEP.format(version=version)
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **own},
        ).stdout.splitlines()

    first, second, other = run("1"), run("1"), run("2")
    assert first[0] == other[0] == "0 1"
    assert second[0] == "1 0"
    assert first[1] == second[1] == other[1]


def test_code_that_does_not_show_its_uses_is_noticed(dropping, monkeypatch):
    """As where a wrapper replays it: an error, not statistics of what was seen."""
    model, losses_of = dropping
    fast = fm.compile(model, backend="aot_eager")
    probe = fm.GradientProbe(model)
    probe.backward(losses_of(fast))
    model.zero_grad()
    monkeypatch.setattr(operators, "_receivers", tuple)
    with pytest.raises(fm.CaptureError, match="showed 0 of its"):
        probe.backward(losses_of(fast))


def test_sizes_are_carried_over(device, monkeypatch):
    """One compiled graph for all lengths and batches: three are measured."""
    torch.manual_seed(0)
    model = BY_NAME["tied head"].build().to(device)
    fast = fm.compile(model, backend="aot_eager", dynamic=True)
    measured = []
    measure = Reader._measure
    monkeypatch.setattr(
        Reader, "_measure", lambda self, g: measured.append(g) or measure(self, g)
    )
    probe, plain = fm.GradientProbe(model), fm.GradientProbe(model)
    counts = []
    for n, t in [(4, 5), (3, 5), (4, 3), (5, 4), (2, 5), (7, 3), (3, 3), (7, 2)]:
        ids = torch.randint(11, (n, t)).to(device)
        want, got = (
            each.backward(run(ids).square().flatten(1).sum(1)).sq_norms
            for each, run in ((plain, model), (probe, fast))
        )
        torch.testing.assert_close(got, want)
        counts.append(sum(graph.regions != [] for graph in measured))
    assert counts == [1, 2, 3, 3, 3, 3, 3, 3]


def test_measured_anew_and_found_to_be_other(dropping):
    """What is remembered of a region is compared with every new measurement."""
    model, losses_of = dropping
    fast = fm.compile(model, backend="aot_eager")
    probe = fm.GradientProbe(model)
    probe.backward(losses_of(fast))
    (structure,) = probe._attacher._reader._structures.values()
    (recipe,) = structure._recipes.values()
    (region,) = recipe.regions.values()
    place = next(p for p, (x,) in region.layouts.items() if x.inner > 1)
    (layout,) = region.layouts[place]
    region.layouts[place] = (replace(layout, outer=layout.inner, inner=1),)
    with pytest.raises(fm.CaptureError, match="belong to other samples"):
        for _ in range(20):
            probe.backward(losses_of(fast))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_normalisation(device, backend):
    """Refused in training as ever; rows of the ordinary pass; constants in eval."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    ).to(device)
    x = torch.randn(5, 3, 6, 6).to(device)
    fast = fm.compile(model, backend=backend)
    for options in ({}, {"batchnorm": "frozen"}):
        with pytest.raises(fm.CaptureError, match="Batch normalisation in training"):
            fm.GradientProbe(model, **options).backward(fast(x).square().sum(1))
        assert all(p.grad is None for p in model.parameters())
    options = {"batchnorm": "rows", "per_parameter": True}
    probe, plain = (fm.GradientProbe(model, **options) for _ in range(2))
    for training in (True, False, True):
        model.train(training)
        for _ in range(2):
            want = plain.backward(model(x).square().sum(1))
            grads = take_grads(model)
            got = probe.backward(fast(x).square().sum(1))
            for name, norms in want.sq_norms_by_parameter.items():
                torch.testing.assert_close(got.sq_norms_by_parameter[name], norms)
            for g, h in zip(take_grads(model), grads, strict=True):
                torch.testing.assert_close(g, h)


class Checkpointed(nn.Module):
    """Blocks of which one is computed again in the backward pass, or part of it."""

    def __init__(self, context_fn=None):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.options = {} if context_fn is None else {"context_fn": context_fn}

    def forward(self, x):
        x = self.first(x).tanh()
        x = x + checkpoint(self.block, x, use_reentrant=False, **self.options)
        return self.last(x)


def _keep_products():
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    return create_selective_checkpoint_contexts(kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context_fn", [None, _keep_products], ids=["all", "selective"])
def test_checkpoints_inside(device, backend, context_fn):
    torch.manual_seed(0)
    plain = Checkpointed().to(device)
    x = torch.randn(5, 4, 6).to(device)
    want = fm.GradientProbe(plain).backward(plain(x).square().sum((1, 2)))
    grads = take_grads(plain)
    model = Checkpointed(context_fn).to(device)
    model.load_state_dict(plain.state_dict())
    fast = fm.compile(model, backend=backend, fullgraph=True)
    probe = fm.GradientProbe(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*once more")
        assert_trains_alike(
            probe, model, lambda: fast(x).square().sum((1, 2)), want, grads
        )


def test_accumulation(dropping):
    """Each backward pass has statistics of its own; `.grad` is their sum."""
    model, losses_of = dropping
    model.eval()
    fast = fm.compile(model, backend="aot_eager")
    probe, plain = fm.GradientProbe(model), fm.GradientProbe(model)
    want = plain.backward(losses_of(model))
    once = take_grads(model)
    for _ in range(3):
        got = probe.backward(losses_of(fast))
        torch.testing.assert_close(got.sq_norms, want.sq_norms)
        torch.testing.assert_close(got.mean_grad_sq_norm, want.mean_grad_sq_norm)
    for g, h in zip(take_grads(model), once, strict=True):
        torch.testing.assert_close(g, 3 * h)


def test_autocast_inside(device, autocast):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x):
            with autocast(dtype=torch.bfloat16):
                return self.layers(x).float()

    model, x = Cast().to(device), torch.randn(5, 4, 6).to(device)
    fast = fm.compile(model, backend="aot_eager", fullgraph=True)
    want, got = (
        fm.GradientProbe(model).backward(run(x).square().sum((1, 2))).sq_norms
        for run in (model, fast)
    )
    torch.testing.assert_close(got, want, rtol=2**-6, atol=0)


def test_an_exported_model(device):
    """Its modules are gone, its parameters and their gradients are not."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), torch.randn(5, 4, 6)
    exported = torch.export.export(model, (x,)).module()
    x = x.to(device)
    model, exported = model.to(device), exported.to(device)
    fast = fm.compile(exported, backend="aot_eager")
    want, got = (
        fm.GradientProbe(model).backward(run(x).sin().sum((1, 2))).sq_norms
        for model, run in ((model, model), (exported, fast))
    )
    torch.testing.assert_close(got, want)


def test_a_mean_outside_the_region(device):
    """Its samples are found below it, as in an uncompiled model."""
    torch.manual_seed(0)
    model, x = BY_NAME["linear 3d"].make(device=device)
    fast = fm.compile(model, backend="aot_eager")
    target = torch.randn_like(model(*x))
    want, got = (
        fm.GradientProbe(model)
        .backward(F.mse_loss(run(*x), target), batch_size=len(target))
        .sq_norms
        for run in (model, fast)
    )
    torch.testing.assert_close(got, want)
    inside = fm.compile(lambda x: F.mse_loss(model(x), target), backend="aot_eager")
    with pytest.raises(fm.CaptureError, match="per-sample losses"):
        fm.GradientProbe(model).backward(inside(*x), batch_size=len(target))
    # Another axis of the same length is not taken for that of the samples.
    square, rows = nn.Linear(6, 3).to(device), torch.randn(3, 6).to(device)
    want, got = (
        fm.GradientProbe(square)
        .backward(run(rows).t().square().mean(1).mean(), batch_size=3)
        .sq_norms
        for run in (square, fm.compile(square, backend="aot_eager"))
    )
    alone = fm.GradientProbe(square).backward(square(rows).square().mean(1)).sq_norms
    torch.testing.assert_close(want, alone)
    torch.testing.assert_close(got, alone)


class Joined(nn.Module):
    """Parameters that are joined before they are used."""

    def __init__(self):
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(4, 6)) for _ in range(2))
        self.a, self.b = (nn.Parameter(torch.randn(4)) for _ in range(2))

    def forward(self, x):
        bias = torch.stack([self.a, self.b]).flatten()
        return F.linear(x, torch.cat([self.q, self.k]), bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_are_joined(device, backend):
    torch.manual_seed(0)
    model, x = Joined().to(device), torch.randn(5, 3, 6).to(device)
    options = {"per_parameter": True, "measure": ("norms", "second_moments")}
    count = sum(p.numel() for p in model.parameters())
    options["directions"] = {"v": torch.linspace(-1, 1, count).to(device)}
    want = fm.GradientProbe(model, **options).backward(model(x).sin().sum((1, 2)))
    probe = fm.GradientProbe(model, **options)
    fast = fm.compile(model, backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*once more")
        for _ in range(2):
            assert_alike(probe.backward(fast(x).sin().sum((1, 2))), want)


OUTPUTS = {
    "transposed": lambda y, x: (y.t(),),
    "with its transpose": lambda y, x: (y, y.t()),
    "parts": lambda y, x: (y[:, :2], y[:, 2:]),
    "chunks": lambda y, x: y.chunk(2, 1),
    "viewed": lambda y, x: (y.view(5, 2, 2),),
    "beside an input": lambda y, x: (x, y, x.t()),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_region_gives(name, device):
    """Views, which are made outside of what the region's node gives; its inputs."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).to(device), torch.randn(5, 6).to(device)

    def losses(run):
        rows = (t if len(t) == 5 else t.t() for t in run(x))
        return sum(t.reshape(5, -1).sin().sum(1) for t in rows)

    def run(x):
        return OUTPUTS[name](model(x), x)

    fast = fm.compile(run, backend="aot_eager", fullgraph=True)
    want = fm.GradientProbe(model).backward(losses(run)).sq_norms
    probe = fm.GradientProbe(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*once more")
        for _ in range(2):
            torch.testing.assert_close(probe.backward(losses(fast)).sq_norms, want)


def test_operators_keep_out_of_cuda_graphs():
    """A replay calls no Python, so the compiler runs them between its graphs."""
    for operator in (operators.LOOK, operators.PRODUCT):
        assert torch.Tag.cudagraph_unsafe in operator.tags


def test_one_graph_for_all_steps(dropping):
    """None is compiled when a step is probed, or not, or by another probe."""
    model, losses_of = dropping
    torch._dynamo.utils.counters.clear()
    fast = fm.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(6):
        losses = losses_of(fast)
        if step % 2:
            mode = ("observe", "fused")[step // 3]
            fm.GradientProbe(model, mode=mode).backward(losses)
        else:
            losses.mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_as_a_decorator(device):
    model, x = nn.Linear(3, 2).to(device), torch.randn(4, 3).to(device)

    @fm.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    def losses(x):
        return model(x).square().sum(1)

    want = fm.GradientProbe(model).backward(model(x).square().sum(1)).sq_norms
    got = fm.GradientProbe(model).backward(losses(x)).sq_norms
    torch.testing.assert_close(got, want)
    same = fm.compile(model, disable=True)
    assert same(x).grad_fn.name() == "AddmmBackward0"


@pytest.mark.slow
def test_by_the_name_of_a_backend(device):
    """As the package's metadata tell torch.compile where it is installed."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    points = metadata["project"]["entry-points"]["torch_dynamo_backends"]
    (entry,) = (EntryPoint(name, where, "") for name, where in points.items())
    model, x = nn.Linear(3, 2).to(device), torch.randn(4, 3).to(device)
    want = fm.GradientProbe(model).backward(model(x).square().sum(1)).sq_norms
    model.compile(backend=entry.load())
    losses = model(x).square().sum(1)
    torch.testing.assert_close(fm.GradientProbe(model).backward(losses).sq_norms, want)


def test_a_mode_is_for_inductor():
    with pytest.raises(ValueError, match="mode='reduce-overhead' is for"):
        fm.compile(nn.Linear(2, 2), backend="aot_eager", mode="reduce-overhead")
