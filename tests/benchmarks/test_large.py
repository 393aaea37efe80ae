"""The benchmark of large models, on a small one."""

import pytest
import torch

from benchmarks.large import DTYPES, largest_eigenvalue
from benchmarks.models import GPT2


@pytest.mark.parametrize("basis", DTYPES)
def test_says_what_a_run_took(basis, capsys):
    torch.manual_seed(0)
    model = GPT2(vocabulary=40, time=8, width=16, heads=2, depth=1)
    found = largest_eigenvalue(model, basis, rtol=1e-2, most=200)
    assert found["converged"] and not found["warnings"]
    assert found["residual"] <= 1e-2 * found["value"] <= found["upper"]
    assert found["products"] == len(found["steps"]) + 1  # the first is made twice
    assert found["peak_gb"] >= found["model_gb"] > 0
    assert f"product {len(found['steps']):3}:" in capsys.readouterr().out
