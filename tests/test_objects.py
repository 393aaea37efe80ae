"""Objects that users keep: printed, pickled, saved, as rows of tables, resumed."""

import copy
import json
import pickle
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastminima as fm


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batch_of(size=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def mean_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def sample_losses(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


MODEL, BATCH = model_of(), batch_of()
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


def rich_statistics():
    probe = fm.GradientProbe(
        MODEL,
        ("second_moments", "gram"),
        {"v": torch.ones(67)},
        per_parameter=True,
        keep_mean=True,
        sample=5,
    )
    return probe.backward(sample_losses(MODEL, BATCH))


@pytest.fixture(scope="module")
def results():
    """One of each kind of result, by name."""
    probe = fm.GradientProbe(MODEL)
    H = fm.Hessian(MODEL, mean_loss, BATCH)
    stats = probe.backward(sample_losses(MODEL, BATCH))
    pairs = fm.top_eigenpairs(H, k=2)
    covariance = fm.GradientCovariance(MODEL, sample_losses, BATCH)
    return {
        "statistics": stats,
        "rich statistics": rich_statistics(),
        "pairs": pairs,
        "trace": fm.trace(H, products=8),
        "density": fm.spectral_density(H, steps=4, probes=2),
        "noise": fm.noise_along(covariance, pairs),
        "critical": fm.critical_sharpness(MODEL, mean_loss, BATCH),
        "factors": fm.three_factors(OPTIMIZER, stats),
        "audit": probe.audit(sample_losses(MODEL, BATCH), samples=2),
        "curvature audit": H.audit(),
    }


def assert_equal(a, b):
    """The same, tensors by their bits."""
    assert type(a) is type(b)
    if is_dataclass(a):
        for field in fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b or (a != a and b != b)  # NaN is what it was


def test_results_survive_pickle_and_torch_load(results, tmp_path):
    for result in results.values():
        assert_equal(pickle.loads(pickle.dumps(result)), result)
        torch.save(result, tmp_path / "result.pt")
        assert_equal(torch.load(tmp_path / "result.pt"), result)  # weights_only=True


def test_results_print_in_a_line_and_audits_as_tables(results):
    for name, result in results.items():
        if "audit" in name:
            assert repr(result) == str(result)
            assert len(str(result).splitlines()) > 4
        else:
            assert len(repr(result)) < 260, name
            assert repr(result).startswith(type(result).__name__ + "(")
            assert "tensor(" not in repr(result)


def test_what_statistics_print(results):
    stats = results["statistics"]
    assert repr(stats) == (
        "GradientStatistics(12 samples, 67 parameters; "
        f"covariance_trace {stats.covariance_trace:.4g}, signal {stats.signal:.4g}, "
        f"noise_scale {stats.noise_scale:.4g})"
    )
    shown = repr(results["rich statistics"])
    assert shown.startswith("GradientStatistics(5 of 12 samples, 67 parameters; ")
    held = "sq_norms_by_parameter, second_moments, gram, mean_grad, dots['v']"
    assert shown.endswith(f"; with {held})")
    one = fm.GradientProbe(MODEL).backward(sample_losses(MODEL, batch_of(1)))
    assert f"; mean_grad_sq_norm {one.mean_grad_sq_norm:.4g})" in repr(one)


def test_results_are_rows_or_columns_of_tables(results):
    for name, result in results.items():
        row = result.to_dict()
        assert json.loads(json.dumps(row)).keys() == row.keys()
        if "statistics" in name:  # lists of several kinds: a row a step
            row = result.to_columns()
            assert {len(column) for column in row.values()} == {result.count}
        columns = [cell for cell in row.values() if isinstance(cell, list)]
        assert len({len(column) for column in columns}) <= 1, name
        assert not any(isinstance(cell, dict) for cell in row.values())
    assert results["rich statistics"].to_columns()["sample"] == (
        results["rich statistics"].samples.tolist()
    )
    low, high = results["trace"].interval()
    assert (results["trace"].to_dict()["low"], high) == (low, high)
    assert results["factors"].to_dict()["ratio"] == results["factors"].ratio
    found = results["pairs"].to_dict()
    assert found["value"] == results["pairs"].values.tolist()
    assert found["products"] == results["pairs"].products
    assert results["audit"].to_dict()["ok"] == [True] * 4


def test_pandas_takes_them(results):
    pandas = pytest.importorskip("pandas")
    for name, result in results.items():
        assert len(pandas.DataFrame([result.to_dict()])) == 1
        if "statistics" in name:
            assert len(pandas.DataFrame(result.to_columns())) == result.count
    assert len(pandas.DataFrame(results["pairs"].to_dict())) == 2


def test_tools_say_what_they_are():
    probe = fm.GradientProbe(
        MODEL, "second_moments", {"v": torch.ones(67)}, every=2, mode="fused"
    )
    assert repr(probe) == (
        "GradientProbe(Sequential, 67 parameters in 4 tensors; "
        "measure=('norms', 'second_moments'); mode='fused'; every=2; "
        "directions=['v']; 0 steps)"
    )
    probe.backward(sample_losses(MODEL, BATCH))
    assert repr(probe).endswith("; 1 steps)")
    H = fm.Hessian(MODEL, mean_loss, BATCH)
    H @ torch.ones(67, 3)
    assert repr(H) == (
        "Hessian(67 x 67, over the parameters of Sequential; torch.float32 on cpu; "
        "3 products)"
    )
    step = fm.LossHessian(MODEL, sample_losses(MODEL, BATCH))
    step @ torch.ones(67)
    assert repr(step).endswith("1 products)")
    assert "Combination(67 x 67)" in repr(H + 2 * step)
    sharpness = fm.SharpnessProbe(MODEL, mean_loss, k=2)
    assert repr(sharpness) == "SharpnessProbe(Sequential, k=2, rtol=0.01; 0 calls)"
    found = sharpness(BATCH).products
    assert repr(sharpness).endswith(f"; 1 calls, {found} products each)")
    sampler = fm.optim.BatchSizeSampler(12, 4)
    cycle = fm.optim.CyclicRatio(OPTIMIZER, sampler, 0.01, 0.05, period=12)
    for one in (
        *(sampler, cycle, fm.optim.NoiseScaleBatchSize(sampler, max_size=8)),
        *(fm.MinibatchVariance(MODEL), fm.monitor.Monitor()),
    ):
        assert repr(one).startswith(type(one).__name__ + "(")
        assert " at 0x" not in repr(one)


def pickled(objects):
    return pickle.loads(pickle.dumps(objects))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copied_probe_is_a_probe_of_the_copied_model(copied):
    model = model_of()
    probe = fm.GradientProbe(model, keep_mean=True, every=2, sample=6)
    probe.backward(sample_losses(model, BATCH))
    twin, other = copied((model, probe))
    want, got = [], []
    for found, m, p in ((want, model, probe), (got, twin, other)):
        m.zero_grad()
        assert p.backward(sample_losses(m, BATCH)) is None  # the second of every two
        found.append(p.backward(sample_losses(m, BATCH)))
        assert m[0].weight.grad is not None
    assert_equal(got, want)
    assert repr(other) == repr(probe)


def resumed(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt")


def test_a_resumed_probe_goes_on(tmp_path):
    def run(probe, steps):
        return [probe.backward(sample_losses(MODEL, BATCH)) for _ in range(steps)]

    probe = fm.GradientProbe(MODEL, every=3, sample=4)
    run(probe, 4)
    state = resumed(probe.state_dict(), tmp_path)
    want = run(probe, 4)
    again = fm.GradientProbe(MODEL, every=3, sample=4)
    again.load_state_dict(state)
    got = run(again, 4)
    assert [stats is not None for stats in got] == [False, False, True, False]
    assert_equal(got[2].samples, want[2].samples)


@pytest.mark.parametrize("vectors", [False, True])
def test_a_resumed_sharpness_goes_on(vectors, tmp_path):
    def probe_of():
        return fm.SharpnessProbe(MODEL, mean_loss, cold_every=3)

    probe = probe_of()
    for _ in range(2):
        probe(BATCH)
    state = resumed(probe.state_dict(vectors=vectors), tmp_path)
    assert ("course" in state) == vectors
    again = probe_of()
    again.load_state_dict(state)
    first, second = again(BATCH), again(BATCH)
    # Warm where there are vectors; the fourth call of the run is cold in any case.
    assert (first.upper == float("inf")) == vectors
    assert second.upper < float("inf")
    want = probe(BATCH)
    torch.testing.assert_close(first.values, want.values, rtol=1e-2, atol=0)
    if vectors:
        torch.testing.assert_close(first.values, want.values)


def test_a_resumed_variance_goes_on(tmp_path):
    def update(variance, seed):
        MODEL.zero_grad()
        mean_loss(MODEL, batch_of(8, seed)).backward()
        variance.update(8)

    variance = fm.MinibatchVariance(MODEL)
    for seed in range(2):
        update(variance, seed)
    again = fm.MinibatchVariance(MODEL)
    again.load_state_dict(resumed(variance.state_dict(), tmp_path))
    assert repr(again) == repr(variance)
    for seed in (2, 3):
        update(variance, seed)
        update(again, seed)
    assert again.to_dict() == variance.to_dict()
    with pytest.raises(ValueError, match="this model has no such parameter"):
        fm.MinibatchVariance(MODEL[0]).load_state_dict(variance.state_dict())
    empty = fm.MinibatchVariance(MODEL)
    empty.load_state_dict(fm.MinibatchVariance(MODEL).state_dict())
    assert empty.to_dict() == {"batches": 0, "samples": 0}
