"""The benchmark harness: what it refuses, what it computes, what it measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gradients, markdown
from benchmarks.curvature import EigenvalueResult
from benchmarks.curvature_oracle import (
    judge_eigenvalue,
    judge_product,
    product_truth,
    top_eigenvalue,
)
from benchmarks.gradients import choose_option, compare_gradients
from benchmarks.gradients_oracle import judge, sample_truth
from benchmarks.harness import Verdict, compare, interleave, ratio
from benchmarks.memory import peak_growth
from benchmarks.providers import Provider, by_name, providers_of
from benchmarks.providers.base import flat, split
from benchmarks.records import describe_run, save, summary
from benchmarks.workloads import (
    WORKLOADS,
    Recipe,
    Workload,
    build,
    freeze_norms,
    mean_loss,
    train,
)

# Counted by hand from the definitions: weights and biases, layer by layer.
PARAMETERS = {
    "W1": 784 * 512 + 512 + 2 * (512 * 512 + 512) + 512 * 10 + 10,
    "W2": (3 * 25 * 32 + 32) + (32 * 9 * 64 + 64) + (64 * 9 * 64 + 64) + 10250,
    "W3": 1792 + 73856 + 295168 + 590080 + 1180160 + 3 * 2359808 + 5130,
    # Convolutions, then GroupNorms, then the two projections, then the head.
    "W4": (432 + 6 * 2304 + 4608 + 5 * 9216 + 18432 + 5 * 36864)
    + 2 * (7 * 16 + 6 * 32 + 6 * 64)
    + (16 * 32 + 32 * 64)
    + 650,
    # Two tables, four blocks (two norms, packed qkv, projection, MLP), norm, head.
    "W5": (2048 + 128) * 256
    + 4 * (2 * 512 + 257 * 768 + 257 * 256 + 257 * 1024 + 1025 * 256)
    + 512
    + 256 * 2048,
    # The same with one table for tokens and head.
    "W6": (50257 + 64) * 768
    + 4 * (4 * 768 + 769 * 2304 + 769 * 768 + 769 * 3072 + 3073 * 768)
    + 2 * 768,
}
PARAMETERS["W1L"] = PARAMETERS["W1"]
SHAPES = {
    "W1": ((128, 784), (128,)),
    "W1L": ((512, 784), (512,)),
    "W2": ((64, 3, 32, 32), (64,)),
    "W3": ((64, 3, 32, 32), (64,)),
    "W4": ((64, 3, 32, 32), (64,)),
    "W5": ((16, 128), (16, 128)),
    "W6": ((4, 64), (4, 64)),
}


class FakeClock:
    """Time that passes only when a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, *durations: float):
        """A step that takes each duration in turn, over and over."""
        calls = 0

        def run():
            nonlocal calls
            self.now += durations[calls % len(durations)]
            calls += 1

        return run


@pytest.fixture
def tiny(monkeypatch):
    """A workload that takes a millisecond: two layers, six samples."""

    def model():
        return torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 10)
        )

    def data():
        return torch.randn(6, 5), torch.randint(10, (6,))

    monkeypatch.setitem(WORKLOADS, "tiny", Recipe(model, data))
    return build("tiny")


@pytest.mark.parametrize("name", PARAMETERS)
def test_workloads_are_as_defined(name):
    workload = build(name)
    count = sum(p.numel() for p in workload.model.parameters())
    assert count == PARAMETERS[name]
    assert (workload.inputs.shape, workload.targets.shape) == SHAPES[name]


@pytest.mark.parametrize("name", ["W1", "W5"])
def test_losses_are_the_samples_own(name):
    workload = build(name)
    losses = workload.losses()
    assert losses.shape == (workload.batch_size,)
    outputs = workload.model(workload.inputs)
    torch.testing.assert_close(losses.mean(), mean_loss(outputs, workload.targets))
    one = Workload(
        name, workload.model, workload.inputs[3:4], workload.targets[3:4]
    ).losses()
    torch.testing.assert_close(one, losses[3:4])


def test_workloads_repeat_and_leave_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = build("W1"), build("W1")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.inputs, second.inputs)
    for p, q in zip(first.parameters.values(), second.parameters.values(), strict=True):
        assert torch.equal(p, q)


def test_unknown_workload_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'W9'.*W1, W1L"):
        build("W9")


def test_frozen_norms_keep_the_rest():
    workload = freeze_norms(build("W4"))
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    left = sum(p.numel() for p in workload.parameters.values())
    assert left == PARAMETERS["W4"] - norms
    assert workload.double().parameters.keys() == workload.parameters.keys()


def test_training_lowers_the_loss(tiny):
    before = tiny.losses().mean().item()
    assert train(tiny, steps=20, lr=0.5).losses().mean().item() < 0.9 * before


def test_ratio_is_of_medians_with_spread():
    result = ratio([2.0, 4.0, 3.0], [1.0, 2.0, 1.0])
    assert result.value == 3.0 / 1.0
    assert (result.lower_quartile, result.upper_quartile) == (2.0, 2.5)
    assert result.low <= result.value <= result.high
    assert result.rounds == 3


def test_ratio_leaves_out_rounds_that_were_sat_out():
    result = ratio([30.0, None, 50.0], [1.0, 9.0, 1.0])
    assert result.value == 40.0
    assert result.rounds == 2


def test_constant_times_have_no_spread():
    result = ratio([3.0] * 5, [2.0] * 5)
    assert (result.low, result.value, result.high) == (1.5, 1.5, 1.5)


def test_interleave_leaves_out_warm_up_and_settling():
    clock = FakeClock()
    # Called twice to warm up, then untimed and timed in turn.
    times = interleave(
        {"plain": clock.step(9.0, 9.0, 8.0, 1.0, 8.0, 1.0), "b": clock.step(2.0)},
        plain="plain",
        budget=0,
        min_rounds=2,
        clock=clock,
    )
    assert times["plain"] == [1.0, 1.0]
    assert times["b"] == [2.0, 2.0]


def test_interleave_takes_as_many_rounds_as_the_budget_allows():
    clock = FakeClock()
    steps = {"plain": clock.step(1.0), "b": clock.step(2.0)}
    times = interleave(steps, plain="plain", budget=61.0, clock=clock)
    assert len(times["plain"]) == 10  # 61 seconds at 2 * (1 + 2) a round


def test_slow_steps_sit_out_most_rounds():
    clock = FakeClock()
    steps = {"plain": clock.step(1.0), "slow": clock.step(50.0)}
    times = interleave(steps, plain="plain", budget=0, min_rounds=5, clock=clock)
    taken = [i for i, seconds in enumerate(times["slow"]) if seconds is not None]
    assert taken == [0, 5, 10]
    assert len(times["plain"]) == len(times["slow"]) == 15


def test_a_wrong_provider_is_not_timed():
    calls = {"plain": 0, "wrong": 0}

    def step(name):
        def run():
            calls[name] += 1
            return name

        return run

    def check(name, answer):
        assert answer == name
        return Verdict(name == "plain", 0.25, "norms")

    results = compare(
        {name: step(name) for name in calls},
        plain="plain",
        check=check,
        budget=0,
        min_rounds=3,
    )
    assert calls == {"plain": 1 + 2 + 2 * 3, "wrong": 1}
    assert results["wrong"].ratio is None
    assert results["wrong"].seconds == []
    assert summary(results["wrong"])["verdict"] == "wrong: norms off by 0.25"
    assert results["plain"].ratio.rounds == 3


def test_a_wrong_plain_step_stops_the_comparison():
    with pytest.raises(RuntimeError, match="plain step 'plain' is wrong"):
        compare(
            {"plain": lambda: None},
            plain="plain",
            check=lambda *_: Verdict(False, 1.0, ".grad"),
            budget=0,
        )


def test_a_provider_that_fails_says_so_and_stops_nobody():
    def fail():
        raise RuntimeError("no rule for FooBackward0\nand more")

    results = compare(
        {"plain": lambda: None, "failing": fail},
        plain="plain",
        check=lambda *_: Verdict(True, 0.0, ""),
        budget=0,
        min_rounds=3,
    )
    said = "failed: RuntimeError: no rule for FooBackward0"
    assert summary(results["failing"])["skipped"] == said
    assert results["plain"].is_timed


def test_a_provider_is_divided_by_its_own_baseline():
    clock = FakeClock()
    steps = {
        "plain": clock.step(1.0),
        "plain, less": clock.step(0.5),
        "b": clock.step(2.0),
    }
    results = compare(
        steps,
        plain="plain",
        check=lambda *_: Verdict(True, 0.0, ""),
        baselines={"b": "plain, less"},
        budget=0,
        min_rounds=3,
        clock=clock,
    )
    assert results["b"].ratio.value == 4.0


def planted(change):
    """A provider that is `vmap` but for what `change` does to the squared norms."""

    def make(workload):
        step = by_name("vmap").measures["norms"](workload, chunk=6)
        return lambda: change(step(), workload)

    return Provider("planted", "planted", {"norms": make})


def scale_gradient(norms, workload):
    for p in workload.parameters.values():
        p.grad *= 1.1
    return norms


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda norms, _: norms * 1.02, "squared norms"),
        (lambda norms, _: norms.index_fill(0, torch.tensor([2]), 0.0), "squared norms"),
        (lambda norms, _: norms.roll(1), "squared norms"),
        (lambda norms, _: norms * float("nan"), "squared norms"),
        (lambda norms, _: norms[:-1], "shape"),
        (scale_gradient, ".grad"),
    ],
)
def test_planted_mistakes_are_refused(tiny, monkeypatch, change, what):
    providers = [by_name("vmap"), planted(change)]
    monkeypatch.setattr(gradients, "providers_of", lambda _: providers)
    results = compare_gradients(tiny, "norms", budget=0, min_rounds=2)
    assert results["vmap"].verdict.ok
    assert results["vmap"].is_timed
    assert not results["planted"].verdict.ok
    assert not results["planted"].is_timed
    assert what in str(results["planted"].verdict)


def test_the_oracle_is_the_definition(tiny):
    truth = sample_truth(tiny)
    exact = tiny.double()
    parameters = list(exact.parameters.values())
    rows = [
        flat(torch.autograd.grad(loss, parameters, retain_graph=True))
        for loss in exact.losses()
    ]
    g = torch.stack(rows)
    torch.testing.assert_close(truth.norms, g.square().sum(dim=1))
    torch.testing.assert_close(
        flat(truth.second_moments.values()), g.square().mean(dim=0)
    )
    torch.testing.assert_close(flat(truth.gradient.values()), g.mean(dim=0))


def test_second_moments_that_miss_a_parameter_are_wrong(tiny):
    truth = sample_truth(tiny)
    answer = dict(truth.second_moments)
    assert judge(answer, truth.gradient, truth).ok
    answer["0.bias"] = answer["0.bias"] * 1.1
    assert not judge(answer, truth.gradient, truth).ok
    del answer["0.bias"]
    assert not judge(answer, truth.gradient, truth).ok


def dense_hessian(workload):
    exact = workload.double()
    like = list(exact.parameters.values())

    def loss(vector):
        named = dict(zip(exact.parameters, split(vector, like), strict=True))
        outputs = torch.func.functional_call(exact.model, named, (exact.inputs,))
        return mean_loss(outputs, exact.targets)

    return torch.autograd.functional.hessian(loss, flat(like).detach())


def test_curvature_oracles_agree_with_the_dense_hessian(tiny):
    hessian = dense_hessian(tiny)
    vector = torch.randn(len(hessian))
    product = product_truth(tiny, vector)
    torch.testing.assert_close(product, hessian @ vector.double())
    assert judge_product(product.float(), product, tiny).ok
    part = product.clone()
    part[35:42] *= 1.5  # the first bias only: a few per cent of the whole
    assert not judge_product(part.float(), product, tiny).ok
    value, residual = top_eigenvalue(tiny)
    want = torch.linalg.eigvalsh(hessian)[-1].item()
    assert value == pytest.approx(want, rel=1e-4)
    assert residual <= 1e-3 * value


def test_eigenvalues_are_judged_by_the_worst_with_its_sign():
    verdict = judge_eigenvalue([1.0, 0.92, 1.01], 1.0)
    assert not verdict.ok
    assert verdict.worst == pytest.approx(-0.08)


def test_the_fastest_option_is_chosen():
    clock = FakeClock()
    durations = {4: 3.0, 16: 1.0, 64: 1.2, 128: 9.0}
    calls = dict.fromkeys(durations, 0)

    def make(value):
        step = clock.step(durations[value])

        def run():
            calls[value] += 1
            step()

        return run

    assert choose_option(make, list(durations), clock) == 16
    assert calls[128] == 1


def test_absent_libraries_are_named_with_their_package(tiny, monkeypatch):
    absent = Provider(
        "absent", "absent", {"norms": None}, module="no_such_library", package="nsl==1"
    )
    monkeypatch.setattr(gradients, "providers_of", lambda _: [absent])
    results = compare_gradients(tiny, "norms", budget=0, min_rounds=2)
    assert results["absent"].skipped == "not installed: pip install nsl==1"


def test_no_peer_is_imported_before_it_is_asked_for():
    code = (
        "import sys, benchmarks.tables\n"
        "peers = {'backpack', 'opacus', 'dattri_llm', 'pyhessian', 'fastminima'}\n"
        "assert not peers & set(sys.modules), peers & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_provider_names_are_distinct():
    measures = ("norms", "second_moments", "product", "eigenvalue")
    for measure in measures:
        names = [p.name for p in providers_of(measure)]
        assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="Unknown provider 'nobody'"):
        by_name("nobody")


def test_records_can_be_drawn_again(tiny, tmp_path):
    results = compare_gradients(tiny, "norms", ["vmap"], budget=0, min_rounds=3)
    cells = {name: summary(result) for name, result in results.items()}
    cells["backpack"] = {
        "right": False,
        "worst_error": 0.391,
        "verdict": "wrong: squared norms off by 0.39",
    }
    record = {"run": describe_run(threads=2), "tables": {"norms": {"tiny": cells}}}
    text = markdown.render(json.loads(save(record, tmp_path / "r.json").read_text()))
    value = results["vmap"].ratio.value
    assert f"| vmap(grad), best chunk | {value:.{1 if value >= 10 else 2}f} ±" in text
    assert "| BackPACK | wrong: +39 % |" in text
    assert cells["vmap"]["note"].startswith("chunk ")  # the fastest on this machine
    assert f"[1] {cells['vmap']['note']}" in text
    assert record["run"]["versions"]["torch"] in text


def test_eigenvalue_cells():
    cell = vars(EigenvalueResult("fastminima", products=[9, 11, 10]))
    cell |= {"gradients": [20.0, 22.0, 24.0], "right": True, "worst_error": -0.001}
    record = {"run": describe_run(1), "tables": {"eigenvalue": {"W1L at init": {}}}}
    record["tables"]["eigenvalue"]["W1L at init"]["fastminima"] = cell
    assert "| 10 / 22 / -0.10 % |" in markdown.render(record)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_a_step_takes():
    growth = peak_growth("W1", "norms", "plain", {}, 1)
    gradients_alone = 4 * PARAMETERS["W1"] / 2**20
    assert gradients_alone < growth["growth"] < 100
    assert growth["first"] <= growth["growth"]


def test_a_failing_child_says_why():
    with pytest.raises(RuntimeError, match="Unknown workload 'W9'"):
        peak_growth("W9", "norms", "plain", {}, 1)
