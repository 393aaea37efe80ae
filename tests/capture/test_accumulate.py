"""`accumulate=k`: statistics of steps that take several backward passes."""

import warnings

import pytest
import torch
import torch.distributed as dist
from oracles import flat, single_sample_gradients
from torch import nn

import fastminima as fm

SIZES = (3, 8, 5)  # samples of the passes of a step


class Small(nn.Module):
    """Layers of several kinds; the second table is reached by long inputs alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh())
        self.head = nn.Linear(6, 2)
        self.rare = nn.Parameter(torch.randn(2))

    def forward(self, x):
        found = self.head(self.body(x)).mean(1)
        return found + self.rare if len(x) == 8 else found


def per_sample(model, batch):
    return model(batch[0]).square().sum(1)


def micro_batches(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 7, 4, generator=generator, dtype=dtype) for n in SIZES]


def truth(model, batches):
    """`[N, P]` of all samples, each differentiated alone in its batch."""
    rows = []
    for x in batches:
        found = {name: [] for name, _ in model.named_parameters()}
        for loss in per_sample(model, [x]):
            grads = torch.autograd.grad(
                loss, list(model.parameters()), allow_unused=True, retain_graph=True
            )
            for (name, p), g in zip(model.named_parameters(), grads, strict=True):
                found[name].append(torch.zeros_like(p) if g is None else g)
        rows.append(flat({n: torch.stack(gs) for n, gs in found.items()}))
    return torch.cat(rows)


def check(stats, rows):
    """Everything in `stats` from the gradients of its samples."""
    n, mean = len(rows), rows.mean(0)
    spread = (rows - mean).square().sum() / (n - 1)
    signal = mean.square().sum() - spread / n
    assert stats.count == n
    for got, want in (
        (stats.sq_norms, rows.square().sum(1)),
        (stats.mean_grad_sq_norm, mean.square().sum()),
        (stats.covariance_trace, spread),
        (stats.signal, signal),
        (stats.noise_scale, spread / signal),
    ):
        torch.testing.assert_close(got, want.to(got.dtype))


@pytest.mark.parametrize(
    ("mode", "way", "keep_mean"),
    [
        ("observe", "backward", False),
        ("observe", "attach", True),
        ("fused", "backward", False),
    ],
)
def test_against_single_samples(mode, way, keep_mean):
    torch.manual_seed(0)
    model = Small().double()
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    probe = fm.GradientProbe(
        model,
        measure=("norms", "second_moments"),
        directions={"v": v},
        per_parameter=True,
        keep_mean=keep_mean,
        mode=mode,
        accumulate=3,
        every=2,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        batches, found = micro_batches(step), []
        rows = truth(model, batches)
        for x in batches:
            losses = per_sample(model, [x]) / 3
            if way == "backward":
                found.append(probe.backward(losses, scale=1 / 3))
            else:
                probe.attach(losses, scale=1 / 3)
                losses.mean().backward()
                found.append(probe.collect())
        assert found[:2] == [None, None]
        if step % 2:
            assert found[2] is None
        else:
            check(found[2], rows)
            torch.testing.assert_close(found[2].dots["v"], rows @ v)
            moments = flat({n: m[None] for n, m in found[2].second_moments.items()})
            torch.testing.assert_close(moments[0], rows.square().mean(0))
            by_name = torch.stack(list(found[2].sq_norms_by_parameter.values())).sum(0)
            torch.testing.assert_close(by_name, rows.square().sum(1))
            assert (found[2].mean_grad is not None) == keep_mean
        optimizer.step()
        optimizer.zero_grad()


def test_float32_and_the_gradients_of_training():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    batches = [x[:, 0] for x in micro_batches(5, torch.float32)]

    def losses_of(model, batch):
        return model(batch[0]).square().sum(1)

    for x in batches:
        (losses_of(model, [x]).mean() / 3).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    probe = fm.GradientProbe(model, accumulate=3)
    for x in batches:
        stats = probe.backward(losses_of(model, [x]) / 3, scale=1 / 3)
    for p, grad in zip(model.parameters(), plain, strict=True):
        assert torch.equal(p.grad, grad)
    check(stats, flat(single_sample_gradients(model, losses_of, [torch.cat(batches)])))


def passes(probe, model, sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = None
    for n in sizes:
        x = torch.randn(n, 4, generator=generator)
        found = probe.backward(model(x).square().sum(1))
    return found


def test_some_samples_of_each_pass():
    model = nn.Linear(4, 2)
    probe = fm.GradientProbe(model, accumulate=2, sample=3)
    stats = passes(probe, model, (8, 6))
    assert (stats.count, stats.all_count) == (6, 14)
    model.zero_grad()
    whole = passes(fm.GradientProbe(model, accumulate=2), model, (8, 6))
    torch.testing.assert_close(stats.mean_grad_sq_norm, whole.mean_grad_sq_norm)


def test_a_step_of_fewer_passes():
    model = nn.Linear(4, 2)
    probe = fm.GradientProbe(model, accumulate=4, every=2)
    assert probe.end_step() is None  # nothing has begun: no step is counted
    assert passes(probe, model, (3, 5)) is None
    assert probe.end_step().count == 8
    assert passes(probe, model, (3, 5)) is None
    assert probe.end_step() is None  # `every` leaves this step out
    assert passes(probe, model, (3, 5, 1, 1)).count == 10


def test_steps_that_only_the_user_ends():
    model = nn.Linear(4, 2)
    probe = fm.GradientProbe(model, accumulate=None)
    for sizes in ((4,), (2, 3, 4), (5, 5)):
        assert passes(probe, model, sizes) is None
        assert probe.end_step().count == sum(sizes)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_ended_unsaid_is_not_mixed_with_the_next(optimizer):
    model = nn.Linear(4, 2)
    probe = fm.GradientProbe(model, accumulate=3)
    step = optimizer(model.parameters(), lr=0.1).step
    passes(probe, model, (3, 5))
    step()
    with pytest.warns(UserWarning, match="after 2 of the 3 backward passes"):
        assert passes(probe, model, (2, 2, 2)).count == 6
    step()
    passes(probe, model, (3,))
    step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert passes(probe, model, (2, 2, 1)).count == 5


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_step_with_a_pass_that_failed_has_no_statistics(failing):
    model = nn.Linear(4, 2)
    probe = fm.GradientProbe(model, accumulate=3)
    found = None
    for n in range(3):
        losses = model(torch.randn(5, 4)).square().sum(1)
        if n == failing:
            with pytest.raises(fm.CaptureError):
                probe.backward(losses + losses.detach().mean() * losses.mean())
        else:
            found = probe.backward(losses)
    assert found is None
    assert passes(probe, model, (2, 3, 4)).count == 9


def test_a_group_of_ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
        probe = fm.GradientProbe(model, process_group="world", accumulate=2)
        for step in range(2):
            with model.no_sync():
                x = torch.randn(3, 4)
                assert probe.backward(model(x).square().sum(1)) is None
            y = torch.randn(5, 4)
            stats = probe.backward(model(y).square().sum(1))

            def losses_of(model, batch):
                return model(batch[0]).square().sum(1)

            both = [torch.cat([x, y])]
            check(stats, flat(single_sample_gradients(model.module, losses_of, both)))
            assert stats.mean_grad is None, step
    finally:
        dist.destroy_process_group()


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="accumulate must be a positive integer"):
        fm.GradientProbe(nn.Linear(2, 2), accumulate=0)
    with pytest.raises(ValueError, match="does not go with accumulate"):
        fm.GradientProbe(nn.Linear(2, 2), measure="gram", accumulate=2)
