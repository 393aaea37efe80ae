"""The algebra of GradientStatistics."""

import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastminima as fm

OPTIONS = {
    "measure": ("norms", "second_moments"),
    "per_parameter": True,
    "keep_mean": True,
}


def setup(seed=0, samples=12):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return model, torch.randn(samples, 4, dtype=torch.float64)


def losses(model, x):
    return model(x).square().sum(1)


def assert_same(a, b):
    assert a.count == b.count
    for name in ("sq_norms", "mean_grad_sq_norm", "covariance_trace", "signal"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    for name in (
        *("sq_norms_by_parameter", "mean_grad_sq_norms_by_parameter"),
        *("second_moments", "variance", "dots"),
    ):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 11), st.integers(0, 5))
def test_parts_add_up(cut, seed):
    model, x = setup(seed)
    v = torch.randn(23, dtype=torch.float64)
    probe = fm.GradientProbe(model, directions={"v": v}, **OPTIONS)
    whole = probe.backward(losses(model, x))
    parts = probe.backward(losses(model, x[:cut])) + probe.backward(
        losses(model, x[cut:])
    )
    assert_same(parts, whole)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100))
def test_scaling_the_loss_scales_squares(c):
    model, x = setup()
    probe = fm.GradientProbe(model, **OPTIONS)
    a = probe.backward(losses(model, x))
    b = probe.backward(c * losses(model, x))
    torch.testing.assert_close(b.sq_norms, c**2 * a.sq_norms)
    torch.testing.assert_close(b.covariance_trace, c**2 * a.covariance_trace)
    torch.testing.assert_close(b.noise_scale, a.noise_scale)
    assert_same(a.scaled(c), b)
    torch.testing.assert_close(a.scaled(c).gram, b.gram)


def test_adding_needs_the_mean():
    model, x = setup()
    stats = fm.GradientProbe(model).backward(losses(model, x))
    with pytest.raises(ValueError, match="keep_mean=True"):
        stats + stats
    with pytest.raises(ValueError, match="keep_mean=True"):
        stats.all_reduce()
    with pytest.raises(ValueError, match="second_moments"):
        _ = stats.variance


def test_adding_different_measurements():
    model, x = setup()
    a = fm.GradientProbe(model, keep_mean=True).backward(losses(model, x))
    b = fm.GradientProbe(model[0], keep_mean=True).backward(losses(model, x))
    with pytest.raises(ValueError, match="tracked parameters"):
        a + b


def test_parameters_reached_by_one_part_only():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)}).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    probe = fm.GradientProbe(model, **OPTIONS)
    one = probe.backward(model["a"](x).square().sum(1))
    two = probe.backward(model["b"](model["a"](x)).square().sum(1))
    both = one + two
    assert both.count == 8
    assert torch.equal(
        both.sq_norms_by_parameter["b.bias"][:4], torch.zeros(4, dtype=torch.float64)
    )
    torch.testing.assert_close(both.mean_grad["b.bias"], two.mean_grad["b.bias"] / 2)


def test_sums_are_in_the_order_of_the_model():
    def reached(*names):
        parts = {name: torch.ones(2) for name in names}
        return fm.GradientStatistics(
            count=2,
            parameter_count=8,
            sq_norms=torch.ones(2),
            mean_grad_sq_norm=torch.ones(()),
            sq_norms_by_parameter=parts,
            second_moments=parts,
            mean_grad=parts,
        )

    total = reached("b", "d") + reached("a", "b", "c", "d", "e")
    for part in (total.sq_norms_by_parameter, total.second_moments, total.mean_grad):
        assert list(part) == ["a", "b", "c", "d", "e"]
    assert total.mean_grad["d"].tolist() == [1, 1]
    assert total.mean_grad["a"].tolist() == [0.5, 0.5]


def test_to_dict_is_json():
    model, x = setup()
    stats = fm.GradientProbe(model, per_parameter=True).backward(losses(model, x))
    row = json.loads(json.dumps(stats.to_dict()))
    assert row["count"] == 12
    assert row["covariance_trace"] == pytest.approx(stats.covariance_trace.item())
    assert len(row["sq_norms"]) == 12


def test_frozen():
    model, x = setup()
    stats = fm.GradientProbe(model).backward(losses(model, x))
    with pytest.raises(AttributeError):
        stats.count = 3


def rank_main(rank, port, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, x = setup()
    probe = fm.GradientProbe(model, **OPTIONS)
    mine = x[:5] if rank == 0 else x[5:]  # uneven
    stats = probe.backward(losses(model, mine)).all_reduce()
    torch.save(stats.to_dict() | {"variance": stats.variance}, f"{path}.{rank}")
    torch.distributed.destroy_process_group()


def test_all_reduce_over_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = str(tmp_path / "stats")
    mp.spawn(rank_main, (port, path), nprocs=2)
    model, x = setup()
    want = fm.GradientProbe(model, **OPTIONS).backward(losses(model, x))
    for rank in range(2):
        got = torch.load(f"{path}.{rank}")
        for name in (
            *("sq_norms", "covariance_trace", "noise_scale"),
            "mean_grad_sq_norms_by_parameter",
        ):
            assert got[name] == pytest.approx(want.to_dict()[name]), name
        torch.testing.assert_close(got["variance"], want.variance)


@pytest.mark.parametrize("mode", ["observe", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_of_the_mean_by_parameter(mode, dtype):
    """In steps that repeat, that add to `.grad`, and where the loop calls backward."""
    model, x = setup()
    model.to(dtype)
    probe = fm.GradientProbe(model, per_parameter=True, mode=mode)

    def check(stats, grads):
        found = stats.mean_grad_sq_norms_by_parameter
        assert list(found) == list(grads)
        want = {name: g.double().square().sum() for name, g in grads.items()}
        torch.testing.assert_close(found, {n: t.to(dtype) for n, t in want.items()})
        torch.testing.assert_close(sum(found.values()), stats.mean_grad_sq_norm)

    named = dict(model.named_parameters())
    for _ in range(4):
        model.zero_grad()
        stats = probe.backward(losses(model, x.to(dtype)))
        check(stats, {name: p.grad for name, p in named.items()})
    before = {name: p.grad.clone() for name, p in named.items()}
    stats = probe.backward(losses(model, 2 * x.to(dtype)))
    check(stats, {name: p.grad - before[name] for name, p in named.items()})
    if mode == "observe":
        model.zero_grad()
        loss = losses(model, x.to(dtype))
        probe.attach(loss)
        loss.mean().backward()
        check(probe.collect(), {name: p.grad for name, p in named.items()})
