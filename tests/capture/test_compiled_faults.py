"""Compiled regions whose own code is read: what was wrong once."""

import pytest
import torch
from torch import nn

import fastminima as fm

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _placed(device):
    """Moved one by one instead: a compiler would trace what places tensors."""
    if device.type == "apart":
        pytest.skip("compilers do not know the device `apart`")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)  # it compiles something else then
    yield
    torch._dynamo.reset()


def test_two_probes_watch_one_pass(device):
    model = nn.Linear(6, 3).to(device)
    x = torch.randn(5, 6).to(device)
    want = fm.GradientProbe(model).backward(model(x).sin().sum(1)).sq_norms
    fast = fm.compile(model, backend="aot_eager")
    whole, part = fm.GradientProbe(model), fm.GradientProbe({"w": model.weight})
    for _ in range(2):
        out = fast(x)
        losses = out.sin().sum(1)
        whole.attach(losses)
        part.attach(losses)
        losses.mean().backward()
        found = part.collect().sq_norms
        torch.testing.assert_close(whole.collect().sq_norms, want)
        assert (found < want).all()
        assert "fastminima.receiver" not in out.grad_fn.metadata
