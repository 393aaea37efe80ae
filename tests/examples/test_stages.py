"""F4, F6 and F7: cycles, breakdown and stages; on digits, and on rows made by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from examples.common.plots import plt
from examples.common.stacks import Stack
from examples.common.training import Orders, minibatches, train_steps
from examples.engine.outcome import HELD, NOT_HELD, UNDECIDED
from examples.three_factors import breakdown, exchange, small, stages
from examples.three_factors.cycles import Arm, Cycle, constant

MODULES = (exchange, breakdown, stages)
SEEDS = range(100, 108)


class Silent:
    """A watch that keeps nothing but the largest fraction."""

    done = 0.0

    def progress(self, fraction):
        self.done = max(self.done, fraction)

    def load(self):
        return None

    def save(self, state):
        pass


def quick(module, **changed):
    return dataclasses.replace(module.settings("quick", "digits"), **changed)


@pytest.fixture(scope="module")
def runs():
    """The quick preset of each, on digits."""
    found = {}
    for module in MODULES:
        settings = quick(module)
        watch = Silent()
        rows = [
            row
            for task in module.tasks(settings)
            for row in module.run(settings, task, watch)
        ]
        found[module] = settings, rows
        assert watch.done == 1
    return found


@pytest.mark.parametrize("module", MODULES)
def test_quick_has_every_row_and_a_verdict(module, runs):
    settings, rows = runs[module]
    expected = module.EXPERIMENT.expected(settings)
    verdict = module.judge(settings, rows, expected)
    assert len(rows) == expected
    assert all(row["status"] == small.TRAINED for row in rows)
    assert verdict.outcome in (HELD, NOT_HELD, UNDECIDED)
    assert verdict.table
    assert verdict.short
    assert max(len(line) for line in verdict.table.splitlines()) < 170
    plt.close(module.draw(settings, rows))


@pytest.mark.parametrize("module", MODULES)
def test_a_second_run_gives_equal_rows(module, runs):
    settings, rows = runs[module]
    task = module.tasks(settings)[-1]
    again = module.run(settings, task, Silent())
    shared = task.keys() & again[0].keys()
    first = [
        row
        for row in rows
        if row["seed"] in task["seeds"] and all(row[k] == task[k] for k in shared)
    ]
    assert first == again


@pytest.mark.parametrize("module", MODULES)
def test_seeds_do_not_depend_on_their_stack(module, runs):
    settings, _ = runs[module]
    task = module.tasks(settings)[-1]
    whole = module.run(settings, task, Silent())
    (alone,) = module.run(settings, {**task, "seeds": task["seeds"][1:2]}, Silent())
    for name, value in whole[1].items():
        if isinstance(value, (float, list)):
            np.testing.assert_allclose(
                np.array(value, float), np.array(alone[name], float), rtol=0.05
            )


@pytest.mark.parametrize("module", MODULES)
def test_more_seeds_add_tasks_and_change_none(module):
    few = module.tasks(module.settings("laptop", "digits"))
    settings = module.settings("laptop", "digits")
    more = dataclasses.replace(settings, seeds=(*settings.seeds, 500, 501))
    many = module.tasks(more)
    whole = [task for task in few if len(task["seeds"]) == settings.chunk]
    assert all(task in many for task in whole)


def exchanged(effect=0.02, difference=0.0, noise=1e-3):
    """Rows in which the cycles are `effect` better than the constants."""
    settings = exchange.settings("laptop", "digits")
    rng = np.random.default_rng(0)
    settings = dataclasses.replace(settings, seeds=tuple(SEEDS))
    rows = []
    for arm in settings.arms:
        is_cycle = arm.low != arm.high
        batch = difference * (arm.vary == "batch_size")
        for seed in SEEDS:
            wobble = rng.normal(0, noise, (2, settings.epochs))
            accuracy = 0.8 + is_cycle * effect + batch * effect + wobble[0]
            loss = -1 - 20 * (is_cycle + batch) * effect + wobble[1]
            rows.append(
                {
                    "arm": arm.name,
                    "seed": seed,
                    "status": small.TRAINED,
                    "validation_accuracy": list(accuracy),
                    "train_loss": list(np.exp(loss)),
                }
            )
    return settings, rows


def broken(after=1.5, later=1.0, drop=0.5, noise=1e-3):
    """Rows in which accuracy drops `after` doublings after eta lambda_max = 2."""
    settings = breakdown.settings("laptop", "digits")
    settings = dataclasses.replace(settings, seeds=tuple(SEEDS))
    rng = np.random.default_rng(0)
    rows = []
    for at, n in enumerate(settings.sizes):
        edge = 4.0 + later * at
        for beta in settings.betas:
            for seed in SEEDS:
                place = math.log2(beta)
                lost = drop * (1 / (1 + math.exp(-20 * (place - edge - after))))
                rows.append(
                    {
                        "samples": n,
                        "beta": beta,
                        "seed": seed,
                        "learning_rate": 0.01 * beta,
                        "status": small.TRAINED,
                        "updates_status": small.TRAINED,
                        "epochs_accuracy": 0.8 - lost + rng.normal(0, noise),
                        "first_eta_lambda": 2 * 2 ** (place - edge),
                        "epochs_eta_lambda": 2.0,
                    }
                )
    return settings, rows


def staged(low=0.05, high=-0.1, noise=0.01):
    """Rows in which sharpness changes by these logarithms over the stages."""
    settings = stages.settings("laptop", "digits")
    settings = dataclasses.replace(settings, seeds=tuple(SEEDS))
    rng = np.random.default_rng(0)
    rows = []
    for way in stages.WAYS:
        for loss in settings.losses:
            for seed in SEEDS:
                steps = [0.0, *([high, low] * settings.stages)][: settings.stages]
                ends = np.exp(np.cumsum(steps) + rng.normal(0, noise, len(steps)))
                twice = list(np.repeat(ends, 2))
                rows.append(
                    {
                        "loss": loss,
                        "way": way,
                        "seed": seed,
                        "status": small.TRAINED,
                        "lambda_max": twice,
                        "frobenius": list(ends),
                        "trace": list(ends),
                        "train_loss": twice,
                        "validation_accuracy": twice,
                    }
                )
    return settings, rows


MADE = {exchange: exchanged, breakdown: broken, stages: staged}


@pytest.mark.parametrize("module", MODULES)
def test_rows_of_which_the_claim_is_true(module):
    settings, rows = MADE[module]()
    verdict = module.judge(settings, rows, len(rows))
    assert verdict.outcome == HELD, verdict
    plt.close(module.draw(settings, rows))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_which_the_claim_is_false(module, seed):
    settings, rows = MADE[module]()
    changed = module.nulls(rows, seed)
    assert changed
    for name, null in changed.items():
        verdict = module.judge(settings, null, len(null))
        assert verdict.outcome != HELD, f"{name}: {verdict}"


@pytest.mark.parametrize("module", MODULES)
def test_nulls_of_runs_are_not_held(module, runs):
    settings, rows = runs[module]
    for name, null in module.nulls(rows, 0).items():
        verdict = module.judge(settings, null, len(null))
        assert verdict.outcome != HELD, f"{name}: {verdict}"


@pytest.mark.parametrize(
    ("make", "outcome"),
    [
        (lambda: exchanged(difference=0.6), NOT_HELD),
        (lambda: exchanged(effect=0.0), UNDECIDED),
        (lambda: broken(after=0.0), NOT_HELD),  # at the edge itself
        (lambda: broken(later=-1.0), NOT_HELD),  # earlier for the larger N
        (lambda: broken(drop=0.0), NOT_HELD),
        (lambda: staged(low=-0.05), NOT_HELD),
        (lambda: staged(low=0.0, high=0.0), UNDECIDED),
    ],
)
def test_other_outcomes(make, outcome):
    settings, rows = make()
    module = next(m for m in MODULES if m.__name__ == type(settings).__module__)
    assert module.judge(settings, rows, len(rows)).outcome == outcome


def test_half_a_grid_decides_nothing():
    for module, make in MADE.items():
        settings, rows = make()
        assert module.judge(settings, rows, 2 * len(rows)).outcome == UNDECIDED


def test_a_cycle_of_rate_has_the_ratio_of_the_cycle_of_batch():
    """Sample by sample; and every epoch of each replica is a permutation."""
    ratios = {}
    for vary in ("lr", "batch_size"):
        cycle = Cycle(Arm("", vary, 0.08, 4, 0.004, 0.02), [0, 1], 120, stage=2)
        ratios[vary] = []
        for _ in range(4):
            seen = []
            for index, rate in cycle.epoch():
                ratios[vary] += [rate / index.shape[1]] * index.shape[1]
                seen.append(index)
            orders = torch.cat(seen, dim=1)
            assert orders.sort(dim=1).values.equal(torch.arange(120).expand(2, -1))
            assert not orders[0].equal(orders[1])
    assert ratios["lr"] == pytest.approx([0.02] * 240 + [0.004] * 240)
    assert ratios["batch_size"] == pytest.approx(ratios["lr"])
    still = Cycle(constant("", 0.08, 20, 0), [0], 120, stage=2)
    assert {(i.shape[1], rate) for i, rate in still.epoch()} == {(20, 0.08)}


def test_a_replica_that_diverges_spoils_no_other():
    """Three replicas of one stack, one with a rate at which it overflows."""
    x, y, *_ = sample = small.samples("digits", 256, 64, seed=0, skip=0, pool=1)
    rates = torch.tensor([0.05, 1e6, 0.05])

    def trained(which):
        stack = Stack.drawn((64, 20, 10), which.tolist())
        orders = Orders(which.tolist(), 256)
        for _ in range(3):
            train_steps(stack, x, y, rates[which], minibatches(orders, 16))
        return small.standing(stack, sample)

    whole = trained(torch.tensor([0, 1, 2]))
    apart = trained(torch.tensor([0, 2]))
    assert not math.isfinite(whole["train_loss"][1])
    for name, values in apart.items():
        assert [whole[name][0], whole[name][2]] == pytest.approx(values, rel=1e-3)


def test_a_network_that_died_is_named_and_has_no_curvature():
    settings = quick(breakdown, learning_rate=100.0, betas=(1,), sizes=(256,))
    rows = breakdown.run(settings, breakdown.tasks(settings)[0], Silent())
    assert {row["status"] for row in rows} <= {small.DIVERGED, small.UNTRAINED}
    for row in rows:
        if row["status"] == small.DIVERGED:
            assert row["epochs_accuracy"] == 0.1
            assert "epochs_eta_lambda" not in row


def test_status():
    assert small.status_of(2.3, 0.5, 0.8) == small.TRAINED
    assert small.status_of(2.3, 2.4, 0.8) == small.UNTRAINED
    assert small.status_of(2.3, 2.2, 0.12) == small.UNTRAINED
    assert small.status_of(2.3, math.nan, 0.1) == small.DIVERGED
    assert small.status_of(2.3, 1e5, 0.1) == small.DIVERGED


@pytest.mark.parametrize("module", MODULES)
def test_the_loop_of_the_paper(module):
    """A small convolutional network in place of the paper's."""
    changed = {"network": "vgg5", "pool": 1, "chunk": 1, "seeds": (100,)}
    if module is breakdown:
        changed |= {"sizes": (128, 256), "betas": (1, 8), "batch_size": 16, "epochs": 2}
    else:
        changed |= {"train": 128, "batch_size": 16, "stage": 2, "stages": 2}
    if module is exchange:
        changed |= {"shapes": ("square",)}
    if module is stages:
        changed |= {"losses": (stages.CROSS_ENTROPY,)}
    settings = quick(module, **changed)
    rows = [
        row
        for task in module.tasks(settings)
        for row in module.run(settings, task, Silent())
    ]
    verdict = module.judge(settings, rows, len(rows))
    assert verdict.outcome == UNDECIDED
    plt.close(module.draw(settings, rows))
    paper = module.settings("paper", "cifar10")
    assert paper.network == "vgg11"
    assert module.tasks(paper)
