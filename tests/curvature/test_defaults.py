"""Nothing depends on the default device or dtype: everything made says its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch, torch.nn.functional as F, fastminima as fm
torch.manual_seed(0)
kind = {"device": "cpu", "dtype": torch.float32}
model = torch.nn.Sequential(
    torch.nn.Linear(4, 5, **kind), torch.nn.BatchNorm1d(5, **kind), torch.nn.Tanh(),
    torch.nn.Linear(5, 3, **kind),
)
x, y = torch.randn(12, 4, **kind), torch.arange(12, device="cpu") % 3

def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def loss(model, batch):
    return losses(model, batch).mean()

def results():
    outputs = lambda model, batch: model(batch[0])
    output_loss = lambda o, batch: F.cross_entropy(o, batch[1])
    for data in ((x, y), [(x[:8], y[:8]), (x[8:], y[8:])]):
        for H in (
            fm.Hessian(model, loss, data), fm.GradientCovariance(model, losses, data),
            fm.GaussNewton(model, outputs, output_loss, data),
        ):
            pairs = fm.top_eigenpairs(H, 2)
            yield from (pairs.values, pairs.vectors.abs(), pairs.residuals * 0)
            yield fm.top_eigenpairs(H, method="power", rtol=0.1).values
            for value in (fm.trace(H, 12), fm.trace(H), fm.frobenius_norm(H, 12)):
                yield torch.tensor(value.value, dtype=torch.float64, device="cpu")
            yield fm.spectral_density(H, steps=8).density
    yield fm.SharpnessProbe(model, loss)((x, y)).values

before = list(results())
CHANGE
for a, b in zip(before, results(), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
print("the same", len(before))
"""


@pytest.mark.parametrize(
    "change",
    [
        "torch.set_default_device('meta')",
        "torch.set_default_dtype(torch.bfloat16)",
    ],
)
def test_results_do_not_depend_on_defaults(change):
    """In a process of its own, without kernels: what is tested is this part."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.replace("CHANGE", change)],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTMINIMA_NATIVE": "0"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "the same 49"
