"""Data-parallel training over two processes: one launch, many checks.

The checks themselves are in the folder `two_processes`.
"""

import re
from pathlib import Path

import pytest
import torch
from launching import two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

import fastminima as fm

FOLDER = Path(__file__).with_name("two_processes")
ABSENT = "no_such_check"

HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_GLOO, reason="this PyTorch has no gloo"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank says of each check, and what the processes printed."""
    folder = tmp_path_factory.mktemp("ranks")
    return two_processes(FOLDER / "worker.py", folder, "every", ABSENT)


def names():
    """The checks, by their text: importing them would import a lot."""
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.py"))]
    return re.findall(r"^@check\ndef (\w+)", "\n".join(texts), re.MULTILINE)


FAMILIES = [
    *(f"ddp_{n}" for n in ("plain", "unused", "static", "static_unused", "views")),
    *("ddp_buckets", "ddp_plain_keep_mean", "ddp_static_keep_mean"),
    *("fsdp_mlp", "fsdp_mlp_unresharded", "fsdp_block"),
    *("fsdp_mlp_keep_mean", "fsdp_block_keep_mean"),
    *(f"ddp_fused_{n}" for n in ("plain", "unused", "static", "static_unused")),
    *("ddp_fused_views", "ddp_fused_buckets"),
    *("fsdp_fused_block", "fsdp_fused_unresharded"),
]


@pytest.mark.parametrize("name", [*names(), *FAMILIES])
def test_two_processes(results, name):
    said, output = results
    for rank, of_rank in enumerate(said):
        verdict = of_rank.get(name, f"not reached\n{output[-4000:]}")
        assert verdict == "ok", f"rank {rank}: {verdict}"


def test_every_check_is_a_test(results):
    said, output = results
    assert set(said[0]) == {*names(), *FAMILIES, ABSENT}, output[-4000:]


def test_a_failing_check_is_seen(results):
    said, _ = results
    assert all("KeyError" in of_rank[ABSENT] for of_rank in said)


@pytest.mark.parametrize("group", ["world", "all"])
def test_without_a_process_group(group):
    with pytest.raises(ValueError, match="init_process_group"):
        fm.GradientProbe(nn.Linear(2, 1), process_group=group)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_a_pass_that_cannot_run_is_explained(alone):
    model = nn.Linear(3, 2)
    losses = model(torch.randn(5, 3)).square().sum(1)
    losses.mean().backward()
    model.zero_grad()
    with pytest.raises(fm.CaptureError, match="has already run"):
        fm.GradientProbe(model, process_group="world").backward(losses)
    probe = fm.GradientProbe(model, process_group="world")
    with pytest.raises(fm.CaptureError, match="has no graph"):
        probe.backward(losses.detach())
    probe.backward(model(torch.randn(5, 3)).square().sum(1))


@pytest.mark.usefixtures("on_the_cpu")  # gloo's group
def test_sharded_over_one_process(alone):
    x = torch.randn(5, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    want = fm.GradientProbe(model, per_parameter=True).backward(
        model(x).square().sum(1)
    )
    model.zero_grad()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    for group in (None, "world"):
        model.zero_grad()
        probe = fm.GradientProbe(model, per_parameter=True, process_group=group)
        got = probe.backward(model(x).square().sum(1))
        assert_close(got.to_dict(), want.to_dict())


def test_other_sharded_parameters_are_refused(alone):
    model = nn.Linear(3, 2)
    whole = model.weight.detach()
    mesh = init_device_mesh("cpu", (1,))
    model.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)]))
    match = r"'weight' is a DTensor with placements \(Shard\(dim=1\),\)"
    with pytest.raises(ValueError, match=match):
        fm.GradientProbe(model)
    with pytest.raises(ValueError, match="instead of a dict"):
        fm.GradientProbe({"weight": model.weight})
    model.weight.requires_grad_(False)
    assert list(fm.GradientProbe(model)._parameters) == ["bias"]


@pytest.mark.usefixtures("on_the_cpu")  # gloo's group
def test_one_process_is_a_group_too(alone):
    model = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    want = fm.GradientProbe(model).backward(model(x).square().sum(1))
    model.zero_grad()
    probe = fm.GradientProbe(model, process_group="world")
    got = probe.backward(model(x).square().sum(1))
    assert_close(got.to_dict(), want.to_dict())
    for group in ("everyone", 3):
        with pytest.raises(ValueError, match=f'"world".*{group}'):
            fm.GradientProbe(model, process_group=group)
    with pytest.raises(ValueError, match="keep_mean=True"):
        fm.GradientProbe(model, process_group="world", batchnorm="frozen")
