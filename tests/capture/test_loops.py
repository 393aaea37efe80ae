"""The loops people write: precision, accumulation, several losses, adapters."""

import copy
import math
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, single_sample_gradients
from torch import nn

import fastminima as fm

N, T = 6, 5


class Network(nn.Module):
    """Embedding, norm, attention, two linears, a convolution: a bit of everything."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(13, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 13)

    def forward(self, ids):
        x = self.norm(self.table(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.conv(x.mT).mT.tanh())


def batch(n=N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(13, (n, T), generator=generator)


def losses_of(model, ids):
    logits = model(ids).mT
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, ids, reduction="none").mean(1)


def single_gradients(model, losses):
    """Autograd's own gradient of each loss, on this very graph: `[N, P]` in float64."""
    parameters = list(model.parameters())
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel()).double()
                    if g is None
                    else g.double().flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


# ------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_autocast_with_a_grad_scaler(dtype, scale, autocast, device):
    """Half-precision regions; what a GradScaler multiplies with is divided out."""
    torch.manual_seed(0)
    model, ids = Network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=scale != 1.0)
    probe = fm.GradientProbe(model, measure=("norms", "gram"))
    for _ in range(2):
        with autocast(dtype=dtype):
            losses = losses_of(model, ids)
        want = single_gradients(model, losses * scale) / scale
        loss = losses.mean()
        optimizer.zero_grad()
        scaled = scaler.scale(loss)
        probe.attach(scaled, batch_size=N, scale=scaler.get_scale())
        scaled.backward()
        stats = probe.collect()
        # autograd rounds each weight gradient to half precision, the probe does not:
        # a relative error of at most one unit of rounding in each element.
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(
            stats.sq_norms.double(), want.square().sum(1), rtol=2 * unit, atol=0
        )
        size = want.square().sum(1).max().item()
        torch.testing.assert_close(
            stats.gram.double(), want @ want.t(), rtol=0, atol=2 * unit * size
        )
        torch.testing.assert_close(
            stats.mean_grad_sq_norm.double(),
            want.mean(0).square().sum(),
            rtol=4 * unit,
            atol=0,
        )
        scaler.step(optimizer)
        scaler.update()
        assert stats.sq_norms.dtype == torch.float32


def test_vector_of_losses_under_a_grad_scaler(autocast):
    model, ids = Network(), batch()
    with autocast(dtype=torch.bfloat16):
        losses = losses_of(model, ids)
    plain = fm.GradientProbe(model).backward(losses, retain_graph=True)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    scaled = fm.GradientProbe(model).backward(losses * 2**10, scale=2.0**10)
    # Powers of two round nowhere, so not a bit differs.
    assert torch.equal(scaled.sq_norms, plain.sq_norms)
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g * 2**10)


def test_squared_norms_beyond_half_precision(autocast):
    """300 squared is more than float16 can hold."""
    model = nn.Linear(4, 4, bias=False)
    x = torch.full((4, 4), 300.0)
    with autocast(dtype=torch.float16):
        losses = model(x).sum(1).float()
    stats = fm.GradientProbe(model).backward(losses)
    torch.testing.assert_close(stats.sq_norms, torch.full((4,), 16 * 300.0**2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_half_precision(dtype):
    torch.manual_seed(0)
    model = Network().to(dtype)
    losses = losses_of(model, batch())
    want = single_gradients(model, losses)
    probe = fm.GradientProbe(
        model, measure=("norms", "second_moments"), keep_mean=True, per_parameter=True
    )
    stats = probe.backward(losses)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        stats.sq_norms.double(), want.square().sum(1), rtol=4 * unit, atol=0
    )
    assert {t.dtype for t in stats.second_moments.values()} == {torch.float32}
    assert {t.dtype for t in stats.mean_grad.values()} == {torch.float32}
    names = [name for name, _ in model.named_parameters()]
    moments = torch.cat([stats.second_moments[n].flatten() for n in names]).double()
    size = want.square().mean(0)
    # Elements whose samples' gradients round to nothing in half precision left out.
    seen = size > 1e-3 * size.mean()
    torch.testing.assert_close(moments[seen], size[seen], rtol=16 * unit, atol=0)


# ---------------------------------------------------------------------- accumulation


def test_accumulation_is_the_large_batch():
    """Uneven parts; the statistics add up to those of the whole, and to the oracle."""
    torch.manual_seed(0)
    model, ids = Network(), batch(12)
    options = {"measure": ("norms", "second_moments"), "keep_mean": True}
    whole = fm.GradientProbe(model, **options).backward(losses_of(model, ids))
    model.zero_grad()
    probe = fm.GradientProbe(model, **options)
    total = None
    for part in ids.split([5, 4, 3]):
        losses = losses_of(model, part)
        # As for a mean over the whole: the optimizer's gradient adds up to it.
        stats = probe.backward(losses.sum() / len(ids), len(part), "sum")
        scaled = _rescaled(stats, len(ids))
        total = scaled if total is None else total + scaled
    exact = flat(single_sample_gradients(model, lambda m, b: losses_of(m, b[0]), [ids]))
    for got in (whole, total):
        assert got.count == 12
        torch.testing.assert_close(
            got.sq_norms.double(), exact.square().sum(1), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(
            got.covariance_trace.double(), exact.var(0).sum(), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(
            got.signal.double(),
            exact.mean(0).square().sum() - exact.var(0).sum() / 12,
            rtol=1e-3,
            atol=0,
        )
    for name, variance in whole.variance.items():
        torch.testing.assert_close(total.variance[name], variance, rtol=1e-3, atol=1e-6)


def _rescaled(stats, factor):
    """Undo the division of a loss by a constant; `scale=1/factor` does it too."""
    import dataclasses

    return dataclasses.replace(
        stats,
        sq_norms=stats.sq_norms * factor**2,
        mean_grad_sq_norm=stats.mean_grad_sq_norm * factor**2,
        second_moments={k: v * factor**2 for k, v in stats.second_moments.items()},
        mean_grad={k: v * factor for k, v in stats.mean_grad.items()},
    )


def test_a_loss_divided_for_accumulation_is_a_scale():
    """`loss / steps`, as loops and libraries write it, is `scale=1 / steps`."""
    model, ids = Network(), batch()
    want = fm.GradientProbe(model).backward(losses_of(model, ids))
    for steps in (3, 4):
        loss = losses_of(model, ids).mean() / steps
        got = fm.GradientProbe(model).backward(loss, batch_size=N, scale=1 / steps)
        torch.testing.assert_close(got.sq_norms, want.sq_norms)
        torch.testing.assert_close(got.covariance_trace, want.covariance_trace)


def test_several_losses_and_backward_passes():
    """Two losses on one graph: one pass over their sum, or a pass each."""
    model, ids = Network(), batch()
    probe = fm.GradientProbe(model, keep_mean=True)

    def both():
        logits = model(ids)
        first = F.cross_entropy(logits.mT, ids, reduction="none").mean(1)
        return first, logits.square().mean((1, 2))

    first, second = both()
    want = single_gradients(model, first + second)
    together = probe.backward(first + second)
    torch.testing.assert_close(
        together.sq_norms.double(), want.square().sum(1), rtol=1e-4, atol=0
    )
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    first, second = both()
    a = probe.backward(first, retain_graph=True)
    between = [p.grad.clone() for p in model.parameters()]
    b = probe.backward(second)  # `.grad` holds the first loss' gradient already
    of_second = fm.GradientProbe(model)
    model.zero_grad()
    alone = of_second.backward(both()[1])
    torch.testing.assert_close(b.sq_norms, alone.sq_norms)
    torch.testing.assert_close(b.mean_grad_sq_norm, alone.mean_grad_sq_norm)
    for p, g, sofar in zip(model.parameters(), grads, between, strict=True):
        torch.testing.assert_close(sofar + p.grad, g)
    # A sample's gradient of the sum is not to be had from the two passes' norms alone.
    cross = together.sq_norms - a.sq_norms - b.sq_norms
    assert cross.abs().max() > 0.01 * together.sq_norms.max()


def test_the_same_graph_twice():
    model, ids = Network(), batch()
    probe = fm.GradientProbe(model)
    losses = losses_of(model, ids)
    first = probe.backward(losses, retain_graph=True)
    grads = [p.grad.clone() for p in model.parameters()]
    second = probe.backward(losses)
    assert torch.equal(first.sq_norms, second.sq_norms)
    torch.testing.assert_close(first.mean_grad_sq_norm, second.mean_grad_sq_norm)
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g + g)


def test_clipping_comes_afterwards():
    model, ids = Network(), batch()
    probe = fm.GradientProbe(model)
    for norm in (1e-3, 1e3):
        model.zero_grad()
        stats = probe.backward(losses_of(model, ids))
        before = nn.utils.clip_grad_norm_(model.parameters(), norm)
        torch.testing.assert_close(stats.mean_grad_sq_norm.sqrt(), before)


# ------------------------------------------------------------ frozen and adapted models


def test_frozen_parameters_are_absent():
    model, ids = Network(), batch()
    everything = fm.GradientProbe(model, per_parameter=True)
    want = everything.backward(losses_of(model, ids)).sq_norms_by_parameter
    model.attention.requires_grad_(False)
    model.table.requires_grad_(False)
    stats = fm.GradientProbe(model, per_parameter=True).backward(losses_of(model, ids))
    left = {"norm.weight", "norm.bias", "conv.weight", "conv.bias"}
    left |= {"head.weight", "head.bias"}
    assert set(stats.sq_norms_by_parameter) == left
    for name, norms in stats.sq_norms_by_parameter.items():
        torch.testing.assert_close(norms, want[name])


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / 8)
        self.up = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up)


def adapted_network(width, depth, rank=2):
    layers = []
    for _ in range(depth):
        layers += [Adapted(nn.Linear(width, width), rank), nn.Tanh()]
    return nn.Sequential(*layers)


def test_adapters():
    torch.manual_seed(0)
    model = adapted_network(8, 3)
    x = torch.randn(N, T, 8)

    def losses(model, batch):
        return model(batch[0]).square().mean((1, 2))

    want = flat(single_sample_gradients(model, losses, [x]))
    probe = fm.GradientProbe(model)
    stats = probe.backward(losses(model, [x]))
    assert stats.parameter_count == want.shape[1] == 6 * 16
    torch.testing.assert_close(
        stats.sq_norms.double(), want.square().sum(1), rtol=1e-4, atol=0
    )


def test_nothing_is_computed_for_what_is_frozen(monkeypatch):
    """The statistics see the adapters' narrow matrices only, in layers of any width."""
    from fastminima.capture.session import hooks
    from fastminima.ops import dense

    monkeypatch.setattr(hooks, "program_of", lambda *_: None)  # they call no ops
    seen = []

    def watching(op):
        def call(a, g, *rest):
            seen.append((a.shape[-1], g.shape[-1]))
            return op(a, g, *rest)

        return call

    for name in ("sequence_sq_norms", "row_sq_norms", "direct_sq_norms"):
        monkeypatch.setattr(dense, name, watching(getattr(dense, name)))
    model = adapted_network(256, 4)
    losses = model(torch.randn(8, 16, 256)).square().mean((1, 2))
    fm.GradientProbe(model).backward(losses)
    assert len(seen) == 8
    assert {min(pair) for pair in seen} == {2}


@pytest.mark.slow
def test_the_cost_of_adapters():
    """Probing the adapters costs little of a step of the whole."""
    torch.manual_seed(0)
    model = adapted_network(512, 6, rank=8)
    x = torch.randn(16, 64, 512)
    probe = fm.GradientProbe(model)

    def plain():
        model(x).square().mean((1, 2)).mean().backward()

    def probed():
        probe.backward(model(x).square().mean((1, 2)))

    times = {plain: [], probed: []}
    for _ in range(9):
        for step in times:
            model.zero_grad()
            start = time.thread_time_ns()
            step()
            times[step].append(time.thread_time_ns() - start)
    best = {step: min(found[2:]) for step, found in times.items()}
    ratio = best[probed] / best[plain]
    print(f"adapters of rank 8 in six layers of 512: {ratio:.2f} of the plain step")
    assert ratio < 1.35


# ------------------------------------------------------------------ more than one probe


def test_two_probes_at_once():
    model, ids = Network(), batch()
    whole, head = fm.GradientProbe(model), fm.GradientProbe({"w": model.head.weight})
    wanted = (
        fm.GradientProbe(model).backward(losses_of(model, ids)).sq_norms,
        fm.GradientProbe({"w": model.head.weight})
        .backward(losses_of(model, ids))
        .sq_norms,
    )
    for first, second in ((whole, head), (head, whole)):
        for _ in range(2):
            losses = losses_of(model, ids)
            first.attach(losses)
            second.attach(losses)
            losses.mean().backward()
            got = {first: first.collect(), second: second.collect()}
            assert torch.equal(got[whole].sq_norms, wanted[0])
            assert torch.equal(got[head].sq_norms, wanted[1])


def test_a_sharpness_probe_on_the_same_step(generator):
    """Curvature before, between and after; neither notices the other."""
    torch.manual_seed(0)
    model, ids = Network(), batch()

    def mean_loss(model, batch):
        return losses_of(model, batch[0]).mean()

    want = fm.GradientProbe(model).backward(losses_of(model, ids)).sq_norms
    alone = fm.SharpnessProbe(model, mean_loss, rtol=1e-3)((ids,))
    model.zero_grad()
    probe = fm.GradientProbe(model)
    sharpness = fm.SharpnessProbe(model, mean_loss, rtol=1e-3)
    losses = losses_of(model, ids)
    probe.attach(losses)
    between = sharpness((ids,))
    losses.mean().backward()
    stats = probe.collect()
    assert torch.equal(stats.sq_norms, want)
    torch.testing.assert_close(between.values, alone.values, rtol=1e-2, atol=0)
    grads = [p.grad.clone() for p in model.parameters()]
    sharpness((ids,))
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g)


def test_threads_with_models_of_their_own():
    """Each thread trains its own model with its own probe, as alone."""
    torch.manual_seed(0)
    first = Network()
    batches = [batch(4 + step % 3, seed=step) for step in range(8)]

    def train(model, found):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = fm.GradientProbe(model)
        for ids in batches:
            optimizer.zero_grad()
            stats = probe.backward(losses_of(model, ids))
            found.append(stats.sq_norms)
            optimizer.step()

    alone: list = []
    train(copy.deepcopy(first), alone)
    results: list[list] = [[] for _ in range(4)]
    threads = [
        threading.Thread(target=train, args=(copy.deepcopy(first), found))
        for found in results
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert len(found) == len(alone)
        for got, want in zip(found, alone, strict=True):
            torch.testing.assert_close(got, want)


def test_threads_on_one_model():
    """Probes on graphs of one model in several threads: each reads its own graph."""
    model = Network()
    batches = [batch(5, seed) for seed in range(4)]
    wanted = [fm.GradientProbe(model).backward(losses_of(model, b)) for b in batches]
    found: list = [None] * 4

    def run(i):
        probe = fm.GradientProbe(model)
        for _ in range(6):
            found[i] = probe.backward(losses_of(model, batches[i])).sq_norms

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want.sq_norms)


_WORKER = """
import sys
import torch
import torch.multiprocessing as mp
import fastminima as fm


def work(model, x, queue):
    probe = fm.GradientProbe(model)
    for _ in range(3):
        model.zero_grad()
        norms = probe.backward(model(x).square().sum(1)).sq_norms
    queue.put(norms.tolist())


if __name__ == "__main__":
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    )
    x = torch.randn(5, 4)
    want = fm.GradientProbe(model).backward(model(x).square().sum(1)).sq_norms
    model.zero_grad()
    model.share_memory()
    context = mp.get_context("spawn")
    queue = context.Queue()
    others = [context.Process(target=work, args=(model, x, queue)) for _ in range(2)]
    for other in others:
        other.start()
    for _ in others:
        torch.testing.assert_close(torch.tensor(queue.get(timeout=120)), want)
    for other in others:
        other.join()
        assert other.exitcode == 0
    print("alike")
"""


def test_one_model_in_two_processes(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(_WORKER)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "alike" in done.stdout


def test_statistics_survive_the_step():
    """What was returned does not change when training goes on."""
    model, ids = Network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    stats = fm.GradientProbe(model, keep_mean=True).backward(losses_of(model, ids))
    before = copy.deepcopy(stats.to_dict()), stats.mean_grad["head.bias"].clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert stats.to_dict() == before[0]
    assert torch.equal(stats.mean_grad["head.bias"], before[1])
    assert math.isfinite(before[0]["noise_scale"])
