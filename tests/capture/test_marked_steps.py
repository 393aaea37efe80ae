"""What the extension computes of compiled regions on a CPU is what Python does."""

import pytest
import torch
from torch import nn

import fastminima as fm
from fastminima.capture.graph.extension import learned
from fastminima.capture.session.marked_launches import LaunchedUse, Memory

if learned() is None:
    pytest.skip("the extension is not built", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Layers(nn.Module):
    """A table, matrices with and without bias, a term, a normalisation; rows alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 24, padding_idx=2)
        self.first = nn.Linear(24, 40)
        self.norm = nn.LayerNorm(40)
        self.second = nn.Linear(40, 24, bias=False)
        self.shift = nn.Parameter(torch.randn(24))
        self.head = nn.Linear(24, 3)

    def forward(self, ids):
        x = self.norm(self.first(self.table(ids)).tanh())
        return self.head((self.second(x).sin() + self.shift).mean(1))


@pytest.fixture
def compared(monkeypatch, on_the_cpu, compiling):
    """Every use is taken by both; how many steps of the extension there were."""
    usual, found = LaunchedUse.__call__, {"steps": 0, "gradients": 0, "python": 0}

    def both(self, memory, *tensors):
        got = usual(self, memory, *tensors)
        expected = self._by_python(*tensors)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        has_step = self._steps.get(tensors[0].dtype) is not None
        found["steps" if has_step else "python"] += 1
        found["gradients"] += self.makes and has_step
        return got

    monkeypatch.setattr(LaunchedUse, "__call__", both)
    return found


@pytest.mark.parametrize("mode", ["observe", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits(compared, dtype, mode):
    torch.manual_seed(0)
    model = Layers().to(dtype)
    fast = fm.compile(model, backend="aot_eager_decomp_partition")
    probe = fm.GradientProbe(model, mode=mode)
    for n in (6, 6, 4):
        ids = torch.randint(11, (n, 7))
        got = probe.backward(fast(ids).square().sum(1))
        want = fm.GradientProbe(model).backward(model(ids).square().sum(1))
        torch.testing.assert_close(got.sq_norms, want.sq_norms)
        model.zero_grad()
    assert compared["steps"] > 3 * compared["python"]
    assert bool(compared["gradients"]) == (mode == "fused")


def test_halves_are_taken_by_python(compared):
    torch.manual_seed(1)
    model = Layers().bfloat16()
    fast = fm.compile(model, backend="aot_eager_decomp_partition")
    probe = fm.GradientProbe(model)
    assert probe.backward(fast(torch.randint(11, (5, 7))).float().sum(1)).is_finite
    assert compared["python"] >= 4  # sums of a normalisation are in float32


def test_a_negation_that_is_not_done_in_memory(on_the_cpu):
    """A gradient has its sign, and norms are as large as without."""
    layout = (0, 1, 3, 4)

    def step(dtype):
        program = learned().Program("f32", "generic")
        made = [(0, (5, 6), None, None)]
        program.add_fused_sequences(0, "", (0, -1), layout, True, 5, made, {})
        return program

    def run(g, a):
        rows = torch.einsum("nto,nti->noi", g.view(3, 4, 5), a.view(3, 4, 6))
        return rows.square().sum((1, 2)), rows.sum(0)

    use = LaunchedUse(run, ["w"], 3, (5, 6), step)
    g, a = torch.randn(12, 5), torch.randn(12, 6)
    negated = torch._neg_view(g)
    for tensors in ((g, a), (negated, a)):
        norms, gradient = use(Memory(1), *tensors)
        expected = run(tensors[0].resolve_neg(), tensors[1])
        torch.testing.assert_close(norms, expected[0])
        torch.testing.assert_close(gradient, expected[1])


def test_what_a_step_is_not_made_for_goes_by_python(on_the_cpu):
    """Rows that lie apart, a batch of another size."""

    def step(dtype):
        program = learned().Program("f32", "generic")
        program.add_sequences(0, "", (0, -1), (0, 1, 3, 4), -1.0, {})
        return program

    asked = []

    def run(g, a):
        asked.append(g.shape)
        return [torch.full((3,), 7.0)]

    use = LaunchedUse(run, ["w"], 3, None, step)
    use(Memory(1), torch.randn(12, 5), torch.randn(12, 6))
    assert not asked
    use(Memory(1), torch.randn(5, 12).T, torch.randn(12, 6))
    use(Memory(1), torch.randn(8, 5), torch.randn(8, 6))
    use(Memory(1), torch.randn(12, 5), torch.randn(12, 6, dtype=torch.float64))
    assert len(asked) == 3
