"""Operators over two processes: one launch, many checks.

The checks themselves are in the folder `two_processes`.
"""

import re
from pathlib import Path

import pytest
import torch
from launching import two_processes
from torch import nn

import fastminima as fm

FOLDER = Path(__file__).with_name("two_processes")

HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_GLOO, reason="this PyTorch has no gloo"),
]


def names():
    """The checks, by their text: importing them would import a lot."""
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.py"))]
    return re.findall(r"^@check\ndef (\w+)", "\n".join(texts), re.MULTILINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return two_processes(FOLDER / "worker.py", folder, "every")


@pytest.mark.parametrize("name", names())
def test_two_processes(results, name):
    said, output = results
    for rank, of_rank in enumerate(said):
        verdict = of_rank.get(name, f"not reached\n{output[-4000:]}")
        assert verdict == "ok", f"rank {rank}: {verdict}"


@pytest.mark.parametrize("group", ["world", "all"])
def test_without_a_process_group(group):
    def loss(model, x):
        return model(x).square().mean()

    with pytest.raises(ValueError, match="init_process_group"):
        fm.Hessian(nn.Linear(2, 1), loss, torch.ones(3, 2), process_group=group)
