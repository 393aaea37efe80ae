"""Experiments beside the three factors: closed forms, and verdicts on made-up rows."""

import math
from dataclasses import replace

import pytest
import torch

import fastminima as fm
from examples.catalog import EXPERIMENTS
from examples.common import measures, second_order
from examples.common.data import DataNotFound, load
from examples.common.stacks import Stack, cross_entropy, make_mlp, squared_loss
from examples.engine.outcome import HELD, NOT_HELD, UNDECIDED
from examples.noise_and_sharpness import batch_sharpness, covariance_end, gap
from examples.three_factors import bowls, regression, stationarity, svag

SEEDS = tuple(range(100, 105))


class Silent:
    """A watch that nobody looks at; what `progress` was told is kept."""

    def __init__(self):
        self.told = []

    def progress(self, fraction):
        self.told.append(fraction)

    def load(self):
        return None

    def save(self, state):
        pass


# What makes the quick preset of each a matter of a second or two.
TINY = {
    "two-bowls": {"walkers": 40, "burn_in": 1.0, "flow": 2.0},
    "regression": {"walkers": 10, "edge_walkers": 4, "times": 1},
    "c-against-h": {"rungs": (1.0, 0.5), "samples": 200, "measured": 60},
    "sharpness-gap": {"steps": 40, "looks": 2, "samples": 128},
    "batch-sharpness": {"steps": 40, "looks": 2, "samples": 128, "batches": 4},
    "yaida": {"samples": 64, "burn_in": 200, "steps": 400, "draws": 1},
    "svag": {"samples": 128, "validation": 50, "steps": 40},
}


def tiny(name):
    experiment = EXPERIMENTS[name]
    dataset = "digits" if experiment.datasets else ""
    changes = dict(TINY[name])
    settings = experiment.settings("quick", dataset)
    if name in ("sharpness-gap", "batch-sharpness"):
        changes["batch_sizes"] = (8, 16, changes["samples"])
    seeds = tuple(settings.seeds[: 1 if name == "regression" else 2])
    return experiment, replace(settings, seeds=seeds, **changes)


@pytest.mark.parametrize("name", TINY)
def test_runs_the_same_twice(name):
    experiment, settings = tiny(name)
    tasks = experiment.tasks(settings)
    watch = Silent()
    rows = []
    for task in tasks:
        made = experiment.run(settings, task, watch)
        assert len(made) == experiment.rows(settings, task)
        rows += made
    assert watch.told
    assert max(watch.told) <= 1
    assert experiment.run(settings, tasks[-1], Silent()) == made
    verdict = experiment.judge(settings, rows, experiment.expected(settings))
    assert verdict.outcome in (HELD, NOT_HELD, UNDECIDED)
    assert verdict.table
    assert verdict.short
    assert experiment.draw(settings, rows).axes
    # Rows that are missing leave a verdict, and nothing to conclude from.
    assert experiment.judge(settings, rows[:1], len(rows)).outcome == UNDECIDED


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("preset", ["quick", "laptop", "paper"])
def test_more_seeds_add_tasks(name, preset):
    experiment = EXPERIMENTS[name]
    for dataset in experiment.datasets or ("",):
        settings = experiment.settings(preset, dataset)
        tasks = experiment.tasks(settings)
        size = settings.chunk * math.ceil(len(settings.seeds) / settings.chunk)
        more = tuple(range(settings.seeds[0], settings.seeds[0] + size + 1))
        grown = experiment.tasks(replace(settings, seeds=more))
        if len(settings.seeds) % settings.chunk == 0:
            assert all(task in grown for task in tasks)
        assert len(grown) > len(tasks)
        if preset != "quick":
            assert min(settings.seeds) >= 110


def wobble(index):
    """Small values that differ from seed to seed."""
    return 1 + 0.01 * math.sin(3 * index)


def rows_of_bowls():
    base = bowls.RATE * bowls.SHARP[2]
    shares = {0.04: 0.0, 0.08: 0.01, 0.32: 0.11, 0.64: 0.2, 1.28: 0.36, 1.92: 0.39}
    cells = [(bowls.COLD, step, up) for step, up in shares.items()]
    cells += [(n, base, 0.0) for n in bowls.TEMPERATURES[1:]]
    return [
        {
            "seed": seed,
            "temperature": n,
            "step": step,
            "batch_size": 10.0,
            "flat": bowls.gibbs_share(n) + up + 0.01 * (wobble(seed) - 1),
            "from_flat": 0.6 * wobble(seed),
            "from_sharp": 0.6,
        }
        for n, step, up in cells
        for seed in SEEDS
    ]


def rows_of_regression():
    rows = []
    for seed in SEEDS:
        rows += [
            {
                "part": "variances",
                "seed": seed,
                "rate": rate,
                "batch_size": size,
                "stability_ratio": fm.theory.stability_ratio(
                    regression.MODES, rate, size
                ),
                "ratio": 1.005 * (0.9 + 0.1 * wobble(seed)),
                "simulated": [1.0] * 20,
                "predicted": [1.0] * 20,
            }
            for rate, size in regression.POINTS
        ]
        for size in regression.BATCH_SIZES:
            grown = [40 * (s - 1) * wobble(seed) for s in regression.SHARES]
            rows.append(
                {
                    "part": "edge",
                    "seed": seed,
                    "batch_size": size,
                    "critical": 2.0 * size,
                    "full_batch_critical": 90.0,
                    "growth": grown,
                    "growth_at_full": 230.0 if size < regression.SAMPLES else -90.0,
                }
            )
    return rows


def rows_of_covariance():
    rungs = EXPERIMENTS["c-against-h"].settings("quick", "digits").rungs
    return [
        {
            "seed": seed,
            "loss": list(rungs),
            "epochs": list(range(len(rungs))),
            "trace": [0.9 * r**0.7 * wobble(seed) for r in rungs],
            "trace_uncentred": [0.9 * r**0.7 for r in rungs],
            "along": [1.0 * r**0.5 * wobble(seed) for r in rungs],
            "overlap": [0.7 for r in rungs],
            "lambda_max": [5.0 for r in rungs],
        }
        for seed in SEEDS
    ]


def rows_of_edge(name):
    edge = EXPERIMENTS[name].settings("quick", "digits")
    rows = []
    for size in edge.batch_sizes:
        is_full = size == edge.batch_sizes[-1]
        value = 1.0 if is_full else 0.3 + 0.1 * math.log2(size / 4)
        noise = 1 / size - 1 / edge.batch_sizes[-1]
        rows += [
            {
                "seed": seed,
                "batch_size": size,
                "step": [200 * (i + 1) for i in range(edge.looks)],
                "loss": [0.1] * edge.looks,
                "lambda_max": [value * wobble(seed)] * edge.looks,
                "batch_sharpness": [wobble(seed)] * edge.looks,
                "noise": [noise * wobble(seed)] * edge.looks,
                "sample_noise": [wobble(seed)] * edge.looks,
            }
            for seed in SEEDS
        ]
    return rows


def rows_of_yaida():
    return [
        {
            "seed": seed,
            **{name: [wobble(seed)] * 10 for name in stationarity.NAMES},
            **{f"{name}_start": 1.0 for name in stationarity.NAMES},
            "dot": [1.0] * 10,
            "trace_other": [0.3 * wobble(seed)] * 10,
            "sq_norm": [1.0] * 10,
            "trace_start": 0.4 * wobble(seed),
            "curved_start": 0.5,
        }
        for seed in SEEDS
    ]


def rows_of_svag():
    looks = EXPERIMENTS["svag"].settings("quick", "digits").looks
    factor = dict.fromkeys(svag.LEVELS, 1.0) | {svag.CONTROL: 0.3}
    return [
        {
            "seed": seed,
            "level": level,
            "time": [i + 1.0 for i in range(looks)],
            "loss": [0.5 * by * wobble(seed + n)] * looks,
            "accuracy": [0.8] * looks,
        }
        for n, (level, by) in enumerate(factor.items())
        for seed in SEEDS
    ]


MADE = {
    "two-bowls": rows_of_bowls,
    "regression": rows_of_regression,
    "c-against-h": rows_of_covariance,
    "sharpness-gap": lambda: rows_of_edge("sharpness-gap"),
    "batch-sharpness": lambda: rows_of_edge("batch-sharpness"),
    "yaida": rows_of_yaida,
    "svag": rows_of_svag,
}


@pytest.mark.parametrize("name", MADE)
def test_verdicts_of_made_up_rows(name):
    experiment, rows = EXPERIMENTS[name], MADE[name]()
    settings = experiment.settings("quick", "digits" if experiment.datasets else "")
    verdict = experiment.judge(settings, rows, len(rows))
    assert verdict.outcome == HELD, verdict
    half = experiment.judge(settings, rows[::2], len(rows))
    assert half.outcome == UNDECIDED
    changed = experiment.nulls(rows, 0)
    assert len(changed) >= 2
    for how, made_false in changed.items():
        assert len(made_false) == len(rows), how
        found = experiment.judge(settings, made_false, len(rows))
        assert found.outcome != HELD, how


def test_gibbs_share_is_that_of_the_paper():
    """.595, .707 and .755; Laplace's approximation is within .003 of them."""
    got = [bowls.gibbs_share(n) for n in bowls.TEMPERATURES]
    assert got == pytest.approx([0.595, 0.707, 0.755], abs=6e-4)
    laplace = [bowls._laplace(n) for n in bowls.TEMPERATURES]
    assert laplace == pytest.approx(got, abs=3e-3)


def test_walkers_follow_the_slope_of_the_lower_bowl():
    x = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    flat, sharp = bowls._bowl(x, bowls.FLAT), bowls._bowl(x, bowls.SHARP)
    (slope,) = torch.autograd.grad(torch.minimum(flat, sharp).sum(), x)
    with torch.no_grad():
        torch.testing.assert_close(bowls._slope(x, bowls._is_flat(x)), slope)


def test_regression_diverges_beyond_the_critical_rate():
    x = torch.randn(20, 80, generator=torch.Generator().manual_seed(0)).double()
    gram = x @ x.T / 80
    eigenvalues = torch.linalg.eigvalsh(gram) / 20
    critical = fm.theory.critical_learning_rate(eigenvalues, 4, 20)
    low, high = (regression.growth(gram, f * critical, 4, 300, 1, 16) for f in (0.7, 2))
    assert low < -3
    assert high > 3


def test_products_are_those_of_the_hessian():
    sizes, count = (6, 5, 3), 4
    stack = Stack.of([make_mlp(sizes, seed) for seed in range(count)])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, 7, 6, generator=draw)
    y = torch.randint(3, (count, 7), generator=draw)
    got = second_order.directional_curvature(stack, x, y, squared_loss)
    for at in range(count):
        batch = (x[at], y[at])
        hessian = fm.Hessian(stack.module(at), measures.squared_error, batch)
        g = hessian.gradient
        want = g @ (hessian @ g) / (g @ g)
        torch.testing.assert_close(got[at], want, rtol=1e-4, atol=1e-5)
    copied = second_order.copies(stack, 2, 3)
    alone = second_order.directional_curvature(
        copied, x[2].expand(3, -1, -1), y[2].expand(3, -1), squared_loss
    )
    torch.testing.assert_close(alone, got[2].expand(3))


def test_sides_of_the_relations():
    """tr C and tr(H C) of mini-batches, against all there are of two samples."""
    settings = replace(
        EXPERIMENTS["yaida"].settings("quick", "digits"), batch_size=1, draws=400
    )
    stack = Stack.of([make_mlp((4, 3, 2), 0)])
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 4, generator=draw), torch.tensor([0, 1])
    got = stationarity.sides(settings, stack, x, y, [draw])
    theta = stack.flat()[0]
    half = settings.decay

    def decayed(index):
        grads = stack.grads(cross_entropy(stack(x[index][None]), y[index][None]))
        return torch.cat([g.flatten() for g in grads]) + half * theta

    grads = torch.stack([decayed([0]), decayed([1])])
    mean = grads.mean(dim=0)
    assert got["dot"].item() == pytest.approx((theta @ mean).item(), rel=1e-4)
    assert got["sq_norm"].item() == pytest.approx((mean @ mean).item(), rel=1e-4)
    second = grads.square().sum(dim=1).mean()
    assert got["trace"].item() == pytest.approx(second.item(), rel=1e-4)
    curved = torch.stack([_times_hessian(stack, x, y, half, g) @ g for g in grads])
    # 400 draws of one of two values.
    error = 4 * (curved[0] - curved[1]).abs().item() / 2 / math.sqrt(400)
    assert got["curved"].item() == pytest.approx(curved.mean().item(), abs=error)


def _times_hessian(stack, x, y, decay, vector):
    parts = vector.split([p.numel() for p in stack.params])
    shaped = [v.view_as(p) for v, p in zip(parts, stack.params, strict=True)]
    losses = cross_entropy(stack(x[None]), y[None])
    _, products = second_order.grads_and_products(stack, losses, shaped)
    return torch.cat([p.flatten() for p in products]) + decay * vector


def test_loss_at_which_a_ratio_leaves():
    losses = [1.0, 0.1, 0.01]
    assert covariance_end.leaving_loss(losses, [1.0, 1.0, 0.25]) == pytest.approx(
        10**-1.5
    )
    assert covariance_end.leaving_loss(losses, [1.0, 0.9, 0.8]) == 0
    assert math.isnan(covariance_end.leaving_loss(losses, [0.1, 0.1, 3.0]))
    assert covariance_end.leaving_loss(losses, [1.0, 4.0, 8.0]) == pytest.approx(
        10**-0.5
    )


@pytest.mark.parametrize("l", [1, 3, 8])
def test_a_step_of_svag_is_that_of_the_optimizer(l):
    module = make_mlp((5, 4, 3), 0)
    stack = Stack.of([module])
    optimizer = fm.optim.SVAG(module.parameters(), lr=0.1, l=l)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        grads = []
        for _ in range(2):
            x = torch.randn(6, 5, generator=draw)
            y = torch.randint(3, (6,), generator=draw)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            grads.append(stack.grads(cross_entropy(stack(x[None]), y[None])))
        svag.svag_step(stack.params, *grads, torch.tensor([0.1]), l)
    torch.testing.assert_close(
        stack.flat(), Stack.of([module]).flat(), rtol=1e-5, atol=1e-6
    )


def test_digits_fit_every_preset():
    count = len(load("digits").labels)
    for name in TINY:
        experiment = EXPERIMENTS[name]
        for preset in ("quick", "laptop", "paper"):
            if experiment.datasets:
                settings = experiment.settings(preset, "digits")
                assert settings.samples + getattr(settings, "validation", 1) <= count
                assert settings.pool == 1
                assert settings.skip == 0


def test_fashion_is_prepared_where_it_is():
    try:
        load("fashion-mnist")
    except DataNotFound:
        pytest.skip("Fashion-MNIST is not on this machine")
    experiment, settings = tiny("sharpness-gap")
    settings = replace(settings, dataset="fashion-mnist", pool=2, skip=6048)
    (first, *_) = experiment.tasks(replace(settings, seeds=(100,)))
    row = experiment.run(settings, first, Silent())[0]
    assert all(value is not None for value in row["lambda_max"])


def test_missing_numbers_are_no_numbers():
    """An eigenvalue that did not converge leaves its seed without a value."""
    rows = rows_of_edge("sharpness-gap")
    rows[0] = {**rows[0], "lambda_max": [None] * len(rows[0]["lambda_max"])}
    settings = EXPERIMENTS["sharpness-gap"].settings("quick", "digits")
    assert gap.judge(settings, rows, len(rows)).outcome != HELD
    rows = rows_of_edge("batch-sharpness")
    rows[5] = {**rows[5], "lambda_max": [None] * len(rows[5]["lambda_max"])}
    settings = EXPERIMENTS["batch-sharpness"].settings("quick", "digits")
    verdict = batch_sharpness.judge(settings, rows, len(rows))
    assert verdict.outcome == UNDECIDED
