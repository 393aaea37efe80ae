"""The five related works: closed forms, small runs, and verdicts that can fail."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import fastminima as fm
from examples.breuel_subproblems import modes
from examples.congregation import restarts
from examples.engine.outcome import HELD, NOT_HELD
from examples.kleinberg_escape import network as path
from examples.kleinberg_escape import one_dimension
from examples.langevin_volume import network as flatness
from examples.langevin_volume import volume
from examples.online_ica import ica

SEEDS = tuple(range(5))


class Silent:
    """A watch that nobody reads."""

    def progress(self, fraction):
        assert 0 <= fraction <= 1

    def load(self):
        return None

    def save(self, state):
        pass


def small(module, dataset="", **sizes):
    """Settings of the quick preset, cut down further, and its experiment."""
    experiment = module.EXPERIMENT
    made = experiment.settings("quick", dataset)
    return experiment, dataclasses.replace(made, **sizes)


SMALL = {
    "breuel": lambda: small(modes, width=64, epochs=3, seeds=(0,)),
    "kleinberg-1d": lambda: small(one_dimension, seeds=(0, 1)),
    "kleinberg-net": lambda: small(
        path, "digits", train_size=200, epochs=3, places=2, points=2, seeds=(0,)
    ),
    "kleinberg-net, resnet": lambda: small(
        path, "digits", model="resnet", train_size=64, epochs=2, places=2, points=1,
        seeds=(0,),
    ),
    "congregation": lambda: small(restarts, steps=1000, repetitions=4, seeds=(0, 1)),
    "langevin-volume": lambda: small(
        volume, walkers=50, relaxing=0.5, counting=1.0, seeds=(0,)
    ),
    "flatness-labels": lambda: small(
        flatness, "digits", train_size=32, width=16, directions=2, seeds=(0,)
    ),
    "online-ica": lambda: small(
        ica, runs=8, time=0.4, growth_betas=(2e-3, 1e-3), variance_time=2.0,
        path_betas=(2e-3, 1e-3), path_time=0.5, seeds=(0, 1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_runs_judges_and_draws(name):
    experiment, settings = SMALL[name]()
    tasks = experiment.tasks(settings)
    assert len(tasks) >= 2
    rows = []
    for task in tasks:
        task = json.loads(json.dumps(task))
        found = experiment.run(settings, task, Silent())
        assert len(found) == experiment.rows(settings, task)
        rows += json.loads(json.dumps(found))
    assert all(len(json.dumps(row)) < 2100 for row in rows)
    verdict = experiment.judge(settings, rows, experiment.expected(settings))
    assert verdict.table
    assert verdict.short
    experiment.draw(settings, rows).canvas.draw()


@pytest.mark.parametrize("name", SMALL)
def test_a_task_gives_the_same_rows_again(name):
    experiment, settings = SMALL[name]()
    task = experiment.tasks(settings)[-1]
    first = experiment.run(settings, task, Silent())
    torch.rand(3)
    assert experiment.run(settings, task, Silent()) == first


@pytest.mark.parametrize("module", [restarts, ica])
def test_a_row_does_not_depend_on_its_stack(module):
    name = module.EXPERIMENT.id
    experiment, settings = SMALL[name]()
    task = experiment.tasks(settings)[0]
    together = experiment.run(settings, task, Silent())
    alone = experiment.run(settings, {**task, "seeds": task["seeds"][:1]}, Silent())
    assert alone == together[:1]


def near(value, spread=0.01):
    """A number for each seed, near the value."""
    return {s: value * (1 + spread * (s - 2)) for s in SEEDS}


def rows_that_hold(name):
    """Settings, and rows as the claim has them."""
    if name == "breuel":
        experiment, settings = small(modes)
        rates = np.linspace(-4, -0.7, 40)
        rows = [
            {
                "labels": labels, "seed": s, "modes": 40, "growing": 0,
                "predicted": rates.tolist(),
                "measured": (rates * (1 + 0.01 * s) + np.cos(9 * rates) / 20).tolist(),
                "cosine": 0.999, "rise": 0.0, "line": [1.0, 0.7, 0.5], "loss_left": 0.5,
            }
            for labels in settings.labels
            for s in SEEDS
        ]  # fmt: skip
    elif name == "kleinberg-1d":
        experiment, settings = small(one_dimension)
        shares = {0.0: 0.17, 0.05: 0.98, 1.0: 0.08}
        rows = [
            {
                "seed": s,
                "noises": list(settings.noises),
                "shares": [near(shares.get(n, 0.4))[s] for n in settings.noises],
            }
            for s in SEEDS
        ]
    elif name == "kleinberg-net":
        experiment, settings = small(path, "digits")
        rows = [
            {
                "seed": s, "batch": batch, "points": 100, "radii": [0.0, 0.5, 2.0, 5.0],
                "shares": [1.0, 1.0, 0.999, 0.9], "null_share": near(0.05)[s],
                "least_cosines": [0.3, 0.2, 0.1, -0.2], "loss": 0.1, "travelled": 2.0,
            }
            for batch in settings.batches
            for s in SEEDS
        ]  # fmt: skip
    elif name == "congregation":
        experiment, settings = small(restarts, seeds=SEEDS)
        shares = {(1, "hasty"): 0.1, (2, "clocked"): 0.4, (2, "hasty"): 0.6}
        shares |= {(4, "clocked"): 0.75, (4, "hasty"): 0.9}
        rows = [
            {
                "members": m, "rule": rule, "seed": s, "share": near(share)[s],
                "history": [0.1, share], "restarts": 1.0,
            }
            for (m, rule), share in shares.items()
            for s in SEEDS
        ]  # fmt: skip
    elif name == "langevin-volume":
        experiment, settings = small(volume)
        rows = [
            {
                "dimension": d,
                "seed": s,
                "ratios": dict.fromkeys(volume.STARTS, near(exact, 0.005)[s]),
                "curves": {start: [0.5, 0.6] for start in volume.STARTS},
            }
            for d, exact in ((1, 2.0), (2, 4.03))
            for s in SEEDS
        ]
    elif name == "flatness-labels":
        experiment, settings = small(flatness, "digits")
        radii = {"true": 20.0, "random": 10.0, "again": 10.0}
        rows = [
            {
                "labels": labels, "seed": s, "radius": near(radius, 0.01 + i / 300)[s],
                "radii": [radius], "radius_of_accuracy": radius, "norm": 20.0,
                "loss": 0.05, "accuracy": 1.0, "epochs": 10, "sharpness": 5.0,
                "noise_share": near(0.1)[s], "parameters": 17_000,
            }
            for i, (labels, radius) in enumerate(radii.items())
            for s in SEEDS
        ]  # fmt: skip
    else:
        experiment, settings = small(ica, seeds=SEEDS)
        rows = []
        for s in SEEDS:
            row = {"part": "converge", "beta": settings.beta, "seed": s}
            winners = [17, 16, 17, 18, 15, 17]
            rows.append({**row, "converged": 1.0, "winners": winners})
            rows += [
                {
                    "part": "variance", "beta": b, "seed": s,
                    "variance": b, "ratio": 1 + 45 * b + 0.002 * (s - 2),
                }
                for b in settings.variance_betas
            ]  # fmt: skip
            rows += [
                {
                    "part": "growth", "beta": b, "off": off, "seed": s,
                    "rate": near(0.6)[s], "ode_rate": 0.6,
                    "gaps": [0.1, 0.2], "ode_gaps": [0.1, 0.2],
                }
                for b in settings.growth_betas
                for off in ica.STARTS
            ]  # fmt: skip
            rows += [
                {
                    "part": "path", "beta": b, "seed": s,
                    "distance": near(d, 0.02 * (i + 1))[s],
                    "mean": [0.5] * 20, "ode": [0.5] * 20,
                }
                for i, (b, d) in enumerate(
                    zip(settings.path_betas, (0.008, 0.004), strict=True)
                )
            ]  # fmt: skip
    return experiment, settings, rows


HAND_MADE = (
    "breuel",
    "kleinberg-1d",
    "kleinberg-net",
    "congregation",
    "langevin-volume",
    "flatness-labels",
    "online-ica",
)


@pytest.mark.parametrize("name", HAND_MADE)
def test_rows_as_the_claim_has_them_are_held(name):
    experiment, settings, rows = rows_that_hold(name)
    verdict = experiment.judge(settings, rows, len(rows))
    assert verdict.outcome == HELD, str(verdict)


@pytest.mark.parametrize("name", HAND_MADE)
def test_rows_of_which_the_claim_is_false_are_not_held(name):
    experiment, settings, rows = rows_that_hold(name)
    found = experiment.nulls(rows, 0)
    outcomes = {
        how: experiment.judge(settings, changed, len(rows)).outcome
        for how, changed in found.items()
    }
    assert len(outcomes) >= 2
    assert HELD not in outcomes.values(), outcomes
    assert NOT_HELD in outcomes.values(), outcomes


@pytest.mark.parametrize("name", HAND_MADE)
def test_half_of_the_runs_decide_nothing(name):
    experiment, settings, rows = rows_that_hold(name)
    verdict = experiment.judge(settings, rows, 2 * len(rows))
    assert verdict.outcome not in (HELD, NOT_HELD)


@pytest.mark.parametrize("name", HAND_MADE)
def test_no_rows_decide_nothing(name):
    experiment, settings, _ = rows_that_hold(name)
    assert experiment.judge(settings, [], 10).outcome not in (HELD, NOT_HELD)


def test_gram_is_of_the_outputs_and_not_of_the_losses():
    random = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()
    x = torch.randn(5, 3, generator=random, dtype=torch.float64)
    y = torch.randn(5, generator=random, dtype=torch.float64)
    rows = []
    for i in range(5):
        found = torch.autograd.grad(model(x[i : i + 1])[0, 0], list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    jacobian = torch.stack(rows)
    gram = modes.gram(model, x)
    torch.testing.assert_close(gram, jacobian @ jacobian.T / 5)
    losses = (model(x)[:, 0] - y).square() / 2
    residual = (model(x)[:, 0] - y).detach()
    of_losses = fm.GradientProbe(model, measure="gram").backward(losses).gram
    torch.testing.assert_close(of_losses, residual * residual[:, None] * gram * 5)


def test_rates_of_exponential_decay():
    steps = np.arange(60)[:, None]
    rates = np.array([0.001, 0.02, 0.3])
    np.testing.assert_allclose(modes.rates(np.exp(-rates * steps)), rates)


def test_smoothed_slope_is_the_average_of_the_slope():
    x = np.linspace(-3, 3, 7)
    away = np.linspace(-0.05, 0.05, 20_001)
    average = one_dimension.slope(x[:, None] + away).mean(1)
    found = one_dimension.smoothed_slope(x, 0.05)
    np.testing.assert_allclose(found, average, atol=1e-3)
    step = 1e-6
    numeric = np.diff(
        [one_dimension.function(x - step), one_dimension.function(x + step)], axis=0
    )
    np.testing.assert_allclose(
        one_dimension.slope(x), numeric[0] / (2 * step), atol=1e-6
    )


@pytest.mark.parametrize(
    "distance, dimension", [(1.5, 1), (1.5, 2), (0.7, 2), (1.5, 3)]
)
def test_exact_ratio_is_that_of_a_sum_over_a_grid(distance, dimension):
    points = 3001 if dimension == 1 else 801
    z = np.linspace(-3.5, 3.5, points)
    # Middles of cells, so that none is half.
    away = np.zeros(1) if dimension == 1 else (np.arange(points) + 0.5) * 3.5 / points
    weight = np.ones(1) if dimension == 1 else away ** (dimension - 2)
    flat = z[:, None] ** 2 + away**2
    sharp = ((z[:, None] - distance) ** 2 + away**2) / 0.25
    mass = np.exp(-np.minimum(flat, sharp) / 0.35) * weight
    is_flat = flat < sharp
    want = mass[is_flat].sum() / mass[~is_flat].sum()
    found = volume.exact_ratio(dimension, distance, (1.0, 0.5), 0.35)
    assert math.isclose(found, want, rel_tol=5e-3)


def test_bowls_far_apart_have_the_ratio_of_their_volumes():
    for dimension in (1, 2, 3, 4):
        found = volume.exact_ratio(dimension, 8.0, (1.0, 0.5), 0.35)
        assert math.isclose(found, 2.0**dimension, rel_tol=1e-3)


def test_the_ode_keeps_the_norm_and_leaves_the_saddle_at_its_rate():
    d = 6
    start = np.full(d, 1 / math.sqrt(d))
    start[0] += 1e-5
    start /= np.linalg.norm(start)
    times = np.linspace(0, 3, 4)
    v = ica.follow(start, times)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, atol=1e-7)
    rate = math.log(ica.gap(v[-1]) / ica.gap(v[0])) / 3
    assert math.isclose(rate, 2 * 1.2 / d, rel_tol=1e-3)
    end = ica.follow(start, np.array([60.0]))[0]
    np.testing.assert_allclose(end, np.eye(d)[0], atol=1e-4)


def test_one_step_of_ica_is_that_of_the_ode_on_average():
    random = np.random.default_rng(0)
    v = np.array([0.8, 0.5, math.sqrt(0.11)])
    x = random.uniform(-math.sqrt(3), math.sqrt(3), (2_000_000, 3))
    drift = -((x @ v)[:, None] ** 3 * x).mean(0)
    drift -= (drift @ v) * v
    slope = (ica.follow(v, np.array([0.0, 1e-4]))[1] - v) / 1e-4
    np.testing.assert_allclose(drift, slope, atol=0.01)


def test_crossing_finds_the_level():
    assert math.isclose(flatness.crossing(lambda r: r * r, 4.0), 2.0, rel_tol=0.01)
    assert math.isnan(flatness.crossing(lambda r: 0.0, 1.0))


def test_a_member_that_is_young_or_best_or_moving_is_not_unfit():
    s = restarts.EXPERIMENT.settings("quick", "")
    old, young = 2000.0, 100.0
    cost = np.array([[0.1, 0.5, 0.5, 0.5]])
    gradient = np.array([[0.0, 0.0, 0.3, 0.0]])
    age = np.array([[old, old, old, young]])
    assert restarts.unfit(s, cost, gradient, age).tolist() == [
        [False, True, False, False]
    ]


def test_congregation_restarts_whom_the_optimizer_restarts():
    """The arrays of the example follow the rule of `fm.optim.Congregation`."""
    settings = restarts.settings("quick", "")

    class Wave(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.empty(1).uniform_(-10, 10))

        def forward(self, x):
            return (self.a * x).sin()

    congregation = fm.optim.Congregation(
        Wave,
        6,
        settings.rate,
        loss=lambda predicted, target: (predicted - target).square().mean() / 2,
        tau=settings.memory,
        tolerance=settings.flat,
        margin=settings.margin,
        check=settings.every,
        clip=(-settings.reach, settings.reach),
        seed=3,
    )
    a = np.array([[congregation.member(i).a.item() for i in range(6)]])
    cost, gradient, age = np.zeros_like(a), np.zeros_like(a), np.zeros_like(a)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 5000):
        x = torch.empty(1).uniform_(-3, 3, generator=generator)
        congregation.zero_grad()
        congregation.losses(x, (2 * x).sin()).sum().backward()
        congregation.step()
        a, slope, error = restarts.moved(settings, a, x.numpy())
        cost += settings.memory * (error * error / 2 - cost)
        gradient += settings.memory * (slope - gradient)
        age += 1
        if step % settings.every == 0:
            unfit = restarts.unfit(settings, cost, gradient, age)[0]
            assert congregation.restarts.tolist() == unfit.astype(int).tolist()
            if unfit.any():
                break
    assert unfit.any()
    assert step > settings.youth
